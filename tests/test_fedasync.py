"""FedAsync and FedBuff from both ends: a recorded trace replayed, staleness, bad replies, resume, misuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Array, Message
from local_grid import FIRST_NODE, LocalGrid, Played, play, trains, undisturbed

from fedmutual.results.directory import RunDirectory
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.orders import read_order

QUICK = ("evaluation.unseen_every=0", "strategy.updates=7", "emulation.speeds=[1,2,4]")
FEDASYNC = ("strategy=fedasync", *QUICK)
FEDBUFF = ("strategy=fedbuff", *QUICK, "strategy.buffer_size=2", "strategy.alpha=0.5")
NAMES = ("client-0", "client-1", "client-2")


class Killed(Exception):
    """The server is gone."""


def arrivals(run: Played) -> list[dict[str, Any]]:
    return [line for line in run.history if not line["closing"]]


def mixed_in(run: Played) -> list[dict[str, Any]]:
    return [line for line in arrivals(run) if "alpha" in line]


def arrays(record: Any) -> dict[str, np.ndarray]:
    return {key: array.numpy() for key, array in record.items()}


def trace(run: Played) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """The weights of every report, by client and its own count."""
    sent = {}
    for reply in run.grid.replies:
        if trains(reply) and "model" in reply.content:
            report = reply.content["report"]
            sent[report["client"], report["round"]] = arrays(reply.content["model"])
    return sent


def received(run: Played) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """The weights of every order, by node and its own count."""
    orders = [(m.metadata.dst_node_id, read_order(m.content)) for m in run.grid.orders if trains(m)]
    return {(node, order.round): arrays(order.model) for node, order in orders}


def final(run: Played) -> dict[str, np.ndarray]:
    (closing,) = {
        name: safetensors.numpy.load_file(run.states() / name / "model.safetensors") for name in NAMES[:1]
    }.values()
    return closing


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Seven reports of three clients, the second and third two and four times slower."""
    played = play(tmp_path_factory.mktemp("fedasync") / "run", *FEDASYNC)
    assert played.error is None
    return played


def test_the_virtual_clock_says_who_reports_when(run: Played) -> None:
    assert [(line["client"], line["clock"]) for line in arrivals(run)] == [
        ("client-0", 1), ("client-0", 2), ("client-1", 2), ("client-0", 3), ("client-0", 4), ("client-1", 4),
        ("client-2", 4),
        ("client-0", 5), ("client-1", 6),  # were on their way
    ]  # fmt: skip
    assert [line.get("late", False) for line in arrivals(run)] == [False] * 7 + [True] * 2
    assert [line["round"] for line in arrivals(run)] == list(range(1, 10))


def test_staleness_counts_from_the_downloaded_version_and_alpha_follows(run: Played) -> None:
    lines = mixed_in(run)
    assert [line["downloaded"] for line in lines] == [0, 1, 0, 2, 4, 3, 0]
    assert [line["version"] for line in lines] == list(range(1, 8))
    assert [line["staleness"] for line in lines] == [0, 0, 2, 1, 0, 2, 6]
    assert [line["alpha"] for line in lines] == pytest.approx(
        [0.6 * (age + 1) ** -0.5 for age in (0, 0, 2, 1, 0, 2, 6)], rel=1e-15
    )


def test_a_recorded_trace_replayed_through_the_formula_gives_the_same_model(run: Played) -> None:
    sent, got = trace(run), received(run)
    model = {key: value.astype(np.float64) for key, value in got[FIRST_NODE, 1].items()}
    versions = [model]
    for line in mixed_in(run):
        new, alpha = sent[line["client"], line["update"]], line["alpha"]
        model = {key: (1 - alpha) * model[key] + alpha * new[key].astype(np.float64) for key in model}
        versions.append(model)
    for line in mixed_in(run):  # every client had the version that the history says
        node = FIRST_NODE + NAMES.index(line["client"])
        for key, value in got[node, line["update"]].items():
            np.testing.assert_allclose(value, versions[line["downloaded"]][key], atol=1e-6)
    for key, value in final(run).items():
        np.testing.assert_allclose(value, model[key], atol=1e-6)


def test_fedbuff_replayed() -> None:
    run = undisturbed(*FEDBUFF)
    sent, got = trace(run), received(run)
    model = {key: value.astype(np.float64) for key, value in got[FIRST_NODE, 1].items()}
    lines = mixed_in(run)
    assert [line["version"] for line in lines] == [0, 1, 1, 2, 2, 3, 3]
    for first, second in zip(lines[:6:2], lines[1::2], strict=True):  # the seventh waits for an eighth
        deltas = []
        for line in (first, second):
            node = FIRST_NODE + NAMES.index(line["client"])
            start, end = got[node, line["update"]], sent[line["client"], line["update"]]
            weight = (line["staleness"] + 1) ** -0.5
            assert line["alpha"] == pytest.approx(weight)
            deltas.append({k: weight * (end[k].astype(float) - start[k].astype(float)) for k in end})
        model = {key: model[key] + 0.5 / 2 * (deltas[0][key] + deltas[1][key]) for key in model}
    for key, value in final(run).items():
        np.testing.assert_allclose(value, model[key], atol=1e-6)


