"""What Hydra and OmegaConf refuse, in words for the person who typed it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_TYPES = {"Integer": "whole number", "Float": "number", "String": "text"}
_HABITS = {  # names that other programs give to settings
    "lr": "optimizer.learning_rate",
    "epochs": "train.local_epochs",
    "clients": "num_clients",
    "dataset": "data",
    "num_rounds": "rounds",
    "momentum": "optimizer.momentum",
    "output": "output_dir",
}


def explained(error: Exception, conf: Path) -> str:
    """Say what is wrong with an override, key first, and what may have been meant.

    Parameters
    ----------
    error : Exception
        Hydra's or OmegaConf's.
    conf : Path
        The folder ``conf/``, whose files have all keys.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = list(error.options or ())
        return f"{group}: {option!r} is none of {', '.join(options)}{_meant(option, options)}"
    if isinstance(error, OverrideParseException):
        return _unparsed(error.override, str(error).splitlines()[0])
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    key, head = str(getattr(cause or error, "full_key", "") or ""), str(error).splitlines()[0]
    text = " ".join(line.strip() for line in str(cause or error).splitlines()[:1])
    if "Key 'study' not in 'Settings'" in str(error):
        return f"experiment: {head.split(chr(39))[1]} is a study of several runs: use `fedmutual compare`"
    if re.match(r"Key '.*' (?:not in '|is not in struct)", text):
        return unknown_key(key or text.split("'")[1], conf)
    wrong = wrong_type(text)
    if wrong:
        return f"{key}: {wrong}"
    if "Ambiguous value" in head:
        override = head.partition("'")[2].rstrip("'")
        name, _, said = override.partition("=")
        return (
            f"{override}: a list is {name}=[{said}], and a text with a comma is quoted: {name}='\"{said}\"'"
        )
    lost = re.match(r"Interpolation key '(.*)' not found", text)
    if lost:
        return f"${{{lost[1]}}}: there is no setting {lost[1]!r}; quote a $ that is meant as it is"
    if "does not support deletion" in text:
        return f"{key}: a setting cannot be removed: give it another value"
    return f"{key}: {text}" if key and key not in text else f"{head}: {text}" if cause else head


def wrong_type(text: str) -> str:
    """Say in plain words that a value has the wrong type; empty: the text says something else."""
    value = re.match(r"Value '(.*)' of type '(.*)' could not be converted to (\w+)", text)
    if value:
        wanted = _TYPES.get(value[3], value[3])
        remedy = "; write lists as 'key=[a,b]'" if value[3] not in _TYPES else ""
        return f"{value[1]!r} is no {wanted}{remedy}"
    either = re.match(r"(?:Value|Cannot assign container) '(.*?)' .*Union\[int, str\]", text)
    if either:
        return f"{either[1]!r} is neither a whole number nor a word"
    truth = re.match(r"Value '(.*)' is not a valid bool", text)
    return f"{truth[1]!r} is neither true nor false" if truth else ""


def not_a_choice(override: str) -> str:
    """Say that a group needs the name of a file."""
    group = override.partition("=")[0].lstrip("+~")
    if not group:
        return f"{override!r} is no setting: write key=value, such as rounds=12"
    return f"{group}: needs the name of a file in conf/{group}/"


def _unparsed(override: str, why: str) -> str:
    if "=" not in override:
        return f"{override!r} is no setting: write key=value, such as rounds=12"
    key, _, value = override.partition("=")
    if re.search(r"[\s(){}\[\],:=]", value) and not re.search(r"[\[{]", value):
        return f"{override!r} is no override (key=value): quote its value twice: {key}='\"{value}\"'"
    return f"{override!r} is no override (key=value): {why}"


def unknown_key(key: str, conf: Path) -> str:
    """Say that there is no such setting, and which one may have been meant."""
    group, _, name = key.partition(".")
    holders = sorted(path.stem for path in (conf / group).glob("*.yaml") if name and _has(path, name))
    if holders:
        return (
            f"{key}: no such setting here, but with {group}={f', {group}='.join(holders)}: choose one first"
        )
    known = sorted(set(_keys(conf)))
    last = key.rpartition(".")[2]
    same = [_HABITS[last]] if last in _HABITS else [k for k in known if k.rpartition(".")[2] == last]
    own = [k for k in known if k.startswith(f"{group}.")] if name else []
    near = same or get_close_matches(key, own or known, 1, 0.7)
    meant = f": did you mean {' or '.join(near[:3])}?" if near else "; `fedmutual config` lists all"
    return f"{key}: no such setting{meant}"


def _has(path: Path, name: str) -> bool:
    values = OmegaConf.to_container(OmegaConf.load(path))
    return isinstance(values, Mapping) and name in values


def _keys(conf: Path) -> Iterator[str]:
    """Return every key of config.yaml, the groups' names, and the keys of their files."""
    for key, value in _values(conf / "config.yaml").items():
        yield key
        if isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in value)
    for path in conf.glob("*/*.yaml"):
        group = path.parent.name
        yield group
        if group != "experiment":
            yield from (f"{group}.{name}" for name in _values(path))


def _values(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if not str(key).startswith(("_", "defaults"))}


def _meant(said: str, options: list[str]) -> str:
    near = get_close_matches(said, options, 1, 0.6)
    return f": did you mean {near[0]}?" if near else ""
