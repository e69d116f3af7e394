"""From Hydra overrides and ``conf/`` to checked settings.

:func:`compose` turns a list of Hydra overrides into a checked :class:`~fedmutual.settings.Settings`;
:func:`from_contexts` does the same from what Flower hands to an app. A misspelt key, a wrong type or a
value out of range raises :class:`~fedmutual.settings.SettingsError` with the key's full name, before anything
starts.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.utils import get_class, get_object
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedmutual.appfolder import app_folder
from fedmutual.settings import (
    ConsensusSettings,
    DataSettings,
    ModelSettings,
    PartitionSettings,
    Settings,
    SettingsError,
    StrategySettings,
)
from fedmutual.settings.explain import explained, not_a_choice, unknown_key, wrong_type
from fedmutual.settings.hydra_conf import config_of
from fedmutual.settings.pretrained import pretrained_settings

CONF_DIR = app_folder() / "conf"

# Keys of `[tool.flwr.app.config]` that choose a Hydra group; an empty string means "as in conf/".
GROUP_KEYS = (
    "experiment",
    "strategy",
    "consensus",
    "model",
    "data",
    "partition",
    "public",
    "optimizer",
    "augment",
)
PLAIN_KEYS = ("seed", "rounds", "output_dir")

CUSTOM_DATA = "fedmutual.data.custom.CustomSettings"  # of data=custom, whose _target_ is somebody's function

_TYPED: dict[tuple[type, str], Any] = {}  # (dataclass, values) -> object: a study's runs share most of them


def compose(overrides: Sequence[str] = (), node_config: Mapping[str, Any] | None = None) -> Settings:
    """Resolve Hydra overrides (and a node's own configuration, which wins) into checked settings.

    Parameters
    ----------
    overrides : Sequence[str]
        Hydra overrides, such as ``["partition=dirichlet", "partition.alpha=0.3"]``.
    node_config : Mapping[str, Any] | None
        A SuperNode's ``--node-config``; ``data-dir``, ``state-dir``, ``cache-dir``, ``device`` and ``model``
        are settings.

    Raises
    ------
    SettingsError
        With the full name of the key and what it takes.
    """
    node = tuple(sorted((k, str(v)) for k, v in (node_config or {}).items() if k in NODE_KEYS))
    return _compose(tuple(overrides), node)


def from_contexts(run_config: Mapping[str, Any], node_config: Mapping[str, Any] | None = None) -> Settings:
    """Compose the settings of a Flower run from ``context.run_config`` and ``context.node_config``.

    Raises
    ------
    SettingsError
        As :func:`compose`, and for a relative path.
    """
    settings = compose(run_config_overrides(run_config), node_config)
    require_absolute(settings)
    return settings


def require_absolute(settings: Settings) -> None:
    """Refuse relative paths.

    Raises
    ------
    SettingsError
        Naming the first one.
    """
    for key in ("output_dir", "state_dir", "cache_dir", "resume"):
        value = getattr(settings, key)
        if value is not None and not Path(value).is_absolute():
            raise SettingsError(
                f"{key}: {value!r} is relative, but an app has its own working folder: make it absolute"
            )


def run_config_overrides(run_config: Mapping[str, Any]) -> list[str]:
    """Translate ``[tool.flwr.app.config]`` values into Hydra overrides; ``overrides`` comes last and wins."""
    chosen = [f"{key}={run_config[key]}" for key in GROUP_KEYS + PLAIN_KEYS if run_config.get(key, "") != ""]
    try:
        return chosen + shlex.split(str(run_config.get("overrides", "")))
    except ValueError as error:
        raise SettingsError(f"overrides: {error}: {run_config['overrides']!r}") from error


NODE_KEYS = {  # of a node's configuration, and the settings that they set
    "data-dir": "data",
    "state-dir": "state_dir",
    "cache-dir": "cache_dir",
    "device": "device",
    "model": "model",
    "privacy-budget": "privacy.budget",
}
FOLDER_KEYS = ("root", "dataset")  # of a data source that reads a folder: what a node's data-dir sets


@functools.lru_cache(maxsize=64)
def _compose(overrides: tuple[str, ...], node: tuple[tuple[str, str], ...]) -> Settings:
    return checked(composed(*effective_overrides(overrides, dict(node)), dict(node)))


def effective_overrides(
    overrides: Sequence[str], node_config: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return the run's overrides that a node leaves standing, and the node's own."""
    node = {key: str(node_config[key]) for key in sorted(NODE_KEYS) if key in node_config}
    own = [
        f"{NODE_KEYS[key]}={QuotedString(value, Quote.single).with_quotes()}"
        for key, value in node.items()
        if key not in ("model", "data-dir")
    ]
    kept = list(overrides)
    if "model" in node:  # the run's arguments belong to the run's model
        kept = without_model(overrides)
        own += model_overrides(node["model"])
    return kept, own


def composed(run: Sequence[str], own: Sequence[str], node_config: Mapping[str, Any]) -> DictConfig:
    """Compose ``conf/`` and overrides, the keys as they are typed and the values not yet checked.

    Parameters
    ----------
    run, own : Sequence[str]
        From :func:`effective_overrides`.
    node_config : Mapping[str, Any]
        A node's configuration, for its ``data-dir``.

    Raises
    ------
    SettingsError
        For what Hydra refuses.
    """
    if not CONF_DIR.is_dir():
        raise SettingsError(f"{CONF_DIR} is missing: the app was packed without conf/**/*.yaml")
    try:
        config = config_of(CONF_DIR, [*run, *own])
        OmegaConf.resolve(config)
        if "data-dir" in node_config:
            _set_folder(config.data, str(node_config["data-dir"]))
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(explained(error, CONF_DIR)) from error
    except SettingsError:
        raise
    except ValueError as error:  # Hydra's, for a group that is set to null or a number
        text = next((text for text in run if str(error).startswith("Config group") and _is_group(text)), "")
        problem = not_a_choice(text) if text else f"{' '.join([*run, *own])}: {error}"
        raise SettingsError(problem) from error
    return config


def _is_group(override: str) -> bool:
    key, _, value = override.partition("=")
    plain = re.fullmatch(r"[A-Za-z_][\w-]*|\[.*", value) and value != "null"
    return not plain and (not key or (CONF_DIR / key.lstrip("+~")).is_dir())


def _set_folder(data: DictConfig, folder: str) -> None:
    key = next((name for name in FOLDER_KEYS if name in data), None)
    if key is None:
        raise SettingsError("data-dir: this run's data source reads no folder; run it with data=folder")
    data[key] = folder


def without_model(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without those of the model and its arguments."""
    return [text for text in overrides if not re.match(r"[+~]*model([.=]|$)", text)]


def model_overrides(name: str) -> list[str]:
    """Overrides that select a model by the name of its ``conf/model`` file or by its dotted path.

    Values of its settings may follow.

    Examples
    --------
    >>> model_overrides("pretrained backbone=lite1")
    ['model=pretrained', 'model.backbone=lite1']
    """
    target, *values = name.split()
    if "." in target:
        return ["model=custom", f"model._target_={target}", *(f"+model.{value}" for value in values)]
    return [f"model={target}", *(f"model.{value}" for value in values)]


def checked(config: DictConfig) -> Settings:
    """Return the settings of a composed config, typed and in range.

    Raises
    ------
    SettingsError
        With the full name of the key and what it takes.
    """
    groups = {
        "strategy": StrategySettings,
        "consensus": ConsensusSettings,
        "data": DataSettings,
        "partition": PartitionSettings,
    }
    if MISSING in str(OmegaConf.to_container(config)):  # to look for their names takes far longer
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise SettingsError(f"{missing[0]}: needs a value")
    _check_keys("", config, Settings)
    values: dict[str, Any] = {}
    for entry in fields(Settings):
        node = config[entry.name]
        if is_dataclass(entry_type := OmegaConf.get_type(node)):
            _check_keys(f"{entry.name}.", node, entry_type)
        if entry.name == "model":
            values[entry.name] = _model_settings(node)
        elif entry.name in groups:
            values[entry.name] = _typed(entry.name, node, groups[entry.name])
        else:
            values[entry.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
    settings = Settings(**values)
    pretrained = pretrained_settings(settings.model)
    if pretrained is not None and pretrained.tune != "all" and settings.public.views != "plain":
        raise SettingsError(
            f"public.views: {settings.public.views} makes new pictures in every round, but model.tune="
            f"{pretrained.tune} computes features once: set public.views=plain or model.tune=all"
        )
    if pretrained is not None and pretrained.tune != "all" and settings.augment.name != "none":
        raise SettingsError(
            f"augment: {settings.augment.name} changes pictures in every epoch, but model.tune="
            f"{pretrained.tune} computes features once: set model.views (views of every picture) or "
            "model.tune=all"
        )
    _check_values("", settings)
    return settings


def _check_keys(prefix: str, node: DictConfig, schema: type) -> None:
    """Hydra lets ``+key=1`` and ``~key`` past the schema."""
    expected = {entry.name for entry in fields(schema)}
    for key in sorted(expected ^ {str(key) for key in node}):
        name = f"{prefix}{key}"
        raise SettingsError(f"{name}: needs a value" if key in expected else unknown_key(name, CONF_DIR))


def _typed(group: str, node: DictConfig, base: type) -> Any:
    """Merge a group's values into the dataclass that its ``_target_`` names; wrong types are refused."""
    values = cast(dict[str, Any], OmegaConf.to_container(node))
    target = str(values.pop("_target_", ""))
    try:
        own_code = group == "data" and "version" in values  # of data=custom
        schema = get_object(target) if own_code else get_class(target)
        if own_code and not is_dataclass(schema):
            schema = get_class(CUSTOM_DATA)
            own = {key: values.pop(key) for key in ("image_size", "version")}
            values = {**own, "target": target, "arguments": values}
    except Exception as error:
        raise SettingsError(f"{group}._target_: no class {target!r}: {error}") from error
    if not (isinstance(schema, type) and is_dataclass(schema) and issubclass(schema, base)):
        raise SettingsError(f"{group}._target_: {target} is no {base.__name__}")
    known = (schema, repr(values))  # repr: 1, 1.0, True and "1" are not the same
    try:
        if known not in _TYPED:
            _TYPED[known] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise SettingsError(f"{group}.{error.full_key}: {wrong_type(said) or said}") from error
    return copy.deepcopy(_TYPED[known])


def _model_settings(node: DictConfig) -> ModelSettings:
    values = cast(dict[str, Any], OmegaConf.to_container(node))
    target, per_client = values.pop("_target_", None), values.pop("per_client", None)
    if not isinstance(target, str) or "." not in target:
        raise SettingsError(f"model._target_: {target!r} is no dotted path of a model class or function")
    if not isinstance(per_client, list) or not all(isinstance(name, str) for name in per_client):
        raise SettingsError(f"model.per_client: {per_client!r} is no list of model names")
    model = ModelSettings(target=target, arguments=values, per_client=per_client)
    pretrained = pretrained_settings(model)
    if pretrained is not None:
        _check_values("model.", pretrained)
    return model


def _check_values(prefix: str, settings: Any) -> None:
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            _check_values(f"{prefix}{entry.name}.", value)
        elif value is not None:
            _check_range(f"{prefix}{entry.name}", value, entry)
    check = getattr(settings, "check", None)
    if check is not None:
        problem = check()
        if problem:
            raise SettingsError(f"{prefix}{problem}")


def _check_range(key: str, value: Any, entry: Field[Any]) -> None:
    rules = entry.metadata
    choices, minimum, maximum, above = (
        rules.get(name) for name in ("choices", "minimum", "maximum", "above")
    )
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{key}: {value} is no finite number")
    word = isinstance(value, str) or minimum is None  # with a minimum: a number, or one of the words
    if choices and word and value not in choices:
        near = get_close_matches(str(value), choices, 1, 0.6)
        meant = f": did you mean {near[0]}?" if near else ""
        other = "" if minimum is None else f", nor a number of at least {minimum}"
        raise SettingsError(f"{key}: {value!r} is none of {', '.join(choices)}{other}{meant}")
    if isinstance(value, str):
        return
    if minimum is not None and value < minimum:
        raise SettingsError(f"{key}: {value} is below {minimum}")
    if maximum is not None and value > maximum:
        raise SettingsError(f"{key}: {value} is above {maximum}")
    if above is not None and value <= above:
        raise SettingsError(f"{key}: {value} is not above {above}")
