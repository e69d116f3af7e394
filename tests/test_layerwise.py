"""The layer-wise baseline: which layers, their weights by hand, what travels when, the server's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from local_grid import FIRST_NODE, Played, play, trains
from torch import nn

from fedmutual.client.learner import Learner
from fedmutual.learning.layers import accuracy_shares, split_layers, weighted_sum
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.records import payload_bytes

LABELLED = ("public.labelled=true", "public=kfold", "strategy.server_epochs=1")
STRATEGY = "strategy=layerwise"


def dimensions(model: nn.Module) -> dict[str, int]:
    return {name: values.ndim for name, values in model.state_dict().items()}


def layers_in(message: Message) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in message.content["model"].items()}


def sent(run: Played, round: int) -> dict[str, dict[str, np.ndarray]]:
    """The layers of a round's reports, by client."""
    reports = [m for m in run.grid.replies if trains(m) and m.content["report"]["round"] == round]
    return {m.content["report"]["client"]: layers_in(m) for m in reports}


def order_of(run: Played, round: int) -> Message:
    return next(m for m in run.grid.orders if trains(m) and m.content["order"]["round"] == round)


# ---------------------------------------------------------------------------------------------------
# The mathematics


def test_convolutions_and_norms_are_shallow_and_linear_layers_deep() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    shallow, deep = split_layers(dimensions(model))
    assert deep == ("3.weight", "3.bias")
    assert set(shallow) == model[:2].state_dict().keys()  # the running statistics of the norm included


@pytest.mark.parametrize(
    ("model", "deep"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), ("1.weight", "1.bias")),  # SqueezeNet's kind
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), ("1.weight", "1.bias")),
    ],
)
def test_a_model_of_one_kind_of_layer_has_a_deep_last_one(model: nn.Module, deep: tuple[str, ...]) -> None:
    assert split_layers(dimensions(model))[1] == deep


@pytest.mark.parametrize(
    "name", ["visionnet", "resnet18", "squeezenet1_1", "mobilenet_v3_small", "vit_small"]
)
def test_every_model_has_both_and_every_array_is_in_one(name: str) -> None:
    from fedmutual.models.build import build_model

    model, _ = build_model(compose([f"model={name}"]).model, 2, 64, 0)
    shallow, deep = split_layers(dimensions(model))
    assert shallow
    assert deep
    assert sorted(shallow + deep) == sorted(model.state_dict())


def test_one_layer_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="one layer only"):
        split_layers({"weight": 2, "bias": 1})


def test_layers_by_hand() -> None:
    """0.9 and 0.6: shares 0.6 and 0.4; 0.6 * 10 + 0.4 * 20 = 14; over K = 2: 0.45 * 10 + 0.3 * 20 = 10.5."""
    accuracies = {"a": 0.9, "b": 0.6}
    weights = {
        "a": {"w": np.float32([10]), "n": np.int64(3)},
        "b": {"w": np.float32([20]), "n": np.int64(5)},
    }
    normalised = weighted_sum(weights, accuracy_shares(accuracies, normalise=True))
    assert normalised["w"] == pytest.approx([14])
    assert normalised["w"].dtype == np.float32
    assert (normalised["n"], normalised["n"].dtype) == (5, np.int64)
    shrunk = weighted_sum(weights, accuracy_shares(accuracies, normalise=False))
    assert shrunk["w"] == pytest.approx([10.5])
    assert accuracy_shares({"a": 0.0, "b": 0.0}, normalise=True) == {"a": 0.5, "b": 0.5}


# ---------------------------------------------------------------------------------------------------
# The run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Four rounds without public labels: the server only averages."""
    played = play(tmp_path_factory.mktemp("layerwise") / "run", STRATEGY, "rounds=4")
    assert played.error is None
    return played


def test_only_the_layers_of_the_round_travel(run: Played) -> None:
    kinds = {}
    for round in (1, 2, 3, 4):
        (names,) = {tuple(layers) for layers in sent(run, round).values()}
        kinds[round] = {"deep" if name.startswith("classifier") else "shallow" for name in names}
        back = set(layers_in(order_of(run, round + 1)))
        assert back == set(names)
    assert kinds == {1: {"shallow"}, 2: {"shallow"}, 3: {"deep"}, 4: {"shallow"}}
    assert "model" not in order_of(run, 1).content
    closing = [m for m in run.grid.replies if trains(m) and m.content["report"]["round"] == 5]
    assert not any("model" in m.content for m in closing)


