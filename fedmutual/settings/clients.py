"""Names of clients in the settings of studies, compared with those that there are."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from fedmutual.settings.schema import Settings


def named_clients(settings: Settings) -> dict[str, list[str]]:
    """Return setting -> names of clients in it."""
    absent = [text.rpartition(":")[0] for text in settings.participation.absent]
    return {"attack.clients": settings.attack.clients, "participation.absent": absent}


def unknown_clients(settings: Settings, known: Sequence[str]) -> str | None:
    """Say which name in ``attack.clients`` or ``participation.absent`` is no client's, key first."""
    for key, names in named_clients(settings).items():
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.8)
                hint = f"did you mean {near[0]}? " if near else ""
                shown = ", ".join(known) if len(known) <= 6 else f"{known[0]}, ..., {known[-1]}"
                return f"{key}: there is no client {name!r}: {hint}The run has {shown}"
    return None