def test_the_summary_is_that_of_a_global_model(run: Played) -> None:
    accuracies = {client["unseen_accuracy"] for client in run.summary["clients"].values()}
    assert len(accuracies) == 1
    assert run.summary["unseen"]["ensemble_accuracy"] == run.summary["unseen"]["mean_accuracy"]
    closing = [m for m in run.grid.replies if trains(m) and "unseen-predictions" in m.content["report"]]
    assert len(closing) == 3
    assert not any("model" in m.content for m in closing)  # the server has it


def test_it_ends_by_its_clock(tmp_path: Path) -> None:
    run = play(tmp_path, *FEDASYNC, "strategy.seconds=2.5", "strategy.updates=100")
    assert run.error is None
    assert [line["clock"] for line in mixed_in(run)] == [1, 2, 2]
    assert all(line["late"] for line in arrivals(run)[3:])


def test_on_the_wall_clock(tmp_path: Path) -> None:
    run = play(tmp_path, *FEDASYNC, "emulation.clock=wall", "emulation.speeds=[1,1,20]")
    assert run.error is None
    assert len(mixed_in(run)) == 7
    clocks = [line["clock"] for line in arrivals(run)]
    assert clocks == sorted(clocks)
    # twenty times slower: hardly any of the seven is its, whatever the machine does
    assert sum(line["client"] == "client-2" for line in mixed_in(run)) <= 2


# ---------------------------------------------------------------------------------------------------
# Bad replies


BAD: dict[tuple[int, int], tuple[str, np.ndarray | None, str]] = {  # by client and its own count
    (0, 1): ("", None, "the report holds no weights"),
    (1, 1): ("head.bias", np.float32([np.nan]), "head.bias is not finite"),
    (0, 3): ("head.bias", np.zeros(3, np.float32), "head.bias is float32 (3,), the server's float32 (1,)"),
    (1, 3): ("more", np.zeros(1, np.float32), "has other layers than the server's model"),
}


def test_a_bad_report_is_rejected_by_name_and_the_run_goes_on(tmp_path: Path, run: Played) -> None:
    bias = next(name for name in final(run) if name.endswith("bias") and final(run)[name].shape == (1,))

    def tamper(node: int, reply: Message) -> Message:
        bad = BAD.get((node - FIRST_NODE, reply.content["report"]["round"])) if trains(reply) else None
        if bad is not None:
            key, value, _ = bad
            if value is None:
                del reply.content["model"]
            else:
                reply.content["model"][key.replace("head.bias", bias)] = Array(value)
        return reply

    bad = play(tmp_path, *FEDASYNC, tamper=tamper)
    assert bad.error is None
    rejected = [line for line in bad.history if "rejected" in line]
    assert [(line["client"], line["update"]) for line in rejected] == [(f"client-{i}", n) for i, n in BAD]
    for line, (_, _, reason) in zip(rejected, BAD.values(), strict=True):
        assert reason.replace("head.bias", bias) in line["rejected"]
    assert len(mixed_in(bad)) == 7
    assert {("client-0", 2), ("client-1", 2)} <= {(line["client"], line["update"]) for line in mixed_in(bad)}


def test_an_order_that_is_lost_is_sent_again_as_it_was(tmp_path: Path) -> None:
    lost = []

    def tamper(node: int, reply: Message) -> Message | None:
        if trains(reply) and node == FIRST_NODE + 1 and not lost:
            lost.append(reply)
            return Message(_gone(), reply_to=_order(reply, grids[0]))
        return reply

    grids: list[LocalGrid] = []
    run = play(tmp_path, *FEDASYNC, tamper=tamper, prepare=grids.append)
    assert run.error is None
    ((arrival, client, reason),) = run.rejections()
    assert (client, reason) == ("client-1", "the node is gone; it may join again when its SuperNode is back")
    first = next(line for line in mixed_in(run) if line["client"] == "client-1")
    assert first["update"] == 1
    assert first["downloaded"] == 0
    assert first["staleness"] == first["version"] - 1
    assert arrival < first["round"]
    sent = [m for m in run.grid.orders if trains(m) and m.metadata.dst_node_id == FIRST_NODE + 1]
    one, two = (read_order(m.content) for m in sent[:2])
    assert (one.round, two.round) == (1, 1)
    for key, value in arrays(one.model).items():
        np.testing.assert_array_equal(value, two.model[key].numpy())


