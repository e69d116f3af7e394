"""A study's runs on Ray: lost machines, missing folders, other versions, and a node killed for real."""

from __future__ import annotations

import csv
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_compare import STUDY, compared, results, wait_for

from fedmutual.cli import main
from fedmutual.compare import node
from fedmutual.compare.carried import Changes, Outgoing, recover, replace_folder
from fedmutual.compare.cluster import ATTEMPTS, RayCluster, needs
from fedmutual.compare.node import Beat, Order, carry_out
from fedmutual.compare.plan import PlannedRun
from fedmutual.settings import SettingsError


class RayError(Exception):
    """Of Ray."""


class NodeDiedError(RayError):
    """A machine went away."""


class RayTaskError(RayError):
    """A task raised."""


class RuntimeEnvSetupError(RayError):
    """A machine cannot run the code."""


class FakeRay:
    """What is used of Ray: each submission gives the beats (or errors) of the next script."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=RayTaskError,
        RuntimeEnvSetupError=RuntimeEnvSetupError,
    )

    def __init__(self, *scripts: list[Beat | Exception]) -> None:
        self.scripts = list(scripts)
        self.orders: list[Order] = []
        self.asked: dict[str, Any] = {}
        self.told: dict[str, Any] = {}
        self.cancelled: list[Any] = []

    def init(self, **told: Any) -> None:
        self.told = told
        bundle = Path(told["runtime_env"]["working_dir"])
        self.bundled = {path.name for path in bundle.iterdir()}
        if told["address"] == "nowhere:1":
            raise ConnectionError("no answer")

    def remote(self, _: Any) -> FakeRay:
        return self

    def options(self, **asked: Any) -> Any:
        def submit(order: Order) -> Iterator[Beat | Exception]:
            self.asked = asked
            self.orders.append(order)
            return iter(self.scripts.pop(0))

        return SimpleNamespace(remote=submit)

    def wait(self, beats: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return beats, []

    def get(self, beat: Beat | Exception) -> Beat:
        if isinstance(beat, Exception):
            raise beat
        return beat

    def cancel(self, beats: Any) -> None:
        self.cancelled.append(beats)

    def shutdown(self) -> None:
        self.told = {}


def planned(*overrides: str) -> PlannedRun:
    return PlannedRun("mutual", "", 0, overrides, 3, 2, 0.5, "0123456789abcdef")


def started(tmp_path: Path, ray: FakeRay, *overrides: str) -> tuple[Any, list[str]]:
    said: list[str] = []
    cluster = RayCluster("local", said.append, ray)
    cluster.prepare(2)
    return cluster.start(planned(*overrides), tmp_path / "runs" / "mutual" / "0123456789abcdef"), said


def test_a_run_takes_its_resources_and_its_files_come_back(tmp_path: Path) -> None:
    files = {"history.jsonl": b"{}\n", "clients/a/model.safetensors": b"weights"}
    last = Beat("one (10.0.0.1)", 3, b"round 3\n", Changes(frozenset(files), files), 0)
    ray = FakeRay([Beat("one (10.0.0.1)"), Beat("one (10.0.0.1)", 1, b"round 1\n"), last])
    work, said = started(tmp_path, ray)
    assert work.over()
    assert (work.round, work.code, work.problem, work.where, said) == (3, 0, "", "one (10.0.0.1)", [])
    folder = tmp_path / "runs" / "mutual" / "0123456789abcdef"
    assert (folder / "clients" / "a" / "model.safetensors").read_bytes() == b"weights"
    assert folder.with_name(f"{folder.name}.log").read_bytes() == b"round 1\nround 3\n"
    assert (ray.asked["num_cpus"], ray.asked["num_gpus"], ray.asked["max_retries"]) == (2, 0.5, 0)
    assert ray.bundled == {"fedmutual", "conf", "server_app.py", "client_app.py", "pyproject.toml"}


def test_a_lost_machine_costs_an_attempt_and_the_run_goes_on_from_what_came_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmutual.compare.cluster.has_checkpoint", Path.exists)
    files = {"checkpoint.safetensors": b"after round 1"}
    ray = FakeRay(
        [Beat("one", 1, b"", Changes(frozenset(files), files)), NodeDiedError("gone")],
        [Beat("two"), Beat("two", 3, b"", None, 0)],
    )
    work, said = started(tmp_path, ray)
    assert work.over()
    assert (work.code, work.problem, work.where) == (0, "", "two")
    assert said == [f"mutual, seed 0: lost with one (NodeDiedError); attempt 2 of {ATTEMPTS}"]
    assert [order.begun and dict(order.begun.files) for order in ray.orders] == [None, files]


def test_a_run_that_is_lost_again_and_again_is_given_up_by_name(tmp_path: Path) -> None:
    killed: list[Beat | Exception] = [Beat("one", 1, b"", None, -9)]
    ray = FakeRay(*[[*killed] for _ in range(ATTEMPTS)])
    work, said = started(tmp_path, ray)
    assert work.over()
    assert work.problem == f"lost {ATTEMPTS} times, the last time with one: its process was ended by signal 9"
    assert len(said) == len(ray.orders) - 1 == ATTEMPTS - 1


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            RayTaskError("Traceback\n  ...\nImportError: no fedmutual"),
            "its task failed: ImportError: no fedmutual",
        ),
        (RuntimeEnvSetupError("no disk\n..."), "Ray cannot set up its environment: no disk"),
    ],
)
def test_what_another_machine_cannot_mend_is_not_tried_again(
    tmp_path: Path, error: Exception, problem: str
) -> None:
    work, _ = started(tmp_path, FakeRay([error]))
    assert work.over()
    assert work.problem == problem


def test_a_run_that_fails_by_itself_is_not_tried_again(tmp_path: Path) -> None:
    work, said = started(tmp_path, FakeRay([Beat("one", 0, b"ValueError: so\n", None, 1)]))
    assert work.over()
    assert (work.code, work.problem, said) == (1, "", [])


def test_what_still_runs_is_cancelled(tmp_path: Path) -> None:
    ray = FakeRay([], [])
    cluster = RayCluster("local", print, ray)
    cluster.prepare(1)
    work = cluster.start(planned(), tmp_path / "a")
    cluster.end(lambda: True)
    assert ray.cancelled == [work.beats]


@pytest.mark.parametrize("address", ["nowhere:1", "ray://head:10001"])
def test_an_address_that_is_none_is_refused_by_name(address: str) -> None:
    with pytest.raises(SettingsError, match=f"--ray-address: .*{re.escape(address)}"):
        RayCluster(address, print, FakeRay()).prepare(1)


def test_a_ray_for_every_run_and_one_for_all_are_not_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "seed=0,1", "--engine", "flwr", "--ray-address", "local"]) == 2
    assert "--ray-address: --engine flwr" in capsys.readouterr().err


def test_data_of_the_command_s_disk_is_named_with_the_machine_that_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_address", lambda: "10.0.0.2")
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    run = planned(f"data.root='{photographs}'", "model.backbone=lite1", "rounds=3")
    assert needs(run) == {"data.root": str(photographs)}
    photographs.rmdir()
    (beat,) = carry_out(Order("a", run.overrides, {"data.root": str(photographs)}, node.versions(), None))
    assert re.match(rf"data\.root: {photographs} is not there on .* \(10\.0\.0\.2\): copy it", beat.problem)


def test_what_a_killed_task_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.tempfile, "gettempdir", lambda: str(tmp_path))
    for owner in (2**30, os.getpid()):
        (tmp_path / f"fedmutual-run-{owner}-x" / "run").mkdir(parents=True)
    node._remove_left()
    assert [path.name for path in tmp_path.iterdir()] == [f"fedmutual-run-{os.getpid()}-x"]


def test_another_version_is_named_with_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_address", lambda: "10.0.0.2")
    (beat,) = carry_out(Order("a", (), {}, {**node.versions(), "torch": "0.1"}, None))
    assert re.match(r"torch is 0\.1 here and 2\..* on .* \(10\.0\.0\.2\): install", beat.problem)


def test_a_folder_is_sent_as_what_changed_and_is_the_same_there(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "clients").mkdir(parents=True)
    (here / "history.jsonl").write_text("1\n")
    (here / "clients" / "model").write_text("old")
    (here / ".run.lock").touch()
    outgoing = Outgoing(here)
    replace_folder(there, outgoing.changes())
    (here / "clients" / "model").unlink()
    (here / "clients" / "new").write_text("new")
    changes = outgoing.changes()
    assert dict(changes.files) == {"clients/new": b"new"}
    replace_folder(there, changes)
    assert {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()} == {
        "history.jsonl",
        "clients/new",
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_replacement_that_is_cut_off_leaves_the_folder_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    replace_folder(folder, Changes(frozenset({"a"}), {"a": b"1"}))
    renames = iter([os.rename])

    def killed(*paths: Path) -> None:
        next(renames, None)(*paths)  # type: ignore[misc]  # the second one is none: TypeError

    monkeypatch.setattr("fedmutual.compare.carried.os.rename", killed)
    with pytest.raises(TypeError):
        replace_folder(folder, Changes(frozenset({"a"}), {"a": b"2"}))
    monkeypatch.undo()
    recover(folder)
    assert (folder / "a").read_bytes() == b"1"


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """Ray on two nodes of one machine, of one run each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster, cluster.add_node(num_cpus=1)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_survives_a_killed_node(two_nodes: Any, tmp_path: Path) -> None:
    cluster, second = two_nodes
    arguments = (*STUDY, "study.only=[mutual,fedasync]", f"cache_dir={tmp_path / 'cache'}")
    whole = tmp_path / "whole"
    whole.mkdir()
    assert compared(whole, arguments, jobs=2)[0] == 0
    folder = tmp_path / "study"
    folder.mkdir()

    def first_round_is_logged() -> bool:
        logs = folder.glob("outputs/compare/smoke/runs/*/*.log")
        return sum("round 1" in log.read_text() for log in logs) > 1

    def kill() -> None:
        wait_for(first_round_is_logged, "two runs never ran side by side")
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    status, out, errors = compared(folder, arguments, jobs=None, ray_address=cluster.address)
    killer.join()
    assert status == 0, errors
    assert "lost with " in out
    assert "attempt 2 of" in out
    assert results(folder) == results(whole)
    rows = list(csv.DictReader((folder / "outputs" / "compare" / "smoke" / "runs.csv").open()))
    assert len(rows) == 4
