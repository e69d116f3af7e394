"""Loggers hear what the history holds: live, after a resume, and without ever ending a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_grid import play
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedmutual.cli import main
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, SettingsError
from fedmutual.settings.compose import compose
from fedmutual.tracking import tracker as tracker_module
from fedmutual.tracking.tensorboard import TensorBoard
from fedmutual.tracking.tracker import LatestMeans, Tracking, figures, missing_logger


def line(number: int, client: str, **values: Any) -> dict[str, Any]:
    return {"round": number, "client": client, "node_id": 7, "closing": False, **values}


def scalars(folder: Path, client: str, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard" / client))
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, pytest.approx(event.value, abs=1e-6)) for event in events.Scalars(tag)]


class TestFigures:
    def test_by_group(self) -> None:
        row = line(
            3, "a", validation_accuracy=0.5, kl_after=0.1, uplink_bytes=10, train_seconds=2.0, seconds=3,
            loss_after=1, model="VisionNet", unseen_recall=[1.0, None], unseen_auroc=float("nan"), ok=True,
        )  # fmt: skip
        assert figures(row) == {
            "validation/accuracy": 0.5, "kl/after": 0.1, "traffic/uplink_bytes": 10.0, "seconds/train": 2.0,
            "seconds/client": 3.0, "other/loss_after": 1.0,
        }  # fmt: skip

    def test_a_rejected_report_has_none(self) -> None:
        assert figures(line(1, "a", validation_accuracy=0.5, rejected="not finite")) == {}

    def test_the_mean_is_over_the_last_of_every_client(self) -> None:
        means = LatestMeans()
        assert means.add([line(1, "a", kl_before=1.0), line(1, "b", kl_before=3.0)]) == {"kl/before": 2.0}
        assert means.add([line(2, "b", kl_before=2.0)]) == {
            "kl/before": 1.5
        }  # a, asynchronously, has said nothing
        assert means.add([line(2, "a", validation_accuracy=0.5)]) == {"validation/accuracy": 0.5}

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1e6, 1e6)), min_size=1))
    def test_a_mean_lies_between_the_extremes(self, said: list[tuple[str, float]]) -> None:
        last = dict(said)
        means = LatestMeans()
        for client, value in said:
            found = means.add([line(1, client, kl_before=value)])
        assert min(last.values()) - 1e-6 <= found["kl/before"] <= max(last.values()) + 1e-6


class TestTensorBoard:
    def test_figures_are_on_the_disk_while_the_run_goes_on(self, tmp_path: Path) -> None:
        board = TensorBoard(compose(), tmp_path, [])
        board.log([line(1, "a", validation_accuracy=0.5), line(1, "b", validation_accuracy=0.7)])
        assert scalars(tmp_path, "a", "validation/accuracy") == [(1, 0.5)]
        assert scalars(tmp_path, "mean", "validation/accuracy") == [(1, 0.6)]
        board.log([line(2, "a", validation_accuracy=0.9)])
        assert scalars(tmp_path, "a", "validation/accuracy") == [(1, 0.5), (2, 0.9)]
        board.close({"status": "completed"})
        events = EventAccumulator(str(tmp_path / "tensorboard" / "mean"))
        events.Reload()
        (settings,) = events.Tensors("settings")[0].tensor_proto.string_val
        assert b"kl_weight: 1.0" in settings

    def test_a_name_is_no_path(self, tmp_path: Path) -> None:
        TensorBoard(compose(), tmp_path / "run", []).log([line(1, "../../x", kl_before=1.0)])
        assert scalars(tmp_path / "run", ".._.._x", "kl/before") == [(1, 1.0)]
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_a_whole_run_and_its_resume(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        played = play(run, "rounds=3", clients=2)
        assert played.summary["status"] == "completed"
        said = {
            (row["round"], row["client"]): row["validation_accuracy"]
            for row in played.history
            if row.get("validation_accuracy") is not None
        }
        before = scalars(run, "client-1", "validation/accuracy")
        assert before == [(number, said[number, "client-1"]) for number in (1, 2, 3, 4)]
        # the last two rounds are lost, as after a crash, and run again
        lines = [row for row in played.history if row["round"] <= 2]
        (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        TensorBoard(compose(), run, lines)
        assert scalars(run, "client-1", "validation/accuracy") == before[:2]

    def test_it_imports_neither_torch_nor_tensorflow(self) -> None:
        code = (
            "import sys, fedmutual.tracking.tensorboard; "
            "print([name for name in ('torch', 'tensorflow', 'mlflow', 'wandb') if name in sys.modules])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"


class TestChoice:
    @pytest.fixture(autouse=True)
    def _absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = dict(tracker_module.LOGGERS)
        known["wandb"] = (known["wandb"][0], "no_such_package_wandb", known["wandb"][2])
        monkeypatch.setattr(tracker_module, "LOGGERS", known)

    def test_a_name_that_is_none_is_refused(self) -> None:
        with pytest.raises(
            SettingsError, match=r"tracking.loggers: 'tensorbord' is none of tensorboard, mlflow"
        ):
            compose(["tracking.loggers=[tensorbord]"])

    def test_one_that_is_not_installed_is_refused_before_anything_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert missing_logger(compose()) is None
        monkeypatch.chdir(tmp_path)
        assert main(["run", "tracking.loggers=[wandb]"]) == 2
        assert (
            "tracking.loggers: wandb is not installed: pip install 'fedmutual[wandb]'"
            in capsys.readouterr().err
        )
        played = play(tmp_path / "run", "tracking.loggers=[wandb]", clients=1)
        assert isinstance(played.error, SettingsError)
        assert list(tmp_path.iterdir()) == []

    def test_none_costs_nothing(self, tmp_path: Path) -> None:
        Tracking(compose(["tracking.loggers=[]"]), tmp_path, []).log([line(1, "a", kl_before=1.0)])
        assert list(tmp_path.iterdir()) == []


class Broken:
    """A logger whose disk is full in the second round."""

    def __init__(self, settings: Settings, folder: Path, history: Any) -> None:
        self.heard = 0

    def log(self, lines: Any) -> None:
        self.heard += 1
        if self.heard == 2:
            raise OSError("no space left on device")

    def close(self, summary: Any) -> None:
        raise AssertionError("it was left out before")


def test_a_logger_that_breaks_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(tracker_module, "_load", lambda name: Broken)
    played = play(tmp_path / "run", "rounds=3", clients=1)
    assert (played.summary["status"], played.summary["rounds_completed"]) == ("completed", 3)
    assert [m for m in said() if "no space left" in m] == [
        "tensorboard failed and gets no more of this run: OSError: no space left on device"
    ]


def test_listeners_hear_what_is_on_the_disk(tmp_path: Path) -> None:
    journal = RunDirectory.create(tmp_path / "run", {}, "r")
    heard: list[int] = []
    journal.listeners.append(lambda lines: heard.append(len(journal.history())))
    journal.append([line(1, "a"), line(1, "b")])
    journal.append([line(2, "a")])
    assert heard == [2, 3]


ROUNDS = [[line(n, c, validation_accuracy=n / 10) for c in ("a", "b")] for n in (1, 2, 3)]


@pytest.mark.slow
def test_mlflow_in_a_database_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    from fedmutual.tracking.mlflow import MLflow

    first = MLflow(compose(["seed=5"]), tmp_path, [])
    first.log(ROUNDS[0])
    second = MLflow(compose(["seed=5"]), tmp_path, ROUNDS[0])  # resumed after a crash
    second.log(ROUNDS[1])
    second.close({"status": "completed", "reason": ""})
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedmutual")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params["seed"]) == ("FINISHED", "5")
    assert run.data.params["strategy.kl_weight"] == "1.0"
    history = client.get_metric_history(run.info.run_id, "a/validation/accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.2)]
    assert run.data.metrics["mean/validation/accuracy"] == 0.2


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path, offline: None) -> None:
    pytest.importorskip("wandb")
    from fedmutual.tracking.wandb import WeightsAndBiases

    run = WeightsAndBiases(compose(), tmp_path, ROUNDS[0])
    run.log(ROUNDS[1])
    assert run._run.summary["validation/accuracy/a"] == 0.2
    assert run._run.summary["validation/accuracy/mean"] == 0.2
    assert run._run.config["strategy"]["name"] == "mutual"
    run.close({"status": "completed"})
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert written.stat().st_size > 0
