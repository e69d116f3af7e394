"""What of a run's configuration holds at a site: its owner decides, not the server.

A run's configuration comes over the wire. At a site it chooses among this package's own classes and models
and sets plain values. It is no code and no path there:

* classes and models are this package's and torchvision's, and what the owner lists (``allowed-models``,
  ``allowed-classes``);
* an override has no ``$``, so nothing of the environment and no OmegaConf resolver is read, and its key is a
  setting of the run: nothing of Hydra's own;
* files of ``conf/`` are chosen by their plain names;
* every path is the node configuration's.

In simulation, server and site are one person, and the run's configuration holds as it is. What says so is on
the site's side only: ``trust-run`` of the node configuration, or a process of Flower's simulation engine.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import PurePath
from typing import Any, cast

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf

from fedmutual.logs import brief
from fedmutual.settings import Settings, SettingsError
from fedmutual.settings.compose import (
    CONF_DIR,
    FOLDER_KEYS,
    NODE_KEYS,
    checked,
    composed,
    effective_overrides,
    from_contexts,
    model_overrides,
    require_absolute,
    run_config_overrides,
    without_model,
)
from fedmutual.settings.explain import explained
from fedmutual.settings.hydra_conf import EXPERIMENT, parsed
from fedmutual.settings.pretrained import SUFFIXES

TRUST, MODELS, CLASSES = "trust-run", "allowed-models", "allowed-classes"
MODEL_PACKAGES = ("fedmutual.models.", "torchvision.models.")
# which classes a group's _target_ may name, besides the owner's allowed-classes
CLASS_PACKAGES = {
    "strategy": "fedmutual.methods.",
    "consensus": "fedmutual.methods.",
    "data": "fedmutual.data.",
    "partition": "fedmutual.data.",
}
MOST_CHARACTERS = 20_000  # of a run's overrides; a long study's have a thousand
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_PUBLIC_PATH = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+")
_TRANSFORM = re.compile(r"torchvision\.transforms\.v2\.[A-Z][A-Za-z0-9]*")
_TOP = frozenset(entry.name for entry in fields(Settings)) | {EXPERIMENT}
_SERVERS = ("output_dir", "resume")  # paths of the server's; a client never reads them
_SITES = {"state_dir": "state-dir", "cache_dir": "cache-dir"}
_WEIGHTS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")  # arguments of torchvision's


def trusts_run(node_config: Mapping[str, Any]) -> bool:
    """Whether the run's configuration holds here as it is: server and site are one person.

    ``trust-run`` of the node configuration says so; without it, only in a worker process of Flower's
    simulation engine. Nothing that comes over the wire has a part in it.
    """
    if TRUST in node_config:
        return says_true(node_config, TRUST)
    return "ray" in sys.modules and PurePath(sys.argv[0]).parts[-3:] == (
        "_private",
        "workers",
        "default_worker.py",
    )


def says_true(node_config: Mapping[str, Any], key: str) -> bool:
    """Whether a node's owner says true under ``key``."""
    return str(node_config.get(key, "")).lower() == "true"


def own_model(node_config: Mapping[str, Any]) -> str:
    """Return the name of the model that a node's owner chose, without its values; empty: none."""
    return str(node_config.get("model", "")).partition(" ")[0]


def listed(node_config: Mapping[str, Any], key: str) -> frozenset[str]:
    """Return the dotted paths that a node's owner lists under ``key``, separated by commas."""
    return frozenset(name.strip() for name in str(node_config.get(key, "")).split(",") if name.strip())


def site_settings(
    run_config: Mapping[str, Any], node_config: Mapping[str, Any], model: str | None = None
) -> Settings:
    """Compose the settings of a run as they hold at a site.

    Parameters
    ----------
    run_config : Mapping[str, Any]
        Came over the wire.
    node_config : Mapping[str, Any]
        The site's own.
    model : str or None
        The run's choice for this node among ``model.per_client``.

    Raises
    ------
    SettingsError
        A setting is invalid, or the owner does not allow it; the text names the key and the remedy.
    """
    if trusts_run(node_config):
        return from_contexts(run_config, node_config if model is None else {**node_config, "model": model})
    node = tuple(sorted((k, str(v)) for k, v in node_config.items() if k in {*NODE_KEYS, MODELS, CLASSES}))
    return _site_settings(tuple(run_config_overrides(run_config)), node, model)


