"""The protocol from both ends: the paper's order of a round, exact targets, and no weight on the wire."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from local_grid import FIRST_NODE, Played, play, trains
from PIL import Image

from fedmutual.client.learner import Learner
from fedmutual.client.state import ClientState, StateFolder
from fedmutual.learning.training import Trainer
from fedmutual.settings.compose import compose
from fedmutual.strategies import mutual
from fedmutual.strategies.mutual import MutualLearning
from fedmutual.wire.codec import decode
from fedmutual.wire.orders import Order
from fedmutual.wire.records import payload_bytes
from fedmutual.wire.reports import Report

Event = tuple[str, str, int]

EAGER = "strategy.burn_in=0"  # the mutual step of round 1 is not left out
NAMES = ("client-0", "client-1", "client-2")


@dataclass
class Watched:
    """A run, and what was seen of its clients."""

    run: Played
    events: list[Event]  # (what, client, round of the order)
    frozen: list[tuple[int, bool]]  # of every training with targets: its steps, and whether they stayed equal
    weights: list[dict[str, torch.Tensor]]  # of a client after every order


def record_events(patch: pytest.MonkeyPatch) -> list[Event]:
    """What every client's learner does from now on: (what, client, round of the order)."""
    done: list[Event] = []
    for name in ("local_training", "mixed_training", "consolidate", "separate_mutual_step", "predictions"):
        original = getattr(Learner, name)

        def recorded(self: Learner, *args: Any, name: str = name, original: Any = original) -> Any:
            done.append((name, self.client, self.order.round))
            return original(self, *args)

        patch.setattr(Learner, name, recorded)
    return done


