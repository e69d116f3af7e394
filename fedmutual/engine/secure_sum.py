"""The server's side of secure aggregation: keys, cohorts, and sums in place of predictions (privacy.secagg).

The strategy gets one report a round, of a client that does not exist and says what the mean of all would say;
so it forms the same consensus from it. A round in which a member of the cohort is missing has no sum. The
next one has a cohort without that client, and until then the clients are taught nothing.

Of whole numbers that have their noise there is one sum in a run. A second one, without a client that has
stayed away, would be a second release of everybody else's images. So the same cohort is asked again, for the
same numbers, and goes on without a client only where the budget pays for another release.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedmutual.data.site import SharedData
from fedmutual.engine.roster import Roster
from fedmutual.learning.gaussian import epsilon_of, multiplier_for
from fedmutual.learning.ring import MOST_CLIENTS, Summed, WideArray, ensemble_of
from fedmutual.settings import Settings
from fedmutual.settings.schema import LEAST_SUMMED
from fedmutual.wire.codec import FloatArray, MessageError
from fedmutual.wire.exchange import Exchange, ExchangeError, messages_to
from fedmutual.wire.key_question import MESSAGE_TYPE, key_question, read_key
from fedmutual.wire.masks import NUMBER_BYTES, WIDE_BYTES, Cohort, added, unpack
from fedmutual.wire.metrics import EXAMPLES
from fedmutual.wire.orders import Order
from fedmutual.wire.records import NO_SAMPLES, Metrics
from fedmutual.wire.reports import Report
from fedmutual.wire.signatures import Proof
from fedmutual.wire.weights import weights_record

logger = logging.getLogger(__name__)

SUM = "(sum)"  # no client can have this name
KEY_SECONDS = 300.0  # a client process starts


class Cohorts:
    """The keys of a run's clients, and who is asked for a part of a sum.

    Parameters
    ----------
    settings : Settings
    shared : SharedData
    """

    width = NUMBER_BYTES  # of a number

    def __init__(self, settings: Settings, shared: SharedData) -> None:
        self._labelled = settings.public.labelled
        self._num_unseen = 0 if shared.unseen is None else len(shared.unseen)
        self._num_classes = len(shared.classes)
        self._digest = shared.public.digest
        self._keys: dict[str, bytes] = {}  # of the members of the next round's cohort
        self._proofs: dict[str, Proof] = {}
        # whose predictions are in the last round's sum; empty: there is none
        self._counted: tuple[str, ...] = ()

    def introduce(self, exchange: Exchange, roster: Roster, run: str) -> None:
        """Ask all nodes for their keys of this run, once.

        Raises
        ------
        ExchangeError
            Too few or too many clients have one.
        """
        if self._keys:
            return
        question = {node: key_question(run) for node in roster.nodes(exchange.grid)}
        replies = exchange.send_and_collect(messages_to(question, MESSAGE_TYPE, KEY_SECONDS), everyone=True)
        for reply in replies:
            name = roster.meet(reply)
            try:
                if name is None or reply.content is None:
                    raise MessageError(reply.error or "it did not give its name")
                self._keys[name], self._proofs[name] = read_key(reply.content)
            except MessageError as error:
                logger.error("node %d takes no part in secure aggregation: %s", reply.node_id, error)
        if not LEAST_SUMMED <= len(self._keys) <= MOST_CLIENTS:
            raise ExchangeError(
                f"privacy.secagg: {len(self._keys)} clients have given a key, {LEAST_SUMMED} to "
                f"{MOST_CLIENTS} can be added up"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON state for the checkpoint."""
        return {
            "keys": {name: key.hex() for name, key in self._keys.items()},
            "proofs": {n: [p.signer.hex(), p.signature.hex()] for n, p in self._proofs.items()},
            "counted": list(self._counted),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue from what :meth:`as_dict` returned."""
        self._keys = {name: bytes.fromhex(key) for name, key in saved["keys"].items()}
        self._proofs = {n: Proof(*map(bytes.fromhex, proof)) for n, proof in saved["proofs"].items()}
        self._counted = tuple(saved["counted"])

    def _cohort(self) -> Cohort:
        names = sorted(self._keys)
        proofs = [self._proofs[name] for name in names]
        signed = tuple(proofs) if any(proof.signature for proof in proofs) else ()
        return Cohort(tuple(names), tuple(self._keys[name] for name in names), signed)

    def _total(self, round: int, reports: Mapping[str, Report]) -> WideArray | None:
        """Return the sum of the cohort's parts; None where somebody is missing."""
        names = self._cohort().names
        parts = {name: reports[name].masked for name in names if name in reports and reports[name].masked}
        missing = [name for name in names if name not in parts]
        self._counted = () if missing else names
        if missing:
            self._miss(round, missing)
            return None
        return added([unpack(part, self.width) for part in parts.values() if part], self.width)

    def _miss(self, round: int, missing: list[str]) -> None:
        """Make the next round's cohort of those who are there."""
        self._leave_out(round, missing)

    def _leave_out(self, round: int, missing: list[str]) -> None:
        left = len(self._keys) - len(missing)
        if left < LEAST_SUMMED:
            then = f"{left} clients are too few to add up, so the next round waits for all of them again"
        else:
            then = f"from the next round on, the other {left} go on without"
            self._keys = {name: key for name, key in self._keys.items() if name not in missing}
        logger.warning(
            "round %d: %s missing, so there is no sum and nothing to teach; %s",
            round,
            ", ".join(missing),
            then,
        )


class SecureSum(Cohorts):
    """The sums of predictions, one a round.

    Parameters
    ----------
    summed : Summed
        What the clients add up.
    settings : Settings
    shared : SharedData
    """

    def __init__(self, summed: Summed, settings: Settings, shared: SharedData) -> None:
        super().__init__(settings, shared)
        self._summed = summed

    def ordered(self, client: str | None, order: Order) -> Order:
        """Return a client's order with the round's cohort, and its own share in the target."""
        if not self._counted:  # nothing was added up, so there is nothing to learn from but labels
            known = order.target_indices if self._labelled else NO_SAMPLES
            order = replace(order, target_indices=known, log_targets=None, target_entropies=None)
        elif self._summed.without_own and client in self._counted:
            order = replace(order, own_share=1 / len(self._counted))
        if order.closing and not self._num_unseen:
            return order
        return replace(order, cohort=self._cohort())

    def masked_bytes(self, samples: int, *, closing: bool) -> int:
        """Return the size of a masked part."""
        return (self._num_unseen if closing else samples) * (self._num_classes - 1) * NUMBER_BYTES

    def add_up(self, round: int, reports: Mapping[str, Report]) -> dict[str, Report]:
        """Return the report of the mean of the cohort; nothing where somebody is missing."""
        total = self._total(round, reports)
        if total is None:
            return {}
        mean = self._summed.decode(total, len(self._counted), self._num_classes)
        return {SUM: Report(SUM, round, self._digest, "", mean)}

    def ensemble(self, reports: Mapping[str, Report], floor: float) -> FloatArray | None:
        """Return the mean of the cohort's predictions of the unseen images; None where one is missing."""
        names = self._cohort().names
        parts = [reports[name].masked for name in names if name in reports]
        if not self._num_unseen or len(parts) < len(names) or not all(parts):
            return None
        total = added([unpack(part) for part in parts if part])
        return ensemble_of(floor).decode(total, len(names), self._num_classes)


class SumOnce(Cohorts):
    """One sum of whole numbers in a run (strategy=speaker).

    Parameters
    ----------
    numbers : int
        Of each client.
    settings : Settings
    shared : SharedData
    """

    width = WIDE_BYTES

    def __init__(self, numbers: int, settings: Settings, shared: SharedData) -> None:
        super().__init__(settings, shared)
        self._numbers = numbers
        self._pays_again = _pays_again(settings)
        self._absent: set[str] = set()  # of the last round

    def ordered(self, client: str | None, order: Order) -> Order:
        """Return a client's order with the cohort, until there is a sum."""
        return order if order.closing or self._counted else replace(order, cohort=self._cohort())

    def masked_bytes(self, samples: int, *, closing: bool) -> int:
        """Return the size of a masked part."""
        return 0 if closing or self._counted else self._numbers * self.width

    def add_up(self, round: int, reports: Mapping[str, Report]) -> dict[str, Report]:
        """Return the report of the cohort's sum, with how many it is of; without one as they are."""
        if self._counted:
            return dict(reports)
        total = self._total(round, reports)
        if total is None:
            return {}
        model = weights_record({"sums": total.view(np.int64)})
        none = np.zeros((0, self._num_classes), np.float32)
        metrics: Metrics = {EXAMPLES: len(self._counted)}
        return {SUM: Report(SUM, round, self._digest, "", none, metrics, model=model)}

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON state for the checkpoint."""
        return {**super().as_dict(), "absent": sorted(self._absent)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue from what :meth:`as_dict` returned."""
        super().restore(saved)
        self._absent = set(saved["absent"])

    def ensemble(self, reports: Mapping[str, Report], floor: float) -> FloatArray | None:
        """Return None: listeners send nothing."""
        return None

    def _miss(self, round: int, missing: list[str]) -> None:
        """Ask the same cohort again; without those who were missing twice, if the budget pays for it."""
        gone = sorted(self._absent & set(missing))
        self._absent = set(missing)
        if gone and self._pays_again:
            self._leave_out(round, gone)
            return
        logger.warning(
            "round %d: %s missing, so there is no sum and no speaker yet; the next round asks all again%s",
            round,
            ", ".join(missing),
            "" if self._pays_again else ": without them it would take a privacy.budget for two releases",
        )


def _pays_again(settings: Settings) -> bool:
    """Whether a site's budget, as far as the run knows it, allows a second release."""
    epsilon, delta, budget = settings.privacy.epsilon, settings.privacy.delta, settings.privacy.budget
    if epsilon is None:
        return True
    return budget is not None and epsilon_of([multiplier_for(epsilon, delta)] * 2, delta) <= budget
