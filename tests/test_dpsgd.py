"""DP-SGD of strategies that average weights: the account, clipping, refused layers, ledger, an audit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from local_grid import FIRST_NODE, Played, play, trains
from scipy.stats import beta
from torch import nn

pytest.importorskip("opacus", reason="needs the extra fedmutual[privacy]")

from fedmutual.client.budget import Asked, BudgetError, BudgetLedger
from fedmutual.client.disclosure import require_sound_noise
from fedmutual.learning.dpsgd import NoisySteps, epsilon_of, misfit, multiplier_for, train
from fedmutual.learning.proximal import proximal
from fedmutual.learning.training import Private
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose

PRIVATE = ("strategy=fedavg", "privacy.epsilon=4", "rounds=2", "privacy.sample_rate=0.5")
DELTA = 1e-3


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.5, 0.1, 50), (2, 1.0, 36), (8, 0.3, 12)])
def test_the_noise_is_just_enough_for_all_steps(epsilon: float, rate: float, steps: int) -> None:
    multiplier = multiplier_for(epsilon, DELTA, rate, steps)
    assert epsilon_of([(multiplier, rate, steps)], DELTA) <= epsilon
    assert epsilon_of([(0.98 * multiplier, rate, steps)], DELTA) > epsilon
    assert epsilon_of([(multiplier, rate, steps + steps // 4)], DELTA) > epsilon


def test_without_sampling_the_account_is_near_that_of_the_gaussian() -> None:
    gaussian = pytest.importorskip("fedmutual.learning.gaussian")
    pytest.importorskip("opendp")
    both = epsilon_of([(20.0, 1.0, 36)], DELTA), gaussian.epsilon_of([20.0] * 36, DELTA)
    assert both[0] == pytest.approx(both[1], rel=0.05)


# ---------------------------------------------------------------------------------------------------
# A step


def linear(features: int = 3) -> nn.Linear:
    layer = nn.Linear(features, 2, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def stepped(images: torch.Tensor, noise: NoisySteps, steps: int = 1, mu: float = 0.0) -> np.ndarray:
    """What training with a step size of 1 moves the weights by, from 0; ``mu`` is FedProx'."""
    layer = linear(images.shape[1])
    private = Private(images, torch.zeros(len(images), dtype=torch.int64))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with proximal(optimizer, mu):
        train(layer, optimizer, private, steps, noise)
    return layer.weight.detach().numpy().copy()


def test_each_image_moves_the_weights_by_at_most_the_clipping_norm() -> None:
    quiet = NoisySteps(0.0, 0.5, 1.0, 1)
    long, short = torch.tensor([[30.0, 40.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.1]])
    assert np.linalg.norm(stepped(long, quiet)) == pytest.approx(0.5, rel=1e-4)
    assert np.linalg.norm(stepped(short, quiet)) == pytest.approx(0.1 / math.sqrt(2), rel=1e-4)
    together = stepped(torch.cat([long] * 100 + [short]), quiet)  # more than are in memory at once
    np.testing.assert_allclose(together, 100 * stepped(long, quiet) + stepped(short, quiet), rtol=1e-3)
    np.testing.assert_array_equal(stepped(torch.tensor([[math.nan, 0, 0]]), quiet), 0)


def test_the_noise_has_its_deviation_and_no_seed() -> None:
    noise = NoisySteps(3.0, 0.5, 0.5, 10)
    nobody = torch.zeros((1, 4000))
    first, second = stepped(nobody, noise), stepped(nobody, noise)
    assert first.std() == pytest.approx(3.0 * 0.5 / 10, rel=0.05)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


def test_the_proximal_term_is_added_after_clipping_and_once_a_step() -> None:
    """It depends on noisy weights only, so it is neither clipped nor counted."""
    quiet = NoisySteps(0.0, 0.01, 1.0, 100)
    images = torch.tensor([[1.0, 0.0, 0.0]]).repeat(100, 1)  # in two pieces; all gradients are clipped
    step = stepped(images, quiet)
    assert np.linalg.norm(step) == pytest.approx(0.01, rel=1e-3)
    np.testing.assert_allclose(stepped(images, quiet, steps=2, mu=0.5), 1.5 * step, rtol=1e-3)


def test_the_proximal_term_keeps_noisy_weights_near_the_start() -> None:
    noise = NoisySteps(1.0, 1.0, 1.0, 10)
    nobody = torch.zeros((1, 4000))  # 40 steps of noise add up; a pull of a half leaves 1 / (1 - 0.5 ** 2)
    deviation = stepped(nobody, noise, steps=40, mu=0.5).std()
    assert deviation == pytest.approx(0.1 * math.sqrt(4 / 3), rel=0.05)


def test_training_with_the_proximal_term_learns() -> None:
    torch.manual_seed(0)
    images = torch.randn(600, 3)
    labels = (images[:, 0] < 0).long()
    layer = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    steps = 40
    with proximal(optimizer, 0.01):
        noise = NoisySteps(multiplier_for(2.0, DELTA, 0.2, steps), 1.0, 0.2, 120)
        train(layer, optimizer, Private(images, labels), steps, noise)
    assert (layer(images).argmax(dim=1) == labels).float().mean() > 0.9


