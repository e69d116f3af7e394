"""One client: an order is done once, whatever happens, and what is wrong is said in words."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Context, Message, RecordDict
from hydra.utils import get_object
from local_grid import TINY, enter_run, over_the_wire, play

from fedmutual.client import answer as client
from fedmutual.client.answer import answer, handle
from fedmutual.client.learner import Learner
from fedmutual.client.state import ClientState, StateError, StateFolder
from fedmutual.data.site import load_site
from fedmutual.learning.evaluation import predict
from fedmutual.models.build import load_weights
from fedmutual.models.stored import find_models, load_model
from fedmutual.settings.compose import compose
from fedmutual.wire.codec import MessageError
from fedmutual.wire.orders import Order, order_record
from fedmutual.wire.records import payload_bytes

NODE = {"partition-id": 0, "num-partitions": 2, "trust-run": True}


def a_context(state_dir: Path, *overrides: str, **node_config: Any) -> Context:
    config = {"overrides": shlex.join([*TINY, "num_clients=2", f"state_dir={state_dir}", *overrides])}
    given = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(run_id=1, node_id=5, node_config=NODE | given, state=RecordDict(), run_config=config)


def an_order(round: int, **changes: Any) -> Order:
    """What the server would send; from round 2 on with a target that is sure of class 1."""
    public = load_site(compose([*TINY, "num_clients=2"]), (0, 2)).public
    indices = np.arange(len(public), dtype=np.int32)
    target = np.log(np.tile(np.array([0.1, 0.9], np.float32), (len(public), 1)))
    order = Order(
        run="run-1",
        round=round,
        closing=False,
        public_digest=public.digest,
        classes=("mask", "no_mask"),
        num_classes=2,
        indices=indices,
        target_indices=indices if round > 1 else indices[:0],
        log_targets=target if round > 1 else None,
        divergence="own_peer",
        kl_weight=1.0 if round > 1 else 0.0,
    )
    return replace(order, **changes)


def closing(round: int) -> Order:
    return an_order(round, closing=True, indices=np.zeros(0, np.int32))


def do(order: Order, context: Context) -> RecordDict:
    return answer(order_record(order), context)


def content_bytes(content: RecordDict) -> bytes:
    enter_run()
    message = Message(content, 5, "train.round")
    return over_the_wire(message).content.deflate() + b"".join(r.deflate() for r in content.values())


def state_of(state_dir: Path, name: str = "client-0") -> ClientState:
    state = StateFolder(state_dir, "run-1", name).load()
    assert state is not None
    return state


# ---------------------------------------------------------------------------------------------------
# Once


class Killed(BaseException):
    """Neither the client nor Flower catches it."""


def test_killed_after_saving_and_ordered_again_it_answers_and_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[tuple[str, int]]
) -> None:
    context, other = a_context(tmp_path / "killed"), a_context(tmp_path / "undisturbed")
    for each in (context, other):
        do(an_order(1), each)
    expected = do(an_order(2), other)
    save = StateFolder.save

    def save_and_die(self: StateFolder, state: ClientState) -> None:
        save(self, state)
        raise Killed

    monkeypatch.setattr(StateFolder, "save", save_and_die)
    with pytest.raises(Killed):
        do(an_order(2), context)
    monkeypatch.setattr(StateFolder, "save", save)
    saved = state_of(tmp_path / "killed")
    trained = len(trainings)
    repeated, again = do(an_order(2), context), do(an_order(2), context)
    assert len(trainings) == trained
    assert content_bytes(repeated) == content_bytes(again)
    assert repeated["report"] == expected["report"]  # the seconds differ, the figures do not
    assert {k: v for k, v in repeated["metrics"].items() if "seconds" not in k} == {
        k: v for k, v in expected["metrics"].items() if "seconds" not in k
    }
    now, undisturbed = state_of(tmp_path / "killed"), state_of(tmp_path / "undisturbed")
    for key, value in now.weights.items():
        assert torch.equal(value, saved.weights[key])
        assert torch.equal(value, undisturbed.weights[key])


def test_an_order_that_arrives_twice_gets_the_same_bytes(tmp_path: Path) -> None:
    context = a_context(tmp_path)
    for order in (an_order(1), an_order(2), closing(3)):
        assert content_bytes(do(order, context)) == content_bytes(do(order, context))


DIE = """
    import os, sys
    from pathlib import Path
    from test_client import a_context, an_order, do
    from fedmutual.client.state import StateFolder

    save = StateFolder.save
    def save_and_die(self, state):
        save(self, state)
        os._exit(9)
    StateFolder.save = save_and_die
    do(an_order(1), a_context(Path(sys.argv[1]), f"cache_dir={sys.argv[2]}"))
