"""The server: settings -> strategy -> rounds -> results."""

from __future__ import annotations

import datetime
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from fedmutual.backbones.intake import intake_of
from fedmutual.data.images import ImageData
from fedmutual.data.review import review_run
from fedmutual.data.site import SharedData, load_images, load_shared
from fedmutual.engine.arriving import Arriving
from fedmutual.engine.rounds import Rounds
from fedmutual.logs import logged_to
from fedmutual.report.leave import keep_evidence, leave_report
from fedmutual.report.plots import write_plots
from fedmutual.results.diagnostics import diagnose, lacking
from fedmutual.results.directory import RunDirectory, build_summary
from fedmutual.settings import Settings, SettingsError, as_container
from fedmutual.settings.clients import unknown_clients
from fedmutual.settings.compose import from_contexts, run_config_overrides
from fedmutual.tracking.tracker import Tracking, missing_logger
from fedmutual.wire.exchange import Exchange
from fedmutual.wire.public_images import Distributor, ServingGrid
from fedmutual.wire.steady import steady

RUN_LOG = "run.log"
NOT_RELEASED = (
    "privacy.epsilon: this simulation has measured its clients; their figures, predictions and times have no "
    "noise, and would leave no site"
)

logger = logging.getLogger(__name__)


def run(grid: Grid, context: Context) -> None:
    """Do a whole run, and record its outcome in the results directory in every case.

    Raises
    ------
    Exception
        The error that ended the run, re-raised after ``summary.json`` is written, so that Flower marks the
        run as failed.
    """
    start = time.time()
    settings = from_contexts(context.run_config)
    grid = steady(grid)
    problem = missing_logger(settings)
    if problem:
        raise SettingsError(problem)
    journal, checkpoint = _open_results(settings, run_config_overrides(context.run_config))
    # `fedmutual run` takes this file from Flower, with the clients' output
    written = logged_to(journal.path / RUN_LOG) if getattr(grid, "may_lose", False) else nullcontext()
    with written:
        _run(grid, settings, journal, checkpoint, start)


