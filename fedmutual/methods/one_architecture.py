"""Where weights are exchanged, all clients have one architecture."""

from __future__ import annotations

from fedmutual.settings import Settings


def one_architecture(settings: Settings) -> str | None:
    """Say why weights cannot be exchanged; None: they can."""
    if settings.model.per_client:
        return (
            f"model.per_client: {len(settings.model.per_client)} models, but "
            f"strategy={settings.strategy.name} exchanges weights: choose one model, or strategy=mutual"
        )
    return None
