"""A recorded run beside the truth: the images of its clients, loaded again from its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.backbones.intake import intake_of
from fedmutual.data.cache import cache_folder
from fedmutual.data.overlap import overlapping
from fedmutual.data.site import SharedData, SiteData, load_images, load_shared, load_site
from fedmutual.results.directory import (
    CONFIG,
    Record,
    ResultsError,
    RunDirectory,
    read_summary,
    saved_overrides,
)
from fedmutual.results.received import Received, read_received
from fedmutual.settings import Settings
from fedmutual.settings.compose import compose

RECORDS = "privacy.record=true"


class AuditError(ValueError):
    """A run cannot be audited; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class RecordedTruth:
    """What a run's server has received, and what is true of its clients.

    Attributes
    ----------
    path : Path
        The run's folder.
    overrides : tuple[str, ...]
        What its settings are made of.
    sites : dict[str, SiteData]
        By client.
    """

    path: Path
    overrides: tuple[str, ...]
    settings: Settings
    received: Received
    history: list[Record]
    shared: SharedData
    sites: dict[str, SiteData]

    def trained(self, client: str) -> NDArray[np.int64]:
        """Positions of the private images that a client was trained on in some round."""
        site = self.sites[client]
        return np.unique(np.concatenate(site.train_parts))

    def held_out(self, client: str) -> NDArray[np.int64]:
        """Positions of the private images that no client was trained on."""
        return np.unique(np.concatenate(self.sites[client].held_out_parts))

    def also_public(self, client: str) -> NDArray[np.int64]:
        """Positions of the private images that are also public, or nearly."""
        site, cache = self.sites[client], cache_folder(self.settings.cache_dir)
        return overlapping(site.private, site.public.images, cache)


def read_truth(path: Path, overrides: Sequence[str] = ()) -> RecordedTruth:
    """Read a recorded run, and load the images of its clients.

    Parameters
    ----------
    overrides : sequence of str
        What has changed since, such as ``data.root``.

    Raises
    ------
    AuditError
        It has recorded nothing, or its images are not here or not the same.
    ResultsError
        The folder is none of a run, or damaged.
    SettingsError, DataError
        Its settings cannot be used here, such as a backbone or a folder that is missing.
    """
    path = path.absolute()
    if not (path / CONFIG).is_file():
        raise ResultsError(f"{path} holds no {CONFIG}: give the results folder of a run")
    received = read_received(path)
    summary = read_summary(path)
    if summary is None:
        raise AuditError(f"{path} has no summary: the run is still going on, or was killed; resume it")
    if received is None:
        raise AuditError(f"{path} holds nothing of what its server received: run it again with {RECORDS}")
    chosen = (*saved_overrides(path), *overrides)
    settings = compose(chosen)
    history = RunDirectory(path).history()
    names = list(summary["clients"])
    if any(name != f"client-{number}" for number, name in enumerate(sorted(names, key=_number))):
        raise AuditError(
            f"the clients of {path} ({', '.join(names[:3])}) have images of their own, which are not here: "
            "audit a simulation of the run (`fedmutual run` with its settings)"
        )
    intake = intake_of(settings)
    images = load_images(settings, intake)
    shared = load_shared(settings, len(names), intake, images)
    if summary.get("public_digest") not in (None, shared.public.digest):
        raise AuditError(
            f"the public images here are not those of {path}: their digest is {shared.public.digest}, and "
            f"was {summary['public_digest']}; put the run's images back, or name their folder (data.root=...)"
        )
    whole = settings.strategy.whole_pool
    sites = {
        f"client-{i}": load_site(settings, (i, len(names)), None, whole, intake, images)
        for i in range(len(names))
    }
    _require_same(path, history, sites)
    return RecordedTruth(path, chosen, settings, received, history, shared, sites)


def _require_same(path: Path, history: Sequence[Record], sites: dict[str, SiteData]) -> None:
    """Refuse private images that are not those of the run, where it has their digest."""
    told: dict[str, Any] = {
        line["client"]: line["private_digest"] for line in history if line.get("private_digest")
    }
    changed = [name for name, site in sites.items() if told.get(name) not in (None, site.private_digest)]
    if changed:
        raise AuditError(
            f"the private images of {changed[0]} here are not those of {path}: put the run's images back, or "
            "name their folder (data.root=...)"
        )


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1
