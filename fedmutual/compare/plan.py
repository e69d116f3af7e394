"""From a study to its runs, all of them checked before the first one starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from fedmutual.compare.settings import Study, parsed
from fedmutual.settings import DataSettings, SettingsError, as_container
from fedmutual.settings.compose import GROUP_KEYS
from fedmutual.simulation.request import Count, prepare

SEED = "seed"
# where a run's files are says nothing about what it computes
_NOWHERE = ".fedmutual-plan"  # a run's own folder has the digest of the checked settings in its name
_PLACES = ("output_dir", "state_dir", "cache_dir", "resume")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes
    ----------
    variant : str
        What is compared: the name in the study, or the values of the axes that are compared.
    condition : str
        Under which: the values of the condition axes; empty where there is none.
    seed : int
    overrides : tuple[str, ...]
        Complete, without the folders.
    rounds : int
    cpus : int
        Threads that it trains with.
    gpus : float
        Share of a GPU that a client has.
    digest : str
        Of its resolved settings.
    """

    variant: str
    condition: str
    seed: int
    overrides: tuple[str, ...]
    rounds: int
    cpus: int
    gpus: float
    digest: str

    @property
    def label(self) -> str:
        """For people."""
        return ", ".join(part for part in (self.variant, self.condition, f"seed {self.seed}") if part)

    @property
    def folder(self) -> str:
        """Below the study's folder. The last part has one length: it travels as the name of the run."""
        words = re.sub(r"[^A-Za-z0-9.=+-]+", "_", self.label.replace(", ", "-")).strip("_")
        return f"{words[:100]}/{self.digest}"


@dataclass(frozen=True)
class Plan:
    """All runs of a study, and the order of its variants and conditions in tables."""

    runs: tuple[PlannedRun, ...]
    variants: tuple[str, ...]
    conditions: tuple[str, ...]
    reference: str


def make_plan(study: Study, cwd: Path) -> Plan:
    """Expand a study and check every run's settings.

    Raises
    ------
    SettingsError
        With the name of the run that has a bad setting.
    """
    shared = _parsed_for("study.overrides", study.settings.overrides)
    given = parsed(study.given)
    fixed = {o.key_or_group for o in given if not o.is_sweep_override()}
    axes = {key: axis for key, axis in _axes(study).items() if key not in fixed}
    axes |= {o.key_or_group: o for o in given if o.is_sweep_override()}
    seeds = _seeds(axes.pop(SEED, None))
    swept = _points(list(axes.values()))
    plain = [o.input_line or "" for o in given if not o.is_sweep_override()]
    runs = []
    chosen = _chosen(study)
    named = (_named("variants", chosen[0]), _named("conditions", chosen[1]))
    count = _counting_once()
    for variant, condition, point in itertools.product(*named, swept):
        text = [*(o.input_line or "" for o in shared), *condition[1], *variant[1], *point, *plain]
        runs += _planned(study, variant[0], condition[0], point, text, seeds, cwd, count)
    _refuse_twins(runs)
    variants = tuple(dict.fromkeys(run.variant for run in runs))
    conditions = tuple(dict.fromkeys(run.condition for run in runs))
    reference = study.settings.reference or variants[0]
    if reference not in variants:
        raise SettingsError(f"study.reference: {reference!r} is none of {', '.join(variants)}")
    # seed by seed: what is there of a study that was stopped early can be compared
    return Plan(tuple(sorted(runs, key=lambda run: run.seed)), variants, conditions, reference)


def _chosen(study: Study) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The variants and the conditions that ``study.only`` names; all of a kind of which it names none."""
    variants, conditions, only = study.settings.variants, study.settings.conditions, study.settings.only
    unknown = [name for name in only if name not in variants and name not in conditions]
    if unknown:
        known = ", ".join([*variants, *conditions]) or "no variants"
        raise SettingsError(f"study.only: {unknown[0]!r} is none of {known}")
    named = [{name: own for name, own in kind.items() if name in only} for kind in (variants, conditions)]
    return named[0] or variants, named[1] or conditions


def _named(kind: str, choices: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Names and overrides; one without either where the study names none."""
    for name, own in choices.items():
        _parsed_for(f"study.{kind}.{name}", own)
    return list(choices.items()) or [("", [])]


