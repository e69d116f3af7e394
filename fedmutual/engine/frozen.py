"""Orders with weights name what these stand on: a frozen backbone, which a client must have as well."""

from __future__ import annotations

from dataclasses import replace

from fedmutual.settings import Settings
from fedmutual.wire.orders import Order


def with_frozen(order: Order, settings: Settings) -> Order:
    """Return an order that names the frozen part of the run's model, if it has weights."""
    if order.model is None:
        return order
    from fedmutual.models.learnt import frozen_digest  # torch, which whoever sends weights has anyway

    return replace(order, frozen=frozen_digest(settings))
