"""A client that sends one bad reply after the other, to every strategy: nothing may end the run.

Three honest clients and a hostile one talk to the real engine; no network is trained, so that a round takes
milliseconds (``centralised`` has a single client, so it is not here). Each order of the hostile client is
answered with another attack: the targeted ones (:mod:`attacks`), then random ones. Counted are the replies
that were accepted, rejected, and those that ended the run, which must be none. What the honest clients are
sent must stay finite, and the run must leave its summary, plots and report.

    python benchmarks/attack.py                     # 10,000 random replies over all strategies: some minutes
    python benchmarks/attack.py --fuzz 200 --strategies mutual fedavg
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from attacks import TARGETED, WEIGHTS, Attack, fuzzed
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from rich.console import Console
from rich.table import Table

import fedmutual.engine.asynchronous
from fedmutual.data.site import load_shared
from fedmutual.report.leave import keep_evidence, leave_report
from fedmutual.report.plots import write_plots
from fedmutual.results.directory import RunDirectory, build_summary
from fedmutual.settings import as_container
from fedmutual.settings.compose import compose
from fedmutual.simulation.inprocess import RUN_ID, enter_run, over_the_wire
from fedmutual.wire.orders import Order, read_order
from fedmutual.wire.reports import Report, identification_record, report_record

STRATEGIES = (
    "mutual", "fedmd", "dsfl", "cfd", "feddf", "fedavg", "fedprox", "layerwise", "local",
    "mutual_async", "fedasync", "fedbuff",
)  # fmt: skip
SETTINGS = (
    "num_clients=4",
    "data.pool_size=80",
    "public.fill=0",
    "data.unseen_size=8",
    "data.image_size=20",
    "public.size=12",
    "device=cpu",
    "exchange.min_clients=1",
    "exchange.poll_interval=0.001",
    "exchange.return_timeout=5",
)
HOSTILE = 4  # the last of the nodes 1 to 4
ROUNDS = 200  # attacks a run


class HostileGrid(Grid):
    """Three honest clients that make their predictions up, and a hostile one."""

    takes_turns = True

    def __init__(self, attacks: Iterator[tuple[str, Attack]], num_unseen: int) -> None:
        enter_run()
        self.attacks = attacks
        self.num_unseen = num_unseen
        self.layers: Any = None  # the strategy: what `layerwise` sends in a round
        self.sent: dict[int, str] = {}  # number of the order -> attack
        self.not_finite = 0
        self._ready: dict[str, Message] = {}
        self._ids = itertools.count()
        self._run = Run.create_empty(run_id=RUN_ID)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, HOSTILE + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._ready.pop(name) for name in list(message_ids) if name in self._ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(messages)))

    def _push(self, message: Message) -> str:
        name = f"m{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = name
        node = message.metadata.dst_node_id
        if message.metadata.message_type.startswith("query"):
            content = identification_record(f"client-{node - 1}")
            self._ready[name] = over_the_wire(Message(content, reply_to=message))
            return name
        order = read_order(over_the_wire(message).content)
        if order.has_target and not np.isfinite(order.log_targets).all():
            self.not_finite += 1
        content = self._report(order, node)
        self._ready[name] = self._answer(message, order, content, hostile=node == HOSTILE)
        return name

    def _report(self, order: Order, node: int) -> RecordDict:
        noise = np.random.default_rng([node, order.round])
        model = order.model
        if self.layers is not None:
            model = self.layers.order("", replace(order, round=order.round + 1)).model
        unseen = _distributions(self.num_unseen, order.num_classes, noise) if order.closing else None
        report = Report(
            client=f"client-{node - 1}",
            round=order.round,
            public_digest=order.public_digest,
            architecture="Net",
            predictions=_distributions(len(order.indices), order.num_classes, noise),
            metrics={
                "num-examples": 10,
                "train-loss": 0.5,
                "validation-accuracy": 0.75,
                "validation-recall": [0.5, 1.0],
                "kl-before": 0.1,
                "kl-after": 0.05,
            },
            unseen_predictions=unseen,
            model=model,
        )
        return report_record(report, order.wire_dtype, order.floor)

    def _answer(self, message: Message, order: Order, content: RecordDict, hostile: bool) -> Message:
        """The reply; a change that Flower's own records or serialisation refuse cannot be sent."""
        good = Message(content, reply_to=message)
        good = over_the_wire(good)
        if not hostile:
            return good
        for name, attack in self.attacks:
            bad = RecordDict(dict(good.content))
            try:
                attack(bad)
                sent = over_the_wire(Message(bad, reply_to=message))
            except Exception:
                continue
            self.sent[order.round] = name
            return sent
        return good


def _distributions(samples: int, classes: int, noise: np.random.Generator) -> np.ndarray:
    return np.log(noise.dirichlet(np.ones(classes), samples).clip(1e-3)).astype(np.float32)


