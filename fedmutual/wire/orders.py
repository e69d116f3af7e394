"""Orders: what the server asks a client to do, and how a client answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedmutual.learning import DIVERGENCES
from fedmutual.wire.codec import WIRE_DTYPES, FloatArray, MessageError
from fedmutual.wire.masks import KEY_BYTES, Cohort
from fedmutual.wire.records import (
    CONFIG,
    FLOOR,
    MODEL,
    NO_SAMPLES,
    ORDER,
    PROTOCOL,
    IndexArray,
    integer,
    read_config,
    read_model,
)
from fedmutual.wire.reports import Report, report_record
from fedmutual.wire.signatures import Proof

if TYPE_CHECKING:
    from torch import Tensor

# the newest read-only array of targets and of entropies, while it is used: its type and its bytes
_shared: dict[str, tuple[ref[FloatArray], str, bytes]] = {}


@dataclass(frozen=True, kw_only=True)
class Order:
    """Server to client: one round of learning, or an evaluation.

    A client reads it with :meth:`of`, learns from :attr:`targets` or :meth:`loss`, and answers with
    :meth:`reply`.

    Attributes
    ----------
    round : int
        From 1. In a run of fedmutual's own engine the closing order is ``rounds + 1``.
    num_classes : int
        C.
    indices : int32 [n]
        Public samples to predict; empty in an evaluation.
    target_indices : int32 [m]
        Public samples that the targets belong to; empty in round 1.
    log_targets : float32 [m, C] or None
        The targets as they travel, see :class:`fedmutual.learning.consensus.Target`.
    target_entropies : float32 [m] or None
        Mean entropy of the peers in nats; only for ``divergence="peer_own"``.
    divergence : str
        ``own_peer``, ``peer_own`` or ``published_code``, see :mod:`fedmutual.learning.divergence`.
    temperature : float
        T of the mutual loss.
    kl_weight : float
        Lambda of the mutual loss.
    wire_dtype, floor
        How predictions travel, see :func:`fedmutual.wire.codec.encode`.
    config : Mapping
        What the server passes on: ``train_config`` or ``evaluate_config`` of ``Strategy.start``.
    run : str
        Unique name of the run, which names the client's state folder. Empty in Flower's own loop.
    closing : bool
        The last order of a run: learn what is left, evaluate, keep the model; predict nothing.
    public_digest : str
        Which public set; empty where the app does not check it.
    classes : tuple of str
        Names of the classes; empty where the app does not check them.
    evaluate_unseen : bool
        Measure the shared test set as well.
    model : ArrayRecord or None
        Weights, only from strategies that exchange them.
    frozen : str
        Which frozen part of a model the weights stand on; empty: they are a whole model's.
    cohort : Cohort or None
        Secure aggregation: those whose predictions of this order are added up. None: there is no sum.
    own_share : float
        Secure aggregation: the share of the client's own predictions in the targets, which it takes out.
    """

    round: int
    num_classes: int
    indices: IndexArray = field(default_factory=lambda: NO_SAMPLES)
    target_indices: IndexArray = field(default_factory=lambda: NO_SAMPLES)
    log_targets: FloatArray | None = None
    target_entropies: FloatArray | None = None
    divergence: str = "peer_own"
    temperature: float = 1.0
    kl_weight: float = 0.0
    wire_dtype: str = "float16"
    floor: float = FLOOR
    config: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    closing: bool = False
    public_digest: str = ""
    classes: tuple[str, ...] = ()
    evaluate_unseen: bool = False
    model: ArrayRecord | None = None
    frozen: str = ""
    cohort: Cohort | None = None
    own_share: float = 0.0
    message: Message | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, message: Message) -> Order:
        """Read and check the order in a message.

        Raises
        ------
        MessageError
            If the message holds no order of this protocol, or a malformed one.
        """
        return replace(read_order(message.content), message=message)

    @property
    def has_target(self) -> bool:
        """Whether there are peers to learn from; False in round 1."""
        return self.log_targets is not None

    @cached_property
    def targets(self) -> FloatArray:
        """The peers' consensus as probabilities, float32 [m, C], for learners without gradients.

        Its rows sum to 1. With ``own_peer`` it is the normalised geometric mean of the peers, with
        ``peer_own`` their arithmetic mean; both softened by ``temperature``.
        """
        if self.log_targets is None:
            return np.zeros((0, self.num_classes), np.float32)
        scores = self.log_targets - self.log_targets.max(axis=1, keepdims=True)
        odds = np.exp(scores)
        return cast(FloatArray, odds / odds.sum(axis=1, keepdims=True))

    def loss(self, outputs: Tensor, index: Any = None) -> Tensor:
        """``lambda T^2 KL`` between the model and its peers, in nats, averaged over the samples.

        Parameters
        ----------
        outputs : Tensor [b, C], or [b, 1] for two classes
            The model's scores (logits) of the public samples ``target_indices[index]``. A single column is
            the log-odds of class 1.
        index : int array or Tensor [b], slice, or None
            Positions in ``target_indices``; None: all of them.

        Returns
        -------
        Tensor
            A scalar with a gradient; 0 where there is no target. The factor T^2 keeps the gradient's size
            independent of T (arXiv:1503.02531).

        Raises
        ------
        MessageError
            If ``outputs`` does not fit the targets.
        """
        from fedmutual.learning.divergence import as_logits, mutual_loss

        if self.log_targets is None:
            return outputs.sum() * 0
        chosen = slice(None) if index is None else index
        if hasattr(chosen, "cpu"):
            chosen = chosen.cpu().numpy()
        target = outputs.new_tensor(self.log_targets[chosen])
        entropies = None
        if self.target_entropies is not None:
            entropies = outputs.new_tensor(self.target_entropies[chosen])
        logits = as_logits(outputs)
        if logits.shape != target.shape:
            raise MessageError(
                f"outputs: {tuple(outputs.shape)}, but the targets are {tuple(target.shape)}: pass the "
                "scores of public[order.target_indices[index]] and the same index"
            )
        value = mutual_loss(self.divergence, logits, target, entropies, self.temperature)
        return self.kl_weight * self.temperature**2 * value

    def reply(
        self,
        probabilities: Any = None,
        *,
        num_examples: int,
        metrics: Mapping[str, float | int | list[float] | list[int]] | None = None,
        client: str | None = None,
        model_name: str = "",
    ) -> Message:
        """Answer the order.

        Parameters
        ----------
        probabilities : array or Tensor [n, C]
            The model's predicted distributions of the public samples ``indices``, in that order. None in
            answer to an evaluation.
        num_examples : int
            Private training samples; the weight of this client's metrics.
        metrics : Mapping
            Measurements by name: finite numbers; a name that ends with ``-recall`` holds one number a class.
        client : str or None
            The client's name, ``Report.client`` at the server; None: ``node-<id>``. Flower's own loop knows
            clients by their node ids.
        model_name : str
            What the model is, for the server's history.

        Raises
        ------
        MessageError
            If the probabilities are no distributions, or not of the samples that the order names.
        """
        if self.message is None:
            raise MessageError("this order came in no message: read it with Order.of(message)")
        report = Report(
            client=client or f"node-{self.message.metadata.dst_node_id}",
            round=self.round,
            public_digest=self.public_digest,
            architecture=model_name,
            predictions=self._log_probabilities(probabilities),
            metrics={**(metrics or {}), "num-examples": int(num_examples)},
        )
        return Message(report_record(report, self.wire_dtype, self.floor), reply_to=self.message)

    def _log_probabilities(self, probabilities: Any) -> FloatArray:
        expected = (len(self.indices), self.num_classes)
        if probabilities is None:
            probabilities = np.zeros((0, self.num_classes), np.float32)
        if hasattr(probabilities, "detach"):
            probabilities = probabilities.detach().float().cpu().numpy()
        values = np.asarray(probabilities, np.float32)
        if values.shape != expected:
            raise MessageError(
                f"probabilities: shape {values.shape}, not {expected}: predict the samples order.indices, "
                "with one column a class"
            )
        if not np.isfinite(values).all():
            raise MessageError("probabilities: a value is not finite (did the training diverge?)")
        if values.size and (values.min() < 0 or np.abs(values.sum(axis=1) - 1).max() > 1e-2):
            raise MessageError(
                "probabilities: a row is no distribution (negative, or its sum is not 1): apply softmax to "
                "the model's outputs"
            )
        return cast(FloatArray, np.log(np.maximum(values, np.float32(self.floor))))


def order_record(order: Order) -> RecordDict:
    """Pack an order. Targets travel in float16, or in float32 where predictions do or a part is taken out."""
    dtype = "<f4" if order.wire_dtype == "float32" or order.own_share else "<f2"
    index_dtype = _index_dtype(order)
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "run": order.run,
        "round": order.round,
        "closing": order.closing,
        "public-digest": order.public_digest,
        "num-classes": order.num_classes,
        "indices-dtype": index_dtype,
        "indices": order.indices.astype(index_dtype).tobytes(),
        "wire-dtype": order.wire_dtype,
        "floor": float(order.floor),
        "evaluate-unseen": order.evaluate_unseen,
    }
    if order.frozen:
        config["frozen"] = order.frozen
    if order.classes:
        config["classes"] = list(order.classes)
    if order.cohort is not None:
        config["cohort"] = list(order.cohort.names)
        config["cohort-keys"] = b"".join(order.cohort.keys)
        if order.cohort.proofs:
            config["cohort-signers"] = [proof.signer for proof in order.cohort.proofs]
            config["cohort-signatures"] = [proof.signature for proof in order.cohort.proofs]
    if order.own_share:
        config["own-share"] = order.own_share
    if not np.array_equal(order.target_indices, order.indices):  # a static public set goes once
        config["target-indices"] = order.target_indices.astype(index_dtype).tobytes()
    if order.log_targets is not None:
        config["kl-weight"] = float(order.kl_weight)
        config["divergence"] = order.divergence
        config["temperature"] = float(order.temperature)
        config["targets-dtype"] = dtype
        config["targets"] = _packed("targets", order.log_targets, dtype)
    if order.target_entropies is not None:
        config["target-entropies"] = _packed("target-entropies", order.target_entropies, dtype)
    records: dict[str, Any] = {ORDER: ConfigRecord(config)}
    if order.config:
        records[CONFIG] = ConfigRecord(dict(order.config))
    if order.model is not None:
        records[MODEL] = order.model
    return RecordDict(records)


def _packed(name: str, values: FloatArray, dtype: str) -> bytes:
    """Bytes of an array; of a read-only one, which several orders share, they are made once."""
    if values.flags.writeable:
        return values.astype(dtype).tobytes()
    known = _shared.get(name)
    if known is None or known[0]() is not values or known[1] != dtype:
        made = values.astype(dtype).tobytes()
        known = _shared[name] = (ref(values, lambda _: _shared.pop(name, None)), dtype, made)
    return known[2]


def read_order(content: RecordDict) -> Order:
    """Unpack and check an order.

    Raises
    ------
    MessageError
        For another protocol version or a malformed record.
    """
    config = read_config(content, ORDER)
    if config.get("protocol") != PROTOCOL:
        raise MessageError(
            f"the server speaks protocol {config.get('protocol')}, this site {PROTOCOL}: "
            "install the same fedmutual version on both"
        )
    model, passed_on = read_model(content), content.get(CONFIG)
    try:
        num_classes = integer(config["num-classes"], "num-classes")
        dtype = np.dtype(_one_of(config.get("targets-dtype", "<f2"), ("<f2", "<f4"), "targets-dtype"))
        indices = target_indices = _indices(config, "indices")
        if "target-indices" in config:
            target_indices = _indices(config, "target-indices")
        targets = entropies = None
        if "targets" in config:
            targets = _numbers(config["targets"], dtype).reshape(len(target_indices), num_classes)
        if "target-entropies" in config:
            entropies = _numbers(config["target-entropies"], dtype).reshape(len(target_indices))
        classes = tuple(cast(list[str], config.get("classes", ())))
        if classes and len(classes) != num_classes:
            raise ValueError(f"classes: {len(classes)} names of {num_classes} classes")
        return Order(
            run=folder_name(config["run"]),
            round=integer(config["round"], "round"),
            closing=bool(config["closing"]),
            public_digest=str(config["public-digest"]),
            num_classes=num_classes,
            classes=classes,
            indices=indices,
            target_indices=target_indices,
            log_targets=targets,
            target_entropies=entropies,
            divergence=_one_of(config.get("divergence", "peer_own"), DIVERGENCES, "divergence"),
            temperature=_positive(config.get("temperature", 1.0), "temperature"),
            kl_weight=float(cast(float, config.get("kl-weight", 0.0))),
            wire_dtype=_one_of(config["wire-dtype"], WIRE_DTYPES, "wire-dtype"),
            floor=_positive(config["floor"], "floor"),
            config=dict(passed_on) if isinstance(passed_on, ConfigRecord) else {},
            evaluate_unseen=bool(config["evaluate-unseen"]),
            model=model,
            frozen=str(config.get("frozen", "")),
            cohort=_cohort(config),
            own_share=_share(config.get("own-share", 0.0)),
        )
    except MessageError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(f"order: malformed: {error!r}") from error


def _one_of(value: object, choices: Sequence[str], name: str) -> str:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}")
    return cast(str, value)


def _positive(value: object, name: str) -> float:
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: {value!r} is no number above 0")
    return value


def _numbers(data: object, dtype: np.dtype[Any]) -> FloatArray:
    """Finite float32 values from bytes."""
    values = np.frombuffer(cast(bytes, data), dtype).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("targets: a value is not finite")
    return values


def _share(value: object) -> float:
    if not isinstance(value, float) or not 0 <= value < 1:
        raise ValueError(f"own-share: {value!r} is no share below 1")
    return value


def _cohort(config: dict[str, Any]) -> Cohort | None:
    if "cohort" not in config:
        return None
    keys = cast(bytes, config["cohort-keys"])
    each = tuple(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
    signed = zip(config.get("cohort-signers", ()), config.get("cohort-signatures", ()), strict=True)
    proofs = tuple(Proof(signer, signature) for signer, signature in signed)
    return Cohort(tuple(cast(list[str], config["cohort"])), each, proofs)


def _index_dtype(order: Order) -> str:
    """Two bytes an index where that is enough."""
    both = np.concatenate((order.indices, order.target_indices))
    return "<u2" if both.max(initial=0) < 2**16 else "<i4"


def _indices(config: dict[str, Any], key: str) -> IndexArray:
    dtype = str(config["indices-dtype"])
    if dtype not in ("<u2", "<i4"):
        raise ValueError(f"indices-dtype {dtype!r}")
    return np.frombuffer(cast(bytes, config[key]), dtype).astype(np.int32)


def folder_name(run: object) -> str:
    """The run's name, which becomes a folder at the client; ValueError where it leads out of its parent."""
    name = str(run)
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"run: {name!r} cannot be the name of a folder")
    return name
