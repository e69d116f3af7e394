"""A status as a table, and as metrics that Prometheus reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rich.console import Console
from rich.table import Table

from fedmutual.logs import shown
from fedmutual.sites.status import Run, Status
from fedmutual.sites.superlink import ONLINE, SuperLinkError

_STYLE = {ONLINE: "green", "offline": "yellow"}
# name -> help, and value of one site
_SITE_METRICS = {
    "fedmutual_site_online": "Whether the site is connected.",
    "fedmutual_site_silent": "Whether the site has been silent for too long.",
    "fedmutual_site_silent_seconds": "Seconds since the site was last heard of.",
    "fedmutual_site_round": "Round of the site's last good report.",
    "fedmutual_site_waited_for": "Whether the run waits for the site's report.",
}


def print_status(status: Status, console: Console) -> None:
    """Print the run in a line, and the sites as a table."""
    console.print(shown(run_line(status.run)), highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("site", "state", "last seen", "round", "waited for", "node", "key"):
        table.add_column(title, no_wrap=True, overflow="ellipsis" if title == "key" else "fold")
    for site in status.sites:
        state = f"{site.state}, silent" if site.silent else site.state
        style = "red" if site.silent else _STYLE.get(site.state, "")
        table.add_row(
            shown(site.name),
            f"[{style}]{state}[/]" if style else state,
            "never" if site.silent_seconds is None else f"{duration(site.silent_seconds)} ago",
            "" if site.round is None else str(site.round),
            "yes" if site.waited_for else "",
            "" if site.node is None else str(site.node),
            site.fingerprint,
        )
    console.print(table, highlight=False)
    if not status.sites:
        console.print("no site is registered: fedmutual site add --all", markup=False)


def run_line(run: Run | None) -> str:
    """Return what a run is doing, in one line."""
    if run is None:
        return "no run yet"
    if run.status == "stopped":
        return f"no run active; {run.folder} was stopped in round {run.round}: continue it with resume=FOLDER"
    if run.status != "running":
        return f"no run active; the last one, {run.folder}, {run.status} after {run.round} rounds"
    if run.rounds is None:
        return f"run {run.folder}: {run.round} rounds done"
    where = "closing round" if run.closing else f"round {run.round} of {run.rounds}"
    since = "" if run.since is None else f" for {duration(max(0.0, time.time() - run.since))}"
    waiting = f"waiting{since} for {', '.join(run.waiting)}" if run.waiting else "nobody is waited for"
    return f"run {run.folder}: {where}, {run.answered or 0} answered, {waiting}"


def duration(seconds: float) -> str:
    """Return seconds for a person.

    Examples
    --------
    >>> duration(8), duration(240), duration(7300), duration(200_000)
    ('8 s', '4 min', '2.0 h', '2.3 days')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129_600 else f"{seconds / 86_400:.1f} days"


def metrics(status: Status | None) -> str:
    """Return the status in Prometheus' text format; None: the SuperLink does not answer."""
    lines = [*_metric("fedmutual_superlink_up", "Whether the SuperLink answers.", {"": status is not None})]
    if status is None:
        return "\n".join(lines) + "\n"
    # of two keys of one name, the connected one counts
    sites = {site.name: site for site in sorted(status.sites, key=lambda site: site.state == ONLINE)}.values()
    values: dict[str, dict[str, float | None]] = {
        "fedmutual_site_online": {site.name: site.state == ONLINE for site in sites},
        "fedmutual_site_silent": {site.name: site.silent for site in sites},
        "fedmutual_site_silent_seconds": {site.name: site.silent_seconds for site in sites},
        "fedmutual_site_round": {site.name: site.round for site in sites},
        "fedmutual_site_waited_for": {site.name: site.waited_for for site in sites},
    }
    for name, help in _SITE_METRICS.items():
        lines += _metric(name, help, values[name])
    run = status.run
    active = run is not None and run.status == "running"
    lines += _metric("fedmutual_run_active", "Whether a run is going on.", {"": active})
    if run is not None:
        lines += _metric("fedmutual_run_round", "The present round, or the last one.", {"": run.round})
        lines += _metric("fedmutual_run_rounds", "Rounds of the run.", {"": run.rounds})
        lines += _metric("fedmutual_run_waiting", "Sites that are waited for.", {"": len(run.waiting)})
    return "\n".join(lines) + "\n"


def _metric(name: str, help: str, values: Mapping[str, float | None]) -> list[str]:
    lines = [f"# HELP {name} {help}", f"# TYPE {name} gauge"]
    for site, value in values.items():
        if value is not None:
            label = "" if not site else f'{{site="{_escaped(site)}"}}'
            lines.append(f"{name}{label} {float(value):g}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def make_server(host: str, port: int, collect: Callable[[], Status]) -> ThreadingHTTPServer:
    """Return a server that answers ``/metrics``; each answer asks the SuperLink anew.

    Raises
    ------
    OSError
        The address is taken or not this machine's.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            try:
                text = metrics(collect())
            except SuperLinkError:
                text = metrics(None)
            content = text.encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)