def test_images_are_sampled_with_their_probability() -> None:
    quiet = NoisySteps(0.0, 1.0, 0.25, 1)
    images = 0.01 * torch.eye(400)  # each moves its own column, and hardly
    moved = stepped(images, quiet, steps=4)[0] / 0.005
    assert moved.mean() == pytest.approx(1.0, abs=0.15)
    assert set(np.rint(moved).astype(int)) >= {0, 1, 2}


def test_layers_that_mix_the_images_of_a_batch_are_refused_by_name() -> None:
    assert misfit(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))) is None
    problem = misfit(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert problem is not None
    assert "layer 1 (BatchNorm2d)" in problem
    assert "choose a model without batch normalisation (visionnet" in problem


def test_a_prior_is_refused() -> None:
    private = Private(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), log_prior=torch.zeros(2))
    layer = linear()
    with pytest.raises(ValueError, match="depend on all images"):
        train(layer, torch.optim.SGD(layer.parameters()), private, 1, NoisySteps(1.0, 1.0, 1.0, 1))


# ---------------------------------------------------------------------------------------------------
# An audit: canaries with a gradient in a direction of their own; an attacker who knows everything else


def audited(multiplier: float) -> float:
    """Lower bound of epsilon (99.9 %) from 1000 canaries that are trained on and 1000 that are not."""
    noise, steps, canary = NoisySteps(multiplier, 1.0, 0.5, 1), 4, 1000
    # each in its own column, so that one training is as many trials
    images = torch.cat((50 * torch.eye(canary), torch.zeros(canary, canary)), dim=1)
    moved = stepped(images, noise, steps)
    scores = moved[0] - moved[1]
    inside, outside = scores[:canary], scores[canary:]
    half = canary // 2
    thresholds = np.quantile(outside[:half], [0.5, 0.9, 0.97, 0.99])
    best = 0.0
    for threshold in thresholds:  # chosen on the first half, tested on the second
        hits, alarms = int((inside[half:] > threshold).sum()), int((outside[half:] > threshold).sum())
        least = beta.ppf(0.001 / 8, hits, half - hits + 1) if hits else 0.0
        most = beta.ppf(1 - 0.001 / 8, alarms + 1, half - alarms) if alarms < half else 1.0
        if least > DELTA:
            best = max(best, math.log((least - DELTA) / most))
    return best


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_audit_stays_below_the_promise(epsilon: float) -> None:
    assert audited(multiplier_for(epsilon, DELTA, 0.5, 4)) <= epsilon


def test_the_audit_finds_missing_noise() -> None:
    assert audited(0.05) > 2


# ---------------------------------------------------------------------------------------------------
# The ledger

RECORDS = np.arange(64, dtype=np.uint8).reshape(4, 16)


def asked(epsilon: float = 2.0, run: str = "a") -> Asked:
    return Asked(multiplier_for(epsilon, DELTA, 0.5, 20), DELTA, "pixels (8, 8, 3)", {"run": run}, 0.5, 20)


def weights(value: float) -> dict[str, np.ndarray]:
    return {"weight": np.full(3, value, np.float32)}


def test_a_second_run_beyond_the_budget_is_refused_before_it_trains(tmp_path: Path) -> None:
    ledger = BudgetLedger(tmp_path, "a")
    ledger.rounds(asked(), RECORDS, 2.0)
    ledger.rounds(asked(), RECORDS, 2.0)  # the next round of the same run
    assert ledger.spent().releases == 1
    assert ledger.spent().epsilon == pytest.approx(2.0, rel=0.01)
    with pytest.raises(BudgetError, match="what these images have spent to epsilon"):
        ledger.rounds(asked(run="b"), RECORDS[:1], 2.0)
    ledger.rounds(asked(run="b"), RECORDS, 4.0)
    assert 2 < ledger.spent().epsilon < 4


def test_it_adds_up_with_releases_that_have_one_noise(tmp_path: Path) -> None:
    ledger = BudgetLedger(tmp_path, "a")
    ledger.rounds(asked(), RECORDS, 2.0)
    single = Asked(5.0, DELTA, "pixels (8, 8, 3)", {"map": "x"})
    with pytest.raises(BudgetError):
        ledger.release(single, RECORDS, 2.0, dict)
    ledger.release(single, RECORDS, 4.0, dict)
    assert 2 < ledger.spent().epsilon < 4


def test_a_round_is_trained_once(tmp_path: Path) -> None:
    rounds = BudgetLedger(tmp_path, "a").rounds(asked(), RECORDS, 2.0)
    assert rounds.find(1) is None
    for number in (1, 2, 3):
        rounds.keep(number, weights(number))
    again = BudgetLedger(tmp_path, "a").rounds(asked(), RECORDS, 2.0)
    for number in (2, 3):
        np.testing.assert_array_equal(again.find(number)["weight"], number)  # type: ignore[index]
    with pytest.raises(BudgetError, match="round 1 was trained before"):
        again.find(1)


