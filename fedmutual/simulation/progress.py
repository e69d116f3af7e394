"""Progress of a run on the terminal: a bar and one line per round, read from its history."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedmutual.logs import shown_lines
from fedmutual.report.tables import human_bytes

Row = dict[str, Any]
_Key = tuple[Any, ...]


class HistoryTail:
    """Read the lines that a run adds to ``history.jsonl``, skipping those that exist already."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = 0
        self._known: set[_Key] = set()
        self.poll()

    def poll(self) -> list[Row]:
        """Return the new complete lines."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                replaced = self._inode is not None and inode != self._inode  # a resumed run rewrites it
                self._inode = inode
                if self._offset and not replaced:
                    file.seek(self._offset - 1)
                    replaced = file.read(1) != b"\n"  # another file may have got the number of a deleted one
                file.seek(0 if replaced else self._offset)
                text = file.read()
                self._offset = file.tell()
        except FileNotFoundError:
            return []
        complete = text.rpartition(b"\n")[0]
        self._offset -= len(text) - len(complete) - (1 if b"\n" in text else 0)
        rows = [json.loads(line) for line in complete.splitlines() if line.strip()]
        if replaced:
            self._known &= {_key(row) for row in rows}
        new = [row for row in rows if _key(row) not in self._known]
        self._known.update(_key(row) for row in new)
        return new


class RoundLines:
    """Turn history rows into one line per round, once all clients reported or a later round began."""

    def __init__(self, num_clients: int, rounds: int) -> None:
        self._num_clients = num_clients
        self._rounds = rounds
        self._open: dict[int, list[Row]] = {}
        self.completed = 0  # rounds with a printed line, without the closing one
        self.waiting = ""  # the current round

    def add(self, rows: Iterable[Row]) -> list[str]:
        """Add new rows; return the lines of the rounds that they complete."""
        lines = []
        for row in rows:
            number = int(row["round"])
            lines += [
                line for earlier in sorted(self._open) if earlier < number for line in self._close(earlier)
            ]
            self._open.setdefault(number, []).append(row)
            if len(self._open[number]) >= self._num_clients:
                lines += self._close(number)
            self._describe(number)
        return lines

    def flush(self) -> list[str]:
        """Return the lines of the open rounds, at the end of the run."""
        return [line for number in sorted(self._open) for line in self._close(number)]

    def _close(self, number: int) -> list[str]:
        rows = self._open.pop(number)
        if not rows[0].get("closing"):
            self.completed = max(self.completed, min(number, self._rounds))
        return [round_line(rows, self._rounds, self._num_clients)]

    def _describe(self, number: int) -> None:
        rows = self._open.get(number, [])
        if not rows:
            last = self.completed >= self._rounds
            self.waiting = "final evaluation" if last else f"round {self.completed + 1}"
        else:
            what = "final evaluation" if rows[0].get("closing") else f"round {number}"
            self.waiting = f"{what}, {len(rows)} of {self._num_clients} clients"


def round_line(rows: Sequence[Mapping[str, Any]], rounds: int, num_clients: int) -> str:
    """Return one line about a round.

    Parameters
    ----------
    rows : Sequence[Mapping[str, Any]]
        The round's history lines, one per client.
    rounds : int
        Rounds of the run.
    num_clients : int
        Clients of the run; shown if some are missing.

    Examples
    --------
    >>> rows = [{"round": 2, "client": "0", "validation_accuracy": 0.5, "kl_before": 0.5, "kl_after": 0.25}]
    >>> round_line([*rows, {"round": 2, "client": "1", "validation_accuracy": 1.0}], 12, 2)
    'round  2/12  validation 0.750 (worst 0.500)  KL 0.500 -> 0.250'
    """
    accepted = [row for row in rows if not row.get("rejected")]
    width = len(str(rounds))
    title = "closing" if rows[0].get("closing") else f"round {rows[0]['round']:>{width}}/{rounds}"
    parts = [f"{title:<{7 + 2 * width}}"]
    for label, key in (("validation", "validation_accuracy"), ("unseen", "unseen_accuracy")):
        values = _values(accepted, key)
        if values:
            parts.append(f"{label} {_mean(values):.3f} (worst {min(values):.3f})")
    before, after = _values(accepted, "kl_before"), _values(accepted, "kl_after")
    if before and after:
        parts.append(f"KL {_mean(before):.3f} -> {_mean(after):.3f}")
    seconds = _values(accepted, "seconds")
    if seconds:
        parts.append(f"{max(seconds):.1f} s per client")
    up, down = (sum(_values(rows, f"{direction}link_bytes")) for direction in ("up", "down"))
    if up or down:
        parts.append(f"{human_bytes(up)} up, {human_bytes(down)} down")
    if len(accepted) < num_clients:
        parts.append(f"{len(accepted)} of {num_clients} clients")
    parts += [f"[rejected {row.get('client')}: {row['rejected']}]" for row in rows if row.get("rejected")]
    return "  ".join(part.rstrip() if part is parts[-1] else part for part in parts)


class Display:
    """The run on the output: a live bar on a terminal, else plain lines."""

    def __init__(self, console: Console, num_clients: int, rounds: int) -> None:
        self._console = console
        self._lines = RoundLines(num_clients, rounds)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=rounds)
        self._progress.start()

    def status(self, text: str) -> None:
        """Show the current activity until there are history rows."""
        if self._progress.disable:
            self.line(text)
        else:
            self._progress.update(self._task, description=text)

    def rows(self, rows: list[Row]) -> None:
        """Show new history rows."""
        for line in self._lines.add(rows):
            self.line(line)
        if rows:
            self._progress.update(
                self._task, completed=self._lines.completed, description=self._lines.waiting
            )

    def line(self, text: str) -> None:
        """Print a line above the bar, unformatted."""
        self._console.print(shown_lines(text), markup=False, highlight=False, soft_wrap=True)

    def log(self, text: str) -> None:
        """Print a log line, with its colours if the terminal supports them."""
        self._console.print(Text.from_ansi(text), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Print open rounds and remove the bar; may be called twice."""
        for line in self._lines.flush():
            self.line(line)
        self._progress.stop()


def _key(row: Row) -> _Key:
    return (
        row.get("round"),
        row.get("client"),
        row.get("node_id"),
        bool(row.get("closing")),
        bool(row.get("rejected")),
    )


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
