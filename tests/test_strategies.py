"""Every public strategy by hand: replies made here, targets worked out here; milliseconds, no federation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

import fedmutual
from fedmutual.simulation.inprocess import enter_run, over_the_wire
from fedmutual.strategies.base import RoundStrategy
from fedmutual.strategies.mutual import MutualLoss
from fedmutual.strategies.predictions import PredictionStrategy

A = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], np.float32)
B = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]], np.float32)
C = np.array([[0.3, 0.7], [0.4, 0.6], [0.8, 0.2]], np.float32)
WIRE = 2e-3  # float16 of a log-odds up to 9.2, as a probability


class Nodes:
    """A grid that only says who is connected."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self.nodes


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    enter_run()


def orders(strategy: RoundStrategy, round: int, *nodes: int, **config: Any) -> dict[int, fedmutual.Order]:
    """What the nodes receive: the orders after Flower's serialisation."""
    sent = strategy.configure_train(round, ArrayRecord(), ConfigRecord(config), Nodes(*nodes))  # type: ignore[arg-type]
    return {m.metadata.dst_node_id: fedmutual.Order.of(over_the_wire(m)) for m in sent}


def reply(order: fedmutual.Order, probabilities: Any, num_examples: int = 10, **metrics: Any) -> Message:
    """What the node answers, after Flower's serialisation."""
    return over_the_wire(order.reply(probabilities, num_examples=num_examples, metrics=metrics))


def play(strategy: RoundStrategy, round: int, said: dict[int, Any], **metrics: Any) -> Any:
    """One round in which each node says what it is given here."""
    got = orders(strategy, round, *said)
    return strategy.aggregate_train(round, [reply(got[node], p, **metrics) for node, p in said.items()])


def mutual(**options: Any) -> fedmutual.MutualLearning:
    return fedmutual.MutualLearning(3, 2, **options)


# ---------------------------------------------------------------------------------------------------
# Mutual learning


def test_round_one_has_no_target_and_asks_for_every_sample() -> None:
    order = orders(mutual(), 1, 1, 2)[1]
    assert not order.has_target
    assert order.indices.tolist() == [0, 1, 2]
    assert len(order.target_indices) == 0
    assert order.targets.shape == (0, 2)


def test_a_client_gets_the_mean_of_the_others() -> None:
    strategy = mutual()
    play(strategy, 1, {1: A, 2: B, 3: C})
    got = orders(strategy, 2, 1, 2, 3)
    assert got[1].target_indices.tolist() == [0, 1, 2]
    np.testing.assert_allclose(got[1].targets, (B + C) / 2, atol=WIRE)
    np.testing.assert_allclose(got[3].targets, (A + B) / 2, atol=WIRE)


@pytest.mark.parametrize(("travels", "kept"), [("float16", "float16"), ("float32", "float32")])
def test_predictions_are_kept_in_the_type_in_which_they_travelled(travels: str, kept: str) -> None:
    strategy = mutual(wire_dtype=travels)
    play(strategy, 1, {1: A, 2: B, 3: C})
    _, arrays = strategy.state()
    assert {v.dtype.name for k, v in arrays.items() if k.startswith("predictions.")} == {kept}


def test_own_peer_sends_the_normalised_geometric_mean() -> None:
    strategy = mutual(divergence="own_peer")
    play(strategy, 1, {1: A, 2: B, 3: C})
    geometric = np.sqrt(B * C)
    expected = geometric / geometric.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(orders(strategy, 2, 1, 2, 3)[1].targets, expected, atol=WIRE)


def test_a_new_node_learns_from_everyone() -> None:
    strategy = mutual()
    play(strategy, 1, {1: A, 2: B})
    np.testing.assert_allclose(orders(strategy, 2, 1, 2, 9)[9].targets, (A + B) / 2, atol=WIRE)


def test_an_absent_peer_teaches_until_it_is_stale() -> None:
    strategy = mutual(staleness_limit=1)
    play(strategy, 1, {1: A, 2: B, 3: C})
    play(strategy, 2, {1: A, 2: B})
    np.testing.assert_allclose(orders(strategy, 3, 1, 2)[1].targets, (B + C) / 2, atol=WIRE)
    play(strategy, 3, {1: A, 2: B})
    np.testing.assert_allclose(orders(strategy, 4, 1, 2)[1].targets, B, atol=WIRE)


