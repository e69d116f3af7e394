"""What a study is: its variants, its axes, and how they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedmutual.settings import SettingsError, setting
from fedmutual.settings.compose import CONF_DIR

PREFIX = "study."


@dataclass(kw_only=True)
class StudySettings:
    """A study: ``conf/compare.yaml``, and what ``study`` in ``conf/experiment/<name>.yaml`` changes."""

    overrides: list[str] = setting("settings that all runs share, as Hydra overrides")
    variants: dict[str, list[str]] = setting(
        "what is compared: a name and its overrides; empty: what the axes vary, conditions and seed excepted"
    )
    axes: dict[str, str] = setting("what every variant is run with: a key and a Hydra sweep, such as 0,1,2")
    conditions: dict[str, list[str]] = setting(
        "under which everything is compared: a name and its overrides; each has a table of its own"
    )
    condition_groups: list[str] = setting(
        "axes of these groups (partition: also partition.alpha) are conditions, all others but seed variants"
    )
    only: list[str] = setting("the variants and the conditions to run; of a kind of which none is named, all")
    reference: str | None = setting("the variant that the others are compared with; null: the first")
    thresholds: list[float] = setting("accuracies whose price is reported: rounds, bytes, seconds")

    def check(self) -> str | None:
        """A threshold is a share, not a percentage."""
        wrong = [value for value in self.thresholds if not 0 < value < 1]
        if wrong:
            return f"study.thresholds: {wrong[0]:g} is no accuracy between 0 and 1"
        return None


@dataclass(frozen=True)
class Study:
    """A study as it was asked for: the settings, its name, and the overrides of the command line."""

    name: str
    settings: StudySettings
    given: tuple[str, ...]  # overrides for every run, sweeps among them
    output_dir: str | None


def load_study(arguments: Sequence[str]) -> Study:
    """Read a command line: ``experiment=NAME`` may name a study, ``study.KEY=VALUE`` changes it.

    Raises
    ------
    SettingsError
        Naming the key.
    """
    own: list[Override] = []
    given: list[str] = []
    name, output_dir = "", None
    for argument, override in zip(arguments, parsed(arguments), strict=True):
        key = override.key_or_group
        if key.startswith(PREFIX):
            if override.is_sweep_override():
                raise SettingsError(f"{argument}: give a sweep as the key's own value, such as seed=0,1")
            own.append(override)
        elif key == "experiment" and is_study(str(override.value())):
            name = str(override.value())
        elif key == "output_dir":
            output_dir = str(override.value())
        elif key in ("resume", "state_dir"):
            raise SettingsError(
                f"{key}: every run of a study has its own; to go on with a study, repeat its command"
            )
        else:
            given.append(argument)
    return Study(name, _study_settings(name, own), tuple(given), output_dir)


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Parse Hydra overrides, sweeps among them.

    Raises
    ------
    SettingsError
        With the text that is none.
    """
    result: list[Override] = []
    for text in overrides:
        try:
            result += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise SettingsError(f"{text!r} is no override: {str(error).splitlines()[0]}") from error
    return result


def is_study(name: str) -> bool:
    """Whether ``conf/experiment/<name>.yaml`` describes several runs and not one."""
    file = _file(name)
    return file.is_file() and "study" in _read(file)


def _file(name: str) -> Path:
    return CONF_DIR / "experiment" / f"{name}.yaml"


def _read(file: Path) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.load(file))
    return {str(key): value for key, value in container.items()} if isinstance(container, dict) else {}


def _study_settings(name: str, changes: Sequence[Override]) -> StudySettings:
    typed = OmegaConf.structured(StudySettings)
    parts: list[Any] = [OmegaConf.load(CONF_DIR / "compare.yaml")]
    if name:
        content = _read(_file(name))
        others = sorted(content.keys() - {"study"})
        if others:
            raise SettingsError(f"experiment={name}: {others[0]}: a study holds `study` and nothing else")
        parts.append(content["study"])
    try:
        merged = typed
        for part in parts:
            merged = OmegaConf.merge(merged, part)
        for change in changes:
            OmegaConf.update(merged, change.key_or_group.removeprefix(PREFIX), change.value(), merge=False)
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        where = f"{PREFIX}{key}" if key else "study"
        raise SettingsError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, StudySettings)
    problem = settings.check()
    if problem:
        raise SettingsError(problem)
    return settings
