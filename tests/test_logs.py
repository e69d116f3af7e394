"""Text from elsewhere on terminals, in logs and in CSV."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedmutual.commands.predict import _csv, _json, _table
from fedmutual.compare.tables import as_csv
from fedmutual.inference.predict import Prediction
from fedmutual.logs import complain, csv_cell, show_logs, shown, shown_lines

RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
HOSTILE = "a\x1b[31m\r\x9b2J\u202egpj.\udcff"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Straße 猫 👩\u200d🔬 می\u200cروم", "Straße 猫 👩\u200d🔬 می\u200cروم"),
        (HOSTILE, r"a\x1b[31m\x0d\x9b2J\u202egpj.\xff"),
        ("two\nlines\u2028three", r"two\x0alines\u2028three"),
        (Path("a\tb"), r"a\x09b"),
    ],
)
def test_control_characters_are_escaped_and_scripts_stay(text: object, expected: str) -> None:
    assert shown(text) == expected


def test_later_lines_are_indented() -> None:
    assert shown_lines("first\nERROR fedmutual: forged\n\tx\x07") == (
        "first\n  ERROR fedmutual: forged\n      x\\x07"
    )


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What the apps' handler writes."""
    logger = logging.getLogger("fedmutual")
    before = list(logger.handlers), logger.level, logger.propagate
    logger.handlers = []
    show_logs()
    (handler,) = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream := io.StringIO())
    yield stream
    logger.handlers, logger.level, logger.propagate = before


def test_a_log_holds_no_raw_control_character_and_no_forged_line(logged: io.StringIO) -> None:
    logger = logging.getLogger("fedmutual.test")
    logger.warning("client %s said: %s", HOSTILE, "no\nWARNING fedmutual: all is well")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("failed")
    text = logged.getvalue()
    assert not RAW.search(text)
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        r"WARNING fedmutual: client a\x1b[31m\x0d\x9b2J\u202egpj.\xff said: no",
        "ERROR fedmutual: failed",
    ]


def test_complaints_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    complain(f"fedmutual: {HOSTILE}")
    assert not RAW.search(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("=1+1", "'=1+1"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1", "'  =1"),
        ("\n=1", "'\n=1"),
        ("\t=1", r"\x09=1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        (-0.5, -0.5),
        (None, None),
        ("clinic-a", "clinic-a"),
    ],
)
def test_cells_are_no_formulas_and_numbers_stay_numbers(value: object, expected: object) -> None:
    assert csv_cell(value) == expected


def test_the_tables_of_a_study_hold_no_formula() -> None:
    rows = [
        {"condition": "=cmd|'/c calc'!A1", "variant": "@x", "failure": "-x\x1b", "mean": -0.25, "runs": 2}
    ]
    (row,) = csv.DictReader(io.StringIO(as_csv(rows)))
    assert row == {
        "condition": "'=cmd|'/c calc'!A1",
        "variant": "'@x",
        "failure": r"'-x\x1b",
        "mean": "-0.25",
        "runs": "2",
    }


@pytest.mark.parametrize("write", [_table, _csv, _json], ids=["table", "csv", "json"])
def test_predictions_are_printed_without_control_characters(
    write: object, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction = Prediction(Path(HOSTILE), np.asarray([0.25, 0.75]), 1)
    formula = Prediction(Path("=1+1.png"), np.asarray([0.25, 0.75]), 1)
    write([prediction, formula], ["x", f"@{HOSTILE}"], ["m"])  # type: ignore[operator]
    printed = capsys.readouterr().out
    assert not RAW.search(printed)
    assert r"\x1b" in printed or r"\u001b" in printed
    if write is _csv:
        cells = [cell for row in csv.reader(io.StringIO(printed)) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "@"))]
    if write is _json:
        (first, _) = json.loads(printed)["predictions"]
        assert first["image"] == HOSTILE  # exact for programs


def test_errors_of_commands_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedmutual.cli import main

    name = f"{tmp_path}/no\x1b[31m\u202e"
    for command in (
        ["predict", "--model", name, __file__],
        ["predict", "--model", str(tmp_path), name],
        ["export", "--model", name, "--format", "onnx"],
        ["report", name],
        ["config", f"data={name}"],
        ["doctor", f"data.{name}=1"],
        ["run", f"data={name}"],
        ["compare", f"base.{name}=1"],
    ):
        assert main(command) != 0
        captured = capsys.readouterr()
        assert not RAW.search(captured.err + captured.out), command
        assert r"\x1b" in captured.err + captured.out, command
