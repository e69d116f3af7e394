"""The client: receive an order, train the model, send a report.

Each message may run in a new process; persistent state is in :mod:`fedmutual.client.state`.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import nn

from fedmutual.backbones.intake import intake_of
from fedmutual.client.disclosure import (
    RELEASED,
    disclosed,
    overlap_rule,
    report_level,
    require_owners_limits,
    require_sound_noise,
)
from fedmutual.client.learner import Answer, Learner, derived_seed, learning_rate, new_optimizer, warm_start
from fedmutual.client.masking import Masking, open_masking, peers_only
from fedmutual.client.refusal import error_reason
from fedmutual.client.sent import record_reply
from fedmutual.client.site_log import progress
from fedmutual.client.state import ClientState, Ledger, StateError, StateFolder
from fedmutual.data.images import ImageData
from fedmutual.data.review import review_site
from fedmutual.data.site import SiteData, half, load_images, load_site, overlap_text
from fedmutual.learning.attack import poisoned
from fedmutual.learning.device import choose_device, describe
from fedmutual.learning.ema import MovingAverage
from fedmutual.models.allowed import require_model
from fedmutual.models.build import load_weights
from fedmutual.models.card import model_card
from fedmutual.models.learnt import (
    architecture_of,
    build_learnt,
    frozen_digest,
    name_of,
    picture_of,
    whole_weights,
)
from fedmutual.models.stored import BEST
from fedmutual.results.directory import states_dir
from fedmutual.settings import Settings
from fedmutual.settings.at_site import site_settings, trusts_run
from fedmutual.settings.identity import IdentityError, client_name, partition_of
from fedmutual.wire.codec import FloatArray, MessageError
from fedmutual.wire.key_question import read_key_question
from fedmutual.wire.orders import Order, read_order
from fedmutual.wire.records import payload_bytes
from fedmutual.wire.reports import Report, identification_record, report_record

SHADOW = (
    "shadow"  # node configuration of a shadow run (fedmutual audit): which half of the images to train on
)

logger = logging.getLogger(__name__)


class Method(Protocol):
    """The client's side of a strategy; see :class:`fedmutual.methods.base.Method`."""

    whole_pool: bool
    part_of_model: bool
    loads_model: bool

    def learn(self, learner: Learner) -> Answer:
        """Carry out the learner's order."""

    def weights(
        self, order: Order, report: Report, weights: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """Return the weights to send with the report."""


def handle(message: Message, context: Context) -> Message:
    """Answer an order with a report, or with an error that names the client.

    A ClientApp that returns None blocks its SuperNode forever, and one that raises sends its whole text to
    the server. Here that and the traceback stay in the site's own log.
    """
    return _handle(message, context, answer)


def handle_public(message: Message, context: Context) -> Message:
    """Answer a query about the public set, or store a part of it (public.distribute)."""
    from fedmutual.wire import public_images as distribution

    def take(content: RecordDict, context: Context) -> RecordDict:
        settings = client_settings(context.run_config, context.node_config)
        return distribution.answer(content, settings, context.node_config)

    return _handle(message, context, take)


def handle_key(message: Message, context: Context) -> Message:
    """Answer the question for this site's public key in a run (privacy.secagg)."""

    def tell(content: RecordDict, context: Context) -> RecordDict:
        name = client_name(context.node_config)
        settings = client_settings(context.run_config, context.node_config)
        run = read_key_question(content)
        folder = StateFolder(states_dir(settings.state_dir), run, name)
        with folder.locked():
            masking = open_masking(folder.path, name, settings, context.node_config)
            if masking is None:
                raise MessageError.to_everyone("privacy.secagg: this run does not use it")
            proof = masking.proof(run)
            own = masking.public_key()
            return identification_record(name, key=own, signer=proof.signer, signature=proof.signature)

    return _handle(message, context, tell)


def _handle(
    message: Message, context: Context, respond: Callable[[RecordDict, Context], RecordDict]
) -> Message:
    try:
        reply = Message(respond(message.content, context), reply_to=message)
    except Exception as error:
        logger.exception("the order failed")
        reply = _failed(message, context, error_reason(error, context.node_config))
    try:
        name = _name_for_errors(context).replace(" ", "-")
        record_reply(message, reply, name, context.node_config)
    except OSError:
        logger.exception("what cannot be recorded is not sent")
        return _failed(message, context, "this site cannot record what it sends; its own log says more")
    return reply


def _failed(message: Message, context: Context, reason: str) -> Message:
    text = f"{_name_for_errors(context)}: {reason}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text), reply_to=message)


def answer(content: RecordDict, context: Context) -> RecordDict:
    """Carry out an order once; answer a repeated order with the saved report.

    Raises
    ------
    MessageError, IdentityError, StateError, DataError, SettingsError
        The message names the problem and the remedy; the state on disk is unchanged.
    """
    start = time.perf_counter()
    name = client_name(context.node_config)
    settings = client_settings(context.run_config, context.node_config)
    level = report_level(settings.privacy, context.node_config)
    require_sound_noise(settings, context.node_config)
    require_owners_limits(settings.privacy, context.node_config)
    order = read_order(content)
    if not order.run:
        raise MessageError("run: the order has no run name; this app only accepts orders of its own server")
    folder = StateFolder(states_dir(settings.state_dir), order.run, name)
    masking = open_masking(folder.path, name, settings, context.node_config)
    with folder.locked():
        if masking is not None:
            masking.admit(order)
        state = folder.load()
        if state is not None and state.report.round > order.round:
            state = _step_back(folder, state.report.round, order.round)
        if state is None or state.report.round < order.round:
            taught = order if state is None else peers_only(order, state.report, settings)
            state = _learn(taught, settings, context.node_config, name, folder, state, start)
            record = _packed(state, settings, order, level, masking)
            received = state.ledger.received + payload_bytes(content)
            sent = state.ledger.sent + payload_bytes(record)
            folder.save(replace(state, ledger=Ledger(received, sent)))
            logger.info("%s: %.1f kB received, %.1f kB sent in this run", name, received / 1e3, sent / 1e3)
            return record
        logger.warning("%s: round %d is already done; sending its report again", name, order.round)
        return _packed(state, settings, order, level, masking)


def _packed(
    state: ClientState, settings: Settings, order: Order, level: str, masking: Masking | None
) -> RecordDict:
    """Pack of the last report what leaves the site (``privacy``)."""
    method: Method = settings.strategy
    weights = state.sent or method.weights(order, state.report, state.weights)
    report = replace(state.report, metrics=disclosed(state.report.metrics, level))
    if level != "full":  # whoever guesses the images could test class counts with it
        report = replace(report, private_digest="")
    if level == RELEASED:
        report = replace(report, unseen_predictions=None)
    if weights:
        report = replace(report, model=ArrayRecord({name: w.cpu() for name, w in weights.items()}))
    if masking is not None:
        report = masking.hide(report, order)
    return report_record(report, order.wire_dtype, order.floor)


def _step_back(folder: StateFolder, done: int, asked: int) -> ClientState:
    """Restore the state before the client's last round, because the server has lost that round."""
    state = folder.step_back(asked)
    if state is None:
        remedy = f"the order is for round {asked}: resume the run from its newest results, or start a new run"
        raise StateError(
            f"{folder.path} is at round {done}, {remedy}", f"this site's state is at round {done}, {remedy}"
        )
    logger.warning(
        "%s: back from round %d to round %d: the server asks for round %d again",
        folder.path,
        done,
        state.report.round,
        asked,
    )
    return state


def _name_for_errors(context: Context) -> str:
    try:
        return client_name(context.node_config)
    except IdentityError:
        return f"node {context.node_id}"


def client_settings(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Settings:
    """Return the run's settings for this node: its own configuration wins, then ``model.per_client``."""
    settings = site_settings(run_config, node_config)
    models = settings.model.per_client
    if models and "model" not in node_config and "partition-id" in node_config:
        settings = site_settings(
            run_config, node_config, models[int(node_config["partition-id"]) % len(models)]
        )
    privacy = replace(settings.privacy, overlap=overlap_rule(settings.privacy.overlap, node_config))
    return replace(settings, privacy=privacy)


def _learn(
    order: Order,
    settings: Settings,
    node_config: Mapping[str, Any],
    name: str,
    folder: StateFolder,
    state: ClientState | None,
    start: float,
) -> ClientState:
    site = _site(settings, partition_of(node_config), order.public_digest)
    if SHADOW in node_config and trusts_run(node_config):
        site = half(site, int(node_config[SHADOW]))
    _check_order(order, site)
    _check_frozen(order, settings)
    require_model(settings.model.target, node_config)
    device = choose_device(settings.device)
    if state is None:  # log once per run: in deployment every order has its own process
        logger.info("%s: training on %s", name, describe(device, settings.device))
        if len(site.left_out):
            logger.warning("%s: %s", name, overlap_text(site))
        if partition_of(node_config) is None:  # else the server has all images, and says it once
            for remark in review_site(site, settings, picture_of(settings).size):
                logger.warning("%s: %s", name, remark)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # use_deterministic_algorithms would import torch's compiler: 1.3 s in every client process
        torch.set_deterministic_debug_mode("warn")
    model, arguments = _model(settings, site, name, device, state)
    optimizer = new_optimizer(settings, model, order.round)
    if state is not None and state.optimizer and settings.optimizer.keep_state:
        optimizer.load_state_dict(state.optimizer)
        _restore_layout(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(settings, order.round)
    if order.model is not None and settings.strategy.loads_model:
        own = model.state_dict() if settings.strategy.part_of_model else {}
        load_weights(model, {**own, **order.model.to_torch_state_dict()})
    average = _average(settings, model, order, state)
    learner = Learner(settings, site, model, optimizer, order, name, average)
    if state is not None and order.model is None and settings.attack.by(name) == "none":
        learner.remember(state.report)
    said = settings.strategy.learn(learner)
    predictions = _sent(said.predictions, settings, order, name)
    learner.metrics.setdefault("num-examples", len(site.train_indices(min(order.round, settings.rounds))))
    learner.metrics["seconds"] = time.perf_counter() - start
    report = Report(
        client=name,
        round=order.round,
        public_digest=site.public.digest,
        architecture=name_of(settings.model, model),
        predictions=predictions,
        metrics=learner.metrics,
        unseen_predictions=said.unseen_predictions,
        private_digest=site.private_digest,
    )
    if state is not None and state.report.private_digest not in ("", report.private_digest):
        logger.warning(
            "%s: the private images are not those of round %d: figures before and after are of other images",
            name,
            state.report.round,
        )
    if settings.train.keep == "best":
        _keep_best(folder, settings, site, arguments, report, learner)
    if order.closing:
        weights = whole_weights(settings, arguments, _weights(learner.predictor))
        where = folder.export_model(weights, _card(settings, site, arguments, report))
        logger.info("%s: finished; its model is in %s", name, where)
    logger.info("%s", progress(report, state.report if state else None, order.closing))
    kept = optimizer.state_dict() if settings.optimizer.keep_state else {}
    ledger = state.ledger if state else Ledger()
    averaged = {} if average is None else _weights(average.model)
    steps = 0 if average is None else average.steps
    architecture = architecture_of(settings.model)
    sent = dict(said.sent)
    return ClientState(architecture, _weights(model), kept, report, ledger, averaged, sent, steps)


def _keep_best(
    folder: StateFolder,
    settings: Settings,
    site: SiteData,
    arguments: dict[str, Any],
    report: Report,
    learner: Learner,
) -> None:
    """Write the model beside the last one if no earlier round was better on the validation images."""
    done = min(report.round, settings.rounds)
    card = _card(settings, site, arguments, report) | {"rounds": done, "order": report.round}
    best = folder.best_card()
    if best is not None and best["order"] < report.round and _score(best) >= _score(card):
        return
    weights = whole_weights(settings, arguments, _weights(learner.predictor))
    folder.export_model(weights, card, BEST)
    logger.info("%s: round %d is the best so far on its validation images", report.client, report.round)


def _score(card: Mapping[str, Any]) -> tuple[float, float]:
    metrics = card["metrics"]
    return metrics.get("validation_accuracy", 0.0), -metrics.get("validation_loss", math.inf)


def _average(
    settings: Settings, model: nn.Module, order: Order, state: ClientState | None
) -> MovingAverage | None:
    """Return the EMA of the client's weights as saved; None if the strategy exchanges weights."""
    decay = settings.train.ema_decay
    exchanged = order.model is not None and settings.strategy.loads_model
    if decay == 0 or exchanged or settings.strategy.part_of_model:
        return None
    if state is None or not state.average:
        return MovingAverage(model, decay)
    average = MovingAverage(model, decay, state.average_steps)
    load_weights(average.model, state.average)
    return average


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach() for key, value in model.state_dict().items()}


def _sent(predictions: FloatArray, settings: Settings, order: Order, name: str) -> FloatArray:
    """Return the client's predictions, altered if it emulates a hostile client."""
    attack = settings.attack.by(name)
    same = np.array_equal(order.target_indices, order.indices)
    seed = derived_seed(settings.seed, name, order.round, "attack")
    return poisoned(attack, predictions, order.log_targets if same else None, seed)


def _restore_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory format of their parameters; the contiguous format of files slows every step."""
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_order(order: Order, site: SiteData) -> None:
    if order.classes != site.classes:
        remedy = (
            f"the server {', '.join(order.classes)}: give both the same class folders, or set data.classes"
        )
        raise MessageError(
            f"classes: this site has {', '.join(site.classes)}, {remedy}",
            f"classes: this site has others, {remedy}",
        )
    if order.public_digest != site.public.digest:
        copy = "copy the server's public images to this site again, unchanged"
        remedy = f"the server's {order.public_digest}: {copy}"
        raise MessageError(
            f"public set: this site's digest is {site.public.digest}, {remedy} ({len(site.public)} are here)",
            f"public set: this site has another, {remedy}",
        )


def _check_frozen(order: Order, settings: Settings) -> None:
    """Refuse weights that stand on another frozen backbone than this site's."""
    if order.model is None:
        return
    own = frozen_digest(settings)
    if order.frozen != own:
        raise MessageError(
            f"model: the run's weights stand on {order.frozen or 'no frozen backbone'} (tuned part, size, "
            f"interpolation, digest), this site's on {own or 'none'}: give it the run's model, with the same "
            "file of weights"
        )


# Loaded by this process, which in simulation answers many orders of many clients.
_SITES: dict[str, SiteData] = {}
_IMAGES: dict[str, ImageData] = {}


def forget_images() -> None:
    """Load the images anew at the next order: they may have changed between two runs of one process."""
    _SITES.clear()
    _IMAGES.clear()


def _site(settings: Settings, partition: tuple[int, int] | None, public_digest: str) -> SiteData:
    """Load the data, or reuse the data of an earlier order of this process (simulation)."""
    key = repr(
        (
            partition,
            public_digest if settings.public.distribute else None,
            settings.data,
            settings.model,
            settings.device,
            settings.partition,
            settings.public,
            settings.seed,
            settings.rounds,
            settings.train.validation_fraction,
            settings.cache_dir,
            settings.privacy.overlap,
            settings.strategy.whole_pool,
        )
    )
    if key not in _SITES:
        intake = intake_of(settings)
        images = repr((settings.data, settings.model, settings.device, settings.cache_dir))
        if images not in _IMAGES:
            _IMAGES[images] = load_images(settings, intake)
        whole_pool = settings.strategy.whole_pool
        _SITES[key] = load_site(settings, partition, public_digest, whole_pool, intake, _IMAGES[images])
    return _SITES[key]


def _model(
    settings: Settings, site: SiteData, name: str, device: torch.device, state: ClientState | None
) -> tuple[nn.Module, dict[str, Any]]:
    target, architecture = settings.model.target, architecture_of(settings.model)
    owner = target if settings.train.common_start else f"{target} {name}"
    seed = derived_seed(settings.seed, "model", owner)
    model, arguments = build_learnt(settings, site, seed, new=state is None)
    model.to(device).to(memory_format=torch.channels_last)
    if state is None:
        warm_start(settings, site, model)
    elif state.architecture != architecture:
        raise StateError(
            f"the state of {name} has the model {state.architecture}, the settings ask for {architecture}: "
            "keep the model within a run, or start a new run"
        )
    else:
        load_weights(model, state.weights)
    return model, arguments


def _card(settings: Settings, site: SiteData, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    return model_card(
        settings,
        site,
        arguments,
        {key.replace("-", "_"): value for key, value in report.metrics.items()},
        client=report.client,
        rounds=report.round - 1,
        num_examples=report.metrics["num-examples"],
        num_validation=len(site.validation_indices(settings.rounds)),
        **settings.strategy.facts(settings, report.client),
    )
