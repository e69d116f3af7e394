"""A site's side of secure aggregation: what it answers, and what it never answers (privacy.secagg).

The server gets the sum of a cohort's predictions, or of its noisy sums, and nothing that would let it find a
part of it:

* a site answers one cohort a round, and a round only once: the same bytes if it is asked again;
* rounds only go forward, so a server cannot ask for a round again with a shorter list;
* a cohort only shrinks within a run, and its keys stay, so all sums of a run are over a chain of sets;
* it has at least ``secagg-min-clients`` members (node configuration), the site itself among them;
* with ``secagg-peers`` its members are those that the owner lists, with keys that they have signed.

What this needs is written down before anything is sent, beside the state and apart from its generations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedmutual.client.state import StateError
from fedmutual.files.atomic import atomic_write
from fedmutual.learning.consensus import as_target
from fedmutual.learning.ring import RingArray, Summed, WideArray, ensemble_of
from fedmutual.settings import ClientsSettings, Settings, SettingsError
from fedmutual.settings.at_site import listed, says_true, trusts_run
from fedmutual.settings.schema import LEAST_SUMMED
from fedmutual.wire.codec import FloatArray, MessageError, decode, encode
from fedmutual.wire.masks import NUMBER_BYTES, WIDE_BYTES, Cohort, masked, new_key, pack, public_key
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report
from fedmutual.wire.signatures import Proof, prove, proven_by

FILE = "secagg.json"
# in the node configuration
MINIMUM, REQUIRED = "secagg-min-clients", "require-secagg"
SIGNING_KEY, PEERS = "secagg-key", "secagg-peers"


@dataclass(frozen=True)
class Owner:
    """What a site's owner says of secure aggregation.

    Attributes
    ----------
    least : int
        Members that a cohort has at least.
    signing_key : Path or None
        Private key with which the site signs its key of a run.
    peers : Mapping[str, str]
        Fingerprint of each peer's key, by name; empty: anyone is taken at the server's word.
    """

    least: int = LEAST_SUMMED
    signing_key: Path | None = None
    peers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> Owner:
        """Read the node configuration.

        Raises
        ------
        SettingsError
            Naming the key whose value is wrong.
        """
        text = str(node_config.get(MINIMUM, LEAST_SUMMED))
        if not text.isdecimal() or int(text) < LEAST_SUMMED:
            raise SettingsError(
                f"{MINIMUM}: a node configuration takes a whole number from {LEAST_SUMMED} on"
            )
        peers = ClientsSettings(allowed=sorted(listed(node_config, PEERS)), bind="key")
        found = peers.keys_of_allowed()
        if peers.check() or not all(found.values()):
            raise SettingsError(
                f"{PEERS}: it takes NAME:SHA256:... of each peer's key, separated by commas "
                "(`ssh-keygen -lf KEY.pub` prints it)"
            )
        key = node_config.get(SIGNING_KEY)
        return cls(int(text), Path(str(key)) if key else None, found)


@dataclass(frozen=True)
class Promise:
    """What a site has answered in a run, and is bound to.

    Attributes
    ----------
    private : str
        Its X25519 private key of the run, in hex.
    round : int
        The last round with a cohort; 0: none yet.
    cohort : str
        Digest of that round's cohort, in hex.
    members : dict[str, str]
        Key of each of its members, in hex.
    sent : str
        SHA-256 of the masked part; empty before it is made.
    """

    private: str
    round: int = 0
    cohort: str = ""
    members: dict[str, str] = field(default_factory=dict)
    sent: str = ""


class Masking:
    """A site's key and promises in one run.

    Parameters
    ----------
    folder : Path
        Of the client's state; its lock is held by the caller.
    name : str
        Of the client.
    summed : Summed or None
        How predictions are added up; None: the whole numbers that a report holds are.
    owner : Owner
    noise : str
        What the site knows of the noise in what it sends. Its peers' must be the same, or nothing can be
        read: else a server that tells each site other terms could take noise away from the sum.
    """

    def __init__(self, folder: Path, name: str, summed: Summed | None, owner: Owner, noise: str = "") -> None:
        self._noise = noise
        self._file = folder / FILE
        self._name = name
        self._summed = summed
        self._owner = owner

    def public_key(self) -> bytes:
        """Return the site's public key of the run; the first call makes the pair."""
        return public_key(bytes.fromhex(self._promise().private))

    def proof(self, run: str) -> Proof:
        """Return the site's signature of its public key of the run; an empty one without ``secagg-key``.

        Raises
        ------
        SettingsError
            The owner's key cannot be used.
        """
        if self._owner.signing_key is None:
            return Proof()
        try:
            return prove(self._owner.signing_key, run, self._name, self.public_key())
        except (ValueError, OSError) as error:
            raise SettingsError(f"{SIGNING_KEY}: {error}") from error

    def admit(self, order: Order) -> None:
        """Check an order's cohort, and promise to answer no other one, before anything is computed.

        Raises
        ------
        MessageError
            The cohort is too small, holds a newcomer, another key or another list than before, or the round
            is over.
        """
        cohort = self._cohort(order)
        if cohort is None:
            return
        promise, digest = self._promise(), cohort.digest(order.run, order.round).hex()
        self._check(cohort, promise)
        self._check_proofs(cohort, order.run)
        if order.round < promise.round:
            raise _refused(f"this site has answered round {promise.round}, and answers no earlier one again")
        if order.round == promise.round and digest != promise.cohort:
            raise _refused(f"round {order.round} has another list of clients than the one answered before")
        if order.round > promise.round:
            members = cohort.members
            self._keep(replace(promise, round=order.round, cohort=digest, members=members, sent=""))

    def hide(self, report: Report, order: Order) -> Report:
        """Return the report with its predictions masked, or without any where they are not added up.

        In answer to a closing order these are the predictions of the unseen images.

        Raises
        ------
        StateError
            The round's predictions are not those that were sent before: the state is an older one.
        """
        bare = replace(
            report,
            predictions=np.zeros((0, order.num_classes), np.float32),
            unseen_predictions=None,
            model=None,
        )
        cohort, promise, unseen = self._cohort(order), self._promise(), report.unseen_predictions
        if cohort is None or (order.closing and unseen is None):
            return replace(bare, masked=b"")
        values: RingArray | WideArray
        if unseen is not None:
            values, width = ensemble_of(order.floor).encode(unseen, len(cohort.names)), NUMBER_BYTES
        elif self._summed is None:
            values, width = _whole(report), WIDE_BYTES
        else:
            values, width = self._summed.encode(_said(report, order), len(cohort.names)), NUMBER_BYTES
        private = bytes.fromhex(promise.private)
        about = (private, self._name, cohort, order.run, order.round, width, self._terms(order))
        data = pack(masked(values, *about), width)
        sent = hashlib.sha256(data).hexdigest()
        if promise.sent not in ("", sent):
            raise StateError.to_everyone(
                f"secure aggregation: round {order.round} was answered before with other predictions, and a "
                "second answer would give both away: this client takes part again in the next round"
            )
        self._keep(replace(promise, sent=sent))
        return replace(bare, masked=data)

    def _terms(self, order: Order) -> bytes:
        """Digest of the noise's terms and of the arrays that the order asks about, such as a feature map."""
        state = hashlib.sha256(self._noise.encode())
        for name, array in sorted((order.model or {}).items()):
            values = array.numpy()
            state.update(f"\0{name} {values.shape} {values.dtype}\0".encode() + values.tobytes())
        return state.digest()

    def _cohort(self, order: Order) -> Cohort | None:
        """The cohort of an order that this site is a member of."""
        cohort = order.cohort
        return None if cohort is None or self._name not in cohort.names else cohort

    def _check(self, cohort: Cohort, promise: Promise) -> None:
        members = cohort.members
        if len(members) < self._owner.least:
            raise _refused(
                f"{len(members)} clients take part, and this site only among {self._owner.least} ({MINIMUM})"
            )
        if members[self._name] != self.public_key().hex():
            raise _refused("the list gives this site another key than its own")
        if promise.round:
            new = [name for name in members if members[name] != promise.members.get(name)]
            if new:
                raise _refused(f"{', '.join(new)}: not in the list of the round before, or with another key")

    def _check_proofs(self, cohort: Cohort, run: str) -> None:
        """Refuse peers that the owner does not list, or whose keys they have not signed."""
        if not self._owner.peers:
            return
        proofs = cohort.proofs or (Proof(),) * len(cohort.names)
        for name, key, proof in zip(cohort.names, cohort.keys, proofs, strict=True):
            if name == self._name:
                continue
            if name not in self._owner.peers:
                raise _refused(f"{name} is not among this site's {PEERS}")
            if proven_by(proof, run, name, key) != self._owner.peers[name]:
                raise _refused(f"the key of {name} is not signed by the key that {PEERS} gives for it")

    def _promise(self) -> Promise:
        try:
            return Promise(**json.loads(self._file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            made = Promise(new_key().hex())
            self._keep(made)
            return made
        except (ValueError, TypeError) as error:
            raise StateError(
                f"{self._file} is damaged: without it this site cannot tell what it has answered in this "
                "run; delete the run's folder and start a new run",
                "this site's record of secure aggregation is damaged: start a new run",
            ) from error

    def _keep(self, promise: Promise) -> None:
        atomic_write(self._file, json.dumps(asdict(promise)).encode())


def open_masking(
    folder: Path, name: str, settings: Settings, node_config: Mapping[str, Any]
) -> Masking | None:
    """Return a site's side of secure aggregation; None in a run without it.

    Raises
    ------
    SettingsError
        The site's owner takes part in no run without it, or the node configuration has a wrong value; or
        only the server vouches for the keys behind which a share of the noise would have to be enough.
    """
    if not settings.privacy.secagg:
        if says_true(node_config, REQUIRED):
            raise SettingsError(f"privacy.secagg: this site takes part only with it ({REQUIRED})")
        return None
    owner = Owner.of(node_config)
    if settings.privacy.epsilon is not None and not owner.peers and not trusts_run(node_config):
        raise SettingsError(
            f"privacy.secagg with privacy.epsilon: a server that gives false keys would see this site's sums "
            f"with a share of the noise only: list the peers' keys ({PEERS}), or run without privacy.secagg"
        )
    privacy = settings.privacy
    noise = repr((privacy.epsilon, privacy.delta, privacy.colluding))
    return Masking(folder, name, settings.strategy.summed(settings), owner, noise)


def _said(report: Report, order: Order) -> FloatArray:
    """What the server would have read of the predictions, so that masking changes no result."""
    data = encode(report.predictions, order.wire_dtype, order.floor)
    return decode(data, len(report.predictions), order.num_classes, order.wire_dtype, order.floor)


def _whole(report: Report) -> WideArray:
    """The whole numbers of a report, modulo 2^64."""
    if report.model is None:
        raise _refused("the order asks for a sum and has no feature map")
    (values,) = (array.numpy() for array in report.model.values())
    return cast(WideArray, values.astype(np.int64).view(np.uint64))


def peers_only(order: Order, report: Report, settings: Settings) -> Order:
    """Return the order with the client's own predictions taken out of its target, where they are in it.

    Parameters
    ----------
    report : Report
        The client's last one, of the round that the target is of.
    """
    own, targets = report.predictions, order.log_targets
    if not order.own_share or targets is None or own.shape != targets.shape:
        return order
    summed: Summed = settings.strategy.summed(settings)
    peers: FloatArray = summed.take_out(targets, own, order.own_share, order.temperature)
    target = as_target(peers, order.divergence)
    return replace(order, log_targets=target.log_probabilities, target_entropies=target.entropies)


def _refused(reason: str) -> MessageError:
    return MessageError.to_everyone(f"secure aggregation: {reason}")