# ---------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """As at sites: the clients say nothing that a simulation alone may know."""
    played = play(tmp_path_factory.mktemp("dpsgd") / "run", *PRIVATE, "privacy.metrics=none")
    assert played.error is None
    assert played.rejections() == []
    return played


@pytest.mark.federation
def test_nothing_leaves_but_the_noisy_weights(run: Played) -> None:
    from fedmutual.wire.records import METRICS, MODEL, REPORT

    contents = [reply.content for reply in run.grid.replies if trains(reply) and reply.has_content()]
    assert len(contents) == 3 * 3
    for content in contents:
        report = content[REPORT]
        assert report["predictions"] == b""
        assert "unseen" not in " ".join(report)
        assert not report.get("private-digest")
        assert dict(content[METRICS]) == {"num-examples": 1}
        assert bool(content.get(MODEL)) == (report["round"] <= 2)


@pytest.mark.federation
def test_the_ledger_has_all_rounds_and_the_card_says_so(run: Played) -> None:
    spent = BudgetLedger(run.path / "clients", "client-0").spent()
    assert spent.releases == 1
    assert 3.9 < spent.epsilon <= 4
    (page,) = (run.path / "clients").glob("run-*/client-0/README.md")
    assert "epsilon 4, delta 0.001 for each image" in page.read_text()
    assert "This model was averaged of what has left" in page.read_text()


@pytest.mark.federation
def test_fedprox_spends_what_fedavg_does(run: Played, tmp_path: Path) -> None:
    from fedmutual.wire.records import MODEL

    prox = [*PRIVATE[1:], "privacy.metrics=none", "strategy.proximal=0.1"]
    played = play(tmp_path / "run", "strategy=fedprox", *prox)
    assert played.error is None
    assert played.rejections() == []
    sent = [reply.content[MODEL] for reply in played.grid.replies if trains(reply) and MODEL in reply.content]
    first, second = ({name: a.numpy() for name, a in sent[i].items()} for i in (0, 3))
    assert all(np.abs(second[name] - first[name]).max() > 0 for name in first if first[name].ndim > 1)
    for client in ("client-0", "client-1", "client-2"):
        ledgers = [BudgetLedger(p.path / "clients", client) for p in (run, played)]
        averaged, proximal = (next(iter(ledger._entries()))[0] for ledger in ledgers)
        account = ("multiplier", "delta", "sample_rate", "steps")
        assert [proximal[key] for key in account] == [averaged[key] for key in account]
        assert ledgers[0].spent() == ledgers[1].spent()
        assert ledgers[1].spent().epsilon <= 4


@pytest.mark.federation
def test_a_round_that_is_asked_for_again_sends_the_same_weights(
    run: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site has lost its state, or a server its last rounds: no step is taken that is not accounted for."""
    from fedmutual.wire.orders import read_order
    from fedmutual.wire.records import MODEL

    def never(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("fedmutual.learning.dpsgd.train", never)
    (folder,) = (run.path / "clients").glob("run-*")
    shutil.rmtree(folder / "client-0")
    before = {m.metadata.reply_to_message_id: m for m in run.grid.replies if m.has_content()}
    orders = [m for m in run.grid.orders if trains(m) and m.metadata.dst_node_id == FIRST_NODE]
    done = [m for m in orders if m.metadata.message_id in before and read_order(m.content).round <= 2]
    assert len(done) == 2
    for order in done:
        again = run.grid._answer(order)
        assert again is not None
        first = before[order.metadata.message_id].content[MODEL]
        assert len(first) > 0
        for name, array in again.content[MODEL].items():
            np.testing.assert_array_equal(array.numpy(), first[name].numpy())


@pytest.mark.federation
def test_batch_normalisation_is_refused_before_anything_trains(tmp_path: Path) -> None:
    played = play(tmp_path / "run", *PRIVATE, "model=resnet8")
    assert isinstance(played.error, SettingsError)
    assert "(BatchNorm2d) has no gradients of single images" in str(played.error)
    assert not any(trains(order) for order in played.grid.orders)


def test_settings_that_do_not_go_with_it_are_refused() -> None:
    for override, message in (
        ("train.class_weights=balanced", "train.class_weights: balanced tells private class counts"),
        ("precision=bf16", "precision: gradients of single images"),
        ("optimizer.clip_norm=1", "optimizer.clip_norm: privacy.max_grad_norm"),
        ("strategy=fed3r", "strategy=fed3r has no noise"),
        ("strategy=local", "strategy=local has no noise"),
    ):
        more = ["train.prior_correction=false"] if "class_weights" in override else ["model=pretrained"]
        with pytest.raises(SettingsError) as refused:
            compose(["strategy=fedavg", "privacy.epsilon=1", *more, override])
        assert message in str(refused.value)


def test_a_real_site_refuses_it_unless_its_owner_trusts_the_run() -> None:
    settings = compose(["strategy=fedavg", "privacy.epsilon=1"])
    with pytest.raises(SettingsError, match=r"floating-point.*strategy=speaker.*trust-run=true"):
        require_sound_noise(settings, {})
    require_sound_noise(settings, {"trust-run": "true"})
    require_sound_noise(compose(["strategy=fedavg"]), {})