def test_bytes_are_those_of_the_layers(run: Played) -> None:
    for round in (1, 3):
        reply = next(m for m in run.grid.replies if trains(m) and m.content["report"]["round"] == round)
        layers = sum(values.nbytes for values in layers_in(reply).values())
        line = run.line(round, "client-0")
        assert line["uplink_bytes"] == payload_bytes(reply.content)
        assert layers < line["uplink_bytes"] < layers + 5_000


@pytest.mark.parametrize("normalise", ["true", "false"])
def test_what_comes_back_is_what_was_sent_weighted_by_accuracy(
    tmp_path: Path, normalise: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = play(tmp_path, STRATEGY, "rounds=1", f"strategy.normalise={normalise}")
    (said,) = [r.message for r in caplog.records if "server_epochs" in r.message]
    assert "public.labelled=false" in said  # so the server does not train
    accuracies = {
        name: run.line(1, name)["validation_accuracy"] for name in ("client-0", "client-1", "client-2")
    }
    by = sum(accuracies.values()) if normalise == "true" else 3
    layers = sent(run, 1)
    for name, values in layers_in(order_of(run, 2)).items():
        expected = sum(accuracies[c] / by * layers[c][name].astype(np.float64) for c in accuracies)
        np.testing.assert_array_equal(values, np.float32(expected))


def test_clients_keep_the_layers_that_did_not_travel(run: Played) -> None:
    import safetensors.numpy

    models = [
        safetensors.numpy.load_file(run.states() / f"client-{i}" / "model.safetensors") for i in range(3)
    ]
    given = layers_in(order_of(run, 5))
    for name, values in models[0].items():
        if name in given:
            assert all(np.array_equal(model[name], given[name]) for model in models)
        else:  # the dense layers of round 3, which each client then trained on in round 4
            assert not np.array_equal(values, models[1][name])


def test_the_server_trains_on_the_rounds_public_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[tuple[int, list[int]]] = []
    step = Learner.separate_mutual_step

    def recorded(self: Learner, public: Any, epochs: int) -> None:
        assert (self.client, epochs, public.log_target) == ("server", 1, None)
        assert torch.equal(
            public.labels, torch.from_numpy(self.site.public.images.labels[self.order.target_indices])
        )
        taught.append((self.order.round, self.order.target_indices.tolist()))
        step(self, public, epochs)

    monkeypatch.setattr(Learner, "separate_mutual_step", recorded)
    run = play(tmp_path, STRATEGY, *LABELLED, "rounds=2")
    assert run.error is None
    assert [round for round, _ in taught] == [1, 2]
    assert not set(taught[0][1]) & set(taught[1][1])  # a fresh fold a round
    layers = sent(run, 1)
    name = next(iter(layers["client-0"]))
    mean = sum(layers[c][name] for c in layers) / 3
    trained = layers_in(order_of(run, 2))[name]
    assert 0 < np.abs(trained - mean).max() < 0.1  # near the average, but trained on


def test_layers_of_another_round_are_rejected_by_name_and_survived(tmp_path: Path) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node == FIRST_NODE and trains(reply) and reply.content["report"]["round"] == 2:
            reply.content["model"] = ArrayRecord({"classifier.0.weight": Array(np.zeros((2, 2), np.float32))})
        return reply

    run = play(tmp_path, STRATEGY, tamper=tamper)
    assert run.error is None
    ((round, client, reason),) = run.rejections()
    assert (round, client) == (2, "client-0")
    assert "other layers than the server's model" in reason


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = play(tmp_path / "whole" / "run", STRATEGY, *LABELLED)

    def die(node: int, order: Message) -> None:
        if trains(order) and order.content["order"]["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "killed" / "run", STRATEGY, *LABELLED, before=die)
    resumed = play(tmp_path / "killed" / "run", STRATEGY, *LABELLED, resume=True)
    assert resumed.error is None
    for key in ("clients", "unseen", "traffic"):
        assert resumed.summary[key] == whole.summary[key]
    for name, values in layers_in(order_of(whole, 4)).items():
        np.testing.assert_array_equal(layers_in(order_of(resumed, 4))[name], values)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.common_start=false", "train.common_start: false, but strategy=layerwise"),
        ("model.per_client=[visionnet,squeezenet1_1]", "model.per_client: 2 models, but strategy=layerwise"),
        ("strategy.deep_every=1", "strategy.deep_every: 1 is below 2"),
    ],
)
def test_misuse_is_refused_before_anything_starts(override: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        compose([STRATEGY, override])
    assert str(refused.value).startswith(problem)
