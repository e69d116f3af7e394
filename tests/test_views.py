"""public.views=mixed: every round shows all clients the same new pictures, and targets are of these."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import FIRST_NODE, Played, play
from test_learner import PUBLIC, learner, order, peers_targets

from fedmutual.data.images import ImageSet
from fedmutual.data.site import load_shared, load_site
from fedmutual.data.views import affine_views, mixed_views
from fedmutual.learning.evaluation import predict
from fedmutual.learning.training import Trainer
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.strategies.mutual import MutualLearning
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report

MIXED = "public.views=mixed"


def ramps(count: int) -> ImageSet:
    """Images that are 0 on the left half and their own number on the right."""
    pixels = np.zeros((count, 4, 4, 3), np.uint8)
    pixels[:, :, 2:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return ImageSet(pixels, np.zeros(count, np.int64), None, ("x",) * count)


def test_views_are_the_same_everywhere_and_new_every_round() -> None:
    images = ramps(200)
    one, again = (mixed_views(images, seed=3, round=2).images for _ in range(2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, mixed_views(images, seed=3, round=3).images)
    assert not np.array_equal(one, mixed_views(images, seed=4, round=2).images)
    assert one.dtype == np.uint8
    assert one.shape == images.images.shape


def test_half_are_mirrored_and_half_are_mixed() -> None:
    images = ramps(200)
    views = mixed_views(images, seed=0, round=1)
    assert set(views.labels) == {-1}
    plain = np.array([(view == image).all() for view, image in zip(views.images, images.images, strict=True)])
    turned = np.array(
        [(view == image[:, ::-1]).all() for view, image in zip(views.images, images.images, strict=True)]
    )
    assert 0.15 < plain.mean() < 0.35
    assert 0.15 < turned.mean() < 0.35
    # of a mixed one at least half is its own, so of the right half's value at least half is left
    largest = views.images.reshape(200, -1).max(axis=1)
    assert (largest >= np.arange(200) // 2).all()


def test_a_whole_white_image_stays_white() -> None:
    white = ImageSet(np.full((50, 2, 2, 3), 255, np.uint8), np.zeros(50, np.int64), None, ("x",) * 50)
    assert (mixed_views(white, seed=0, round=1).images == 255).all()


def test_predictions_are_of_this_rounds_views_and_targets_of_the_last_rounds() -> None:
    now = learner(MIXED, order=order(round=2))
    shown = mixed_views(now.site.public.images.subset(np.array([1, 4, 7])), now.settings.seed, 2)
    expected = predict(now.model, torch.from_numpy(shown.images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(now.predictions(), expected.numpy(), atol=1e-6)

    later = learner(MIXED, order=order(peers_targets(), round=3))
    taught = later.public().images
    pixels = mixed_views(later.site.public.images.subset(np.arange(PUBLIC)), later.settings.seed, 2).images
    assert np.array_equal(taught.permute(0, 2, 3, 1).numpy(), pixels)


def test_all_clients_of_a_run_are_taught_the_same_new_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, seen = Trainer.train, []

    def watched(self: Trainer, steps: int, private: Any, public: Any) -> float:
        if public is not None:
            seen.append(public.images.numpy().tobytes())
        return train(self, steps, private, public)

    monkeypatch.setattr(Trainer, "train", watched)
    run = play(tmp_path, MIXED, "rounds=3")
    assert run.error is None
    assert [seen.count(pixels) for pixels in dict.fromkeys(seen)] == [3, 3, 3]


def test_an_absent_peers_predictions_are_of_other_pictures(tmp_path: Path) -> None:
    away = "participation.absent=[client-0:2-3]"
    kept = play(tmp_path / "kept", MIXED, away, "rounds=3", "strategy.staleness_limit=null")
    dropped = play(tmp_path / "dropped", MIXED, away, "rounds=3", "strategy.staleness_limit=0")

    def targets(run: Played) -> np.ndarray:
        found = run.orders(3)[FIRST_NODE + 1, 3].log_targets
        assert found is not None
        return found

    assert np.array_equal(targets(kept), targets(dropped))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["public.labelled=true"], "public.views: mixed images have no label"),
        (["strategy=fedmd"], "public.views: strategy=fedmd"),
        (["strategy=mutual_async"], "public.views: strategy=mutual_async"),
    ],
)
def test_what_mixed_views_do_not_go_with_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(SettingsError, match=key):
        compose([MIXED, *overrides])


# ---------------------------------------------------------------------------------------------------
# public.fill: a small public set is filled up with views


def squares(count: int, side: int = 16) -> ImageSet:
    """Dark images, each with a bright square in the middle; labels count up."""
    pixels = np.full((count, side, side, 3), 20, np.uint8)
    pixels[:, side // 4 : -side // 4, side // 4 : -side // 4] = 220
    return ImageSet(pixels, np.arange(count), None, tuple(map(str, range(count))))


def test_affine_views_are_the_same_on_every_machine() -> None:
    views = affine_views(squares(3), 7, seed=1)
    assert hashlib.sha256(views.images.tobytes()).hexdigest()[:16] == "5fbb4c29afbd05b1"
    assert not np.array_equal(views.images, affine_views(squares(3), 7, seed=2).images)


def test_affine_views_show_each_image_in_turn_moved_a_little() -> None:
    images = squares(3)
    views = affine_views(images, 60, seed=0)
    assert views.labels.tolist() == [0, 1, 2] * 20
    assert views.names == ("0", "1", "2") * 20
    shown, whole = views.images[..., 0].astype(float), images.images[0, ..., 0].astype(float)
    assert shown.min() >= 20
    assert shown.max() <= 220
    area = (shown - 20).sum(axis=(1, 2)) / (whole - 20).sum()
    assert 0.7 < area.min() < 0.95 < 1.05 < area.max() < 1.35  # scaled by 12 % both ways
    centre = ((shown - 20) * np.arange(16)).sum(axis=(1, 2)) / (shown - 20).sum(axis=(1, 2))
    assert 1 < abs(centre - 7.5).max() < 2.2  # moved by up to a tenth of the side
    assert len({view.tobytes() for view in views.images}) == 60


def test_a_view_of_one_colour_is_that_colour() -> None:
    white = ImageSet(np.full((2, 5, 7, 3), 255, np.uint8), np.zeros(2, np.int64), None, ("x",) * 2)
    assert (affine_views(white, 20, seed=0).images == 255).all()


@pytest.mark.parametrize(
    ("overrides", "views"),
    [
        ((), 14),
        (("public.fill=0",), 0),
        (("public.fill=5",), 0),
        (("strategy=dsfl",), 14),
        (("strategy=mutual_async",), 0),
        (("strategy=fedavg",), 0),
        (("strategy=local",), 0),
        (("participation.fraction=0.5",), 0),
        (("participation.absent=[client-1:3-3]",), 0),
        (("exchange.enough_clients=3",), 0),
        (("public=kfold", "public.fill=0"), 0),
    ],
)
def test_the_last_round_adds_views_to_a_small_public_set(overrides: tuple[str, ...], views: int) -> None:
    settings = compose(["data.image_size=16", "public.size=6", "public.fill=20", *overrides])
    shared, site = load_shared(settings, 5), load_site(settings, (0, 5))
    assert (len(shared.public), shared.public.views) == (6, views)
    static = settings.public.schedule == "static"
    rounds = [shared.public.indices(settings.public, 0, round, 3) for round in (1, 2, 3)]
    assert not static or [len(indices) for indices in rounds] == [6, 6, 6 + views]
    # a client makes those that an order names, whatever its own model is
    assert len(site.public.filled) == max(settings.public.fill, 6)
    assert np.array_equal(shared.public.filled.images, site.public.filled.images)
    assert np.array_equal(site.public.filled.images[:6], site.public.images.images)
    plain = load_shared(compose(["data.image_size=16", "public.size=6", "public.fill=0"]), 5).public
    assert shared.public.digest == site.public.digest == plain.digest


def test_clients_of_a_process_share_the_views() -> None:
    settings = compose(["data.image_size=16", "public.size=6", "public.fill=20"])
    one, other = (load_site(settings, (number, 5)).public for number in (0, 1))
    assert one.filled is other.filled


def test_who_missed_the_views_still_teaches_of_the_images() -> None:
    strategy = MutualLearning(4, 2, schedule=lambda round: np.arange(4 if round < 2 else 7, dtype=np.int32))
    said = {name: np.log(np.full((7, 2), 0.5, np.float32)) for name in "abc"}
    strategy.take(1, {name: Report(name, 1, "", "", log_p[:4]) for name, log_p in said.items()})
    strategy.take(2, {name: Report(name, 2, "", "", said[name]) for name in "ab"})
    strategy.prepare(3)
    order = strategy.order("a", Order(round=3, num_classes=2))
    assert order.target_indices.tolist() == [0, 1, 2, 3]
    assert order.log_targets is not None
    assert len(order.log_targets) == 4
    strategy.take(3, {name: Report(name, 3, "", "", log_p) for name, log_p in said.items()})
    strategy.prepare(4)
    assert len(strategy.order("a", Order(round=4, num_classes=2)).target_indices) == 7


def test_the_last_round_and_the_closing_step_are_of_the_views_too(tmp_path: Path) -> None:
    run = play(tmp_path, "rounds=2", "public.size=6", "public.fill=20", clients=2)
    assert run.summary["status"] == "completed"
    orders = [run.orders()[FIRST_NODE, round] for round in (1, 2, 3)]
    assert [len(order.indices) for order in orders[:2]] == [6, 20]
    assert [len(order.target_indices) for order in orders] == [0, 6, 20]
    assert orders[2].closing


def test_views_fill_only_a_static_public_set() -> None:
    with pytest.raises(SettingsError, match=r"public\.fill: 1600, but schedule=sample"):
        compose(["public.schedule=sample"])
