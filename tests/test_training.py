"""The training step by hand, its batches, its seeds and its arithmetics."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmutual.learning import divergence, layers, training
from fedmutual.learning.optimizers import make_optimizer
from fedmutual.learning.placement import to_input
from fedmutual.learning.training import (
    Private,
    Public,
    Trainer,
    _cuts,
    balanced_weights,
    focal_loss,
    log_prior,
)
from fedmutual.methods.mutual import MutualSettings
from fedmutual.settings.compose import compose
from fedmutual.settings.pretrained import prior_smoothing


class Linear(nn.Module):
    """Logits = pixels @ weight, of 1x1 images: gradients that can be written down."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, outputs, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layer(images.flatten(1))
        return scores


def pixels(n: int, seed: int = 0, size: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def private(n: int, classes: int = 2, size: int = 1) -> Private:
    return Private(pixels(n, size=size), torch.arange(n) % classes)


def public(n: int, classes: int = 2, size: int = 1, **changes: Any) -> Public:
    generator = torch.Generator().manual_seed(7)
    values: dict[str, Any] = {
        "images": pixels(n, seed=1, size=size),
        "log_target": torch.log_softmax(torch.randn(n, classes, generator=generator), dim=1),
        "entropies": None,
        "labels": None,
        "divergence": "own_peer",
        "temperature": 1.0,
        "weight": 1.0,
    }
    return Public(**{**values, **changes})


def trainer(
    model: nn.Module,
    *,
    learning_rate: float = 0.1,
    batch_size: int = 8,
    seed: int = 0,
    precision: str = "fp32",
    optimizer: str = "sgd",
) -> Trainer:
    chosen = make_optimizer(optimizer, model.parameters(), learning_rate, 0.0, 0.0)
    return Trainer(model, chosen, precision, batch_size, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------
# Prior correction


def test_log_prior_by_hand() -> None:
    prior = log_prior(torch.tensor([1, 1, 1, 2]), 4)
    torch.testing.assert_close(prior[1:3], torch.tensor([math.log(0.75), math.log(0.25)]))
    assert torch.isfinite(prior).all()
    assert prior[[0, 3]].max() < -1e30  # absent: out of the softmax


def test_log_prior_of_private_and_taught_classes_by_hand() -> None:
    # (1, 0, 0) and (.2, .8, 0) count half each
    prior = log_prior(torch.tensor([0, 0]), 3, torch.tensor([0.2, 0.8, 0.0]))
    torch.testing.assert_close(prior[:2], torch.tensor([math.log(0.6), math.log(0.4)]))
    assert prior[2] < -1e30


def test_smoothing_counts_images_of_each_class() -> None:
    torch.testing.assert_close(
        log_prior(torch.tensor([0, 0]), 2, smoothing=1.0).exp(), torch.tensor([0.75, 0.25])
    )


@pytest.mark.parametrize(
    ("overrides", "smoothing"),
    [
        ([], 0.0),
        (["model=pretrained"], 1.0),
        (["model=pretrained", "train.prior_smoothing=0"], 0.0),
        (["train.prior_smoothing=2"], 2.0),
    ],
)
def test_a_head_hears_of_the_classes_that_a_client_lacks(overrides: list[str], smoothing: float) -> None:
    assert prior_smoothing(compose(overrides)) == smoothing


@pytest.mark.parametrize(
    ("overrides", "divergence"),
    [
        ([], "peer_own"),
        (["model=pretrained"], "own_peer"),
        (["model=pretrained", "model.tune=all"], "peer_own"),
        (["model=pretrained", "strategy.divergence=peer_own"], "peer_own"),
        (["strategy=mutual_async", "model=pretrained"], "own_peer"),
    ],
)
def test_heads_learn_from_the_mean_of_log_probabilities(overrides: list[str], divergence: str) -> None:
    settings = compose(overrides)
    assert isinstance(settings.strategy, MutualSettings)
    assert settings.strategy.divergence_for(settings) == divergence
    assert settings.strategy.options(settings)["divergence"] == divergence


def test_a_sharpened_target_is_a_power_of_it() -> None:
    target = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    public = Public(torch.zeros(2, 4), target.log(), torch.zeros(2), None, "peer_own", 1.0, 1.0)
    sharp = public.sharpened(2.0)
    expected = torch.tensor([[1 / 17, 16 / 17], [0.5, 0.5]])
    assert sharp.log_target is not None
    assert sharp.entropies is not None
    torch.testing.assert_close(sharp.log_target.exp(), expected)
    torch.testing.assert_close(sharp.entropies, -(expected * expected.log()).sum(dim=1))
    assert public.sharpened(1.0) is public


@pytest.mark.parametrize(
    ("overrides", "power"),
    [
        ([], 1.0),
        (["model=pretrained"], 1.25),
        (["model=pretrained", "strategy.divergence=own_peer"], 1.0),
        (["model=pretrained", "strategy.sharpening=2"], 2.0),
        (["model=pretrained", "model.tune=last"], 1.0),
    ],
)
def test_heads_learn_from_sharper_targets(overrides: list[str], power: float) -> None:
    settings = compose(overrides)
    assert isinstance(settings.strategy, MutualSettings)
    assert settings.strategy.sharpening_for(settings) == power


def test_class_shares_normalise_the_targets() -> None:
    # the first row is a mean of logs, (.4, .4), which is a half each; the second is (.9, .1)
    shares = public(2, log_target=torch.log(torch.tensor([[0.4, 0.4], [0.9, 0.1]]))).class_shares(2)
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.3]))


