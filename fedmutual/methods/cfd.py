"""``strategy=cfd`` in the image application: after arXiv:2012.00632."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedmutual.methods.digest import DigestSettings
from fedmutual.settings import Settings
from fedmutual.strategies.cfd import CFD

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class CFDSettings(DigestSettings):
    """Settings of ``strategy=cfd``."""

    means_of_scores: ClassVar[bool] = False

    def strategy(self, settings: Settings, shared: SharedData) -> CFD:
        """Return the strategy of these settings."""
        return CFD(**self.options(settings, shared))