"""


def test_a_process_that_dies_between_state_and_reply(tmp_path: Path, trainings: list[Any]) -> None:
    expected = do(an_order(1), a_context(tmp_path / "undisturbed"))
    trainings.clear()
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DIE), str(tmp_path / "killed"), str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 9
    repeated = do(an_order(1), a_context(tmp_path / "killed"))
    assert trainings == []
    assert repeated["report"] == expected["report"]  # also: the same bits in another process


def test_a_failed_order_leaves_the_state_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = a_context(tmp_path)
    do(an_order(1), context)
    before = (tmp_path / "run-1/client-0/state.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "validate", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            do(an_order(2), context)
    assert (tmp_path / "run-1/client-0/state.safetensors").read_bytes() == before
    do(an_order(2), context)
    assert state_of(tmp_path).report.round == 2


def test_a_diverged_round_is_an_error_and_not_kept(tmp_path: Path) -> None:
    context = a_context(tmp_path, "optimizer=sgd", "optimizer.learning_rate=1e30")
    with pytest.raises(MessageError, match=r"not finite.*lower optimizer.learning_rate"):
        do(an_order(1), context)
    assert StateFolder(tmp_path, "run-1", "client-0").load() is None


def test_an_older_order_is_refused_with_the_remedy(tmp_path: Path) -> None:
    context = a_context(tmp_path)
    for round in (1, 2, 3):
        do(an_order(round), context)
    with pytest.raises(
        StateError, match=r"is at round 3, the order is for round 1: resume .* new run"
    ) as error:
        do(an_order(1), context)
    assert str(tmp_path / "run-1" / "client-0") in str(error.value)
    assert state_of(tmp_path).report.round == 3


def test_a_server_that_lost_its_last_round_is_followed_one_round_back(
    tmp_path: Path, trainings: list[Any]
) -> None:
    context, other = a_context(tmp_path / "back"), a_context(tmp_path / "undisturbed")
    for each in (context, other):
        first, second = (do(an_order(round), each) for round in (1, 2))
    trained = len(trainings)
    assert do(an_order(1), context)["report"] == first["report"]
    assert len(trainings) == trained  # its report was kept
    assert do(an_order(2), context)["report"] == second["report"]
    assert len(trainings) == trained + 1  # the order may have been another: it is learned again
    for key, value in state_of(tmp_path / "back").weights.items():
        assert torch.equal(value, state_of(tmp_path / "undisturbed").weights[key])


def test_a_client_that_missed_the_lost_round_learns_it_from_the_one_before(tmp_path: Path) -> None:
    context, other = a_context(tmp_path / "back"), a_context(tmp_path / "undisturbed")
    for round in (1, 3, 2):
        late = do(an_order(round), context)
    for round in (1, 2):
        expected = do(an_order(round), other)
    assert late["report"] == expected["report"]


def test_the_device_is_said_once_in_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = a_context(tmp_path)
    with caplog.at_level(logging.INFO):
        for round in (1, 2, 3):
            do(an_order(round), context)
    (said,) = [text for text in caplog.messages if "training on" in text]
    assert said.startswith("client-0: training on CPU, ")
    assert said.endswith("(device=cpu)")


def test_rounds_that_were_missed_are_no_obstacle(tmp_path: Path) -> None:
    context = a_context(tmp_path)
    do(an_order(1), context)
    assert do(an_order(4), context)["report"]["round"] == 4


def test_another_run_starts_afresh(tmp_path: Path) -> None:
    context = a_context(tmp_path)
    first = do(an_order(1), context)
    do(an_order(2), context)
    assert do(an_order(1, run="run-2"), context)["report"] == first["report"]


def test_the_ledger_counts_what_came_and_went(tmp_path: Path) -> None:
    context = a_context(tmp_path)
    received = sent = 0
    for order in (an_order(1), an_order(2)):
        content = order_record(order)
        sent += payload_bytes(answer(content, context))
        received += payload_bytes(content)
    ledger = state_of(tmp_path).ledger
    assert (ledger.received, ledger.sent) == (received, sent)


def test_the_optimisers_history_is_kept_or_not_as_set(tmp_path: Path) -> None:
    for keep in (True, False):
        context = a_context(tmp_path / str(keep), f"optimizer.keep_state={keep}")
        do(an_order(1), context)
        do(an_order(2), context)
    kept, fresh = state_of(tmp_path / "True"), state_of(tmp_path / "False")
    assert float(kept.optimizer["state"][0]["step"]) > 3
    assert fresh.optimizer == {}
    assert any(not torch.equal(value, fresh.weights[key]) for key, value in kept.weights.items())


# ---------------------------------------------------------------------------------------------------
# What does not fit


def test_the_architecture_must_not_change_within_a_run(tmp_path: Path) -> None:
    do(an_order(1), a_context(tmp_path))
    with pytest.raises(
        StateError, match=r"has the model .*VisionNet, the settings ask for .*squeezenet1_1: keep"
    ):
        do(an_order(2), a_context(tmp_path, model="squeezenet1_1"))


def test_another_public_set_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MessageError, match=r"this site's digest is .*, the server's 0123: copy .* again"):
        do(an_order(1, public_digest="0123"), a_context(tmp_path))


def test_other_classes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        MessageError, match=r"this site has mask, no_mask, the server no_mask, mask: .*data.classes"
    ):
        do(an_order(1, classes=("no_mask", "mask")), a_context(tmp_path))


def test_orders_of_another_app_are_refused(tmp_path: Path) -> None:
    """Flower's own loop names no run, and need not name the classes."""
    with pytest.raises(MessageError, match=r"run: the order has no run name"):
        do(an_order(1, run=""), a_context(tmp_path))
    with pytest.raises(MessageError, match=r"classes: this site has mask, no_mask, the server :"):
        do(an_order(1, classes=()), a_context(tmp_path))
    assert list(tmp_path.rglob("state.safetensors")) == []


