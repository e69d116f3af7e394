"""``fedmutual completion``: shell completion of commands, options, settings and their choices."""

from __future__ import annotations

import argparse
from typing import Any

from fedmutual.commands.parser import add_command

_EXAMPLES = """\
for this shell only:
  eval "$(fedmutual completion bash)"
  eval "$(fedmutual completion zsh)"
  fedmutual completion fish | source

permanently: add that line to ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish.
Then `fedmutual run part<TAB>` offers partition= and its settings, `partition=<TAB>` its choices.
"""
SHELLS = ("bash", "zsh", "fish")


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "completion",
        call,
        help="print the shell code for completion",
        description="Print the shell code that enables completion of `fedmutual`.",
        examples=_EXAMPLES,
    )
    parser.add_argument("shell", choices=SHELLS)


def call(arguments: argparse.Namespace) -> int:
    """Print the shell code."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["fedmutual"], shell=arguments.shell))
    return 0


def complete_overrides(parser: argparse.ArgumentParser) -> None:
    """Enable completion of a parser's ``overrides``."""
    for action in parser._actions:
        if action.dest == "overrides":
            action.completer = complete_override  # type: ignore[attr-defined]


def complete_override(prefix: str, **_: object) -> list[str]:
    """Return the overrides that start with ``prefix``: keys with an equals sign, groups with each choice.

    Only YAML files are read, because the shell waits for the answer.
    """
    key, equals, _value = prefix.partition("=")
    if equals:
        return [f"{key}={choice}" for choice in _choices(key)]
    return [f"{name}=" for name in [*_groups(), *_keys()] if name.startswith(prefix)]


def _groups() -> list[str]:
    from fedmutual.appfolder import app_folder

    return sorted(path.name for path in (app_folder() / "conf").iterdir() if path.is_dir())


def _choices(group: str) -> list[str]:
    from fedmutual.appfolder import app_folder

    if group not in _groups():
        return []
    return sorted(path.stem for path in (app_folder() / "conf" / group).glob("*.yaml"))


def _keys() -> list[str]:
    """Return the dotted keys of config.yaml and of all group files except the experiments."""
    import yaml  # type: ignore[import-untyped]

    from fedmutual.appfolder import app_folder

    conf = app_folder() / "conf"
    files = [(conf / "config.yaml", "")]
    files += [(path, f"{group}.") for group in _groups() for path in (conf / group).glob("*.yaml")]
    found: set[str] = set()
    for path, prefix in files:
        if prefix != "experiment.":
            found |= set(_dotted(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, prefix))
    return sorted(found)


def _dotted(values: dict[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += _dotted(value, f"{prefix}{key}.")
        elif key != "defaults":
            found.append(f"{prefix}{key}")
    return found
