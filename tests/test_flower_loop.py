"""Flower's own ``Strategy.start`` drives the public strategies: real ClientApp, real serialisation, no run.

The clients are written as a library user writes them: an own model, an own loop, ``Order.of`` and ``reply``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedmutual
from fedmutual.simulation.inprocess import FIRST_NODE, InProcessGrid

SAMPLES, CLASSES, CLIENTS = 40, 3, 4
CENTRES = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], np.float32)


def points(seed: int, count: int, classes: tuple[int, ...] = (0, 1, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds in the plane."""
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, count)
    x = CENTRES[y] + rng.normal(0, 0.6, (count, 2)).astype(np.float32)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


PUBLIC, _ = points(0, SAMPLES)
TEST = points(1, 300)


def torch_client(*mods: Any) -> ClientApp:
    """A network whose weights live in ``context.state``; a client lacks one class."""
    app = ClientApp(mods=list(mods))

    def model_of(context: Context) -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, CLASSES)
        if "model" in context.state:
            model.load_state_dict(context.state["model"].to_torch_state_dict())  # type: ignore[union-attr]
        return model

    def private(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        i = int(context.node_config["partition-id"])
        return points(10 + i, 60, (i % 3, (i + 1) % 3))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = fedmutual.Order.of(message)
        model, (x, y) = model_of(context), private(context)
        optimizer = torch.optim.Adam(model.parameters(), lr=float(order.config.get("lr", 0.05)))
        for step in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if order.has_target:
                index = torch.arange(step % 2, len(order.target_indices), 2)
                loss = loss + order.loss(model(PUBLIC[order.target_indices[index]]), index)
            loss.backward()
            optimizer.step()
        context.state["model"] = ArrayRecord(model.state_dict())
        with torch.no_grad():
            predicted = torch.softmax(model(PUBLIC[order.indices]), dim=1)
        return order.reply(predicted, num_examples=len(x), metrics={"loss": float(loss.detach())})

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        order = fedmutual.Order.of(message)
        with torch.no_grad():
            right = model_of(context)(TEST[0]).argmax(dim=1) == TEST[1]
        return order.reply(num_examples=len(TEST[0]), metrics={"accuracy": float(right.float().mean())})

    return app


def numpy_client() -> ClientApp:
    """A classifier without gradients: the class means, which learns from soft labels as from hard ones."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = fedmutual.Order.of(message)
        x, y = (t.numpy() for t in points(20 + int(context.node_config["partition-id"]), 50))
        weights = np.eye(CLASSES)[y]
        if order.has_target:
            x = np.concatenate([x, PUBLIC.numpy()[order.target_indices]])
            weights = np.concatenate([weights, order.targets])
        means = weights.T @ x / weights.sum(axis=0)[:, None]
        scores = -((PUBLIC.numpy()[order.indices, None] - means) ** 2).sum(axis=2)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return order.reply(odds / odds.sum(axis=1, keepdims=True), num_examples=len(y))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        fedmutual.Order.of(message)
        record = RecordDict({"metrics": MetricRecord({"accuracy": 0.5, "num-examples": 1})})
        return Message(record, reply_to=message)

    return app


def started(
    strategy: fedmutual.PredictionStrategy, app: ClientApp, rounds: int = 3, **options: Any
) -> tuple[Any, InProcessGrid]:
    grid = InProcessGrid(app, CLIENTS, {})
    return strategy.start(grid=grid, initial_arrays=ArrayRecord(), num_rounds=rounds, **options), grid


EVERY = [fedmutual.MutualLearning, fedmutual.FedMD, fedmutual.DSFL, fedmutual.CFD, fedmutual.FedDF]


@pytest.mark.parametrize("client", [torch_client, numpy_client])
@pytest.mark.parametrize("kind", EVERY)
def test_start_runs_every_strategy(
    kind: type[fedmutual.PredictionStrategy], client: Callable[[], ClientApp]
) -> None:
    result, _ = started(kind(SAMPLES, CLASSES), client())
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2, 3]
    assert result.arrays["consensus"].numpy().shape == (SAMPLES, CLASSES)


def test_clients_that_lack_a_class_learn_it_from_their_peers() -> None:
    alone, _ = started(fedmutual.MutualLearning(SAMPLES, CLASSES, kl_weight=0.0), torch_client(), 6)
    together, _ = started(fedmutual.MutualLearning(SAMPLES, CLASSES, kl_weight=3.0), torch_client(), 6)
    before = alone.evaluate_metrics_clientapp[6]["accuracy"]
    after = together.evaluate_metrics_clientapp[6]["accuracy"]
    assert before < 0.75
    assert after > before + 0.15


def test_evaluate_fn_gets_the_consensus_of_every_round() -> None:
    seen: dict[int, ArrayRecord] = {}

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        seen[round] = arrays
        return MetricRecord({"rows": len(arrays["consensus"].numpy()) if round else 0})

    result, _ = started(fedmutual.MutualLearning(SAMPLES, CLASSES), torch_client(), evaluate_fn=evaluate)
    assert list(seen) == [0, 1, 2, 3]
    assert len(seen[0]) == 0
    assert result.evaluate_metrics_serverapp[3]["rows"] == SAMPLES


def test_train_config_and_evaluate_config_arrive() -> None:
    got: list[tuple[str, Any]] = []

    def mod(message: Message, context: Context, call: Any) -> Message:
        got.append((message.metadata.message_type, fedmutual.Order.of(message).config))
        return call(message, context)  # type: ignore[no-any-return]

    started(
        fedmutual.MutualLearning(SAMPLES, CLASSES, fraction_evaluate=0.5, min_evaluate_nodes=1),
        torch_client(mod),
        1,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_config=ConfigRecord({"split": "test"}),
    )
    assert got.count(("train", {"lr": 0.1, "server-round": 1})) == CLIENTS
    assert got.count(("evaluate", {"split": "test", "server-round": 1})) == CLIENTS // 2


def test_partial_participation_and_stale_peers() -> None:
    strategy = fedmutual.MutualLearning(SAMPLES, CLASSES, fraction_train=0.5, fraction_evaluate=0.0)
    result, _ = started(strategy, torch_client(), 6)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4, 5, 6]
    assert result.evaluate_metrics_clientapp == {}
    _, arrays = strategy.state()
    assert sum(name.startswith("predictions.") for name in arrays) == CLIENTS


class Faulty(InProcessGrid):
    """A grid on which one client raises, and another sends nonsense."""

    def _answer(self, order: Message) -> Message | None:
        node = order.metadata.dst_node_id - FIRST_NODE
        if order.metadata.message_type == "train" and node == 0:
            broken = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(2))})})
            return Message(broken, reply_to=order)
        if node == 1:
            del order.content["order"]  # the ClientApp raises
        return super()._answer(order)


@pytest.mark.parametrize("kind", EVERY)
def test_a_client_that_fails_and_one_that_sends_nonsense_end_nothing(
    kind: type[fedmutual.PredictionStrategy], caplog: pytest.LogCaptureFixture
) -> None:
    strategy = kind(SAMPLES, CLASSES)
    with caplog.at_level("WARNING", "fedmutual"):
        grid = Faulty(torch_client(), CLIENTS, {})
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(), num_rounds=2)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2]
    rejected = [record.getMessage() for record in caplog.records if "rejected" in record.getMessage()]
    assert any(f"node {FIRST_NODE} rejected: report" in line for line in rejected)
    assert any(f"node {FIRST_NODE + 1} rejected" in line for line in rejected)
    assert not any(f"node {FIRST_NODE + 2} rejected" in line for line in rejected)


def test_no_weight_travels() -> None:
    sent: list[Message] = []

    class Watched(InProcessGrid):
        def _answer(self, order: Message) -> Message | None:
            answer = super()._answer(order)
            sent.extend(m for m in (order, answer) if m is not None)
            return answer

    grid = Watched(torch_client(), CLIENTS, {})
    fedmutual.MutualLearning(SAMPLES, CLASSES).start(
        grid=grid, initial_arrays=ArrayRecord({"w": Array(np.ones(5))}), num_rounds=2
    )
    assert len(sent) == 2 * 2 * 2 * CLIENTS
    assert not any(message.content.array_records for message in sent)