def test_predictions_of_other_samples_teach_nobody() -> None:
    strategy = fedmutual.MutualLearning(12, 2, schedule="sample", per_round=3)
    play(strategy, 1, {1: A, 2: B, 3: C})
    first = strategy.predicted
    assert orders(strategy, 2, 1, 2)[1].target_indices.tolist() == first.tolist()
    play(strategy, 2, {1: A, 2: B})
    np.testing.assert_allclose(orders(strategy, 3, 1, 2)[1].targets, B, atol=WIRE)


def test_lambda_waits_for_the_burn_in() -> None:
    loss = MutualLoss("peer_own", 1.0, kl_weight=3.0, burn_in=2)
    assert [loss.weight(round) for round in range(6)] == [0, 0, 0, 3, 3, 3]
    strategy = mutual(burn_in=1)
    play(strategy, 1, {1: A, 2: B})
    assert not orders(strategy, 2, 1, 2)[1].has_target
    play(strategy, 2, {1: A, 2: B})
    assert orders(strategy, 3, 1, 2)[1].has_target


def test_the_loss_is_lambda_t_squared_kl() -> None:
    torch = pytest.importorskip("torch")
    strategy = mutual(divergence="peer_own", temperature=2.0, kl_weight=0.5)
    play(strategy, 1, {1: A, 2: B})
    order = orders(strategy, 2, 1, 2)[1]
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    q = np.sqrt(B[:2]) / np.sqrt(B[:2]).sum(axis=1, keepdims=True)  # softened by 2
    p = torch.softmax(logits / 2, dim=1).detach().numpy()
    expected = 0.5 * 4 * (q * np.log(q / p)).sum(axis=1).mean()
    loss = order.loss(logits, np.array([0, 1]))
    assert loss.item() == pytest.approx(float(expected), rel=5e-3)
    assert order.loss(logits, torch.tensor([0, 1])).item() == pytest.approx(loss.item())
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_a_single_column_is_the_log_odds_of_class_1() -> None:
    torch = pytest.importorskip("torch")
    strategy = mutual()
    play(strategy, 1, {1: A, 2: B})
    order = orders(strategy, 2, 1, 2)[1]
    odds = torch.tensor([[0.3], [-1.0], [2.0]])
    two = torch.cat([torch.zeros(3, 1), odds], dim=1)
    assert float(order.loss(odds)) == pytest.approx(float(order.loss(two)))


def test_without_a_target_the_loss_is_zero_and_has_a_gradient() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = orders(mutual(), 1, 1, 2)[1].loss(logits)
    loss.backward()
    assert loss.item() == 0
    assert float(logits.grad.abs().sum()) == 0


def test_a_wrong_index_is_named() -> None:
    torch = pytest.importorskip("torch")
    strategy = mutual()
    play(strategy, 1, {1: A, 2: B})
    with pytest.raises(fedmutual.MessageError, match=r"public\[order.target_indices\[index\]\]"):
        orders(strategy, 2, 1, 2)[1].loss(torch.zeros(2, 2), [0])


@pytest.mark.parametrize(
    ("consensus", "expected"),
    [
        ("median", np.median([A, B, C], axis=0)),
        (fedmutual.Median(), np.median([A, B, C], axis=0)),
        (fedmutual.Mean(include_own=True), (A + B + C) / 3),
    ],
)
def test_a_consensus_by_name_or_as_an_object(consensus: Any, expected: np.ndarray) -> None:
    strategy = mutual(consensus=consensus)
    play(strategy, 1, {1: A, 2: B, 3: C})
    got = orders(strategy, 2, 1, 2, 3)[1].targets
    np.testing.assert_allclose(got, expected / expected.sum(axis=1, keepdims=True), atol=WIRE)


