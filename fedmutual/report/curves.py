"""Curves over the rounds, computed from a history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedmutual.results.diagnostics import Lines, number

Record = Mapping[str, Any]
Curve = dict[float, float]  # position on the round axis -> value
Curves = dict[str, Curve]  # one per client
Seeds = dict[str, list[Curve]]  # one per repetition

# With more clients than this, single lines cannot be followed: quantiles over the clients replace them.
MOST_LINES = 12
# Beyond this nothing is drawn: an axis that ends near the largest number there is cannot be computed.
_LARGEST = 1e30


def curves_of(lines: Lines, key: str, scale: float = 1.0, shift: float = 0.0) -> Curves:
    """Every client's values of ``key``, times ``scale``, at its rounds plus ``shift``."""
    curves = {
        client: {r["round"] + shift: scale * v for r in reports if (v := drawable(r, key)) is not None}
        for client, reports in lines.items()
    }
    return {client: curve for client, curve in curves.items() if curve}


def saw(lines: Lines, key: str, scale: float = 1.0) -> Curves:
    """Curves with ``<key>_before`` of the mutual step of round r at r, and ``<key>_after`` at r + 1/2."""
    teeth: Curves = {}
    for client, reports in lines.items():
        for line in reports:
            start, end = drawable(line, f"{key}_before"), drawable(line, f"{key}_after")
            if start is not None and end is not None:
                step = {line["round"] - 1.0: scale * start, line["round"] - 0.5: scale * end}
                teeth.setdefault(client, {}).update(step)
    return teeth


def drawable(line: Record, key: str) -> float | None:
    """The number under ``key`` if an axis can show it, or None."""
    value = number(line, key)
    return None if value is None or abs(value) > _LARGEST else value


def carried_on(curves: Curves) -> Curves:
    """Every client's last known value at every position."""
    positions = sorted({x for curve in curves.values() for x in curve})
    carried: Curves = {}
    for client, curve in curves.items():
        last = None
        carried[client] = {}
        for x in positions:
            last = curve.get(x, last)
            if last is not None:
                carried[client][x] = last
    return carried


def over_clients(curves: Curves, reduce: Callable[[list[float]], Any]) -> Curve:
    """One value for each position that has more than half as many clients as the fullest one."""
    columns: dict[float, list[float]] = {}
    for curve in curves.values():
        for x, y in curve.items():
            columns.setdefault(x, []).append(y)
    most = max((len(column) for column in columns.values()), default=0)
    return {x: float(reduce(columns[x])) for x in sorted(columns) if 2 * len(columns[x]) > most}


def cumulated(history: Sequence[Record], key: str, unit: float = 1.0) -> Curve:
    """The sum over all clients up to every round, in multiples of ``unit``."""
    total, curve = 0.0, {}
    for line in sorted(history, key=lambda line: int(line["round"])):
        total += number(line, key) or 0.0
        curve[float(line["round"])] = total / unit
    return curve


def traffic(history: Sequence[Record]) -> tuple[Curves, str]:
    """Payload of all clients since the start, each way, and its unit; no curves if nothing was sent."""
    from rich.filesize import pick_unit_and_suffix

    ways = {"clients to server": "uplink_bytes", "server to clients": "downlink_bytes"}
    top = max(sum(number(line, key) or 0.0 for line in history) for key in ways.values())
    unit, name = pick_unit_and_suffix(int(top), ["bytes", "kB", "MB", "GB"], 1000)
    return {way: cumulated(history, key, unit) for way, key in ways.items()} if top > 0 else {}, name


def closing_round(history: Sequence[Record]) -> int | None:
    """Position of the closing reports, which belong to no round; None if there are none."""
    return max((line["round"] for line in history if line.get("closing")), default=None)
