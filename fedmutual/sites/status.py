"""The sites and the run as the server sees them: from the SuperLink, and from the run's folder."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedmutual.provision.registry import Registry
from fedmutual.results.directory import CONFIG, HISTORY, SUMMARY, ResultsError, read_history, read_summary
from fedmutual.results.hold import in_use
from fedmutual.results.progress import PROGRESS, Present, read_progress
from fedmutual.results.summary import natural_key
from fedmutual.sites.superlink import ONLINE, REGISTERED, REMOVED, Registered
from fedmutual.wire.signatures import fingerprint

UNREGISTERED = "not registered"
_GRACE = 5.0  # seconds; a connected site is silent only when a heartbeat is overdue


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes
    ----------
    status : str
        ``running``, ``stopped``, or what its summary says: ``completed``, ``failed``.
    round : int
        The present one; of a run that is over the last.
    closing : bool
        All rounds are done, and the closing one is under way.
    waiting : list[str]
        Sites whose reports are waited for.
    since : float or None
        When the round began, Unix time.
    """

    folder: str
    status: str
    round: int
    rounds: int | None = None
    closing: bool = False
    answered: int | None = None
    waiting: list[str] = field(default_factory=list)
    since: float | None = None


@dataclass(frozen=True)
class SiteStatus:
    """One site.

    Attributes
    ----------
    state : str
        ``online``, ``offline``, ``registered`` (it has never connected) or ``not registered``.
    node : int or None
    last_seen : str or None
        ISO 8601 with the time zone.
    silent_seconds : float or None
        Since then; None: it has never been seen.
    silent : bool
        It has not been heard of for longer than is accepted.
    round : int or None
        Of its last good report.
    waited_for : bool
        The run waits for its report.
    """

    name: str
    state: str
    node: int | None
    fingerprint: str
    last_seen: str | None
    silent_seconds: float | None
    silent: bool
    round: int | None
    waited_for: bool


@dataclass(frozen=True)
class Status:
    """All of it; ``run`` is None where there is no run's folder."""

    sites: list[SiteStatus]
    run: Run | None

    def as_json(self) -> str:
        """Return it as a JSON object."""
        return json.dumps(asdict(self), indent=2)


def newest_run(folder: Path) -> Path | None:
    """Return the results folder that was written to last; None: there is none below this one."""
    found = [path.parent for path in folder.glob(f"*/{CONFIG}")]
    return max(found, key=_written, default=None)


def status_of(
    nodes: Sequence[Registered], now: float, registry: Registry, run: Path | None, silent: float
) -> Status:
    """Put together what the SuperLink, the registry and a run's folder say.

    Parameters
    ----------
    nodes : Sequence[Registered]
        Nodes that were removed may be among them.
    now : float
        The SuperLink's time.
    run : Path or None
        The run's folder.
    silent : float
        Seconds after which a site counts as silent.
    """
    present = [node for node in nodes if node.state != REMOVED]
    seen, rounds = (None, {}) if run is None else _read_run(run, present)
    waiting = set(seen.waiting) if seen else set()
    sites = [_site(node, now, silent, rounds, waiting) for node in present]
    there = {node.fingerprint for node in present}
    for name, line in registry.read().items():
        key = fingerprint(line)
        if key not in there:
            sites.append(SiteStatus(name, UNREGISTERED, None, key, None, None, True, rounds.get(name), False))
    return Status(sorted(sites, key=lambda site: natural_key(site.name)), seen)


def _site(
    node: Registered, now: float, silent: float, rounds: Mapping[str, int], waiting: Iterable[str]
) -> SiteStatus:
    name = node.name or f"node {node.id}"
    seconds = None if node.seen is None else max(0.0, now - node.seen)
    limit = max(silent, node.interval + _GRACE) if node.state == ONLINE else silent
    return SiteStatus(
        name=name,
        state=node.state,
        node=node.id,
        fingerprint=node.fingerprint,
        last_seen=None if node.seen is None else _iso(node.seen),
        silent_seconds=None if seconds is None else round(seconds, 1),
        silent=node.state == REGISTERED or seconds is None or seconds > limit,
        round=rounds.get(name),
        waited_for=name in waiting,
    )


def _read_run(folder: Path, nodes: Sequence[Registered]) -> tuple[Run, dict[str, int]]:
    """Return what a run's folder says, and each site's last round with a good report."""
    names = {node.id: node.name or f"node {node.id}" for node in nodes}
    try:
        history = read_history(folder)
        summary = read_summary(folder)
    except ResultsError:  # it is being written, or damaged: `fedmutual report` says how
        history, summary = [], None
    rounds: dict[str, int] = {}
    for line in history:
        client = names.get(line.get("node_id") or 0) or line.get("client")
        if client and "rejected" not in line:
            rounds[client] = max(rounds.get(client, 0), line["round"])
    done = max((line["round"] for line in history), default=0)
    now: Present | None = read_progress(folder) if summary is None else None
    going = summary is None and in_use(folder)
    if now is None:
        ended = "stopped" if summary is None else str(summary.get("status"))
        return Run(folder.name, "running" if going else ended, done), rounds
    if not going:
        return Run(folder.name, "stopped", now.round, now.rounds, now.closing), rounds
    waiting = [names.get(int(node), name or f"node {node}") for node, name in now.waiting.items()]
    waiting.sort(key=natural_key)
    shown = Run(folder.name, "running", now.round, now.rounds, now.closing, now.answered, waiting, now.since)
    return shown, rounds


def _written(folder: Path) -> float:
    files = (folder / name for name in (PROGRESS, HISTORY, SUMMARY, CONFIG))
    return max(file.stat().st_mtime for file in files if file.exists())


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
