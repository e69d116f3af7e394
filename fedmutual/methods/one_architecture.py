"""Check that all clients have the same architecture, for strategies that exchange weights."""

from __future__ import annotations

from fedmutual.settings import Settings


def one_architecture(settings: Settings) -> str | None:
    """Return why weights cannot be exchanged; None if they can."""
    if settings.model.per_client:
        return (
            f"model.per_client: {len(settings.model.per_client)} models, but "
            f"strategy={settings.strategy.name} exchanges weights: choose one model, or strategy=mutual"
        )
    return None
