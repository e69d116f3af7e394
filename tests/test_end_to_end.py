"""The whole of it: ``fedmutual run``, a real SuperLink, Ray, SuperNodes and the project's own apps.

One run is the installed wheel's, the others are this checkout's: equal bits hold for both.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command import RunCommand
from installation import build, copy_checkout, environment
from safetensors.torch import load_file

from fedmutual.learning.evaluation import predict
from fedmutual.models.build import build_model, load_weights
from fedmutual.results.directory import read_history
from fedmutual.settings import ModelSettings
from fedmutual.settings.compose import compose
from fedmutual.simulation.inprocess import run_inprocess
from fedmutual.simulation.progress import round_line

pytestmark = pytest.mark.slow

TINY = (
    "num_clients=2", "rounds=3", "data.image_size=24", "data.pool_size=160", "data.unseen_size=60",
    "train.local_epochs=1", "strategy.public_epochs=1", "strategy.min_steps=1", "public.fill=0",
    "partition=dirichlet", "partition.alpha=1.0",
)  # fmt: skip


@dataclass
class Run:
    """A run that has ended: its results, exit code, what was printed, and the processes that it left."""

    output: Path
    cache: Path
    code: int
    printed: str
    left: list[Any]

    @classmethod
    def of(cls, command: RunCommand, output: Path, cache: Path) -> Run:
        code, printed = command.end()
        return cls(output, cache, code, printed, command.left())

    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.output / "summary.json").read_text())
        return content

    def reported(self) -> list[tuple[int, str]]:
        """Who reported when; within a round the order is that of the node ids, which are random."""
        return sorted((line["round"], line["client"]) for line in read_history(self.output))

    def models(self) -> dict[str, Path]:
        return {path.parent.name: path for path in (self.output / "clients").glob("*/*/model.safetensors")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to: by the program of an installed wheel, in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_checkout(folder / "checkout")
    _, wheel = build(folder / "checkout", folder)
    program = environment(wheel, folder / "environment") / "fedmutual"
    empty = folder / "empty"
    command = RunCommand(empty, *TINY, "output_dir=out", "cache_dir=cache", program=[str(program)])
    run = Run.of(command, empty / "out", empty / "cache")
    assert run.code == 0, run.printed
    return run


@pytest.fixture(scope="module")
def interrupted(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run by this checkout, ended with Ctrl-C after its first round, while its clients hang."""
    folder = tmp_path_factory.mktemp("checkout") / "interrupted"
    output = folder / "out"
    slow = "exchange.poll_interval=0.5"  # so that it is surely seen between two rounds
    paths = (f"output_dir={output}", f"cache_dir={finished.cache}")
    command = RunCommand(folder, *TINY, slow, *paths)
    command.wait_until((output / "checkpoint.safetensors").exists)
    clients = command.clients()
    for client in clients:
        client.suspend()
    assert clients
    command.process.send_signal(signal.SIGINT)
    return Run.of(command, output, finished.cache)


def same_models(one: Run, other: Run) -> bool:
    first, second = one.models(), other.models()
    assert first.keys() == second.keys() == {"client-0", "client-1"}
    for name, path in first.items():
        expected, found = load_file(path), load_file(second[name])
        if expected.keys() != found.keys() or not all(torch.equal(expected[k], found[k]) for k in expected):
            return False
    return True


def figures(run: Path) -> list[dict[str, Any]]:
    """The history without what is another run's by nature; the runs' names differ, so the downlink too."""
    own = ("seconds", "node_id", "downlink_bytes")
    lines = [{k: v for k, v in line.items() if not k.endswith(own)} for line in read_history(run)]
    return sorted(lines, key=lambda line: (line["round"], line["client"]))


def test_a_run_leaves_what_it_promises(finished: Run) -> None:
    output, result = finished.output, finished.summary()
    assert (result["status"], result["strategy"], result["rounds_completed"]) == ("completed", "mutual", 3)
    assert set(result["clients"]) == {"client-0", "client-1"}
    lines = read_history(output)
    assert finished.reported() == [(r, f"client-{i}") for r in range(1, 5) for i in range(2)]
    for name, found in result["clients"].items():
        own = [line for line in lines if line["client"] == name]
        assert found["uplink_bytes"] == sum(line["uplink_bytes"] for line in own)
        assert 0 <= found["unseen_accuracy"] <= 1
        assert found["finished"]
    assert result["unseen"]["num_examples"] == 60
    for name in ("config.yaml", "accuracy.png", "collaboration.png", "report.html"):
        assert (output / name).stat().st_size > 0


def test_a_run_shows_its_rounds_and_leaves_no_process(finished: Run) -> None:
    lines = finished.printed.splitlines()
    history = read_history(finished.output)
    rounds = [[line for line in history if line["round"] == number] for number in (1, 2, 3, 4)]
    shown = [line for line in lines if line.startswith(("round", "closing"))]
    assert shown == [round_line(rows, 3, 2).rstrip() for rows in rounds]
    assert f"Results: {finished.output}" in lines
    assert finished.left == []


def test_the_wheel_writes_nothing_but_what_it_is_told(finished: Run) -> None:
    assert {path.name for path in finished.output.parent.iterdir()} == {"out", "cache"}


def test_a_client_s_model_is_rebuilt_from_its_folder(finished: Run) -> None:
    data = compose([*TINY, f"cache_dir={finished.cache}"]).data.load(finished.cache)
    images = torch.from_numpy(data.unseen.images.copy()).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.unseen.labels)
    for name, weights in finished.models().items():
        card = json.loads((weights.parent / "model.json").read_text())
        settings = ModelSettings(target=card["target"], arguments=card["arguments"], per_client=[])
        model, _ = build_model(settings, len(card["classes"]), card["image_size"], seed=0)
        load_weights(model, load_file(weights))
        right = (predict(model, images).argmax(dim=1) == labels).float().mean()
        said = finished.summary()["clients"][name]["unseen_accuracy"]
        assert float(right) == pytest.approx(said, abs=0.02)


def test_the_in_process_engine_gives_the_same_bits(finished: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run_inprocess([*TINY, f"cache_dir={finished.cache}"], output) == 0
    assert figures(output) == figures(finished.output)
    assert same_models(Run(output, finished.cache, 0, "", []), finished)


def test_ctrl_c_stops_everything(interrupted: Run) -> None:
    assert interrupted.code == 130, interrupted.printed
    summary = interrupted.summary()
    assert (summary["status"], summary["reason"]) == ("stopped", "stopped by SIGINT")
    assert summary["rounds_completed"] < 3
    assert interrupted.left == []


def test_interrupted_and_resumed_ends_with_the_same_bits(
    interrupted: Run, finished: Run, tmp_path: Path
) -> None:
    output, cache = interrupted.output, interrupted.cache
    resumed = Run.of(RunCommand(tmp_path / "run", f"resume={output}", f"cache_dir={cache}"), output, cache)
    assert resumed.code == 0, resumed.printed
    assert resumed.summary()["status"] == "completed"
    assert resumed.reported() == finished.reported()
    assert same_models(resumed, finished)
    assert resumed.left == []
