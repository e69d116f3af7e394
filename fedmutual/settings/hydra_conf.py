"""One config from the files of ``conf/`` and overrides: what Hydra composes, most of it remembered.

Hydra reads and merges every file anew for each composition. A study composes hundreds that differ in a few
values. So Hydra composes each choice of groups once, and the values are set on a copy with the call that
Hydra makes for them, ``OmegaConf.update``. Overrides that are neither a plain choice nor a plain value, and
whatever is wrong, are left to Hydra: its message is what the user reads.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedmutual.settings import Settings

EXPERIMENT = "experiment"
_HYDRA_LOCK = threading.Lock()  # GlobalHydra is a process-wide singleton
_SETTINGS = frozenset(entry.name for entry in fields(Settings))

ConfigStore.instance().store(name="schema", node=Settings)


def config_of(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """Compose a config, equal to :func:`by_hydra`'s; the caller may change it.

    Parameters
    ----------
    folder : Path
        ``conf/``.
    overrides : Sequence[str]
        Hydra overrides.

    Raises
    ------
    HydraException, OmegaConfBaseException, ValueError
        Hydra's own.
    """
    try:
        divided = _divided(folder, overrides)
        if divided is not None:
            choices, values = divided
            config = _conf(folder, _state(folder)).chosen(choices)
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            return config
    except (HydraException, OmegaConfBaseException, ValueError):
        pass  # Hydra, asked for the whole, says what is wrong
    return by_hydra(folder, overrides)


def by_hydra(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """Let Hydra compose everything."""
    with hydra_on(folder):
        return hydra_compose(config_name="config", overrides=list(overrides))


@contextmanager
def hydra_on(folder: Path) -> Iterator[None]:
    """Let Hydra read ``folder`` while the block runs; one block at a time."""
    with _HYDRA_LOCK:
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            yield


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Override:
    """Parse an override; the result is shared.

    Raises
    ------
    HydraException
        The text is none.
    """
    return OverridesParser.create().parse_override(text)


def _divided(folder: Path, overrides: Sequence[str]) -> tuple[dict[str, str], list[Override]] | None:
    """Return the choices of groups (group -> override; the last one wins) and the values, in their order.

    None where there is anything else among them: a deletion, an addition, a package, a sweep.
    """
    choices: dict[str, str] = {}
    values: list[Override] = []
    for text in overrides:
        override = parsed(text)
        key = override.key_or_group
        if override.type != OverrideType.CHANGE or override.package or override.is_sweep_override():
            return None
        if (folder / key).is_dir():
            if not isinstance(override.value(), str):
                return None
            choices[key] = text
        elif key.partition(".")[0] in _SETTINGS:
            values.append(override)
        else:
            return None
    return choices, values


class _Conf:
    """What Hydra composed of one state of ``conf/``.

    Where no file of a group draws in others, one group's choice says nothing about another group's values.
    Then what Hydra made of a choice stands for it beside every choice of the other groups (but not under
    another experiment, which may change any value).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups = [name for name in sorted(_SETTINGS) if (folder / name).is_dir()]
        self.separable = _separable(folder)
        self._composed: dict[frozenset[str], bytes] = {}  # unpickled in half the time of a deep copy
        self._parts: dict[tuple[str, str, str], DictConfig] = {}  # (experiment, group, choice)
        self._whole: dict[str, DictConfig] = {}  # experiment -> config, with any choices

    def chosen(self, choices: Mapping[str, str]) -> DictConfig:
        """Compose group -> override; returns a copy."""
        key = frozenset(choices.values())
        if key not in self._composed:
            found = self._from_parts(choices)
            self._composed[key] = pickle.dumps(self._by_hydra(choices) if found is None else found)
        return cast(DictConfig, pickle.loads(self._composed[key]))

    def _from_parts(self, choices: Mapping[str, str]) -> DictConfig | None:
        experiment = choices.get(EXPERIMENT, "")
        parts = {group: self._parts.get((experiment, group, choices.get(group, ""))) for group in self.groups}
        if not self.separable or None in parts.values():
            return None
        config = copy.deepcopy(self._whole[experiment])
        for group, part in parts.items():
            config[group] = part
        return config

    def _by_hydra(self, choices: Mapping[str, str]) -> DictConfig:
        config = by_hydra(self.folder, list(choices.values()))
        experiment = choices.get(EXPERIMENT, "")
        self._whole.setdefault(experiment, config)
        for group in self.groups:
            self._parts.setdefault((experiment, group, choices.get(group, "")), config[group])
        return config


def _separable(folder: Path) -> bool:
    """Whether no file of a group has a defaults list or a package, and no other file refers to a choice."""
    for path in folder.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        group = path.relative_to(folder).parts[0]
        if path.parent == folder or group == EXPERIMENT:
            if "${" in text:
                return False
        elif re.search(r"\bdefaults['\"]?\s*:|#\s*@", text):
            return False
    return True


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every file: they may change in the life of a notebook."""
    found = []
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            status = os.stat(path)
            found.append((path, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


@functools.lru_cache(maxsize=2)
def _conf(folder: Path, state: tuple[tuple[str, int, int], ...]) -> _Conf:
    return _Conf(folder)