def test_validation_weights_by_plain_accuracy_where_there_is_no_recall() -> None:
    strategy = mutual(consensus="validation")
    got = orders(strategy, 1, 1, 2, 3)
    said = {1: (A, 0.9), 2: (B, 0.75), 3: (C, 0.5)}
    strategy.aggregate_train(
        1, [reply(got[n], p, **{"validation-accuracy": accuracy}) for n, (p, accuracy) in said.items()]
    )
    # odds 9, 3 and 0 (chance): client 3's target is (9 A + 3 B) / 12
    np.testing.assert_allclose(orders(strategy, 2, 1, 2, 3)[3].targets, (9 * A + 3 * B) / 12, atol=WIRE)


def test_state_continues_where_it_was() -> None:
    strategy, again = mutual(), mutual()
    play(strategy, 1, {1: A, 2: B, 3: C})
    meta, arrays = strategy.state()
    again.restore_state(meta, {name: np.array(values) for name, values in arrays.items()})
    for node in (1, 2, 3):
        one, two = (orders(s, 2, 1, 2, 3)[node] for s in (strategy, again))
        np.testing.assert_array_equal(one.targets, two.targets)


# ---------------------------------------------------------------------------------------------------
# The strategies with one consensus for everyone


def test_fedmd_teaches_the_mean_score() -> None:
    strategy = fedmutual.FedMD(3, 2)
    play(strategy, 1, {1: A, 2: B})
    geometric = np.sqrt(A * B)
    got = orders(strategy, 2, 1, 2)
    np.testing.assert_allclose(got[1].targets, geometric / geometric.sum(axis=1, keepdims=True), atol=WIRE)
    np.testing.assert_array_equal(got[1].targets, got[2].targets)


def test_dsfl_sharpens() -> None:
    strategy = fedmutual.DSFL(3, 2, era_temperature=0.1)
    play(strategy, 1, {1: A, 2: B})
    mean = (A + B) / 2
    expected = np.exp(mean / 0.1) / np.exp(mean / 0.1).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(orders(strategy, 2, 1, 2)[1].targets, expected, atol=WIRE)


def test_cfd_sends_labels_and_teaches_the_votes() -> None:
    strategy = fedmutual.CFD(3, 2)
    one = orders(strategy, 1, 1, 2, 3)[1]
    assert one.wire_dtype == "label"
    play(strategy, 1, {1: A, 2: B, 3: C})
    votes = np.mean([np.eye(2)[p.argmax(axis=1)] for p in (A, B, C)], axis=0)
    np.testing.assert_allclose(orders(strategy, 2, 1, 2, 3)[1].targets, votes, atol=WIRE)


class Student:
    """Repeats what it is taught, a little less surely."""

    def __init__(self) -> None:
        self.taught: list[np.ndarray] = []

    def distil(self, round: int, indices: np.ndarray, log_probabilities: np.ndarray) -> np.ndarray:
        self.taught.append(np.exp(log_probabilities))
        return np.log(0.8 * np.exp(log_probabilities) + 0.1)

    def figures(self, round: int) -> dict[str, Any]:
        return {}

    def weights(self) -> dict[str, np.ndarray]:
        return {"w": np.array([float(len(self.taught))])}

    def load(self, weights: Any) -> None:
        self.taught = [np.zeros(0)] * int(weights["w"][0])


@pytest.mark.parametrize(("teacher", "share"), [("student", 0.8), ("consensus", 1.0)])
def test_feddf_teaches_its_student(teacher: str, share: float) -> None:
    student = Student()
    strategy = fedmutual.FedDF(3, 2, student=student, teacher=teacher)
    arrays, _ = play(strategy, 1, {1: A, 2: B})
    geometric = np.sqrt(A * B)
    consensus = geometric / geometric.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(student.taught[0], consensus, atol=WIRE)
    expected = share * consensus + (1 - share) / 2
    np.testing.assert_allclose(orders(strategy, 2, 1, 2)[1].targets, expected, atol=WIRE)
    assert arrays["w"].numpy().tolist() == [1.0]
    meta, saved = strategy.state()
    again = fedmutual.FedDF(3, 2, student=Student(), teacher=teacher)
    again.restore_state(meta, saved)
    assert again.global_weights()["w"].tolist() == [1.0]  # type: ignore[index]