@pytest.mark.parametrize(
    ("node_config", "problem"),
    [
        ({}, "client-0: StateError: .*at round 3"),
        ({"client_name": "hospital a"}, r"node 5: IdentityError: client-name 'hospital a'"),
        ({"client_name": "a", "device": "cuda:99"}, "a: ValueError: device=cuda:99: torch sees"),
        ({"client_name": "a", "device": "abacus"}, "a: .*abacus"),
        ({"client_name": "a", "model": "no.such.model"}, "a: ValueError: model._target_: .*no.such.model"),
        ({"client_name": "a", "partition_id": 2}, "a: DataError: partition-id: 2 is not below"),
    ],
)
def test_what_goes_wrong_is_an_error_reply_that_names_the_client(
    tmp_path: Path, node_config: dict[str, Any], problem: str
) -> None:
    for round in (1, 2, 3):
        do(an_order(round), a_context(tmp_path))
    enter_run()
    order = over_the_wire(Message(order_record(an_order(1)), 5, "train.round"))
    reply = handle(order, a_context(tmp_path, **node_config))
    assert reply.has_error()
    assert reply.error.code == 2
    assert reply.error.reason is not None
    assert re.search(problem, reply.error.reason), reply.error.reason
    assert "Traceback" not in reply.error.reason


