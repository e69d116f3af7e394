"""All data in one place: the reference line that collaboration is measured against.

One node trains one model on the private images of all clients. Only where all of them come out of one pool
(``partition-id``) can a node read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line
from fedmutual.engine.rounds import Arrays
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings
from fedmutual.strategies.local import Local, LocalSettings
from fedmutual.wire.messages import Report


@dataclass(kw_only=True)
class CentralisedSettings(LocalSettings):
    """Settings of ``strategy=centralised``."""

    whole_pool: ClassVar[bool] = True

    def build(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> Centralised:
        """Make the strategy of a run."""
        return Centralised(settings, shared, run, journal)


class Centralised(Local):
    """Order one node only, and after a restart the same client again."""

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        self._client: str | None = None

    def participants(self, nodes: list[int]) -> list[int]:
        """The node that has trained before; at first any."""
        known = [
            node for node in nodes if self._client is not None and self.roster.name(node) == self._client
        ]
        return known or nodes[:1]

    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Remember who trains."""
        (self._client,) = reports
        return {}

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Who trains."""
        return {"client": self._client}, {}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Take up what :meth:`state` gave."""
        self._client = meta["client"]