def test_prior_correction_by_hand() -> None:
    # Adding the prior (3/4, 1/4) to equal logits predicts it: the loss of label 1 is ln 4, and p_1 - 1 = -3/4
    # pulls its logit up. What the skew explains is not learnt.
    model = Linear(2)
    nn.init.zeros_(model.layer.weight)
    images = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    prior = torch.log(torch.tensor([0.75, 0.25]))
    loss = trainer(model, learning_rate=1.0).train(1, Private(images, torch.tensor([1]), prior), None)
    assert loss == pytest.approx(math.log(4), rel=1e-6)
    torch.testing.assert_close(model.layer.weight.detach(), torch.tensor([[-0.75], [0.75]]).expand(2, 3))


def test_prior_correction_leaves_nothing_to_learn_from_skew_alone() -> None:
    # one image, three times labelled 0 and once 1: plain training drifts to log-odds -ln 3, corrected stays
    images = torch.full((4, 3, 1, 1), 255, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 1])
    drift = {}
    for name, prior in (("plain", None), ("corrected", log_prior(labels, 2))):
        model = Linear(1)
        nn.init.zeros_(model.layer.weight)
        trainer(model, learning_rate=0.5).train(40, Private(images, labels, prior), None)
        drift[name] = float(model.layer.weight.detach().sum())
    assert drift["plain"] == pytest.approx(-math.log(3), abs=1e-3)
    assert drift["corrected"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_client_of_one_class_has_no_local_gradient(outputs: int) -> None:
    model = Linear(outputs)
    before = copy.deepcopy(model.state_dict())
    labels = torch.ones(6, dtype=torch.int64)
    loss = trainer(model).train(3, Private(pixels(6), labels, log_prior(labels, 2)), None)
    assert loss == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("direction", "temperature"), [("own_peer", 1.0), ("own_peer", 2.0), ("peer_own", 3.0)]
)
def test_a_mixed_step_by_hand(labelled: bool, direction: str, temperature: float) -> None:
    """CE + lambda T^2 KL: loss and gradient from their closed forms, no autograd."""
    weight, rate = 0.7, 0.1
    entropies = torch.full((4,), 0.2) if direction == "peer_own" else None
    labels = torch.tensor([0, 1, 2, 0]) if labelled else None
    mine = private(5, classes=3)
    theirs = public(
        4, classes=3, weight=weight, temperature=temperature, divergence=direction, labels=labels,
        entropies=entropies,
    )  # fmt: skip
    model = Linear(3)
    start = model.layer.weight.detach().clone()
    loss = trainer(model, learning_rate=rate).train(1, mine, theirs)

    x, u = mine.images.flatten(1) / 255, theirs.images.flatten(1) / 255
    p = torch.softmax(x @ start.T, dim=1)
    expected = -p[torch.arange(5), mine.labels].log().mean()
    gradient = (p - torch.eye(3)[mine.labels]).T @ x / 5
    soft = torch.log_softmax(u @ start.T / temperature, dim=1)
    s, g = soft.exp(), theirs.log_target
    if direction == "own_peer":
        kl = (s * (soft - g)).sum(dim=1, keepdim=True)
        kl_by_logits = s * (soft - g - kl) / temperature
    else:
        kl = -(g.exp() * soft).sum(dim=1, keepdim=True) - 0.2
        kl_by_logits = (s - g.exp()) / temperature
    expected = expected + weight * temperature**2 * kl.mean()
    gradient = gradient + weight * temperature**2 * kl_by_logits.T @ u / 4
    if labels is not None:
        plain = torch.softmax(u @ start.T, dim=1)
        expected = expected - plain[torch.arange(4), labels].log().mean()
        gradient = gradient + (plain - torch.eye(3)[labels]).T @ u / 4
    assert loss == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(model.layer.weight.detach(), start - rate * gradient, rtol=1e-5, atol=1e-6)