def test_feddf_without_a_student_teaches_the_consensus() -> None:
    strategy = fedmutual.FedDF(3, 2)
    play(strategy, 1, {1: A, 2: A})
    np.testing.assert_allclose(orders(strategy, 2, 1, 2)[1].targets, A, atol=WIRE)
    assert strategy.global_weights() is None


# ---------------------------------------------------------------------------------------------------
# Flower's side: who takes part, what is aggregated, what a bad reply does

EVERY = [fedmutual.MutualLearning, fedmutual.FedMD, fedmutual.DSFL, fedmutual.CFD, fedmutual.FedDF]


@pytest.mark.parametrize("kind", EVERY)
def test_metrics_are_averaged_by_examples_and_the_consensus_is_returned(
    kind: type[PredictionStrategy],
) -> None:
    strategy = kind(3, 2)
    got = orders(strategy, 1, 1, 2)
    replies = [
        reply(got[1], A, 30, loss=1.0, only_here=5.0),
        reply(got[2], B, 10, loss=2.0),
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert dict(metrics) == {"loss": pytest.approx(1.25)}
    assert arrays["indices"].numpy().tolist() == [0, 1, 2]
    np.testing.assert_allclose(arrays["consensus"].numpy().sum(axis=1), 1, rtol=1e-5)


def test_the_consensus_of_all_is_their_mean() -> None:
    arrays, _ = play(mutual(), 1, {1: A, 2: B})
    np.testing.assert_allclose(arrays["consensus"].numpy(), (A + B) / 2, atol=WIRE)


def test_ones_own_aggregation_gets_the_records_and_the_key() -> None:
    seen: list[Any] = []

    def own(records: list[RecordDict], key: str) -> MetricRecord:
        seen.append((len(records), key))
        return MetricRecord({"mine": 1})

    strategy = mutual(train_metrics_aggr_fn=own, evaluate_metrics_aggr_fn=own, weighted_by_key="weight")
    _, metrics = play(strategy, 1, {1: A, 2: B}, weight=1.0)
    assert metrics["mine"] == 1
    assert seen == [(2, "weight")]


def test_a_reply_without_the_weight_is_rejected() -> None:
    strategy = mutual(weighted_by_key="weight")
    assert play(strategy, 1, {1: A, 2: B}) == (None, None)
    assert "weight: None is no weight (weighted_by_key)" in strategy.rejected["1"]


def raw(order: fedmutual.Order, content: RecordDict) -> Message:
    assert order.message is not None
    return Message(content, reply_to=order.message)


def changed(order: fedmutual.Order, **values: Any) -> Message:
    message = order.reply(A, num_examples=1)
    for key, value in values.items():
        message.content["report"][key.replace("_", "-")] = value  # type: ignore[index]
    return message


BAD = {
    "an error": lambda o: Message(Error(3, "it broke"), reply_to=o.message),
    "nothing": lambda o: raw(o, RecordDict()),
    "another app's": lambda o: raw(o, RecordDict({"metrics": MetricRecord({"num-examples": 1})})),
    "no metrics": lambda o: raw(o, RecordDict({"report": o.reply(A, num_examples=1).content["report"]})),
    "short": lambda o: changed(o, predictions=b"12"),
    "not finite": lambda o: changed(o, predictions=np.full(3, np.nan, "<f2").tobytes()),
    "huge": lambda o: changed(o, predictions=np.full(3, 60000, "<f2").tobytes()),
    "another round's": lambda o: changed(o, round=7),
    "another type": lambda o: changed(o, predictions="no bytes"),
    "another wire type": lambda o: changed(o, dtype="float32"),
    "another protocol": lambda o: changed(o, protocol=1),
}


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_named_and_survived(fault: str, kind: type[PredictionStrategy]) -> None:
    strategy = kind(3, 2)
    got = orders(strategy, 1, 1, 2, 3)
    if kind is fedmutual.CFD and fault in ("not finite", "huge"):
        pytest.skip("labels have no such values")
    replies = [reply(got[1], A), BAD[fault](got[2]), reply(got[3], C)]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert list(strategy.rejected) == ["2"]
    assert strategy.rejected["2"]
    assert arrays is not None
    assert metrics is not None
    only_good = kind(3, 2)
    play(only_good, 1, {1: A, 3: C})
    np.testing.assert_array_equal(
        orders(strategy, 2, 1, 2, 3)[1].targets, orders(only_good, 2, 1, 2, 3)[1].targets
    )


@pytest.mark.parametrize("kind", EVERY)
def test_a_round_without_a_good_reply_changes_nothing(kind: type[PredictionStrategy]) -> None:
    strategy = kind(3, 2)
    play(strategy, 1, {1: A, 2: B})
    before = orders(strategy, 2, 1, 2)[1].targets
    assert strategy.aggregate_train(2, []) == (None, None)
    np.testing.assert_array_equal(orders(strategy, 3, 1, 2)[1].targets, before)


def test_a_share_of_the_nodes_takes_part_and_the_choice_is_seeded() -> None:
    nodes = tuple(range(100, 120))
    strategy = mutual(fraction_train=0.25, seed=3)
    first = list(orders(strategy, 1, *nodes))
    assert len(first) == 5
    assert list(orders(mutual(fraction_train=0.25, seed=3), 1, *nodes)) == first
    assert any(list(orders(strategy, round, *nodes)) != first for round in range(2, 6))
    assert len(orders(mutual(fraction_train=0.01, min_train_nodes=3), 1, *nodes)) == 3
    assert orders(mutual(fraction_train=0.0), 1, *nodes) == {}


def test_it_waits_for_the_nodes_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, waited = Nodes(1), []
    monkeypatch.setattr(
        "fedmutual.strategies.base.time.sleep", lambda s: (waited.append(s), grid.nodes.append(2))
    )
    sent = mutual().configure_train(1, ArrayRecord(), ConfigRecord(), grid)  # type: ignore[arg-type]
    assert [m.metadata.dst_node_id for m in sent] == [1, 2]  # type: ignore[union-attr]
    assert len(waited) == 1


def test_train_config_reaches_the_clients_and_stays_the_callers() -> None:
    config = ConfigRecord({"lr": 0.5})
    sent = mutual().configure_train(4, ArrayRecord(), config, Nodes(1, 2))  # type: ignore[arg-type]
    order = fedmutual.Order.of(over_the_wire(next(iter(sent))))
    assert order.config == {"lr": 0.5, "server-round": 4}
    assert order.round == 4
    assert dict(config) == {"lr": 0.5}


def test_evaluation_asks_for_the_model_as_it_is() -> None:
    strategy = mutual(fraction_evaluate=0.5, min_evaluate_nodes=1)
    play(strategy, 1, {1: A, 2: B})
    sent = list(
        strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord({"batch": 8}), Nodes(1, 2, 3, 4))  # type: ignore[arg-type]
    )
    assert len(sent) == 2
    assert {m.metadata.message_type for m in sent} == {"evaluate"}
    order = fedmutual.Order.of(over_the_wire(sent[0]))
    assert len(order.indices) == 0
    assert not order.has_target
    assert order.config == {"batch": 8, "server-round": 1}
    plain = raw(order, RecordDict({"any": MetricRecord({"accuracy": 0.5, "num-examples": 1})}))
    ours = order.reply(num_examples=3, metrics={"accuracy": 0.9})
    ours.metadata.__dict__["_src_node_id"] = 77
    assert dict(strategy.aggregate_evaluate(1, [plain, ours])) == {"accuracy": pytest.approx(0.8)}
    assert mutual(fraction_evaluate=0.0).configure_evaluate(1, ArrayRecord(), ConfigRecord(), Nodes(1)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["static", "sample", "kfold"])
