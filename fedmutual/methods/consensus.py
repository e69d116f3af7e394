"""The choices of the settings group ``consensus``; :mod:`fedmutual.strategies.consensus` has the rules."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from fedmutual.settings import ConsensusSettings, StrategySettings, setting
from fedmutual.strategies import consensus
from fedmutual.strategies.consensus import Rule

OWN = "include a client's own prediction in its consensus"


@dataclass(kw_only=True)
class RuleSettings(ConsensusSettings):
    """A consensus' settings; ``_target_`` in ``conf/consensus/*.yaml`` names the subclass."""

    kind: ClassVar[type[Rule]]

    def rule(self) -> Rule:
        """Return the rule, whose parameters have the names of these settings."""
        made: Rule = self.kind(**asdict(self))
        return made

    def misfit(self, strategy: StrategySettings) -> str | None:
        """Return the strategy setting that this consensus does not support, key first."""
        if not strategy.takes_consensus:
            return f"consensus: strategy={strategy.name} does not use it: leave it at consensus=mean"
        if getattr(strategy, "divergence", "") == "published_code" and not self.kind.is_mean:
            return "strategy.divergence: published_code is defined for a mean of the peers only"
        return None


@dataclass(kw_only=True)
class MeanSettings(RuleSettings):
    """Settings of ``consensus=mean``, shared by all weighted means."""

    kind: ClassVar[type[Rule]] = consensus.Mean
    takes_secagg: ClassVar[bool] = True

    include_own: bool = setting(OWN)

    def misfit(self, strategy: StrategySettings) -> str | None:
        """Accept the plain mean for every strategy, since it is the default."""
        return None if type(self) is MeanSettings else super().misfit(strategy)


@dataclass(kw_only=True)
class ValidationSettings(MeanSettings):
    """Settings of ``consensus=validation``."""

    kind: ClassVar[type[Rule]] = consensus.Validation
    takes_secagg: ClassVar[bool] = False


@dataclass(kw_only=True)
class ConfidenceSettings(MeanSettings):
    """Settings of ``consensus=confidence``."""

    kind: ClassVar[type[Rule]] = consensus.Confidence
    takes_secagg: ClassVar[bool] = False

    exponent: float = setting("a of the weight (1 - entropy / log C) ** a of a prediction", above=0)


@dataclass(kw_only=True)
class MedianSettings(RuleSettings):
    """``consensus=median``, which has no settings."""

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

    tolerance: float = setting("multiple of the median distance that raises no suspicion", minimum=0)
    margin: float = setting(
        "further total variation distance that raises no suspicion, for clients that had a target before",
        minimum=0,
        maximum=1,
    )
    memory: float = setting("decay of a client's suspicion per round", minimum=0, maximum=1)
    severity: float = setting("a client's weight is exp(-severity * suspicion)", above=0)
