"""The choices of the settings group ``consensus``; what each one computes is in its strategy's rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from fedmutual.settings import ConsensusSettings, StrategySettings, setting
from fedmutual.strategies import consensus
from fedmutual.strategies.consensus import Rule

OWN = "a client's own prediction counts as one of its peers'"


@dataclass(kw_only=True)
class RuleSettings(ConsensusSettings):
    """A consensus' settings; ``_target_`` in ``conf/consensus/*.yaml`` names the subclass."""

    kind: ClassVar[type[Rule]]

    def rule(self) -> Rule:
        """Make the rule from the settings: its parameters have their names."""
        made: Rule = self.kind(**asdict(self))
        return made

    def misfit(self, strategy: StrategySettings) -> str | None:
        """Say which setting of the strategy this consensus does not go with, key first."""
        if not strategy.takes_consensus:
            return f"consensus: strategy={strategy.name} has no use for it: leave it at consensus=mean"
        if getattr(strategy, "divergence", "") == "published_code" and not self.kind.is_mean:
            return "strategy.divergence: published_code is defined for a mean of the peers only"
        return None


@dataclass(kw_only=True)
class MeanSettings(RuleSettings):
    """Settings of ``consensus=mean``, and what all kinds of mean have."""

    kind: ClassVar[type[Rule]] = consensus.Mean

    include_own: bool = setting(OWN)

    def misfit(self, strategy: StrategySettings) -> str | None:
        """The plain mean goes with every strategy: it is the value where there is nothing to choose."""
        return None if type(self) is MeanSettings else super().misfit(strategy)


@dataclass(kw_only=True)
class ValidationSettings(MeanSettings):
    """Settings of ``consensus=validation``."""

    kind: ClassVar[type[Rule]] = consensus.Validation


@dataclass(kw_only=True)
class ConfidenceSettings(MeanSettings):
    """Settings of ``consensus=confidence``."""

    kind: ClassVar[type[Rule]] = consensus.Confidence

    exponent: float = setting("a of the weight (1 - entropy / log C) ** a of a prediction", above=0)


@dataclass(kw_only=True)
class MedianSettings(RuleSettings):
    """Settings of ``consensus=median``: there are none."""

    kind: ClassVar[type[Rule]] = consensus.Median


@dataclass(kw_only=True)
class TrimmedMeanSettings(RuleSettings):
    """Settings of ``consensus=trimmed_mean``."""

    kind: ClassVar[type[Rule]] = consensus.TrimmedMean

    trim: int = setting(
        "values left out at each end: the number of hostile clients it is robust to", minimum=1
    )


@dataclass(kw_only=True)
class ReputationSettings(RuleSettings):
    """Settings of ``consensus=reputation``."""

    kind: ClassVar[type[Rule]] = consensus.Reputation

    tolerance: float = setting("a distance of up to so many median distances raises no suspicion", minimum=0)
    margin: float = setting(
        "nor, on top, this total variation distance, for a client that has had a target before",
        minimum=0,
        maximum=1,
    )
    memory: float = setting("share of a client's suspicion that is left a round later", minimum=0, maximum=1)
    severity: float = setting("a client's weight is exp(-severity * suspicion)", above=0)
