"""``strategy=fedmd`` in the image application: arXiv:1910.03581."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedmutual.methods.digest import DigestSettings
from fedmutual.settings import Settings
from fedmutual.strategies.fedmd import FedMD

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class FedMDSettings(DigestSettings):
    """Settings of ``strategy=fedmd``."""

    revisits_last: ClassVar[bool] = True

    def strategy(self, settings: Settings, shared: SharedData) -> FedMD:
        """Return the strategy of these settings."""
        return FedMD(**self.options(settings, shared))