# ---------------------------------------------------------------------------------------------------
# The model that it leaves


@pytest.mark.parametrize("model", ["visionnet", "mnasnet0_5"])
def test_the_exported_model_is_rebuilt_from_its_card_and_predicts_the_same(
    tmp_path: Path, model: str
) -> None:
    context = a_context(tmp_path, f"model={model}", "data.image_size=32")
    settings = client.client_settings(context.run_config, context.node_config)
    site = load_site(settings, (0, 2))
    order = replace(an_order(1), public_digest=site.public.digest)
    do(order, context)
    record = do(replace(closing(2), public_digest=site.public.digest), context)
    folder = tmp_path / "run-1" / "client-0"
    card = json.loads((folder / "model.json").read_text())
    rebuilt = get_object(card["target"])(**card["arguments"]).to(memory_format=torch.channels_last)
    load_weights(rebuilt, safetensors.torch.load_file(folder / "model.safetensors"))
    assert site.unseen is not None
    images = torch.from_numpy(site.unseen.images[np.arange(len(site.unseen))]).permute(0, 3, 1, 2)
    state = StateFolder(tmp_path, "run-1", "client-0").load()
    assert state is not None
    np.testing.assert_array_equal(predict(rebuilt, images).numpy(), state.report.unseen_predictions)
    assert card["classes"] == ["mask", "no_mask"]
    assert card["image_size"] == 32
    assert card["num_examples"] == len(site.train_indices(1))
    assert card["metrics"]["unseen_accuracy"] == record["metrics"]["unseen-accuracy"]
    assert card["rounds"] == 1


@pytest.mark.parametrize("trust", [True, False])
def test_a_node_chooses_its_model_before_the_run_does(trust: bool) -> None:
    run = {"overrides": "model.per_client=[squeezenet1_1,resnet18]"}
    for node, target in (
        ({"partition-id": 0, "num-partitions": 2}, "torchvision.models.squeezenet1_1"),
        ({"partition-id": 1, "num-partitions": 2}, "torchvision.models.resnet18"),
        ({"partition-id": 2, "num-partitions": 3}, "torchvision.models.squeezenet1_1"),
        (
            {"partition-id": 1, "num-partitions": 2, "model": "visionnet"},
            "fedmutual.models.visionnet.VisionNet",
        ),
        ({"client-name": "a"}, "fedmutual.models.visionnet.VisionNet"),
    ):
        assert client.client_settings(run, {"trust-run": trust, **node}).model.target == target


def test_the_best_model_is_kept_beside_the_last_one(tmp_path: Path) -> None:
    own = ["train.keep=best", "rounds=3", "optimizer.learning_rate=0.05", "optimizer.schedule=constant"]
    run = play(tmp_path / "run", *own, clients=2)
    assert run.error is None
    for name in ("client-0", "client-1"):
        lines = [line for line in run.history if line["client"] == name and "validation_loss" in line]
        expected = max(
            lines, key=lambda line: (line["validation_accuracy"], -line["validation_loss"], -line["round"])
        )
        best, last = (load_model(run.states() / name / place) for place in ("best", "."))
        assert best.card["order"] == expected["round"]
        assert best.card["metrics"]["validation_loss"] == expected["validation_loss"]
        same = all(
            torch.equal(a, b)
            for a, b in zip(best.model.state_dict().values(), last.model.state_dict().values(), strict=True)
        )
        assert same == expected["closing"]
        assert find_models(run.states() / name / "best") == [run.states() / name / "best"]
    assert [folder.name for folder in find_models(tmp_path / "run/clients")] == ["client-0", "client-1"]