def _gone() -> Any:
    from flwr.app import Error
    from flwr.common.constant import ErrorCode

    return Error(ErrorCode.NODE_UNAVAILABLE, "")


def _order(reply: Message, grid: LocalGrid) -> Message:
    name = reply.metadata.reply_to_message_id
    return next(m for m in grid.orders if m.metadata.message_id == name)


def test_the_second_node_with_a_name_waits(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    def same(i: int) -> dict[str, Any]:
        return {"partition-id": i, "num-partitions": 3, "client-name": "me" if i else "you"}

    run = play(tmp_path, *FEDASYNC, node_config=same)
    assert run.error is None
    assert any("nodes 1001 and 1002 are both named me" in line for line in said())
    assert {line["client"] for line in arrivals(run)} == {"me", "you"}
    assert {line["node_id"] for line in arrivals(run)} == {1000, 1001}


# ---------------------------------------------------------------------------------------------------
# Resume


def assert_same(resumed: Played, whole: Played) -> None:
    assert resumed.error is None, resumed.summary
    strip = [{k: v for k, v in line.items() if "seconds" not in k} for line in resumed.history]
    assert strip == [{k: v for k, v in line.items() if "seconds" not in k} for line in whole.history]
    for name in NAMES:
        for key, value in final(whole).items():
            np.testing.assert_array_equal(final(resumed)[key], value, err_msg=f"{name} {key}")
    for key in ("clients", "unseen", "traffic", "rejected"):
        assert resumed.summary[key] == whole.summary[key]


@pytest.mark.parametrize(("moment", "round"), [("after", 1), ("before", 4), ("after", 7), ("before", 9)])
def test_killed_and_resumed_equals_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Played, moment: str, round: int
) -> None:
    save = RunDirectory.save_checkpoint

    def killed(self: RunDirectory, meta: Any, arrays: Any) -> None:
        if moment == "before" and meta["round"] == round:
            raise Killed
        save(self, meta, arrays)
        if meta["round"] == round:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", killed)
        broken = play(tmp_path / "run", *FEDASYNC)
        assert isinstance(broken.error, Killed)

    def renamed(grid: LocalGrid) -> None:
        """A restarted SuperLink gives every SuperNode another id."""
        for node in list(grid.contexts):
            grid.rename_node(node, 3000 - node)

    resumed = play(tmp_path / "run", *FEDASYNC, resume=True, prepare=renamed)
    resumed.history = [{**line, "node_id": 3000 - line["node_id"]} if line["node_id"] >= 1500 else line
                       for line in resumed.history]  # fmt: skip
    assert_same(resumed, run)


def test_fedbuff_resumes_with_a_half_full_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = RunDirectory.save_checkpoint

    def killed(self: RunDirectory, meta: Any, arrays: Any) -> None:
        save(self, meta, arrays)
        if meta["round"] == 3:
            assert meta["strategy"]["buffered"] == 1
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", killed)
        assert isinstance(play(tmp_path / "run", *FEDBUFF).error, Killed)
    assert_same(play(tmp_path / "run", *FEDBUFF, resume=True), undisturbed(*FEDBUFF))


# ---------------------------------------------------------------------------------------------------
# Misuse


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["emulation.speeds=[]"], "emulation.speeds: "),
        (["emulation.speeds=[1,0]"], "emulation.speeds: "),
        (["strategy.alpha=0"], "strategy.alpha: "),
        (["strategy.alpha=1.5"], "strategy.alpha: "),
        (
            ["strategy.staleness=linear"],
            "strategy.staleness: 'linear' is none of constant, polynomial, hinge",
        ),
        (["emulation.clock=sun"], "emulation.clock: "),
        (["strategy.updates=0"], "strategy.updates: "),
        (["strategy.seconds=0"], "strategy.seconds: "),
        (["strategy.buffer_size=0"], "strategy.buffer_size: "),
        (["model.per_client=[visionnet,squeezenet1_1]"], "model.per_client: 2 models, but strategy=fedasync"),
    ],
)
def test_misuse_is_refused_before_anything_starts(overrides: list[str], problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        compose(["strategy=fedasync", *overrides])
    assert str(refused.value).startswith(problem)


@pytest.mark.parametrize("name", ["fedasync", "fedbuff"])
def test_its_configuration_composes(name: str) -> None:
    strategy = compose([f"strategy={name}"]).strategy
    assert strategy.name == name
    assert (strategy.buffer_size > 1) == (name == "fedbuff")
