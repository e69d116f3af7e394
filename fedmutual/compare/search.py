"""``fedmutual compare --trials N``: a search for settings, with Optuna."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from fedmutual.compare.outcome import read_summary
from fedmutual.compare.plan import SEED, Plan, PlannedRun, make_plan, swept_values
from fedmutual.compare.runner import Runner
from fedmutual.compare.settings import Study, parsed
from fedmutual.results.summary import mean
from fedmutual.settings import SettingsError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from rich.table import Table

    from fedmutual.simulation.interrupts import Interrupts

JOURNAL = "search.log"
SHOWN = 10  # trials in the table


class Search:
    """A search over the swept settings of a study, by the validation accuracy of the clients.

    The unseen images have no part in it. Each trial's value is the mean over its runs (seeds, conditions) of
    the clients' mean validation accuracy. All trials are in a file of the study's folder, so a repeated
    command goes on.

    Parameters
    ----------
    study : Study
        Its sweeps are the search space, but for ``seed``, which every trial runs: ``interval(a, b)``,
        ``tag(log, interval(a, b))``, ``range(a, b)``, ``a,b,c``.
    folder : Path

    Raises
    ------
    SettingsError
        There is nothing to search, the sweep is none that can be searched, or Optuna is missing.
    """

    def __init__(self, study: Study, folder: Path, cwd: Path) -> None:
        given = parsed(study.given)
        swept = [o for o in given if o.is_sweep_override() and o.key_or_group != SEED]
        if not swept:
            raise SettingsError(
                "--trials: nothing to search; give a setting an interval, such as "
                "'strategy.kl_weight=interval(0.3,3)'"
            )
        self._trials = _open(folder)
        self._space = {o.get_key_element(): distribution(o) for o in swept}
        fixed = tuple(o.input_line or "" for o in given if o not in swept)
        self._study, self._cwd = replace(study, given=fixed), cwd

    @property
    def done(self) -> list[optuna.trial.FrozenTrial]:
        """The finished trials, the best first."""
        finished = [t for t in self._trials.get_trials(deepcopy=False) if t.value is not None]
        return sorted(finished, key=lambda trial: -(trial.value or 0.0))

    def run(self, trials: int, runner: Runner, interrupts: Interrupts) -> None:
        """Do trials until there are ``trials`` finished ones; as many at a time as the runner has jobs.

        Raises
        ------
        SettingsError
            A run's settings are refused, or all runs of a trial failed.
        Interrupted
            A signal came.
        """
        while (missing := trials - len(self.done)) > 0:
            asked: list[tuple[optuna.Trial, Plan]] = []
            runs: list[PlannedRun] = []
            while len(asked) < missing and (not runs or len(runs) < runner.jobs):
                trial = self._trials.ask(self._space)
                asked.append((trial, self._plan(trial.params)))
                runs += asked[-1][1].runs
            runner.run(list({run.digest: run for run in runs}.values()), interrupts)
            for trial, plan in asked:
                self._tell(trial, plan, runner)

    def best(self) -> str:
        """The overrides of the best trial, as one types them."""
        return shlex.join([*self._study.given, *_point(self.done[0].params)])

    def table(self) -> Table:
        """The best trials."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title="best trials, by the clients' validation accuracy in %",
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        for name in ("trial", *self._space, "validation"):
            table.add_column(name, justify="right")
        for trial in self.done[:SHOWN]:
            values = (_text(trial.params[name]) for name in self._space)
            table.add_row(str(trial.number), *values, f"{100 * (trial.value or 0.0):.2f}")
        return table

    def _plan(self, values: Mapping[str, Any]) -> Plan:
        point = _point(values)
        plan = make_plan(replace(self._study, given=(*self._study.given, *point)), self._cwd)
        name = ", ".join(point)
        return replace(plan, runs=tuple(replace(run, variant=name) for run in plan.runs))

    def _tell(self, trial: optuna.Trial, plan: Plan, runner: Runner) -> None:
        from optuna.trial import TrialState

        summaries = [read_summary(runner.path(run)) for run in plan.runs]
        values = [_validation(s) for s in summaries if s is not None and s["status"] == "completed"]
        known = [value for value in values if value is not None]
        if len(known) == len(plan.runs):
            self._trials.tell(trial, mean(known))
            return
        self._trials.tell(trial, state=TrialState.FAIL)
        why = "have no validation images" if values else "failed: see the lines above"
        raise SettingsError(f"{', '.join(_point(trial.params))}: its runs {why}")


def distribution(override: Override) -> BaseDistribution:
    """Return what Optuna draws from, for a sweep in Hydra's grammar.

    Raises
    ------
    SettingsError
        For a pattern of names (``glob``).
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        log = "log" in sweep.tags
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return IntDistribution(sweep.start, sweep.end, log=log)
        return FloatDistribution(float(sweep.start), float(sweep.end), log=log)
    if isinstance(sweep, ChoiceSweep | RangeSweep):
        texts = [text.partition("=")[2] for text in swept_values(override)]
        return CategoricalDistribution(texts)
    raise SettingsError(f"{override.input_line}: a search takes interval(a,b), range(a,b) or a,b,c")


def _open(folder: Path) -> optuna.Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise SettingsError("--trials: Optuna is missing: pip install 'fedmutual[search]'") from error
    optuna.logging.set_verbosity(logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(
        study_name="search",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
    )
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a command that was killed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _point(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _validation(summary: Mapping[str, Any]) -> float | None:
    return mean(
        client["validation_accuracy"]
        for client in summary["clients"].values()
        if client.get("validation_accuracy") is not None
    )
