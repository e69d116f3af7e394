"""``strategy=mutual`` in the image application: distributed mutual learning (arXiv:2503.05803)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedmutual.learning import DIVERGENCES
from fedmutual.learning.ring import Summed
from fedmutual.methods.base import PREDICTIONS, Method
from fedmutual.methods.schedule import predictions
from fedmutual.settings import Settings, setting
from fedmutual.settings.pretrained import tunes_head
from fedmutual.strategies.mutual import MutualLearning
from fedmutual.wire.codec import WIRE_DTYPES

if TYPE_CHECKING:
    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData
    from fedmutual.learning.training import Public

AUTO = "auto"
HEAD_SHARPENING = 1.25
CLOSING_ROUNDS, CLOSING_WEIGHT = 3, 3.0


@dataclass(kw_only=True)
class MutualSettings(Method):
    """Settings of ``strategy=mutual``."""

    phase: str = setting(
        "mixed: every step uses a private and a public batch; separate: public samples after the private "
        "ones, as in the paper",
        choices=("mixed", "separate"),
    )
    divergence: str | None = setting(
        "own_peer: KL(own || peer), the paper; peer_own: KL(peer || own), arXiv:1706.00384; "
        "published_code: the expression in the paper's code, not a divergence, two classes only; "
        "null: own_peer with model=pretrained model.tune=head, else peer_own",
        choices=DIVERGENCES,
    )
    temperature: float = setting("softens every distribution in the mutual loss", above=0)
    sharpening: float | None = setting(
        "exponent of a target's probabilities before a client learns from it (see DS-FL); null: "
        f"{HEAD_SHARPENING} with strategy.divergence=null and model.tune=head, else 1",
        above=0,
    )
    kl_weight: float = setting("lambda, weight of the mean KL; 0: no mutual learning", minimum=0)
    burn_in: int = setting("number of first rounds without a mutual step", minimum=0)
    public_epochs: int | str = setting(
        "phase=mixed: minimum passes per round over the public samples; auto: as many public images a step "
        "as private ones, and steps by the private images and min_steps alone",
        choices=(AUTO,),
        minimum=1,
    )
    min_steps: int = setting(
        "phase=mixed: minimum steps of a round with targets, however few the images", minimum=1
    )
    mutual_epochs: int = setting("phase=separate: passes over the public samples", minimum=1)
    closing: str = setting(
        "phase=mixed: the step after the last round. consolidate: the mixed steps of "
        f"{CLOSING_ROUNDS} rounds, with {CLOSING_WEIGHT:g} lambda and a rate that decays to a hundredth; "
        "mixed: those of one round; public: the public samples alone; none: no step",
        choices=("consolidate", "mixed", "public", "none"),
    )
    or_alone: bool = setting(
        "closing=consolidate: a client also trains alone from the same weights, and keeps that model if it "
        "is right on significantly more of its own validation images"
    )
    probability_floor: float = setting(
        "minimum of shared probabilities; bounds the influence of one peer", above=0, maximum=0.1
    )
    wire_dtype: str = setting("number format of predictions in messages", choices=WIRE_DTYPES)
    staleness_limit: int | None = setting(
        "number of rounds for which a missing peer's stale predictions are used (with public=static "
        "public.views=plain; otherwise they refer to other images and are discarded); null: no limit",
        minimum=0,
    )

    @property
    def closing_rounds(self) -> int:
        """How many rounds' time the closing step may take."""
        return CLOSING_ROUNDS if self.phase == "mixed" and self.closing == "consolidate" else 1

    takes_consensus: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    fills_public: ClassVar[bool] = True
    takes_secagg: ClassVar[bool] = True

    def check(self) -> str | None:
        """Reject a temperature for the published code's expression, and auto where there is no mixed step."""
        if self.divergence == "published_code" and self.temperature != 1:
            return f"temperature: {self.temperature:g}, but divergence=published_code is only defined for 1"
        if self.or_alone and (self.phase, self.closing) != ("mixed", "consolidate"):
            return "or_alone: true is for phase=mixed and closing=consolidate: set it to false"
        if self.public_epochs == AUTO and self.phase == "separate":
            return (
                "public_epochs: auto is for phase=mixed; phase=separate takes strategy.mutual_epochs passes"
            )
        if self.public_epochs == AUTO and self.closing == "public":
            return (
                "public_epochs: auto counts the private images of a step, and closing=public has none: set a "
                "number, or another closing step"
            )
        return None

    @property
    def passes(self) -> int | None:
        """The minimum of passes over the public samples in a round; None: in proportion."""
        return None if isinstance(self.public_epochs, str) else self.public_epochs

    def misfit(self, settings: Settings) -> str | None:
        """Reject what needs more than the sum of the predictions where only that is known."""
        if settings.privacy.secagg and self.divergence == "published_code":
            return "strategy.divergence: published_code needs more than privacy.secagg adds up"
        return super().misfit(settings)

    def summed(self, settings: Settings) -> Summed:
        """Return the sum that the divergence needs: of probabilities, or of log-odds."""
        return Summed(
            log_odds=self.divergence_for(settings) == "own_peer",
            floor=self.probability_floor,
            temperature=self.temperature,
            without_own=not settings.consensus.include_own,
        )

    def sends(self, settings: Settings) -> list[str]:
        """Return predictions."""
        return [PREDICTIONS]

    def strategy(self, settings: Settings, shared: SharedData) -> MutualLearning:
        """Return the strategy of these settings."""
        return MutualLearning(
            **self.options(settings),
            **predictions(settings, shared),
            same_views=settings.public.views == "plain",
        )

    def divergence_for(self, settings: Settings) -> str:
        """Return the divergence, or what it is by default.

        Heads learn more from the mean of the peers' log-probabilities, in which who is sure counts more.
        Networks that learn from nothing are sure without reason where labels are skewed.
        """
        if self.divergence is not None:
            return self.divergence
        return "own_peer" if tunes_head(settings.model) else "peer_own"

    def sharpening_for(self, settings: Settings) -> float:
        """Return the sharpening, or what it is by default."""
        if self.sharpening is not None:
            return self.sharpening
        return HEAD_SHARPENING if tunes_head(settings.model) and self.divergence is None else 1.0

    def options(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments shared by the strategies with and without rounds."""
        return {
            "consensus": settings.consensus.rule(),
            "divergence": self.divergence_for(settings),
            "temperature": self.temperature,
            "kl_weight": self.kl_weight,
            "burn_in": self.burn_in,
            "staleness_limit": self.staleness_limit,
            "labelled": settings.public.labelled,
            "wire_dtype": self.wire_dtype,
            "probability_floor": self.probability_floor,
        }

    def learn(self, learner: Learner) -> Answer:
        """Do the mutual step of the previous round, local training and predictions, as in the paper."""
        order = learner.order
        public = learner.public() if len(order.target_indices) else None  # with a target, or only labels
        if public:
            public = public.sharpened(self.sharpening_for(learner.settings))
        if public and self.phase == "separate":
            learner.separate_mutual_step(public, self.mutual_epochs)
        elif public and order.closing:
            self._closing_step(learner, public)
        if order.closing:
            return learner.close()
        if public and self.phase == "mixed":
            learner.mixed_training(public, self.passes, self.min_steps)
        else:
            learner.local_training()
        return learner.report()

    def _closing_step(self, learner: Learner, public: Public) -> None:
        """Learn from the last round's targets."""
        if self.closing == "consolidate":
            start = learner.weights() if self.or_alone else None
            learner.consolidate(public, self.passes, self.min_steps, CLOSING_ROUNDS, CLOSING_WEIGHT)
            if start is not None:
                learner.alone_if_better(start, CLOSING_ROUNDS)
        elif self.closing == "mixed":
            learner.mixed_training(public, self.passes, self.min_steps)
        elif self.closing == "public" and self.passes is not None:
            learner.separate_mutual_step(public, self.passes)