def test_schedules(schedule: str) -> None:
    strategy = fedmutual.FedMD(10, 2, schedule=schedule, per_round=4, seed=1)
    rounds = [strategy.indices(round) for round in (1, 2, 3)]
    assert all(index.dtype == np.int32 and (np.diff(index) > 0).all() for index in rounds)
    if schedule == "static":
        assert all(len(index) == 10 for index in rounds)
    if schedule == "sample":
        assert all(len(index) == 4 for index in rounds)
    if schedule == "kfold":
        assert sorted(np.concatenate(rounds).tolist()) == list(range(10))
        np.testing.assert_array_equal(strategy.indices(4), rounds[0])


def test_a_schedule_of_ones_own() -> None:
    strategy = fedmutual.FedMD(10, 2, schedule=lambda round: np.array([round, round + 1], np.int32))
    assert orders(strategy, 3, 1, 2)[1].indices.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        (fedmutual.MutualLearning, {"num_samples": 0}, "num_samples"),
        (fedmutual.MutualLearning, {"num_classes": 1}, "num_classes"),
        (fedmutual.MutualLearning, {"divergence": "kl"}, "divergence: 'kl' is none of own_peer"),
        (fedmutual.MutualLearning, {"temperature": 0}, "temperature"),
        (fedmutual.MutualLearning, {"kl_weight": -1}, "kl_weight"),
        (fedmutual.MutualLearning, {"consensus": "best"}, "consensus: 'best' is none of mean"),
        (fedmutual.MutualLearning, {"divergence": "published_code", "num_classes": 3}, "two classes"),
        (
            fedmutual.MutualLearning,
            {"divergence": "published_code", "consensus": "median"},
            "published_code is defined for a mean",
        ),
        (fedmutual.MutualLearning, {"staleness_limit": -1}, "staleness_limit"),
        (fedmutual.MutualLearning, {"burn_in": 1.5}, "burn_in"),
        (fedmutual.FedMD, {"wire_dtype": "float64"}, "wire_dtype"),
        (fedmutual.FedMD, {"probability_floor": 0.5}, "probability_floor"),
        (fedmutual.FedMD, {"schedule": "weekly"}, "schedule"),
        (fedmutual.FedMD, {"per_round": 9}, "per_round"),
        (fedmutual.FedMD, {"fraction_train": 2}, "fraction_train"),
        (fedmutual.FedMD, {"min_train_nodes": -1}, "min_train_nodes"),
        (fedmutual.DSFL, {"era_temperature": 0}, "era_temperature"),
        (fedmutual.FedDF, {"teacher": "parrot"}, "teacher"),
    ],
)
def test_a_wrong_argument_is_named(kind: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**{"num_samples": 3, "num_classes": 2, **arguments})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="fraction_fit"):
        mutual(fraction_fit=1.0)


