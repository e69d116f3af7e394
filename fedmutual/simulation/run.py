"""One simulation from start to end: start, submit, follow, report, and end every process."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmutual.appfolder import runnable_app
from fedmutual.simulation.interrupts import Interrupted, Interrupts
from fedmutual.simulation.progress import Display, HistoryTail
from fedmutual.simulation.request import RunRequest, held
from fedmutual.simulation.superlink import FlowerError, SuperLink

POLL_SECONDS = 0.1
RECORD_SECONDS = 0.5  # interval of the search for new processes
ASK_SECONDS = 20.0  # interval of status requests while the run's process has not appeared
ENDING_SECONDS = 120.0  # time limit of the ServerApp after its summary
FAILING_SECONDS = 2.0  # the same after a failed run's report: Flower would still start its clients
REPORTING_SECONDS = 20.0  # time limit of a failed run's plots and report, which come after its summary
STOPPING_SECONDS = 5.0  # time limit for a simulation to stop


class LocalRun:
    """A simulation on this machine.

    Parameters
    ----------
    request : RunRequest
        The checked settings.
    app_dir : Path
        The Flower app: a folder with ``pyproject.toml``, ``server_app.py`` and ``client_app.py``; assembled
        first for an installed wheel.
    console : Console
        Shows the run.
    verbose : bool
        Also show the log of the ServerApp and the clients.
    """

    def __init__(self, request: RunRequest, app_dir: Path, console: Console, verbose: bool = False) -> None:
        self._request = request
        self._app_dir = app_dir
        self._console = console
        self._verbose = verbose
        self._output = request.output_dir
        self._log = self._output / "run.log"  # output of the ServerApp and the clients
        self._interrupts = Interrupts()
        self._recorded = 0.0

    def run(self) -> int:
        """Run the simulation to its end.

        Raises
        ------
        SettingsError
            The results folder is in use by another run, or cannot be made; nothing was started.

        Returns
        -------
        int
            The exit code: 0 when the run completed, 1 when it failed, 130 after Ctrl-C, 143 after SIGTERM.
        """
        with held(self._output):
            return self._run()

    def _run(self) -> int:
        self._log_offset = self._log.stat().st_size if self._log.exists() else 0
        self._shown = self._log_offset
        self._old_summary = _identity(self._output / "summary.json")
        self._old_report = _identity(self._output / "report.html")
        with self._interrupts, runnable_app(self._app_dir) as app_dir:
            self._display = Display(self._console, self._request.num_clients, self._request.settings.rounds)
            gpu_index = self._request.settings.device.startswith("cuda:")
            self._superlink = SuperLink(app_dir, self._output / "superlink.log", gpu_index)
            try:
                reason = self._simulate()
            except Interrupted as interruption:
                return self._interrupted(interruption)
            except FlowerError as error:
                reason = str(error)
            finally:
                self._close()
            return self._report(reason)

    def _simulate(self) -> str:
        """Start and follow the run; return why it left no summary, empty if it left one."""
        history = HistoryTail(self._output / "history.jsonl")
        self._run_id = ""
        models, num_clients = self._request.settings.model.per_client, self._request.num_clients
        if models and len(models) < num_clients:
            self._display.line(f"model.per_client: {num_clients} clients take the {len(models)} in turn")
        self._display.status("starting the SuperLink")
        self._superlink.start(self._wait)
        self._display.status("submitting the app")
        self._run_id = self._superlink.submit(
            self._request.run_config, self._request.federation_config, self._wait
        )
        if self._verbose:
            self._superlink.stream_log(self._run_id, self._log)
        self._display.status("starting the server and the clients")
        self._follow(history)
        summary = self._summary()
        if not self._verbose:  # else it is there already
            self._superlink.save_log(self._run_id, self._log, self._wait)
        if summary is None:
            status, details = self._superlink.status(self._run_id, self._wait)
            return details or last_error(self._log, self._log_offset) or status
        return ""

    def _follow(self, history: HistoryTail) -> None:
        """Show the run's history until its process has ended."""
        asked = time.monotonic()
        deadline, failed = None, False
        while True:
            over = self._superlink.simulation is not None and not self._superlink.simulating
            if deadline is None and (summary := self._summary()) is not None:
                failed = summary.get("status") != "completed"
                deadline = time.monotonic() + (REPORTING_SECONDS if failed else ENDING_SECONDS)
            if failed and _identity(self._output / "report.html") != self._old_report:
                deadline, failed = time.monotonic() + FAILING_SECONDS, False
            if deadline is not None:  # Flower's shutdown takes seconds, with no further rows
                over = over or self._superlink.returned
            self._display.rows(history.poll())
            if over or (deadline is not None and time.monotonic() > deadline):
                return
            if not self._superlink.running:
                raise FlowerError(f"the SuperLink ended during the run; see {self._output / 'superlink.log'}")
            if self._superlink.simulation is None and time.monotonic() - asked > ASK_SECONDS:
                if self._superlink.status(self._run_id, self._wait)[0].startswith("finished"):
                    return
                asked = time.monotonic()
            self._wait()

    def _wait(self) -> None:
        time.sleep(POLL_SECONDS)
        self._show_log()
        if time.monotonic() - self._recorded > RECORD_SECONDS:
            self._superlink.processes.record()
            self._recorded = time.monotonic()
        self._interrupts.check()

    def _interrupted(self, interruption: Interrupted) -> int:
        self._display.status("stopping (Ctrl-C again: at once)")
        self._stop_run()
        self._close()
        self._leave_summary("stopped", str(interruption))
        self._console.print(
            f"Stopped. Results so far: {self._output}", markup=False, highlight=False, soft_wrap=True
        )
        return interruption.exit_code

    def _stop_run(self) -> None:
        """Let Flower shut the simulation down; killing the SuperLink first would leave Ray running."""

        def wait() -> None:
            time.sleep(POLL_SECONDS)
            if self._interrupts.hurry():
                raise FlowerError("no time left")

        if not self._run_id or self._interrupts.hurry():
            return
        try:
            self._superlink.stop_run(self._run_id, wait)
            deadline = time.monotonic() + STOPPING_SECONDS
            while self._superlink.simulating and time.monotonic() < deadline:
                wait()
        except FlowerError as error:
            self._display.line(f"flwr stop: {error}; ending its processes")

    def _leave_summary(self, status: str, reason: str) -> None:
        """Write ``summary.json`` for a run that could not write it itself."""
        from fedmutual.report.leave import leave_report
        from fedmutual.results.directory import ResultsError, RunDirectory, leave_summary
        from fedmutual.settings import as_container

        try:
            if not (self._output / "config.yaml").exists():  # it ended before the ServerApp started
                RunDirectory(self._output).write_config(as_container(self._request.settings))
            leave_summary(self._output, status, reason)
            leave_report(self._output)
        except (ResultsError, OSError) as error:  # for example a damaged history or a full disk
            self._display.line(f"no summary.json: {error}")

    def _close(self) -> None:
        self._superlink.close(self._interrupts.hurry)
        self._show_log()
        self._display.close()

    def _report(self, reason: str) -> int:
        if self._summary() is None:
            reason = reason or last_error(self._log, self._log_offset) or "no reason given"
            self._leave_summary("failed", reason)
        summary = self._summary()
        if summary is not None and summary.get("clients"):
            from fedmutual.report.tables import clients_table

            self._console.print(clients_table(summary))
        for warning in (summary or {}).get("warnings", []):
            self._display.line(f"warning: {warning}")
        completed = summary is not None and summary.get("status") == "completed"
        if not completed:
            status, given = ((summary or {}).get(key) for key in ("status", "reason"))
            self._display.line(f"The run {status or 'failed'}: {given or reason or 'no reason given'}")
            if self._log.exists():
                self._display.line(f"Full log: {self._log}")
        if (self._output / "report.html").exists():
            self._display.line(f"Report: {self._output / 'report.html'}")
        self._display.line(f"Results: {self._output}")
        return 0 if completed else 1

    def _summary(self) -> dict[str, Any] | None:
        """Return the summary of this run, ignoring one left by an earlier, interrupted run."""
        path = self._output / "summary.json"
        if _identity(path) in (None, self._old_summary):
            return None
        summary = json.loads(path.read_text(encoding="utf-8"))
        return dict(summary)

    def _show_log(self) -> None:
        if not self._verbose or not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._shown)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._shown += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            self._display.log(line)


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"^\s*(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*")


def last_error(log: Path, start: int = 0) -> str:
    """Return the last exception line of a log, else its last lines; empty for an empty log.

    Parameters
    ----------
    log : Path
        The log.
    start : int
        Byte at which this run's part begins.
    """
    if not log.exists():
        return ""
    text = _COLOUR.sub("", log.read_bytes()[start:].decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    stated = [line for line in lines if _EXCEPTION.match(line)]
    return stated[-1] if stated else "\n".join(lines[-5:])


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
