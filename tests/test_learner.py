"""One client's round on a data set small enough to follow."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor, nn

from fedmutual.client.learner import (
    Learner,
    derived_seed,
    learning_rate,
    new_optimizer,
    step_rate,
    warm_start,
)
from fedmutual.data.images import ImageSet
from fedmutual.data.public import PublicSet
from fedmutual.data.site import SiteData
from fedmutual.learning import training
from fedmutual.learning.consensus import MeanConsensus
from fedmutual.learning.evaluation import accuracy, cross_entropy, predict
from fedmutual.models.build import build_model
from fedmutual.settings import Settings
from fedmutual.settings.compose import compose
from fedmutual.wire.orders import Order

SIZE = 8
PRIVATE, HELD_OUT, PUBLIC, UNSEEN = 20, 6, 12, 8


class Tiny(nn.Module):
    """A linear model of centred pixels, so that a test takes no time."""

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(3 * SIZE * SIZE, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images - 0.43)
        return scores


def image_set(n: int, seed: int) -> ImageSet:
    """Noise whose brightness is the label: dark 0, bright 1."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    noise = rng.integers(0, 100, (n, SIZE, SIZE, 3))
    return ImageSet((noise + 120 * labels[:, None, None, None]).astype(np.uint8), labels, None, ("x",) * n)


def site_data(parts: int = 1, warm: bool = False) -> SiteData:
    private = image_set(PRIVATE + HELD_OUT, 0)
    positions = np.arange(PRIVATE + HELD_OUT)
    return SiteData(
        classes=("dark", "bright"),
        private=private,
        public=PublicSet(image_set(PUBLIC, 1), image_set(10, 2) if warm else None, None, "digest"),
        unseen=image_set(UNSEEN, 3),
        train_parts=tuple(np.array_split(positions[:PRIVATE], parts)),
        held_out_parts=tuple(np.array_split(positions[PRIVATE:], parts)),
    )


def small_site(private: int) -> SiteData:
    return replace(site_data(), train_parts=(np.arange(private),))


def order(targets: np.ndarray | None = None, **changes: Any) -> Order:
    values: dict[str, Any] = {
        "run": "run",
        "round": 2,
        "closing": False,
        "public_digest": "digest",
        "num_classes": 2,
        "classes": ("dark", "bright"),
        "indices": np.array([1, 4, 7], dtype=np.int32),
        "target_indices": np.arange(0 if targets is None else len(targets), dtype=np.int32),
        "log_targets": targets,
        "divergence": "own_peer",
        "kl_weight": 1.0,
    }
    return Order(**{**values, **changes})


def settings_of(*overrides: str) -> Settings:
    model = ["model=custom", f"model._target_={__name__}.Tiny", "+model.dropout=0"]
    training = ["rounds=3", "train.batch_size=4", "train.local_epochs=1", "optimizer.learning_rate=0.01"]
    return compose([*model, *training, "strategy.public_epochs=1", "strategy.min_steps=1", *overrides])


def learner(
    *overrides: str, order: Order, site: SiteData | None = None, client: str = "a", start: int = 0
) -> Learner:
    settings = settings_of(*overrides)
    model, _ = build_model(settings.model, 2, SIZE, seed=start)
    return Learner(settings, site or site_data(), model, new_optimizer(settings, model), order, client)


