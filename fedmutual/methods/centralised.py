"""``strategy=centralised`` in the image application: all data in one place, as a reference.

One node trains one model on the private images of all clients. This is possible only if all of them are
shares of one pool (``partition-id``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedmutual.methods.local import LocalSettings
from fedmutual.settings import Settings
from fedmutual.strategies.local import Centralised

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class CentralisedSettings(LocalSettings):
    """Settings of ``strategy=centralised``."""

    whole_pool: ClassVar[bool] = True

    def strategy(self, settings: Settings, shared: SharedData) -> Centralised:
        """Return the strategy of these settings."""
        return Centralised(len(shared.classes), labelled=self.labelled(settings, shared))