def _run(
    grid: Grid,
    settings: Settings,
    journal: RunDirectory,
    checkpoint: tuple[dict[str, Any], dict[str, Any]] | None,
    start: float,
) -> None:
    logger.info("results: %s", journal.path)
    tracking = Tracking(settings, journal.path, journal.history())
    journal.listeners.append(tracking.log)
    outcome: dict[str, Any] = {"status": "failed", "reason": "the ServerApp was killed"}
    num_classes = 2
    shared = engine = None
    try:
        exchange = Exchange(grid, settings.exchange)
        nodes = exchange.wait_for_clients(settings.num_clients)
        intake, num_clients = intake_of(settings), settings.num_clients or len(nodes)
        images = load_images(settings, intake)
        shared = load_shared(settings, num_clients, intake, images)
        remarks = _remarks(settings, num_clients, images)
        outcome |= {"public_digest": shared.public.digest, "remarks": remarks}
        num_classes = len(shared.classes)
        engine = settings.strategy.engine(settings, shared, _run_name(journal.path), journal)
        if checkpoint is not None:
            engine.restore(*checkpoint)
        if settings.public.distribute:
            distributor = Distributor(exchange, settings, shared, journal.count_public_bytes)
            distributor.serve(nodes)
            grid = ServingGrid(grid, distributor)
        started = time.time()
        engine.start(grid)
        outcome["seconds"] = {"startup": started - start, "training": time.time() - started}
        outcome |= {
            "ensemble": _ensemble(engine, shared, settings),
            "global_model": _global_model(engine, settings, shared, journal),
        }
        unmeasured = "" if settings.privacy.secagg else _unmeasured(engine, shared, outcome)
        if unmeasured:
            logger.warning("%s", unmeasured)
            outcome["remarks"] = [*outcome["remarks"], unmeasured]
        outcome |= {"status": "completed", "reason": ""}
    except BaseException as error:
        outcome["reason"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        seconds = {**outcome.pop("seconds", {}), "total": time.time() - start}
        if shared is not None and engine is not None:
            keep_evidence(journal, shared, engine.unseen_predictions, settings.evaluation.mistakes)
        try:
            _finish(journal, settings, outcome, seconds, num_classes, tracking)
        finally:
            journal.close()


def _remarks(settings: Settings, num_clients: int, images: ImageData) -> list[str]:
    """Say what is worth knowing about the clients and the images; it never ends a run."""
    from fedmutual.models.learnt import picture_of

    def review() -> list[str]:
        return review_run(settings, num_clients, picture_of(settings).size, images)

    remarks: list[str] = _attempted("the review of the images", review, [])
    if num_clients == 1 and settings.strategy.needs_peers:
        remarks.append(
            f"one client has no peers: strategy={settings.strategy.name} exchanges nothing; set "
            "num_clients=2 or more, or strategy=local"
        )
    for remark in remarks:
        logger.warning("%s", remark)
    return remarks


def _open_results(
    settings: Settings, overrides: list[str]
) -> tuple[RunDirectory, tuple[dict[str, Any], dict[str, Any]] | None]:
    if settings.resume is not None:
        journal = RunDirectory.resume(Path(settings.resume), as_container(settings))
        return journal, journal.load_checkpoint()
    now = datetime.datetime.now()
    name = f"{now:%Y-%m-%d_%H-%M-%S}-{settings.strategy.name}"
    output = Path(settings.output_dir) if settings.output_dir else None
    return RunDirectory.create(output, as_container(settings), name, overrides), None


def _run_name(path: Path) -> str:
    """Return a globally unique name: clients store their states under it, so runs must never share one."""
    return f"{path.name}-{secrets.token_hex(4)}"


def _ensemble(engine: Rounds | Arriving, shared: SharedData, settings: Settings) -> dict[str, Any] | None:
    """Evaluate the mean-logit ensemble of the honest clients that answered the closing order.

    Of a sum it is of all of them: no one can be left out.
    """
    hostile = settings.attack.clients
    said = [values for name, values in engine.unseen_predictions.items() if name not in hostile]
    if engine.joint is not None:
        said = [engine.joint]
    if not said or shared.unseen is None:
        return None
    import torch

    from fedmutual.learning.evaluation import ensemble, quality

    log_p = torch.from_numpy(ensemble(said))
    return {**quality(log_p, torch.from_numpy(shared.unseen.labels)), "num_examples": len(shared.unseen)}


def _unmeasured(engine: Rounds | Arriving, shared: SharedData, outcome: Mapping[str, Any]) -> str:
    """Say that the server's test images measured nothing, and what to do; empty: they did."""
    if shared.unseen is None or engine.unseen_predictions or outcome.get("global_model"):
        return ""
    return (
        f"nothing was measured on the server's {len(shared.unseen)} test images: the sites have none, and "
        "their models stay there. Copy test/ to the sites, beside their own train/ and public/ (they predict "
        "it once, at the end), or judge the run by each site's own validation images"
    )


def _global_model(
    engine: Rounds | Arriving, settings: Settings, shared: SharedData, journal: RunDirectory
) -> dict[str, Any] | None:
    """Evaluate and save the global model, if the strategy has one."""
    weights = engine.global_weights()
    if weights is None:
        return None
    from fedmutual.engine.server_model import ServerModel

    return ServerModel(settings, shared, weights).leave(journal)


def _finish(
    journal: RunDirectory,
    settings: Settings,
    outcome: dict[str, Any],
    seconds: dict[str, float],
    classes: int,
    tracking: Tracking,
) -> None:
    """Write the summary, then what can be made again and must not cost it: plots and the report."""
    history: list[Any] = _attempted("history.jsonl", journal.history, [])
    kl_weight = getattr(settings.strategy, "kl_weight", 0.0)
    warnings: list[str] = _attempted("a diagnosis", lambda: diagnose(history, classes, kl_weight), [])
    reported = sorted({line["client"] for line in history if line.get("client")})
    unknown = unknown_clients(settings, reported) if reported else None
    warnings += [unknown] if unknown else []
    if settings.privacy.epsilon is not None and any("validation_accuracy" in line for line in history):
        warnings.append(NOT_RELEASED)
    for warning in warnings:
        logger.warning("%s", warning)
    lack: str | None = _attempted("what reports lack", lambda: lacking(history), None)
    if lack is not None:
        logger.info("%s", lack)
    summary = build_summary(
        settings=as_container(settings),
        history=history,
        public_data_bytes=_attempted("public_data.json", journal.public_bytes, 0),
        seconds=seconds,
        warnings=[*outcome.pop("remarks", []), *warnings],
        date=_iso(time.time() - seconds["total"]),
        **outcome,
    )
    try:
        journal.write_summary(summary)
    finally:
        tracking.close(summary)
        write_plots(history, journal.path)
        leave_report(journal.path, summary)  # the last one, for which `fedmutual run` waits


def _iso(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment).astimezone().isoformat(timespec="minutes")


def _attempted(what: str, call: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return call()
    except Exception as error:  # of a file that something else has damaged; the summary says what is known
        logger.warning("%s is left out of the summary: %s", what, error)
        return otherwise