def _parsed_for(where: str, overrides: Sequence[str]) -> list[Override]:
    result = parsed(overrides)
    for override in result:
        if override.is_sweep_override():
            raise SettingsError(f"{where}: {override.input_line}: sweeps belong to study.axes")
    return result


def _axes(study: Study) -> dict[str, Override]:
    """The study's own axes by key, in Hydra's syntax of a sweep; one value is a sweep as well."""
    return {key: parsed([f"{key}={sweep}"])[0] for key, sweep in study.settings.axes.items()}


def _points(axes: Sequence[Override]) -> list[list[str]]:
    """The product of all sweeps, the last one's values in turn: a list of overrides each."""
    return [list(point) for point in itertools.product(*(swept_values(axis) for axis in axes))]


def swept_values(axis: Override) -> list[str]:
    """Return an axis' values in turn, each as an override.

    Raises
    ------
    SettingsError
        They cannot be listed: those of an interval, or a pattern of names.
    """
    key = axis.get_key_element()
    if not axis.is_sweep_override():
        return [f"{key}={axis.get_value_element_as_str()}"]
    try:
        return [f"{key}={text}" for text in axis.sweep_string_iterator()]
    except HydraException as error:  # an interval, a pattern of names
        raise SettingsError(f"study.axes: {axis.input_line}: list the values, such as 0,1,2") from error


def _seeds(axis: Override | None) -> list[int]:
    """The seeds of the study; none where they are no axis."""
    if axis is None:
        return []
    values = [text.partition("=")[2] for (text,) in _points([axis])]
    wrong = [value for value in values if not value.isdecimal()]
    if wrong:
        raise SettingsError(f"seed: {wrong[0]!r} is no whole number from 0 on")
    return [int(value) for value in values]


def _planned(
    study: Study,
    variant: str,
    condition: str,
    point: Sequence[str],
    overrides: list[str],
    seeds: list[int],
    cwd: Path,
    count: Count,
) -> list[PlannedRun]:
    """The runs of one variant under one condition: their settings differ by the seed, and compose once."""
    compared, conditions = ([variant] if variant else []), ([condition] if condition else [])
    for text in point:
        key, _, value = text.lstrip("+").partition("=")
        names = conditions if key.split(".")[0] in study.settings.condition_groups else compared
        # a group's choice speaks for itself: "dirichlet", but "partition.alpha=0.3"
        names.append(value if key in GROUP_KEYS else text)
    try:
        request = prepare([*overrides, f"output_dir={_NOWHERE}"], cwd, count=count)
    except SettingsError as error:
        where = ", ".join([*compared, *conditions]) or "the study"
        raise SettingsError(f"{where}: {error}") from error
    settings = request.settings
    places = ("output_dir", "state_dir", SEED)
    shared = [o for o in request.overrides if o.partition("=")[0] not in places]
    return [
        PlannedRun(
            variant=", ".join(compared) or settings.strategy.name,
            condition=", ".join(conditions),
            seed=seed,
            overrides=(*shared, f"{SEED}={seed}"),
            rounds=settings.rounds,
            cpus=settings.simulation.client_cpus,
            gpus=settings.simulation.client_gpus,
            digest=digest(as_container(replace(settings, seed=seed))),
        )
        for seed in seeds or [settings.seed]
    ]


def _counting_once() -> Count:
    """Count the images of each data source at its first run: a folder may hold many thousands."""
    known: dict[str, tuple[int, int | None] | None] = {}

    def count(data: DataSettings) -> tuple[int, int | None] | None:
        if repr(data) not in known:
            known[repr(data)] = data.count()
        return known[repr(data)]

    return count


def digest(settings: dict[str, Any]) -> str:
    """16 hexadecimal digits of all settings but the folders: equal digests, equal results."""
    content = {key: value for key, value in settings.items() if key not in _PLACES}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_twins(runs: Sequence[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        twin = seen.setdefault(run.digest, run)
        if twin is not run:
            raise SettingsError(f"{twin.label} and {run.label} have the same settings: leave one out")
