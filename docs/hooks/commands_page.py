"""The page on the command line, from the parsers themselves."""

from __future__ import annotations

import argparse
import os
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fedmutual.cli import make_parser

PAGE = "commands.md"
_HEAD = """\
# Command line

What `fedmutual --help` and `fedmutual COMMAND --help` say; this page is made from the same parsers.

Every command is also there as `python -m fedmutual COMMAND`, and `fedmutual completion` makes the shell
complete commands, options, settings and their choices. In a folder with files of others, use `fedmutual` or
`python -P -m fedmutual`. None of them imports packages from the current folder, but with `-m` alone Python
itself looks there for a few of its own modules (`types`, `re`, ...) before fedmutual starts.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs calls this with the files of docs/."""
    files.append(File.generated(config, PAGE, content=commands_page()))
    return files


def commands_page() -> str:
    """The page as Markdown: a section a command."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):  # argparse wraps at the terminal's width
        parser = make_parser()
        sections = [_section("fedmutual", parser)]
        sections += [_section(f"fedmutual {name}", command) for name, command in _commands(parser).items()]
    return "\n".join([_HEAD, *sections])


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (group,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(group.choices)


def _section(title: str, parser: argparse.ArgumentParser) -> str:
    return f"## {title}\n\n```text\n{parser.format_help()}```\n"
