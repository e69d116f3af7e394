"""No exchange: every client learns alone; or one node on the data of all, the reference line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedmutual.strategies.base import Arrays, Figures, RoundStrategy, Schedule
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report


class Local(RoundStrategy):
    """Keep the clients in step, and record what they measure.

    Parameters
    ----------
    num_classes : int
    labelled : callable or None
        The labelled public samples that clients also train on in a round; None: none.
    **flower
        See :class:`fedmutual.strategies.base.RoundStrategy`.
    """

    def __init__(self, num_classes: int, *, labelled: Schedule | None = None, **flower: Any) -> None:
        super().__init__(num_classes, **flower)
        self.labelled = labelled

    def order(self, client: str | None, base: Order) -> Order:
        """Train for a round."""
        return with_labelled(base, self.labelled)

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Nothing is exchanged."""
        return {}


class Centralised(Local):
    """Order one node only, and after a restart the same client again."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self._client: str | None = None

    def participants(self, nodes: Mapping[int, str | None]) -> list[int]:
        """The node that has trained before; at first any."""
        known = [node for node, name in nodes.items() if self._client is not None and name == self._client]
        return known or list(nodes)[:1]

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Remember who trains."""
        (self._client,) = reports
        return {}

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Who trains."""
        return {"client": self._client}, {}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        self._client = meta["client"]


def with_labelled(order: Order, labelled: Schedule | None) -> Order:
    """The order with the labelled public samples that are trained on, where there are any."""
    if labelled is None or order.closing:
        return order
    return replace(order, target_indices=labelled(order.round))