# ---------------------------------------------------------------------------------------------------
# The client's side


@pytest.mark.parametrize(
    ("probabilities", "named"),
    [
        (A[:2], r"shape \(2, 2\), not \(3, 2\)"),
        (A[:, :1], r"one column a class"),
        (np.log(A), "no distribution"),
        (A * 2, "no distribution"),
        (np.full((3, 2), np.nan), "not finite"),
        (None, r"shape \(0, 2\), not \(3, 2\)"),
    ],
)
def test_what_is_no_prediction_is_refused_at_the_client(probabilities: Any, named: str) -> None:
    with pytest.raises(fedmutual.MessageError, match=named):
        orders(mutual(), 1, 1, 2)[1].reply(probabilities, num_examples=1)


def test_certain_predictions_are_raised_to_the_floor() -> None:
    strategy = mutual(probability_floor=0.01)
    play(strategy, 1, {1: np.eye(2)[[0, 1, 0]], 2: B})
    np.testing.assert_allclose(orders(strategy, 2, 1, 2)[2].targets[0], [0.99, 0.01], atol=WIRE)


def test_torch_probabilities_travel_like_numpy_ones() -> None:
    torch = pytest.importorskip("torch")
    order = orders(mutual(), 1, 1, 2)[1]
    tensor = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    assert order.reply(tensor, num_examples=1).content["report"] == reply(order, A).content["report"]


def test_a_message_of_another_app_is_no_order() -> None:
    message = Message(RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord()}), 5, "train")
    with pytest.raises(fedmutual.MessageError, match="order: the message holds no such record"):
        fedmutual.Order.of(message)


def test_an_order_that_came_in_no_message_cannot_be_answered() -> None:
    with pytest.raises(fedmutual.MessageError, match=r"Order\.of"):
        fedmutual.Order(round=1, num_classes=2).reply(num_examples=1)
