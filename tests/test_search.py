"""``fedmutual compare --trials``: a search by validation accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.types import Override

from fedmutual.cli import main
from fedmutual.compare import search as module
from fedmutual.compare.plan import PlannedRun
from fedmutual.compare.search import JOURNAL, Search, distribution
from fedmutual.compare.settings import load_study, parsed
from fedmutual.settings import SettingsError

optuna = pytest.importorskip("optuna")

RATE = "optimizer.learning_rate=tag(log,interval(1e-5,1e-1))"


class Pretended:
    """A runner that trains nothing: runs are best at a learning rate of 0.003."""

    jobs = 2

    def __init__(self) -> None:
        self.runs: list[PlannedRun] = []

    def run(self, runs: Sequence[PlannedRun], interrupts: Any) -> None:
        self.runs += runs

    def path(self, run: PlannedRun) -> Path:
        return Path(run.digest)

    def summary(self, path: Path) -> dict[str, Any] | None:
        run = next(run for run in self.runs if run.digest == str(path))
        rate = next(
            float(o.partition("=")[2]) for o in run.overrides if o.startswith("optimizer.learning_rate")
        )
        if rate > 0.09:
            return None
        value = 0.9 - 0.1 * abs(math.log10(rate / 0.003)) + 0.001 * run.seed
        return {"status": "completed", "clients": {"a": {"validation_accuracy": value}}}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    pretended = Pretended()
    monkeypatch.setattr(module, "read_summary", pretended.summary)
    return pretended


def searching(folder: Path, *arguments: str) -> Search:
    return Search(load_study([*arguments, "rounds=1"]), folder, folder)


def test_a_search_comes_near_the_best_and_goes_on_where_it_was(tmp_path: Path, runner: Pretended) -> None:
    first = searching(tmp_path, RATE, "seed=0,1")
    first.run(10, runner, None)  # type: ignore[arg-type]
    assert len(runner.runs) == 20  # two seeds a trial
    again = searching(tmp_path, RATE, "seed=0,1")
    assert len(again.done) == 10
    again.run(30, runner, None)  # type: ignore[arg-type]
    assert len(runner.runs) == 60
    best = again.done[0]
    assert 0.001 < best.params["optimizer.learning_rate"] < 0.01
    assert best.value == max(trial.value for trial in again.done)
    assert "optimizer.learning_rate=0.00" in again.best()
    assert "seed=0,1" in again.best()
    assert again.table().row_count == 10
    assert (tmp_path / JOURNAL).stat().st_size > 0


def test_a_trial_whose_runs_fail_ends_the_search_and_counts_for_nothing(
    tmp_path: Path, runner: Pretended
) -> None:
    found = searching(tmp_path, "optimizer.learning_rate=0.095,0.099")
    with pytest.raises(SettingsError, match=r"optimizer.learning_rate=0.09\d: its runs failed"):
        found.run(1, runner, None)  # type: ignore[arg-type]
    assert found.done == []


def test_what_cannot_be_searched_is_refused(tmp_path: Path, runner: Pretended) -> None:
    with pytest.raises(SettingsError, match="nothing to search"):
        searching(tmp_path, "optimizer.learning_rate=0.1", "seed=0,1")
    with pytest.raises(SettingsError, match="glob"):
        searching(tmp_path, "model=glob(*)")
    with pytest.raises(SettingsError, match="learning_rate"):
        searching(tmp_path, "optimizer.learning_rate=-2,-1").run(1, runner, None)  # type: ignore[arg-type]


def of(text: str) -> Any:
    (override,) = parsed([text])
    assert isinstance(override, Override)
    return distribution(override)


def test_hydras_sweeps_are_optunas_distributions() -> None:
    kinds = optuna.distributions
    assert of("a=interval(0.5,3)") == kinds.FloatDistribution(0.5, 3)
    assert of(RATE) == kinds.FloatDistribution(1e-5, 1e-1, log=True)
    assert of("a=int(interval(1,8))") == kinds.IntDistribution(1, 8)
    assert of("a=range(1,4)") == kinds.CategoricalDistribution(["1", "2", "3"])
    assert of("a=x,y") == kinds.CategoricalDistribution(["x", "y"])


@pytest.mark.slow
def test_the_command_searches_real_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = (
        "rounds=1 num_clients=2 data.pool_size=80 data.unseen_size=20 data.image_size=20 public.size=12 "
        "public.fill=0"
    )
    command = ["compare", "--trials", "2", "train.local_epochs=1,2", *small.split()]
    assert main([*command, "tracking.loggers=[]", f"output_dir={tmp_path / 'search'}"]) == 0
    out = capfd.readouterr().out
    assert "Best: fedmutual run" in out
    assert "train.local_epochs=" in out
    assert "best trials" in out
