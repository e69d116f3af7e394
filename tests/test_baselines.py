"""The baselines: Flower's aggregation to the bit, bad weights rejected, equal data, local, centralised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from local_grid import FIRST_NODE, Played, enter_run, play, trains, undisturbed

from fedmutual.client.learner import Learner
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose

BASELINES = ("local", "fedavg", "fedprox", "centralised")


def baseline(path: Path, name: str, *overrides: str, **hooks: Any) -> Any:
    """A run of three clients."""
    return play(path, f"strategy={name}", *overrides, **hooks)


def weights_in(message: Message) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in message.content["model"].items()}


def test_a_round_of_fedavg_is_flowers_aggregation_to_the_last_bit(tmp_path: Path) -> None:
    run = baseline(tmp_path, "fedavg", "rounds=2", "partition=dirichlet", "partition.alpha=1.0")
    assert run.error is None
    enter_run()
    for round in (1, 2):
        sent = [m for m in run.grid.replies if trains(m) and m.content["report"]["round"] == round]
        replies = []
        for message in sent:
            examples = MetricRecord({"num-examples": message.content["metrics"]["num-examples"]})
            content = RecordDict({"model": message.content["model"], "metrics": examples})
            replies.append(Message(content, dst_node_id=1, message_type="train"))
        assert len({m.content["metrics"]["num-examples"] for m in replies}) > 1  # weights matter
        expected, _ = FlowersFedAvg().aggregate_train(round, replies)
        assert expected is not None
        order = next(m for m in run.grid.orders if trains(m) and m.content["order"]["round"] == round + 1)
        given = weights_in(order)
        assert set(given) == set(expected)
        for name, array in expected.items():
            assert np.array_equal(given[name], array.numpy().astype(given[name].dtype)), name


def test_all_clients_of_fedavg_end_with_the_global_model(tmp_path: Path) -> None:
    run = baseline(
        tmp_path, "fedavg", "rounds=2", "evaluation.unseen_every=1", "evaluation.unseen_limit=null"
    )
    accuracies = {c["unseen_accuracy"] for c in run.summary["clients"].values()}
    assert len(accuracies) == 1
    last = {run.line(2, name)["unseen_accuracy"] for name in run.summary["clients"]}
    assert last == accuracies  # the server's own measurement of the average is the clients' closing one
    closing = [m for m in run.grid.replies if trains(m) and m.content["report"]["round"] == 3]
    assert not any("model" in m.content for m in closing)


DAMAGES = ("missing", "shape", "nan")  # of client-0 in round 2, client-1 in round 3, client-2 in round 4


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A run of federated averaging with bad weights of each kind, in a round of its own."""

    def tamper(node: int, reply: Message) -> Message:
        position = node - FIRST_NODE
        if trains(reply) and reply.content["report"]["round"] == position + 2:
            damage, weights = DAMAGES[position], weights_in(reply)
            name = next(iter(weights))
            if damage == "missing":
                del weights[name]
            elif damage == "shape":
                weights[name] = weights[name][:1]
            else:
                weights[name] = np.full_like(weights[name], np.nan)
            reply.content["model"] = ArrayRecord({k: Array(v) for k, v in weights.items()})
        return reply

    folder = tmp_path_factory.mktemp("spoilt")
    run = baseline(folder, "fedavg", "rounds=4", "evaluation.unseen_every=0", tamper=tamper)
    assert run.error is None
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_weights_are_rejected_by_name_and_survived(spoilt: Played, damage: str) -> None:
    position = DAMAGES.index(damage)
    assert len(spoilt.rejections()) == len(DAMAGES)
    round, client, reason = spoilt.rejections()[position]
    assert (round, client) == (position + 2, f"client-{position}")
    assert "model" in reason
    order = next(m for m in spoilt.grid.orders if trains(m) and m.content["order"]["round"] == round + 1)
    assert all(np.isfinite(values).all() for values in weights_in(order).values())


def test_fedprox_stays_nearer_to_what_was_sent(tmp_path: Path) -> None:
    def travelled(run: Any) -> float:
        start = next(m for m in run.grid.orders if trains(m))
        end = next(m for m in run.grid.replies if trains(m))
        before, after = weights_in(start), weights_in(end)
        return float(sum(((after[k] - before[k]) ** 2).sum() for k in before))

    free = travelled(baseline(tmp_path / "a", "fedprox", "strategy.proximal=0", "rounds=1", clients=1))
    pulled = travelled(baseline(tmp_path / "b", "fedprox", "strategy.proximal=10", "rounds=1", clients=1))
    plain = travelled(baseline(tmp_path / "c", "fedavg", "rounds=1", clients=1))
    assert free == plain
    assert pulled < free


def test_equal_data_trains_on_the_public_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    for name in ("mixed_training", "separate_mutual_step", "local_training"):
        original = getattr(Learner, name)

        def recorded(self: Learner, *args: Any, name: str = name, original: Any = original) -> Any:
            seen.append((self.order.round, name))
            if args:
                assert torch.equal(
                    args[0].labels,
                    torch.from_numpy(self.site.public.images.labels[self.order.target_indices]),
                )
                assert args[0].log_target is None
            return original(self, *args)

        monkeypatch.setattr(Learner, name, recorded)
    labelled = ("strategy.equal_data=true", "public.labelled=true", "public=kfold", "rounds=2")
    baseline(tmp_path / "mixed", "fedavg", *labelled)
    assert seen == [(r, "mixed_training") for r in (1, 2) for _ in range(3)]
    seen.clear()
    baseline(tmp_path / "separate", "local", *labelled, "strategy.phase=separate")
    assert seen == [
        (r, n) for r in (1, 2) for _ in range(3) for n in ("local_training", "separate_mutual_step")
    ]


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"strategy\.equal_data"):
        compose(["strategy=fedavg", "strategy.equal_data=true"])
    with pytest.raises(SettingsError, match=r"model\.per_client"):
        compose(["strategy=fedavg", "model.per_client=[visionnet,squeezenet1_1]"])


def test_local_exchanges_nothing() -> None:
    run = undisturbed("strategy=local", clients=2)
    for message in (*run.grid.orders, *run.grid.replies):
        if trains(message):
            assert "model" not in message.content
    assert all(len(o.indices) == len(o.target_indices) == 0 for o in run.orders().values())
    assert all(not m.content["report"]["predictions"] for m in run.grid.replies if trains(m))
    assert set(run.summary["clients"]) == {"client-0", "client-1"}


def test_centralised_trains_one_model_on_everybodys_images(tmp_path: Path) -> None:
    everybody = baseline(tmp_path / "local", "local", "rounds=1").summary["clients"]
    one = baseline(tmp_path / "centralised", "centralised", "rounds=1").summary["clients"]
    assert len(one) == 1
    (figures,) = one.values()
    alone = sum(client["num_examples"] for client in everybody.values())
    assert abs(figures["num_examples"] - alone) <= 3  # each split holds out whole images


@pytest.mark.parametrize("name", BASELINES)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    whole = undisturbed(f"strategy={name}", clients=2)

    def die(node: int, order: Message) -> None:
        if trains(order) and order.content["order"]["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baseline(tmp_path / "killed", name, before=die, clients=2)
    resumed = baseline(tmp_path / "killed", name, resume=True, clients=2)
    assert resumed.error is None
    figures = [
        {k: c["unseen_accuracy"] for k, c in run.summary["clients"].items()} for run in (whole, resumed)
    ]
    assert figures[0] == figures[1]
    lines = [run.line(3, next(iter(whole.summary["clients"])))["train_loss"] for run in (whole, resumed)]
    assert lines[0] == lines[1]