def peers_targets(n: int = PUBLIC) -> np.ndarray:
    """Peers that are right about every public sample."""
    odds = np.where(np.arange(n) % 2 == 1, 2.0, -2.0)
    p = 1 / (1 + np.exp(-odds))
    return np.log(np.stack([1 - p, p], axis=1)).astype(np.float32)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Steps:
    """Counts the optimiser steps, and which optimiser took them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self.parts: list[tuple[int, int]] = []
        original = training.Trainer._step

        def step(
            trainer: Any, private: Any, private_index: Tensor, public: Any, public_index: Tensor
        ) -> Tensor:
            self.optimizers.append(trainer.optimizer)
            self.parts.append((len(private_index), len(public_index)))
            return original(trainer, private, private_index, public, public_index)

        monkeypatch.setattr(training.Trainer, "_step", step)


# ---------------------------------------------------------------------------------------------------
# Separate phase


@pytest.mark.parametrize(
    ("divergence", "temperature"), [("own_peer", 1.0), ("own_peer", 2.0), ("peer_own", 1.0)]
)
def test_the_separate_step_lowers_the_kl_to_its_target(divergence: str, temperature: float) -> None:
    peers = {f"p{i}": peers_targets() for i in range(2)}
    target = MeanConsensus(peers, divergence, temperature).target("me")
    assert target is not None
    mine = order(
        target.log_probabilities,
        target_entropies=target.entropies,
        divergence=divergence,
        temperature=temperature,
    )
    one = learner("strategy.phase=separate", order=mine)
    separate_mutual_step(one)
    before, after = one.metrics["kl-before"], one.metrics["kl-after"]
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert -1e-5 <= after < 0.2 * before


def separate_mutual_step(one: Learner) -> None:
    one.separate_mutual_step(one.public(), one.settings.strategy.mutual_epochs)


def mixed_training(one: Learner) -> None:
    chosen = one.settings.strategy
    one.mixed_training(one.public(), chosen.public_epochs, chosen.min_steps)


def test_the_separate_step_takes_a_fresh_optimiser_and_public_images_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = Steps(monkeypatch)
    one = learner("strategy.phase=separate", "strategy.mutual_epochs=5", order=order(peers_targets()))
    one.local_training()
    moments = copy.deepcopy(one.optimizer.state_dict())
    steps.optimizers.clear()
    steps.parts.clear()
    separate_mutual_step(one)
    assert steps.parts == [(0, 4)] * 15  # 5 epochs of 12 images in batches of 4
    (fresh,) = set(steps.optimizers)
    assert fresh is not one.optimizer
    assert type(fresh) is type(one.optimizer)
    torch.testing.assert_close(one.optimizer.state_dict(), moments, rtol=0, atol=0)
    assert {int(state["step"]) for state in fresh.state.values()} == {15}


def test_labels_of_the_public_set_are_used_only_where_the_settings_say_so() -> None:
    wrong = peers_targets()[:, ::-1].copy()
    accuracies = {}
    for labelled in ("false", "true"):
        mine = order(wrong, kl_weight=0.01)
        one = learner("strategy.phase=separate", f"public.labelled={labelled}", order=mine)
        separate_mutual_step(one)
        labels = torch.from_numpy(one.site.public.images.labels)
        accuracies[labelled] = accuracy(one._predict(one.site.public.images, mine.target_indices), labels)
    assert accuracies == {"false": 0.0, "true": 1.0}


# ---------------------------------------------------------------------------------------------------
# Mixed phase


@pytest.mark.parametrize(
    ("overrides", "public", "expected"),
    [
        ([], PUBLIC, 5),  # 20 private images: 5 batches; 12 public ones: 3
        (["strategy.public_epochs=4"], PUBLIC, 12),
        (["train.local_epochs=3"], PUBLIC, 15),
        (["strategy.public_epochs=4"], 4, 5),
        (["strategy.min_steps=7"], PUBLIC, 7),
    ],
)
def test_mixed_training_takes_as_many_steps_as_the_larger_part_needs(
    overrides: list[str], public: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    one = learner(*overrides, order=order(peers_targets(public)))
    mixed_training(one)
    assert steps.parts == [(4, 4)] * expected
    assert set(steps.optimizers) == {one.optimizer}
    assert one.metrics["num-examples"] == PRIVATE


@pytest.mark.parametrize(
    ("private", "overrides", "expected"),
    [
        (PRIVATE, [], [(4, 4)] * 5),  # the public set of 12 does not count
        (PRIVATE, ["strategy.min_steps=7"], [(4, 4)] * 7),
        (3, ["strategy.min_steps=4"], [(3, 3)] * 4),
        (6, ["train.local_epochs=2"], [(4, 3), (2, 3)] * 2),  # 3: the mean of 4 and 2
        (1, ["strategy.min_steps=3"], [(1, 2)] * 3),
    ],
)
def test_auto_takes_as_many_public_images_as_private_ones(
    private: int, overrides: list[str], expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    mine = order(peers_targets())
    one = learner("strategy.public_epochs=auto", *overrides, order=mine, site=small_site(private))
    one.settings.strategy.learn(one)
    assert steps.parts == expected
    assert one.metrics["trained-images"] == sum(map(sum, expected))


def test_auto_holds_in_the_closing_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    mine = order(peers_targets(), round=4, closing=True)
    chosen = ["strategy.public_epochs=auto", "strategy.min_steps=5"]
    one = learner(*chosen, order=mine, site=small_site(3))
    one.settings.strategy.learn(one)
    assert steps.parts == [(3, 3)] * 15  # of three rounds


def test_consolidation_has_a_fresh_optimiser_whose_rate_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    one = learner(order=order(peers_targets()))
    one.local_training()
    moments = copy.deepcopy(one.optimizer.state_dict())
    steps.optimizers.clear()
    steps.parts.clear()
    one.consolidate(one.public(), 1, 7, rounds=3, weight=3.0)
    assert steps.parts == [(4, 4)] * 21
    (fresh,) = set(steps.optimizers)
    assert fresh is not one.optimizer
    torch.testing.assert_close(one.optimizer.state_dict(), moments, rtol=0, atol=0)
    assert fresh.param_groups[0]["lr"] == pytest.approx(0.01 * one.settings.optimizer.learning_rate)
    assert one.metrics["trained-images"] == 5 * 4 + 21 * 8


@pytest.mark.parametrize(
    ("closing", "trained"), [("consolidate", 15 * 8), ("mixed", 5 * 8), ("public", 3 * 4), ("none", None)]
)
def test_the_closing_step(closing: str, trained: int | None) -> None:
    mine = order(peers_targets(), round=4, closing=True)
    one = learner(f"strategy.closing={closing}", order=mine)
    one.settings.strategy.learn(one)
    assert one.metrics.get("trained-images") == trained
    assert "validation-accuracy" in one.metrics


@pytest.mark.parametrize(("wrong", "kept"), [(False, "together"), (True, "alone")])
def test_a_client_that_its_peers_mislead_ends_with_the_model_it_trained_alone(wrong: bool, kept: str) -> None:
    targets = peers_targets()[:, ::-1].copy() if wrong else peers_targets()
    ends = {}
    for name, alone in (("together", False), ("guarded", True)):
        chosen = [f"strategy.or_alone={str(alone).lower()}", "optimizer.learning_rate=0.05"]
        one = learner(*chosen, order=order(targets, round=4, closing=True, kl_weight=9.0))
        one.settings.strategy.learn(one)
        ends[name] = weights(one.model)
        if alone:
            assert one.metrics["trained-images"] == 15 * 8 + 15 * 4  # what it costs
            assert one.metrics["validation-accuracy"] == 1.0
    assert torch.equal(ends["guarded"], ends["together"]) == (kept == "together")


def test_a_client_without_an_image_of_a_class_keeps_the_model_of_all() -> None:
    site = site_data()
    dark = np.flatnonzero(site.private.labels[PRIVATE:] == 0) + PRIVATE
    one = learner(
        order=order(peers_targets(), round=4, closing=True), site=replace(site, held_out_parts=(dark,))
    )
    one.alone_if_better(one.weights(), 3)
    assert "trained-images" not in one.metrics


def test_local_training_takes_private_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    one = learner("train.local_epochs=2", order=order())
    one.local_training()
    assert steps.parts == [(4, 0)] * 10
    assert "kl-before" not in one.metrics
    assert one.metrics["train-loss"] > 0  # type: ignore[operator]


def test_mixed_training_obeys_the_orders_lambda() -> None:
    runs = {}
    for weight in (0.0, 1.0):
        one = learner(order=order(peers_targets()[:, ::-1].copy(), kl_weight=weight))
        mixed_training(one)
        runs[weight] = one.metrics["kl-after"]
    assert runs[1.0] < runs[0.0]  # type: ignore[operator]


def test_mixed_training_draws_its_targets_by_position() -> None:
    """The m-th target belongs to public image target_indices[m], also when they are a subset in any order."""
    positions = np.array([11, 2, 5, 0], dtype=np.int32)
    targets = peers_targets()[positions]
    public = learner(order=order(targets, target_indices=positions)).public()
    expected = site_data().public.images.images[positions].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(public.images.numpy(), expected)
    np.testing.assert_array_equal(public.log_target.numpy(), targets)
    labelled = learner("public.labelled=true", order=order(targets, target_indices=positions)).public()
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_before_is_the_mean_kl_to_the_peers(temperature: float) -> None:
    """Against scipy, pair by pair, with the peers' predictions and not the target."""
    rng = np.random.default_rng(0)
    odds = rng.normal(size=(3, PUBLIC)) * 2

    def distributions(values: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(-values))
        return np.stack([1 - p, p], axis=-1)

    peers = {f"p{i}": np.log(distributions(o)).astype(np.float32) for i, o in enumerate(odds)}
    target = MeanConsensus(peers, "own_peer", temperature).target("me")
    assert target is not None
    one = learner(order=order(target.log_probabilities, temperature=temperature))
    own = predict(one.model, torch.from_numpy(one.site.public.images.images).permute(0, 3, 1, 2)).numpy()
    own_soft = distributions((own[:, 1] - own[:, 0]) / temperature)
    expected = np.mean([rel_entr(own_soft, distributions(o / temperature)).sum(axis=1) for o in odds])
    mixed_training(one)
    assert one.metrics["kl-before"] == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------
