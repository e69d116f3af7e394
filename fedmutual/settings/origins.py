"""Where each setting's value comes from, as Hydra composed it.

Hydra merges, in this order: the files of ``conf/`` that its defaults list names (the group's choice, then
``config.yaml``, then the experiment's), the overrides of the command line, and last what a node says of
itself. The last one that names a key gave its value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fedmutual.settings import compose as composition
from fedmutual.settings.hydra_conf import hydra_on, parsed
from fedmutual.settings.pretrained import pretrained_settings
from fedmutual.settings.schema import ModelSettings

COMMAND_LINE, NODE = "command line", "node configuration"


@dataclass(frozen=True)
class Origin:
    """One setting.

    Attributes
    ----------
    key : str
        As it is typed in an override, such as "train.batch_size"; a group's choice has the group's name.
    value : Any
        As it holds for the run.
    source : str
        A file of ``conf/``, "command line", "node configuration", or what the caller gave in ``labels``.
    """

    key: str
    value: Any
    source: str


def origins(
    overrides: Sequence[str],
    node_config: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[Origin]:
    """Return every setting with its source, in the order of ``conf/``.

    Parameters
    ----------
    overrides : Sequence[str]
        Hydra overrides of the run.
    node_config : Mapping[str, Any] | None
        A SuperNode's ``--node-config``.
    labels : Mapping[str, str] | None
        Override -> source, for those that are not from the command line.

    Raises
    ------
    SettingsError
        As :func:`fedmutual.settings.compose.compose`.
    """
    composition.compose(overrides, node_config)  # refuses what is wrong
    node = dict(node_config or {})
    run, own = composition.effective_overrides(overrides, node)
    config = composition.composed(run, own, node)
    with hydra_on(composition.CONF_DIR):
        loader = GlobalHydra.instance().config_loader()
        found = loader.compute_defaults_list("config", [*run, *own], RunMode.RUN)
    origin: dict[str, str] = {}
    for default in found.defaults:
        path = composition.CONF_DIR / f"{default.config_path}.yaml"
        if path.is_file():
            origin |= dict.fromkeys(_keys_of(path, default.package or ""), _name(path))
    origin |= _overridden(run, labels or {}, config) | _overridden(own, dict.fromkeys(own, NODE), config)
    if "data-dir" in node:
        origin |= {f"data.{key}": NODE for key in composition.FOLDER_KEYS if key in config.data}
    choices = [
        Origin(group, choice, _choice_source(found.overrides, group, [*run, *own], labels or {}, own))
        for group, choice in sorted(found.overrides.known_choices.items())
        if group in composition.GROUP_KEYS
    ]
    values = _flat(config)
    return choices + [Origin(key, value, origin[key]) for key, value in values.items()]


def meanings(settings: Any, prefix: str = "") -> dict[str, str]:
    """Return key -> what it means, from the schema's own words.

    Parameters
    ----------
    settings : Any
        A settings dataclass, such as ``compose()`` gives.
    """
    found: dict[str, str] = {}
    for entry in fields(settings):
        key, value = f"{prefix}{entry.name}", getattr(settings, entry.name)
        if is_dataclass(value):
            found |= meanings(value, f"{key}.")
            pretrained = pretrained_settings(value) if isinstance(value, ModelSettings) else None
            found |= {} if pretrained is None else meanings(pretrained, f"{key}.")
        elif entry.metadata.get("help"):
            found[key] = entry.metadata["help"]
    return found


def _keys_of(path: Path, package: str) -> list[str]:
    content = OmegaConf.load(path)
    assert isinstance(content, DictConfig)
    plain = {key: value for key, value in content.items() if key != "defaults"}
    return list(_flat(OmegaConf.create(plain), f"{package}." if package else ""))


def _overridden(given: Sequence[str], labels: Mapping[str, str], config: DictConfig) -> dict[str, str]:
    """Key -> source of the settings that overrides set one by one (not by a group's choice)."""
    known = _flat(config)
    origin: dict[str, str] = {}
    for text in given:
        key = parsed(text).key_or_group
        hit = [name for name in known if name == key or name.startswith(f"{key}.")]
        if key not in composition.GROUP_KEYS or not isinstance(OmegaConf.select(config, key), DictConfig):
            origin |= dict.fromkeys(hit, labels.get(text, COMMAND_LINE))
    return origin


def _choice_source(
    overrides: Any, group: str, given: Sequence[str], labels: Mapping[str, str], own: Collection[str]
) -> str:
    for text in reversed(given):
        if parsed(text).key_or_group == group:
            return NODE if text in own else labels.get(text, COMMAND_LINE)
    metadata = overrides.override_metadata.get(group)
    by = metadata.containing_config_path if metadata is not None else None
    return _name(composition.CONF_DIR / f"{by or 'config'}.yaml")


def _name(path: Path) -> str:
    return f"conf/{path.relative_to(composition.CONF_DIR).as_posix()}"


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Key -> value, lists and empty groups whole."""
    found: dict[str, Any] = {}
    for key in config:
        value = config._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and len(value):
            found |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, DictConfig):
            found[f"{prefix}{key}"] = (
                OmegaConf.to_container(value) if OmegaConf.is_list(value) else config[key]
            )
    return found
