"""A strategy without rounds: every client is sent its next order as soon as it has answered the last one.

Flower's interface is made of rounds, so these are driven by fedmutual's own engine
(:mod:`fedmutual.engine.arriving`). The ``round`` of an order is the client's own count of updates, from 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmutual.wire.orders import Order
from fedmutual.wire.records import FLOOR, NO_SAMPLES, IndexArray
from fedmutual.wire.reports import Report

Arrays = dict[str, np.ndarray[Any, Any]]
Figures = dict[str, Any]
Delivered = Mapping[str, int]  # accepted reports of each client so far


class ArrivalStrategy(ABC):
    """What an algorithm without rounds says of itself."""

    own_metrics: tuple[str, ...] = ()  # names that clients of the application may report besides its own
    wire_dtype = "float16"
    keeps_half = False  # keep what travels in float16 in float16; the strategy computes in float32 or better
    floor = FLOOR

    def indices(self) -> IndexArray:
        """Public samples that clients predict, int32 [n]."""
        return NO_SAMPLES

    @abstractmethod
    def prepare(self, client: str, update: int, delivered: Delivered) -> None:
        """Freeze the inputs of the client's next order, so that a resend is identical."""

    @abstractmethod
    def order(self, client: str, base: Order) -> Order:
        """The order that :meth:`prepare` froze; equal every time it is asked for."""

    @abstractmethod
    def closing_order(self, client: str, base: Order, delivered: Delivered) -> Order:
        """A client's last order."""

    @abstractmethod
    def take(self, client: str, report: Report, delivered: Delivered) -> Figures:
        """Use a report; ``delivered`` does not count it yet.

        Returns
        -------
        dict
            What its history line also says.

        Raises
        ------
        MessageError
            If it cannot be used; nothing has changed.
        """

    def global_weights(self) -> Arrays | None:
        """Weights of the global model; None: the strategy has none."""
        return None

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What the strategy needs to continue: JSON values, and arrays by name."""

    @abstractmethod
    def restore_state(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue from what :meth:`state` returned."""
