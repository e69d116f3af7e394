"""``strategy=dsfl`` in the image application: arXiv:2008.06180."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedmutual.methods.digest import DigestSettings
from fedmutual.settings import Settings, setting
from fedmutual.strategies.dsfl import DSFL

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class DSFLSettings(DigestSettings):
    """Settings of ``strategy=dsfl``."""

    means_of_scores: ClassVar[bool] = False

    era_temperature: float = setting("T of the entropy reduction; the paper: 0.1", above=0)

    def strategy(self, settings: Settings, shared: SharedData) -> DSFL:
        """Return the strategy of these settings."""
        return DSFL(era_temperature=self.era_temperature, **self.options(settings, shared))