def record_targets(patch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every training with targets from now on: its steps, and whether the targets were constants."""
    train, seen = Trainer.train, []

    def watched(self: Trainer, steps: int, private: Any, public: Any) -> float:
        before = None if public is None else public.log_target.clone()
        loss = train(self, steps, private, public)
        if public is not None:
            same = torch.equal(public.log_target, before) and not public.log_target.requires_grad
            seen.append((steps, same))
        return loss

    patch.setattr(Trainer, "train", watched)
    return seen


def record_weights(patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights of every client after every order from now on."""
    saved: list[dict[str, torch.Tensor]] = []
    save = StateFolder.save

    def recorded(self: StateFolder, state: ClientState) -> None:
        saved.append({key: value.clone() for key, value in state.weights.items()})
        save(self, state)

    patch.setattr(StateFolder, "save", recorded)
    return saved


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Three clients, three rounds, and the mutual step from the first one on."""
    with pytest.MonkeyPatch.context() as patch:
        events, frozen, weights = record_events(patch), record_targets(patch), record_weights(patch)
        run = play(tmp_path_factory.mktemp("eager"), EAGER, "rounds=3")
    assert run.error is None
    return Watched(run, events, frozen, weights)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    return record_events(monkeypatch)


def predictions(
    run: Played, round: int, samples: int = 24, wire_dtype: str = "float16"
) -> dict[str, np.ndarray]:
    """What the clients sent in a round, from the captured replies."""
    settings = compose()
    sent = {}
    for reply in run.grid.replies:
        if trains(reply) and reply.content["report"]["round"] == round:
            report = reply.content["report"]
            floor = settings.strategy.probability_floor
            sent[report["client"]] = decode(report["predictions"], samples, 2, wire_dtype, floor)
    return sent


def test_a_round_in_the_papers_order_separate(tmp_path: Path, events: list[Event]) -> None:
    play(tmp_path, EAGER, "strategy.phase=separate", "strategy.mutual_epochs=1", "rounds=2")
    by_client = {name: [(what, r) for what, who, r in events if who == name] for name in NAMES}
    for name in NAMES:
        assert by_client[name] == [
            ("local_training", 1), ("predictions", 1),
            ("separate_mutual_step", 2), ("local_training", 2), ("predictions", 2),
            ("separate_mutual_step", 3),
        ]  # fmt: skip
    assert_mutual_after_all_predictions(events, "separate_mutual_step")


def test_a_round_in_the_papers_order_mixed(eager: Watched) -> None:
    for name in NAMES:
        assert [(what, r) for what, who, r in eager.events if who == name] == [
            ("local_training", 1), ("predictions", 1),
            ("mixed_training", 2), ("predictions", 2),
            ("mixed_training", 3), ("predictions", 3),
            ("consolidate", 4),
        ]  # fmt: skip
    assert_mutual_after_all_predictions(eager.events, "mixed_training")
    assert_mutual_after_all_predictions(eager.events, "consolidate")


def assert_mutual_after_all_predictions(events: list[Event], step: str) -> None:
    """The mutual step that the order of round r + 1 asks for belongs to round r."""
    steps = [position for position, (what, _, _) in enumerate(events) if what == step]
    assert steps
    for position in steps:
        belongs_to = events[position][2] - 1
        before = {
            who for what, who, round in events[:position] if what == "predictions" and round == belongs_to
        }
        assert before == set(NAMES)


def test_targets_are_frozen_during_the_mutual_step(eager: Watched) -> None:
    assert len(eager.frozen) == 3 * 3
    assert all(steps > 0 and same for steps, same in eager.frozen)


def test_one_message_a_client_and_round_and_one_at_the_end(eager: Watched) -> None:
    run = eager.run
    assert len(run.grid.orders) == len(run.grid.replies) == 3 * 3 + 3
    assert sorted(run.orders()) == [(FIRST_NODE + i, r) for i in range(3) for r in range(1, 5)]
    assert [order.closing for order in run.orders(4).values()] == [True] * 3
    assert not any(order.closing for order in run.orders(3).values())
    assert run.summary["status"] == "completed"


# ---------------------------------------------------------------------------------------------------
# Targets


def softened(log_p: np.ndarray, temperature: float) -> np.ndarray:
    scores = log_p.astype(np.float64) / temperature
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_are_the_mean_of_the_others_own_peer(
    tmp_path: Path, eager: Watched, temperature: float
) -> None:
    soft = f"strategy.temperature={temperature}"
    run = eager.run if temperature == 1 else play(tmp_path, EAGER, soft, "rounds=2")
    for round in (2, 3):
        sent = predictions(run, round - 1)
        assert set(sent) == set(NAMES)
        for i, name in enumerate(NAMES):
            a, b = (softened(log_p, temperature) for other, log_p in sent.items() if other != name)
            order = run.orders()[FIRST_NODE + i, round]
            assert order.temperature == temperature
            assert order.log_targets is not None
            np.testing.assert_allclose(order.log_targets, (a + b) / 2, rtol=2**-10, atol=1e-4)
            np.testing.assert_array_equal(order.target_indices, np.arange(24))
            assert order.target_entropies is None


def test_targets_are_the_mean_of_the_others_peer_own(tmp_path: Path) -> None:
    run = play(tmp_path, EAGER, "strategy.divergence=peer_own", "rounds=1")
    sent = predictions(run, 1)
    for i, name in enumerate(NAMES):
        a, b = (np.exp(log_p.astype(np.float64)) for other, log_p in sent.items() if other != name)
        order = run.orders()[FIRST_NODE + i, 2]
        assert order.log_targets is not None
        np.testing.assert_allclose(np.exp(order.log_targets), (a + b) / 2, rtol=5e-3)
        entropy = (-(a * np.log(a)).sum(axis=1) - (b * np.log(b)).sum(axis=1)) / 2
        np.testing.assert_allclose(order.target_entropies, entropy, rtol=5e-3)
    assert run.line(2, "client-0")["kl_before"] >= 0  # with the entropies it is a divergence
    assert run.summary["status"] == "completed"


def test_peers_and_the_own_prediction_are_weighed_by_the_odds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = itertools.cycle((0.9, 0.75, 0.5))  # what so short a run learns is chance
    monkeypatch.setattr(mutual, "validated", lambda metrics: next(accuracies))
    overrides = ("consensus=validation", "consensus.include_own=true")
    run = play(tmp_path, EAGER, *overrides, "strategy.divergence=peer_own", "rounds=1")
    sent = {name: np.exp(log_p.astype(np.float64)) for name, log_p in predictions(run, 1).items()}
    assert list(sent) == list(NAMES)
    for i in range(3):
        order = run.orders()[FIRST_NODE + i, 2]
        assert order.log_targets is not None
        mean = (9 * sent["client-0"] + 3 * sent["client-1"]) / 12
        np.testing.assert_allclose(np.exp(order.log_targets), mean, rtol=5e-3)


def test_the_reported_kl_is_the_true_mean_of_all_pairs(tmp_path: Path) -> None:
    run = play(tmp_path, EAGER, "rounds=1", "optimizer.learning_rate=0.01")
    sent = {name: log_p.astype(np.float64) for name, log_p in predictions(run, 1).items()}
    for name in NAMES:
        own = sent[name]
        pairs = [(np.exp(own) * (own - log_p)).sum(axis=1).mean() for o, log_p in sent.items() if o != name]
        assert run.line(2, name)["kl_before"] == pytest.approx(np.mean(pairs), abs=2e-3, rel=0.02)
        assert max(pairs) > 0


@pytest.mark.parametrize(("burn_in", "weights"), [
    (0, [0, 0.8, 0.8, 0.8, 0.8]),
    (2, [0, 0, 0, 0.8, 0.8]),
])  # fmt: skip
def test_lambda_waits_for_the_burn_in(burn_in: int, weights: list[float]) -> None:
    strategy = MutualLearning(3, 2, kl_weight=0.8, burn_in=burn_in)
    said = np.log(np.array([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]], np.float32))
    orders = []
    for round in range(1, 6):
        strategy.prepare(round)
        orders.append(strategy.order("a", Order(round=round, num_classes=2)))
        strategy.take(round, {name: Report(name, round, "", "", said) for name in "ab"})
    assert [order.kl_weight for order in orders] == pytest.approx(weights)
    assert [order.log_targets is not None for order in orders] == [weight > 0 for weight in weights]


def test_lambda_of_a_runs_orders(tmp_path: Path) -> None:
    given = ["strategy.burn_in=1", "strategy.kl_weight=0.8"]
    run = play(tmp_path, *given, "rounds=3", "evaluation.unseen_every=0", clients=2)
    orders = [run.orders()[FIRST_NODE, r] for r in range(1, 5)]
    assert [order.kl_weight for order in orders] == pytest.approx([0, 0, 0.8, 0.8])
    assert [order.log_targets is not None for order in orders] == [False, False, True, True]
    closing = orders[-1]
    assert closing.closing
    assert closing.log_targets is not None
    assert closing.log_targets.shape == (len(orders[-2].indices), 2)


def test_no_mutual_learning_at_weight_zero(tmp_path: Path, events: list[Event]) -> None:
    run = play(tmp_path, EAGER, "strategy.kl_weight=0", "strategy.phase=separate", "rounds=2")
    assert all(order.log_targets is None for order in run.orders().values())
    assert {what for what, _, _ in events} == {"local_training", "predictions"}


# ---------------------------------------------------------------------------------------------------
# The public set


def indices(run: Played) -> list[list[int]]:
    last = max(round for _, round in run.orders())
    return [run.orders()[FIRST_NODE, round].indices.tolist() for round in range(1, last)]


@pytest.mark.parametrize("schedule", ["static", "kfold", "sample"])
def test_which_samples_a_round_uses(tmp_path: Path, eager: Watched, schedule: str) -> None:
    static = schedule == "static"
    run = eager.run if static else play(tmp_path, EAGER, f"public={schedule}", "rounds=3", clients=2)
    rounds = indices(run)
    if static:
        assert rounds == [list(range(24))] * 3
    elif schedule == "kfold":
        assert sorted(i for r in rounds for i in r) == list(range(24))
        assert [len(r) for r in rounds] == [8, 8, 8]
    else:
        assert [len(set(r)) for r in rounds] == [6, 6, 6]
        assert rounds[0] != rounds[1]
    for (_, round), order in run.orders().items():
        if 1 < round <= 3:  # the targets belong to the samples of the round before
            assert order.target_indices.tolist() == rounds[round - 2]
    assert run.summary["status"] == "completed"


def test_labelled_public_images_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[Any] = []
    train = Trainer.train

    def watched(self: Trainer, steps: int, private: Any, public: Any) -> float:
        labels.append(None if public is None else public.labels)
        return train(self, steps, private, public)

    monkeypatch.setattr(Trainer, "train", watched)
    for labelled in (True, False):
        run = play(tmp_path / str(labelled), EAGER, f"public.labelled={labelled}", "rounds=2", clients=2)
        assert run.error is None
        mutual = labels[2:4]
        assert all((part is not None) is labelled for part in mutual)
        labels.clear()


# ---------------------------------------------------------------------------------------------------
# Variants


def test_published_code(tmp_path: Path) -> None:
    code = ("strategy.divergence=published_code", "strategy.phase=separate")
    run = play(tmp_path, EAGER, *code, "rounds=1", clients=2)
    assert run.summary["status"] == "completed"
    assert run.orders()[FIRST_NODE, 2].log_targets is not None


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 3 x 20 images, each class of another colour."""
    root = tmp_path_factory.mktemp("three")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("public", 5), ("test", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (20, 20, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return str(root)


def test_published_code_is_refused_with_three_classes(tmp_path: Path, three_classes: str) -> None:
    run = play(
        tmp_path, "strategy.divergence=published_code", "data=folder", f"data.root={three_classes}",
        "data.image_size=20",
    )  # fmt: skip
    assert run.summary["status"] == "failed"
    assert "two classes only" in run.summary["reason"]
    assert run.grid.orders == []


@pytest.mark.parametrize("wire_dtype", ["float16", "int8"])
def test_three_classes(tmp_path: Path, three_classes: str, wire_dtype: str) -> None:
    run = play(
        tmp_path, EAGER, f"strategy.wire_dtype={wire_dtype}", "data=folder", f"data.root={three_classes}",
        "data.image_size=20", "rounds=2",
    )  # fmt: skip
    assert run.summary["status"] == "completed", run.summary["reason"]
    assert run.rejections() == []
    order = run.orders()[FIRST_NODE, 2]
    assert order.log_targets is not None
    assert order.log_targets.shape == (15, 3)
    assert len(run.line(3, "client-1")["unseen_recall"]) == 3


@pytest.mark.parametrize(("wire_dtype", "size"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_the_wire_type_is_what_travels(tmp_path: Path, eager: Watched, wire_dtype: str, size: int) -> None:
    other = f"strategy.wire_dtype={wire_dtype}"
    run = eager.run if wire_dtype == "float16" else play(tmp_path, EAGER, other, "rounds=1", clients=2)
    sizes = {len(r.content["report"]["predictions"]) for r in run.grid.replies}
    assert sizes == {24 * size, 0}
    assert run.rejections() == []


def test_a_single_client_learns_alone(tmp_path: Path, events: list[Event]) -> None:
    run = play(tmp_path, EAGER, "rounds=2", clients=1)
    assert run.summary["status"] == "completed"
    assert all(order.log_targets is None for order in run.orders().values())
    assert {what for what, _, _ in events} == {"local_training", "predictions"}
    assert run.summary["clients"]["client-0"]["unseen_accuracy"] is not None


def test_five_architectures_teach_each_other(tmp_path: Path) -> None:
    models = "visionnet,shufflenet_v2_x0_5,squeezenet1_1,mnasnet0_5,mobilenet_v3_small"
    small = ("rounds=2", "data.image_size=32", "evaluation.unseen_every=0")
    run = play(tmp_path, EAGER, f"model.per_client=[{models}]", *small, clients=5)
    assert run.summary["status"] == "completed", run.summary["reason"]
    assert [run.summary["clients"][f"client-{i}"]["model"] for i in range(5)] == [
        "VisionNet", "ShuffleNetV2", "SqueezeNet", "MNASNet", "MobileNetV3",
    ]  # fmt: skip
    for i in range(5):
        assert run.line(2, f"client-{i}")["kl_before"] >= -1e-3
    assert run.rejections() == []


# ---------------------------------------------------------------------------------------------------
# What travels


def captured(run: Played) -> list[bytes]:
    """Every byte of every message of a run, both ways, as Flower serialises it."""
    messages = [*run.grid.orders, *run.grid.replies]
    return [o.deflate() for m in messages for o in get_all_nested_objects(m).values()]


def weight_bytes(weights: list[dict[str, torch.Tensor]]) -> set[bytes]:
    """Runs of four weights, in both layouts and both precisions, of every tensor of every state."""
    found = set()
    for state in weights:
        for tensor in state.values():
            if tensor.numel() < 4 or not tensor.is_floating_point():
                continue
            for layout in (
                tensor.contiguous().view(-1),
                tensor.permute(*range(tensor.ndim)[::-1]).reshape(-1),
            ):
                for values in (layout, layout.half()):
                    for start in (0, len(values) // 2, len(values) - 4):
                        piece = values[start : start + 4].numpy().tobytes()
                        if any(piece):  # biases start as zeros, which are everywhere
                            found.add(piece)
    return found


def found_in(pieces: set[bytes], messages: list[bytes]) -> int:
    return sum(any(piece in message for message in messages) for piece in pieces)


def test_no_model_parameter_travels(eager: Watched) -> None:
    run, weights = eager.run, eager.weights
    assert len(weights) == 3 * 4
    assert not [
        record
        for message in [*run.grid.orders, *run.grid.replies]
        for record in message.content.values()
        if isinstance(record, ArrayRecord)
    ]
    model = sum(tensor.numel() * tensor.element_size() for tensor in weights[0].values())
    messages = captured(run)
    assert max(len(message) for message in messages) < 2_000 < model / 100
    pieces = weight_bytes(weights)
    assert len(pieces) > 100
    assert found_in(pieces, messages) == 0


def test_where_weights_are_sent_the_same_search_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = record_weights(monkeypatch)
    run = play(tmp_path, "strategy=fedavg", "rounds=2", "evaluation.unseen_every=0", clients=2)
    assert run.summary["status"] == "completed"
    pieces = weight_bytes(weights[:2])
    assert found_in(pieces, captured(run)) > len(pieces) / 4


def test_the_history_counts_the_captured_bytes(eager: Watched) -> None:
    run = eager.run
    orders = {(m.metadata.dst_node_id, m.content["order"]["round"]): m for m in run.grid.orders}
    replies = {(r.metadata.src_node_id, r.content["report"]["round"]): r for r in run.grid.replies}
    assert len(run.history) == len(orders) == len(replies) == 12
    for line in run.history:
        key = line["node_id"], line["round"]
        assert line["downlink_bytes"] == independent_count(orders[key])
        evaluation = line.get("evaluation_bytes", 0)
        assert evaluation == (2 * 40 if line["closing"] else 0)
        assert line["uplink_bytes"] + evaluation == independent_count(replies[key])
    traffic = run.summary["traffic"]
    assert traffic["downlink_bytes"] == sum(independent_count(m) for m in run.grid.orders)
    assert traffic["uplink_bytes"] + traffic["evaluation_bytes"] == sum(
        independent_count(m) for m in run.grid.replies
    )


def independent_count(message: Any) -> int:
    """The content alone, record by record: no ArrayRecord has arrays below it here."""
    content = message.content
    return len(content.deflate()) + sum(len(record.deflate()) for record in content.values())


@pytest.mark.parametrize(("phase", "divergence"), [("mixed", "own_peer"), ("separate", "peer_own")])
def test_a_report_costs_two_bytes_a_sample_and_a_thousand(
    tmp_path: Path, phase: str, divergence: str
) -> None:
    run = play(
        tmp_path, EAGER, f"strategy.phase={phase}", f"strategy.divergence={divergence}", "rounds=2",
        "strategy.mutual_epochs=1", "data.pool_size=700", "public.size=600", "data.image_size=18",
        "train.batch_size=64", clients=2,
    )  # fmt: skip
    assert run.summary["status"] == "completed", run.summary["reason"]
    sizes = [payload_bytes(reply.content) for reply in run.grid.replies]
    assert len(sizes) == 2 * 3
    assert max(sizes) <= 2 * 600 + 1000
    assert sum(sizes) / len(sizes) <= 2 * 600 + 1000
    assert {"kl_before", "kl_after", "train_loss", "unseen_recall"} <= set(run.line(2, "client-1"))
