"""The page with every setting: keys, meanings and ranges from the dataclasses, values from conf/."""

from __future__ import annotations

import html
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fedmutual.compare.settings import StudySettings
from fedmutual.settings import AugmentSettings, OptimizerSettings, PublicSettings, Settings
from fedmutual.settings.compose import CONF_DIR, CUSTOM_DATA
from fedmutual.settings.pretrained import PretrainedSettings

PAGE = "settings.md"
TYPED = ("strategy", "consensus", "data", "partition")  # every choice has a dataclass of its own
SHARED = {  # all choices have one dataclass
    "optimizer": OptimizerSettings,
    "public": PublicSettings,
    "augment": AugmentSettings,
}
_HEAD = """\
# Every setting

This page is made from the schema in the code and the values in `conf/` whenever the documentation is
built. `fedmutual config` shows the same for one run, with the file that each value comes from; `--meaning`
adds the words.

A setting is changed with `key=value`, a group's choice with `group=choice`:

    fedmutual run rounds=20 partition=dirichlet partition.alpha=0.3 'model.per_client=[visionnet,resnet18]'

`null` means: not set. What is misspelt, of the wrong type or out of range is refused by the name of its
key, before anything starts. The grammar is [Hydra](https://hydra.cc)'s.
"""
_NODE = """\
## A site's own configuration { #node-configuration }

What a SuperNode is started with (`--node-config 'client-name="clinic-a" data-dir="/data"'`) wins over the
run's settings: a site chooses its own name, folders, device and model, and what else a run may do there
([What a site's owner decides](site-owner.md)).

| key | sets |
|---|---|
| `client-name` | the name in results and states; else `client-<partition-id>` |
| `data-dir` | `data.root`, or `data.dataset` |
| `state-dir` | `state_dir` |
| `cache-dir` | `cache_dir` |
| `device` | `device` |
| `model` | `model`, its file in `conf/model/` or dotted path, and values: `"pretrained tune=all"` |
| `allowed-models`, `allowed-classes` | further models, and classes of the groups, that a run may name |
| `accept-public`, `max-public-bytes` | whether the server may send public images, and how many bytes |
| `privacy-metrics` | the most that `privacy.metrics` may say: `none`, `coarse` or `full` |
| `privacy-overlap` | the least strict that `privacy.overlap` may be: `allow`, `exclude` or `refuse` |
| `require-secagg`, `secagg-min-clients` | only runs with `privacy.secagg`; the fewest clients added up |
| `secagg-key`, `secagg-peers` | the key that signs, and the keys of the only peers to be added up with |
| `trust-run` | `true`: the run's own settings hold; for trials by one person |
| `partition-id`, `num-partitions` | which part of one pool this node holds; Flower's simulation sets them |
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs calls this with the files of docs/."""
    files.append(File.generated(config, PAGE, content=settings_page()))
    return files


def settings_page() -> str:
    """The page as Markdown."""
    values = _read(CONF_DIR / "config.yaml")
    parts = [_HEAD, "## The run\n", _table(Settings, values)]
    for name, schema in typing.get_type_hints(Settings).items():
        if is_dataclass(schema) and name not in SHARED:
            parts += [f"## {name}\n\n{_words(schema)}\n", _table(schema, values[name], f"{name}.")]
    for group in TYPED:
        parts.append(f"## {group}\n\n`{group}=...` chooses one of them; its settings come with it.\n")
        parts += [_choice(group, path) for path in _choices(group)]
    for group, schema in SHARED.items():
        parts.append(f"## {group}\n\n{_words(schema)} `{group}=...` chooses a column of values.\n")
        parts.append(_columns(group, schema))
    return "\n".join([*parts, _models(), _experiments(), _study(), _NODE])


def _table(schema: Any, values: Mapping[str, Any], prefix: str = "") -> str:
    rows = [
        f"| `{prefix}{entry.name}` | {_value(values[entry.name])} "
        f"| {_takes(schema, entry)} | {_meaning(entry)} |"
        for entry in _settings(schema)
    ]
    return "\n".join(["| key | value | takes | meaning |", "|---|---|---|---|", *rows, ""])


def _columns(group: str, schema: Any) -> str:
    """One dataclass, a column of values for every choice of the group."""
    values = {path.stem: _read(path) for path in _choices(group)}
    names = " | ".join(f"`{group}={name}`" for name in values)
    rows = [
        f"| `{group}.{entry.name}` | {' | '.join(_value(v[entry.name]) for v in values.values())} "
        f"| {_takes(schema, entry)} | {_meaning(entry)} |"
        for entry in _settings(schema)
    ]
    rule = "|".join(["---"] * (len(values) + 3))
    return "\n".join([f"| key | {names} | takes | meaning |", f"|{rule}|", *rows, ""])