# Measurements


def test_predictions_are_those_of_the_asked_samples() -> None:
    one = learner(order=order())
    everything = predict(one.model, torch.from_numpy(one.site.public.images.images).permute(0, 3, 1, 2))
    predictions = one.predictions()
    assert predictions.dtype == np.float32
    np.testing.assert_allclose(predictions, everything[[1, 4, 7]].numpy(), atol=1e-6)
    np.testing.assert_allclose(np.exp(predictions).sum(axis=1), 1, rtol=1e-5)


def expected_validation(one: Learner, indices: np.ndarray) -> tuple[float, float]:
    images = torch.from_numpy(one.site.private.images[indices]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(one.site.private.labels[indices])
    log_p = predict(one.model, images)
    return cross_entropy(log_p, labels), accuracy(log_p, labels)


@pytest.mark.parametrize(
    ("round", "closing", "held_out"),
    [(1, False, [20, 21]), (2, False, [20, 21, 22, 23]), (3, False, range(20, 26)), (4, True, range(20, 26))],
)
def test_validation_sees_the_images_held_out_so_far(round: int, closing: bool, held_out: Any) -> None:
    one = learner(order=order(round=round, closing=closing), site=site_data(parts=3))
    one.validate()
    loss, share = expected_validation(one, np.array(held_out))
    assert one.metrics["validation-loss"] == pytest.approx(loss, rel=1e-5)
    assert one.metrics["validation-accuracy"] == pytest.approx(share)
    assert ("validation-auroc" in one.metrics) == closing


def test_the_mutual_step_is_judged_on_the_images_held_out_before_its_round() -> None:
    """loss-after is compared with the validation at the end of round 1: the same images."""
    one = learner("strategy.phase=separate", order=order(peers_targets()), site=site_data(parts=3))
    separate_mutual_step(one)
    loss, share = expected_validation(one, np.array([20, 21]))
    assert one.metrics["loss-after"] == pytest.approx(loss, rel=1e-5)
    assert one.metrics["accuracy-after"] == pytest.approx(share)


def test_without_held_out_or_unseen_images_nothing_is_claimed() -> None:
    bare = replace(site_data(), unseen=None, held_out_parts=(np.zeros(0, np.int64),))
    one = learner(order=order(peers_targets()), site=bare)
    mixed_training(one)
    one.validate()
    assert one.evaluate_unseen(None) is None
    assert not [name for name in one.metrics if name.startswith(("validation", "unseen", "loss", "accuracy"))]


def test_the_unseen_subset_is_the_same_for_every_client_and_round() -> None:
    predictions = []
    for client, round in (("a", 1), ("b", 2)):
        one = learner(order=order(round=round), client=client)
        predictions.append(one.evaluate_unseen(5))
        assert one.metrics["unseen-accuracy"] in [pytest.approx(i / 5) for i in range(6)]
    assert predictions[0] is not None
    assert predictions[0].shape == (5, 2)
    np.testing.assert_array_equal(predictions[0], predictions[1])
    whole = learner(order=order()).evaluate_unseen(None)
    assert whole is not None
    assert whole.shape == (UNSEEN, 2)


def test_stream_folds_train_on_the_rounds_own_images() -> None:
    one = learner(order=order(round=2), site=site_data(parts=2))
    np.testing.assert_array_equal(one._private().labels.numpy(), site_data().private.labels[10:20])
    assert one.metrics["num-examples"] == 10


# ---------------------------------------------------------------------------------------------------
# Seeds


def test_derived_seed_never_changes() -> None:
    assert derived_seed(0, "client-1", 3, "samples") == 107_370_996_700_419_573
    assert derived_seed("0", "client-1", "3", "samples") == 107_370_996_700_419_573
    assert derived_seed(0, "client-13", "samples") != derived_seed(0, "client-1", 3, "samples")
    assert all(0 <= derived_seed(i) < 2**63 for i in range(100))


def trained(overrides: list[str], client: str = "a", round: int = 2, targets: bool = True) -> Tensor:
    one = learner(
        "model.dropout=0.5",
        *overrides,
        order=order(peers_targets() if targets else None, round=round),
        client=client,
    )
    if targets:
        mixed_training(one)
    else:
        one.local_training()
    return weights(one.model)


def test_a_round_repeats_bit_for_bit_and_differs_by_client_round_and_seed() -> None:
    first = trained([])
    torch.rand(7)  # what else uses the global generator does not matter
    assert torch.equal(trained([]), first)
    assert not torch.equal(trained([], client="b"), first)
    assert not torch.equal(trained([], round=3), first)
    assert not torch.equal(trained(["seed=1"]), first)


def test_the_warm_start_gives_every_client_the_same_weights() -> None:
    settings = settings_of("train.warm_start_epochs=2", "model.dropout=0.5")
    models = []
    for seed in (1, 2):
        model, _ = build_model(settings.model, 2, SIZE, seed=0)
        untouched = weights(model)
        torch.manual_seed(seed)
        private = image_set(PRIVATE + HELD_OUT, seed + 10)  # another client's
        warm_start(settings, replace(site_data(warm=True), private=private), model)
        models.append(weights(model))
        assert not torch.equal(models[-1], untouched)
    assert torch.equal(models[0], models[1])


@pytest.mark.parametrize(("warm", "epochs"), [(False, 2), (True, 0)])
def test_no_fold_or_no_epochs_make_no_warm_start(warm: bool, epochs: int) -> None:
    settings = settings_of(f"train.warm_start_epochs={epochs}")
    model, _ = build_model(settings.model, 2, SIZE, seed=0)
    before = weights(model)
    warm_start(settings, site_data(warm=warm), model)
    assert torch.equal(weights(model), before)


def test_the_prior_correction_follows_the_settings() -> None:
    skewed = replace(site_data(), train_parts=(np.array([0, 2, 4, 1]),))
    corrected = learner(order=order(), site=skewed)._private().log_prior
    assert corrected is not None
    torch.testing.assert_close(corrected.exp(), torch.tensor([0.75, 0.25]))
    assert learner("train.prior_correction=false", order=order(), site=skewed)._private().log_prior is None


def test_mixed_training_corrects_for_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private (3/4, 1/4), public targets (1/10, 9/10) on average: batches of one size, so their mean."""
    priors = []
    original = training.Trainer.train

    def train(trainer: Any, steps: int, private: Any, public: Any) -> float:
        priors.append(private.log_prior.exp())
        return original(trainer, steps, private, public)

    monkeypatch.setattr(training.Trainer, "train", train)
    skewed = replace(site_data(), train_parts=(np.array([0, 2, 4, 1]),))
    targets = np.log(np.array([[0.05, 0.95], [0.15, 0.85]], dtype=np.float32))
    one = learner(order=order(targets), site=skewed)
    mixed_training(one)
    one.local_training()
    torch.testing.assert_close(priors, [torch.tensor([0.425, 0.575]), torch.tensor([0.75, 0.25])])


def test_new_optimizer_is_the_settings_own() -> None:
    settings = settings_of("optimizer=sgd", "optimizer.learning_rate=0.3", "optimizer.weight_decay=0.01")
    optimizer = new_optimizer(settings, nn.Linear(2, 1))
    assert type(optimizer).__name__ == "SGD"
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 0.01)


def test_the_cosine_schedule_ends_at_a_tenth() -> None:
    cosine = compose(["optimizer.schedule=cosine", "rounds=11", "optimizer.learning_rate=0.1"])
    rates = [learning_rate(cosine, round) for round in range(1, 13)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.055)  # half way between 0.1 and 0.01
    assert rates[10] == rates[11] == pytest.approx(0.01)  # the last round, and the closing message
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(compose(["rounds=1", "optimizer.schedule=cosine"]), 1) == 1e-3


def test_step_sizes_within_the_rounds() -> None:
    def rates(round: int, *overrides: str) -> list[float]:
        rate = step_rate(compose(["rounds=4", "optimizer.learning_rate=1", *overrides]), round)
        assert rate is not None
        return [round_to(rate(done)) for done in (0.5, 1.0)]

    def round_to(value: float) -> float:
        return float(f"{value:.4f}")

    assert step_rate(compose(["rounds=4"]), 1) is None
    assert step_rate(compose(["rounds=4", "optimizer.schedule=constant"]), 3) is None
    steps = "optimizer.schedule=cosine_steps"
    assert rates(2, steps)[1] == 0.55  # half of the run
    assert rates(4, steps)[1] == 0.1
    assert rates(5, steps) == rates(4, steps)  # the closing order
    decay = "optimizer.schedule=decay"
    assert [rates(n, decay) for n in (1, 3, 4)] == [[1, 1], [0.1, 0.1], [0.01, 0.01]]
    warm = ["optimizer.schedule=constant", "optimizer.warmup=0.5"]
    assert [rates(n, *warm) for n in (1, 2, 3)] == [[0.25, 0.5], [0.75, 1], [1, 1]]
    by_round = [learning_rate(compose(["rounds=4", "optimizer.learning_rate=1"]), n) for n in (1, 4)]
    assert rates(4, "optimizer.warmup=0.5") == [by_round[1]] * 2