def test_the_loss_grows_with_lambda_and_the_square_of_the_temperature() -> None:
    logits, index = torch.tensor([[0.5, -1.0], [2.0, 0.0]]), torch.arange(2)
    once = public(2, temperature=3.0).loss(logits, index)
    raw = divergence.own_peer(logits, public(2).log_target, 3.0)
    assert once.item() == pytest.approx(9 * raw.item(), rel=1e-6)
    assert public(2, temperature=3.0, weight=4.0).loss(logits, index).item() == pytest.approx(
        4 * once.item(), rel=1e-6
    )
    assert public(2, weight=0.0).loss(logits, index).item() == 0


def test_the_gradient_hardly_depends_on_a_high_temperature() -> None:
    # arXiv:1503.02531: T^2 compensates the 1/T^2 of the softened gradient
    scores = torch.tensor([[1.0, -1.0, 0.0]])
    sizes = []
    for temperature in (10.0, 100.0):
        logits = scores.clone().requires_grad_()
        target = torch.log_softmax(torch.tensor([[-1.0, 1.0, 0.5]]) / temperature, dim=1)
        public(1, 3, log_target=target, temperature=temperature).loss(logits, torch.arange(1)).backward()
        assert logits.grad is not None
        sizes.append(float(logits.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_targets_follow_their_images_through_the_shuffle() -> None:
    """With batches of 3 in random order, 11 one-hot targets can only be learnt if each meets its image."""
    classes = 11
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, classes))
    images = pixels(classes, size=4)
    sure = torch.log_softmax(12 * torch.eye(classes), dim=1)
    chosen = Public(images, sure, None, None, "own_peer", 1.0, 1.0)
    trainer(model, learning_rate=0.02, batch_size=3, optimizer="adam").train(400, None, chosen)
    assert model(to_input(images, torch.device("cpu"))).argmax(dim=1).tolist() == list(range(classes))


def test_to_input_scales_and_keeps_the_source() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert to_input(images, torch.device("cpu")).flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert images.flatten().tolist() == [0, 51, 255]


# ---------------------------------------------------------------------------------------------------
# Batches


@given(st.integers(0, 300), st.integers(1, 64))
def test_cuts_cover_everything_once_and_leave_no_batch_of_one(samples: int, batch_size: int) -> None:
    cuts = _cuts(samples, batch_size)
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(samples))
    lengths = [stop - start for start, stop in cuts]
    assert all(length <= batch_size + 1 for length in lengths)
    assert lengths[:-1] == [batch_size] * (len(lengths) - 1)
    if batch_size > 1 and samples != 1:
        assert 1 not in lengths


@pytest.mark.parametrize(
    ("samples", "batch_size", "epochs", "steps"),
    [(64, 32, 1, 2), (65, 32, 1, 2), (66, 32, 1, 3), (1, 32, 5, 5), (100, 32, 10, 40), (0, 32, 3, 0)],
)
def test_steps_for(samples: int, batch_size: int, epochs: int, steps: int) -> None:
    assert trainer(Linear(1), batch_size=batch_size).steps_for(samples, epochs) == steps