@functools.lru_cache(maxsize=64)
def _site_settings(
    overrides: tuple[str, ...], node: tuple[tuple[str, str], ...], model: str | None
) -> Settings:
    node_config = dict(node)
    check_overrides(overrides)
    run = list(overrides)
    if model is not None:
        target, *values = model.split() or [""]
        if not _PLAIN_NAME.fullmatch(target) and not _PUBLIC_PATH.fullmatch(target):
            raise SettingsError("model.per_client: an entry is neither a plain name nor a dotted path")
        check_overrides([f"model.{value}" for value in values])
        run = [*without_model(run), *model_overrides(model)]
    kept, own = effective_overrides(run, node_config)
    config = composed(kept, own, node_config)
    check_targets(_plain(config), node_config)
    _confine_paths(config, node_config)
    settings = checked(config)
    require_absolute(settings)
    return settings


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that are more than a choice or a value of a setting.

    Raises
    ------
    SettingsError
        Naming the override and what is wrong with it.
    """
    if sum(map(len, overrides)) > MOST_CHARACTERS:
        raise SettingsError(f"overrides: more than {MOST_CHARACTERS} characters are not read at a site")
    for text in overrides:
        problem = _problem(text)
        if problem:
            raise SettingsError(f"{brief(text)}: {problem}")


def _problem(text: str) -> str | None:
    if "$" in text:
        return "a site reads no environment, resolver or other setting for a run: write the value itself"
    try:
        override = parsed(text)
    except HydraException as error:
        return explained(error, CONF_DIR)
    key = override.key_or_group
    if not _KEY.fullmatch(key) or override.package or not text.lstrip("+~").startswith(key):
        return "no plain key: a site takes settings of the run only (key=value)"
    if key.partition(".")[0] not in _TOP:
        return f"no setting of a run: a site takes {', '.join(sorted(_TOP))}"
    if override.is_sweep_override():
        return "a run has one value for each setting, and no sweep"
    if "." not in key and (CONF_DIR / key).is_dir():
        return _choice_problem(override)
    return None


def _choice_problem(override: Override) -> str | None:
    value = override.value()
    names = value if isinstance(value, list) else [value]
    if any(isinstance(name, str) and not _PLAIN_NAME.fullmatch(name) for name in names):
        return f"no plain name of a file in conf/{override.key_or_group}/"
    return None


def _confine_paths(config: DictConfig, node_config: Mapping[str, Any]) -> None:
    """Leave no path of the run's in the settings; refuse the run where the owner gives none instead."""
    for key in _SERVERS:
        config[key] = None
    for key, own in _SITES.items():
        if own not in node_config and config[key] is not None:
            raise SettingsError(_needs(own, key, "folder"))
    values = _plain(config)
    folder = next((key for key in FOLDER_KEYS if key in values["data"]), None)
    if folder is not None and "data-dir" not in node_config:
        raise SettingsError(_needs("data-dir", f"data.{folder}", "images"))
    own_keys = {*_SITES, f"data.{folder}"}
    for key, value in _texts(values, ""):
        # tracking is the server's, and is never read here
        if key in own_keys or key.startswith("tracking."):
            continue
        if key.startswith("model.") and "model" in node_config:  # the owner's own, with all its values
            continue
        if _is_path(value) or (key == "model.backbone" and value.endswith(SUFFIXES)):
            raise SettingsError(
                f"{key}: a run names no path at a site: leave it out, or let the site's owner set "
                f"{TRUST}=true (only where server and site are one person)"
            )


def _needs(own: str, key: str, what: str) -> str:
    return (
        f"{key}: a site takes every path from its own node configuration, never from the run, and this one "
        f"gives no {what}: start its SuperNode with --node-config '{own}=\"...\"' "
        f"(a trial by one person: {TRUST}=true)"
    )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _texts(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, str):
        yield key, value


def _is_path(text: str) -> bool:
    return (
        text.startswith(("/", "\\", "~", "file:"))
        or re.match(r"[A-Za-z]:[\\/]", text) is not None
        or ".." in re.split(r"[\\/]", text)
    )


def check_targets(values: Mapping[str, Any], node_config: Mapping[str, Any]) -> None:
    """Refuse what the run names and the owner does not allow, before anything is imported.

    Parameters
    ----------
    values : Mapping[str, Any]
        A config as plain values: each group with its ``_target_``.
    node_config : Mapping[str, Any]

    Raises
    ------
    SettingsError
        Naming the group and the remedy.
    """
    classes = listed(node_config, CLASSES)
    for group, package in CLASS_PACKAGES.items():
        _require_allowed(f"{group}._target_", values[group].get("_target_"), (package,), classes, CLASSES)
    for target in _targets(values.get("augment")):
        if target not in classes and not _TRANSFORM.fullmatch(target):
            raise SettingsError(
                f"augment.transforms: {brief(target)} is not allowed at this site, only classes of "
                f'torchvision.transforms.v2: its owner can list it in the node configuration, {CLASSES}="..."'
            )
    models = listed(node_config, MODELS)
    own = own_model(node_config)
    if "." in own:
        models |= {own}
    target = values["model"].get("_target_")
    _require_allowed("model._target_", target, MODEL_PACKAGES, models, MODELS)
    if target not in models and str(target).startswith("torchvision."):
        for name in _WEIGHTS:
            if values["model"].get(name) not in (None, False):
                raise SettingsError(
                    f"model.{name}: this site loads no weights from elsewhere: leave it out, or let the "
                    f'site\'s owner list {MODELS}="{target}"'
                )


def _targets(value: Any) -> Iterator[str]:
    """Return every class that is named below a value, at any depth."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield str(value["_target_"])
        for entry in value.values():
            yield from _targets(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _targets(entry)


def _plain(config: DictConfig) -> dict[str, Any]:
    """Return the config as plain values; each group that names a class must be there."""
    values = cast(dict[str, Any], OmegaConf.to_container(config))
    for group in (*CLASS_PACKAGES, "model"):
        if not isinstance(values.get(group), dict):
            raise SettingsError(f"{group}: needs a value")
    return values


def _require_allowed(
    key: str, target: Any, packages: tuple[str, ...], allowed: Collection[str], node_key: str
) -> None:
    if target in allowed or target in (None, MISSING):  # what is missing is refused later, by its name
        return
    text = str(target)
    if not _PUBLIC_PATH.fullmatch(text) or not text.startswith(packages):
        raise SettingsError(
            f"{key}: {brief(text)} is not allowed at this site, only what is in "
            f"{', '.join(package.rstrip('.') for package in packages)}: its owner can list it in the node "
            f'configuration, {node_key}="..."'
        )