@dataclass
class Outcome:
    """What became of the attacks on one strategy.

    Attributes
    ----------
    accepted : list[str]
        Names of the targeted attacks that were not rejected.
    ended : list[str]
        Attacks that ended a run, with the error.
    not_finite : int
        Orders to honest clients whose targets were not finite.
    """

    counts: Counter[str] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    not_finite: int = 0


def attack(strategy: str, attacks: list[tuple[str, Attack]], folder: Path) -> Outcome:
    """Send each attack once, in as many runs as it takes."""
    outcome, left, number = Outcome(), list(attacks), 0
    while left:
        waiting = iter(left)
        path = folder / f"{strategy}-{number}"
        grid, error = _play(strategy, waiting, min(len(left), ROUNDS), path)
        _count(path, grid, error, outcome)
        left, number = list(waiting), number + 1
    return outcome


def _play(
    strategy: str, attacks: Iterator[tuple[str, Attack]], rounds: int, path: Path
) -> tuple[HostileGrid, str]:
    settings = compose([*SETTINGS, f"strategy={strategy}", f"rounds={rounds}"])
    shared = load_shared(settings, 4)
    assert shared.unseen is not None
    journal = RunDirectory.create(path, as_container(settings), strategy, [])
    grid = HostileGrid(attacks, len(shared.unseen))
    error = ""
    try:
        engine = settings.strategy.engine(settings, shared, f"attack-{strategy}", journal)
        grid.layers = engine.strategy if strategy == "layerwise" else None
        engine.start(grid)
        keep_evidence(journal, shared, engine.unseen_predictions, settings.evaluation.mistakes)
        summary = build_summary(
            settings=as_container(settings), history=journal.history(), public_data_bytes=0, seconds={},
            warnings=[], status="completed", reason="", public_digest=shared.public.digest, ensemble=None,
            global_model=None,
        )  # fmt: skip
        leave_report(journal.path, summary)
        write_plots(journal.history(), journal.path)
        journal.write_summary(summary)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return grid, error


def _count(path: Path, grid: HostileGrid, error: str, outcome: Outcome) -> None:
    with (path / "history.jsonl").open() as file:
        lines = [json.loads(line) for line in file]
    answered = {}
    for line in lines:
        if line["node_id"] == HOSTILE:
            answered[line.get("update", line["round"])] = "rejected" in line
    for order, name in grid.sent.items():
        if order not in answered:
            outcome.counts["ended"] += 1
            outcome.ended.append(f"{name}: {error}")
            continue
        outcome.counts["rejected" if answered[order] else "accepted"] += 1
        if not answered[order] and name in TARGETED | WEIGHTS:
            outcome.accepted.append(name)
    if error and not any(order not in answered for order in grid.sent):
        outcome.counts["ended"] += 1
        outcome.ended.append(f"afterwards: {error}")
    outcome.not_finite += grid.not_finite


def exchanges_weights(strategy: str) -> bool:
    """Whether the strategy's reports hold weights."""
    return strategy in ("fedavg", "fedprox", "layerwise", "fedasync", "fedbuff")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a reply ended a run or made a target that is not finite."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--fuzz", type=int, default=10_000, help="random replies, over all strategies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES, choices=STRATEGIES)
    arguments = parser.parse_args(argv)
    logging.disable(logging.ERROR)
    fedmutual.engine.asynchronous.FIRST_PAUSE = 0.0  # a rejected client is asked again at once
    share = -(-arguments.fuzz // len(arguments.strategies))
    table = Table("strategy", "targeted", "random", "accepted", "rejected", "ended", "targets not finite")
    total, problems = Counter[str](), []
    for number, strategy in enumerate(arguments.strategies):
        targeted = list((TARGETED | (WEIGHTS if exchanges_weights(strategy) else {})).items())
        dice = random.Random(f"{arguments.seed} {number}")
        fuzz = [("random", fuzzed(dice.getrandbits(32))) for _ in range(share)]
        with tempfile.TemporaryDirectory() as folder:
            outcome = attack(strategy, [*targeted, *fuzz], Path(folder))
        counts = outcome.counts
        table.add_row(
            strategy, str(len(targeted)), str(share), str(counts["accepted"]), str(counts["rejected"]),
            str(counts["ended"]), str(outcome.not_finite),
        )  # fmt: skip
        total.update(counts)
        problems += [f"{strategy}: {text}" for text in outcome.ended]
        problems += ["targets not finite"] * bool(outcome.not_finite)
        if outcome.accepted:
            print(f"{strategy}: accepted, since they are harmless: {', '.join(outcome.accepted)}")
    Console(width=110).print(table)
    print(
        f"{total.total()} replies: {total['accepted']} accepted, {total['rejected']} rejected, "
        f"{total['ended']} ended a run"
    )
    for problem in problems[:20]:
        print(problem[:300])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