def _choice(group: str, path: Path) -> str:
    """A choice with a dataclass of its own."""
    values = _read(path)
    if path.stem == "custom":  # somebody's function, whose arguments are added
        values |= {"_target_": CUSTOM_DATA, "target": "???", "arguments": {}}
    schema = get_class(values["_target_"])
    text = f"### {group}={path.stem}\n\n{_comment(path) or _words(schema)}\n"
    return f"{text}\n{_table(schema, values, f'{group}.')}" if _settings(schema) else text


def _models() -> str:
    rows = []
    for path in _choices("model"):
        values = _read(path)
        arguments = ", ".join(
            f"`model.{key}={value}`" for key, value in values.items() if key not in ("_target_", "per_client")
        )
        rows.append(f"| `model={path.stem}` | `{values['_target_']}` | {arguments} | {_comment(path)} |")
    pretrained = _table(PretrainedSettings, _read(CONF_DIR / "model" / "pretrained.yaml"), "model.")
    return f"""\
## model

A model is a class or function that is called with its arguments; its head is fitted to the number of
classes. An argument that its file does not name is added with a plus: `+model.width=2`.

| key | value | takes | meaning |
|---|---|---|---|
| `model._target_` | that of the choice | dotted path | the class or function, for `model=custom` |
| `model.per_client` | `[]` | list of text | client by client, `"choice key=value"`; `[]`: one for all |

| choice | `model._target_` | arguments | |
|---|---|---|---|
{chr(10).join(rows)}

### model=pretrained

{pretrained}
"""


def _experiments() -> str:
    parts = ["## experiment\n\nOverlays over all of the above, and studies for `fedmutual compare`.\n"]
    for path in _choices("experiment"):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith("# @package")]
        content = "\n".join(f"    {line}" for line in ["```yaml", *kept, "```"])
        parts.append(f'??? note "experiment={path.stem}"\n\n{content}\n')
    return "\n".join(parts)


def _study() -> str:
    table = _table(StudySettings, _read(CONF_DIR / "compare.yaml"), "study.")
    return f"## study\n\nWhat `fedmutual compare` compares.\n\n{table}"


# ---------------------------------------------------------------------------------------------------


def _settings(schema: Any) -> list[Field[Any]]:
    """The fields that are settings: those with a meaning."""
    return [entry for entry in fields(schema) if entry.metadata.get("help")]


def _takes(schema: Any, entry: Field[Any]) -> str:
    """Which values a setting takes, in words: its choices, else its type and range."""
    rules, kind = entry.metadata, typing.get_type_hints(schema)[entry.name]
    nullable = isinstance(kind, types.UnionType) and types.NoneType in typing.get_args(kind)
    if nullable:
        (kind,) = [option for option in typing.get_args(kind) if option is not types.NoneType]
    numbers = [_kind(int)] if int in typing.get_args(kind) else []  # beside a word
    words = [", ".join([*(f"`{choice}`" for choice in rules["choices"]), *numbers]) or _kind(kind)]
    for rule, said in (("minimum", "at least"), ("above", "above"), ("maximum", "at most")):
        words += [f"{said} {rules[rule]:g}"] if rules[rule] is not None else []
    return ", ".join([*words, *(["or `null`"] if nullable else [])])


def _kind(kind: Any) -> str:
    if kind in _KINDS:
        return _KINDS[kind]
    parts = typing.get_args(kind)
    return (
        f"list of {_kind(parts[0])}" if typing.get_origin(kind) is list else f"names with {_kind(parts[1])}"
    )


_KINDS = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", Any: "values"}


def _value(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False).strip(chr(34))}`"


def _meaning(entry: Field[Any]) -> str:
    """The schema's words; nothing in them is Markdown but their code."""
    return _plain(entry.metadata["help"])


def _plain(text: str) -> str:
    parts = text.split("`")  # every other one is code, which Markdown leaves as it is
    parts[::2] = [
        html.escape(part, quote=False).replace("*", "&#42;").replace("|", "&#124;") for part in parts[::2]
    ]
    return "`".join(parts)


def _words(schema: Any) -> str:
    """What a class says of itself, in plain Markdown."""
    return (schema.__doc__ or "").strip().splitlines()[0].replace("``", "`")


def _comment(path: Path) -> str:
    """The comment at the head of a YAML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    said = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return _plain(" ".join(said))


def _choices(group: str) -> list[Path]:
    return sorted((CONF_DIR / group).glob("*.yaml"))


def _read(path: Path) -> dict[str, Any]:
    return typing.cast(dict[str, Any], yaml.safe_load(path.read_text(encoding="utf-8")))