def test_every_epoch_takes_every_image_once_in_a_fresh_order() -> None:
    one = trainer(Linear(1), batch_size=4)
    batches = one._batches(private(10))
    epochs = [torch.cat([next(batches) for _ in range(3)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_no_images_are_an_error_and_no_steps_are_not() -> None:
    with pytest.raises(ValueError, match="no private images"):
        trainer(Linear(1)).train(1, private(0), public(4))
    assert trainer(Linear(1)).train(0, private(0), None) == 0


# ---------------------------------------------------------------------------------------------------
# Seeds, precision, optimisers


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(4 * 36, 2),
    )  # fmt: skip


def run(
    seed: int, precision: str = "fp32", optimizer: str = "adam", samples: int = 30
) -> tuple[float, nn.Module]:
    model = small_network()
    one = trainer(model, learning_rate=1e-2, seed=seed, precision=precision, optimizer=optimizer)
    torch.manual_seed(seed)
    return one.train(20, private(samples, size=8), public(7, size=8)), model


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    (loss, model), (again, same) = run(3), run(3)
    other_loss, other = run(4)
    assert loss == again
    torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert loss != other_loss
    assert not torch.equal(model[0].weight, other[0].weight)  # type: ignore[index]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_arithmetic_and_optimiser_learns(precision: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model = small_network()
    mine = private(16, size=8)
    one = trainer(model, learning_rate=1e-2, precision=precision, optimizer=optimizer)
    first = one.train(1, mine, None)
    one.train(60, mine, None)
    assert one.train(1, mine, None) < 0.5 * first
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_bf16_computes_in_bf16() -> None:
    seen: list[torch.dtype] = []
    for precision in ("fp32", "bf16"):
        model = Linear(2)
        model.layer.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
        trainer(model, precision=precision).train(1, private(4), None)
    assert seen == [torch.float32, torch.bfloat16]


def test_batch_norm_trains_with_an_odd_image_left_over() -> None:
    model = small_network()
    loss = trainer(model, batch_size=8).train(4, private(17, size=8), None)  # 8 + 9: never a batch of one
    assert math.isfinite(loss)
    assert model[1].num_batches_tracked == 4  # type: ignore[index]


def test_make_optimizer_takes_every_argument() -> None:
    adam = make_optimizer("adam", Linear(1).parameters(), 1e-3, 0.9, 0.1)
    adamw = make_optimizer("adamw", Linear(1).parameters(), 1e-3, 0.9, 0.1)
    sgd = make_optimizer("sgd", Linear(1).parameters(), 0.05, 0.9, 0.1)
    assert [type(o).__name__ for o in (adam, adamw, sgd)] == ["Adam", "AdamW", "SGD"]
    assert adam.defaults["eps"] == adamw.defaults["eps"] == 1e-7
    assert [o.defaults["weight_decay"] for o in (adam, adamw, sgd)] == [0.1] * 3
    assert [o.defaults["lr"] for o in (adam, adamw, sgd)] == [1e-3, 1e-3, 0.05]
    assert sgd.defaults["momentum"] == 0.9
    with pytest.raises(KeyError):
        make_optimizer("lion", Linear(1).parameters(), 1.0, 0.0, 0.0)


@pytest.mark.parametrize("module", [training, divergence, layers], ids=lambda m: m.__name__)
def test_examples_in_the_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_batch_normalisation_refuses_a_single_image_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    images = torch.zeros((1, 3, 1, 1), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"one image at a time: raise train\.batch_size"):
        trainer(model).train(1, Private(images, torch.tensor([0])), None)


def test_norm_statistics_are_those_of_the_weights_as_they_are() -> None:
    """However slowly the running average follows, and whatever dropout does before it."""
    model = nn.Sequential(
        nn.Dropout(0.9), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.01), nn.Flatten(), nn.Linear(16, 2)
    )
    images = torch.randint(0, 255, (8, 3, 2, 2), dtype=torch.uint8)
    private = Private(images, torch.arange(8) % 2)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.5), "fp32", 8, torch.Generator())
    trainer.train(3, private, None)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    trainer.recompute_norm_statistics(private, None)
    with torch.no_grad():
        inner = model[1](images / 255)
    torch.testing.assert_close(model[2].running_mean, inner.mean((0, 2, 3)))
    torch.testing.assert_close(model[2].running_var, inner.var((0, 2, 3)))
    assert model[2].momentum == 0.01
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------
# Losses, step sizes and gradients


def test_focal_loss_by_hand_and_without_gamma() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log()
    labels = torch.tensor([0, 0])
    expected = (0.1**2 * -math.log(0.9) + 0.6**2 * -math.log(0.4)) / 2
    assert float(focal_loss(logits, labels, 2.0)) == pytest.approx(expected)
    weights = torch.tensor([3.0, 1.0])
    for chosen in (None, weights):
        plain = nn.functional.cross_entropy(logits, labels, chosen)
        torch.testing.assert_close(focal_loss(logits, labels, 0.0, chosen), plain)
    certain = torch.tensor([[100.0, -100.0]], requires_grad=True)
    focal_loss(certain, torch.tensor([0]), 0.5).backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


def test_balanced_classes_count_the_same() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    part = Private(torch.zeros(40, 1), labels, class_weights=balanced_weights(labels, 3))
    own = [nn.functional.cross_entropy(logits[labels == c], labels[labels == c]) for c in (0, 1)]
    torch.testing.assert_close(part.loss(logits, torch.arange(40)), (own[0] + own[1]) / 2)


def test_the_norm_of_a_gradient_is_limited() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    before = [p.detach().clone() for p in model.parameters()]
    images = torch.full((4, 3, 2, 2), 255, dtype=torch.uint8)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    limited = Trainer(model, optimizer, "fp32", 4, torch.Generator(), clip_norm=0.01)
    limited.train(1, Private(images, torch.tensor([0, 0, 0, 1])), None)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-4)


def test_every_step_has_the_step_size_of_its_share() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "share": 0.5}], 7.0)
    seen: list[float] = []

    def rate(done: float) -> float:
        seen.append(done)
        return 4 * done

    images = torch.zeros((8, 3, 2, 2), dtype=torch.uint8)
    chosen = Trainer(model, optimizer, "fp32", 4, torch.Generator(), rate=rate)
    chosen.train(4, Private(images, torch.tensor([0, 1] * 4)), None)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert optimizer.param_groups[0]["lr"] == 2.0
