"""``strategy=fed3r`` (arXiv:2406.01116) in the image application: closed-form ridge regression of a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedmutual.engine.server_model import ServerModel
from fedmutual.methods.base import nothing_predicted
from fedmutual.methods.fedavg import FedAvgSettings
from fedmutual.settings import Settings, setting
from fedmutual.settings.pretrained import tunes_head
from fedmutual.strategies.fed3r import GRAM, MOMENT, Fed3R
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class Fed3RSettings(FedAvgSettings):
    """Settings of ``strategy=fed3r``; those of FedAvg hold for its fine-tuning."""

    takes_dp: ClassVar[bool] = False  # its sums have no noise: strategy=speaker

    ridge: float = setting(
        "lambda of the ridge regression, as a share of the features' mean square", minimum=0
    )
    output_temperature: float = setting(
        "the regression's outputs (about 0 to 1) are divided by it to become logits", above=0
    )
    fine_tune: bool = setting("fine-tune the head by FedAvg in the rounds after the first")

    def misfit(self, settings: Settings) -> str | None:
        """Reject a model that is no head on frozen features."""
        if not tunes_head(settings.model):
            return "strategy=fed3r solves for a head on frozen features: set model=pretrained model.tune=head"
        return super().misfit(settings)

    def strategy(self, settings: Settings, shared: SharedData) -> Fed3R:
        """Return the strategy of these settings."""
        server = ServerModel(settings, shared)
        return Fed3R(
            len(shared.classes),
            server.weights(),
            ridge=self.ridge,
            temperature=self.output_temperature,
            fine_tune=self.fine_tune,
            measure=server.measure_weights,
            labelled=self.labelled(settings, shared),
        )

    def learn(self, learner: Learner) -> Answer:
        """Add up the statistics of the private images, or fine-tune."""
        if learner.order.closing or (learner.order.round > 1 and self.fine_tune):
            return super().learn(learner)
        learner.validate()
        answer = nothing_predicted(learner)
        return answer if learner.order.round > 1 else replace(answer, sent=_statistics(learner))

    def sends(self, settings: Settings) -> list[str]:
        """Return the sums of the first round, and the fine-tuned head."""
        sums = "sums over its images of products of features and labels, once"
        return [sums, *(super().sends(settings) if self.fine_tune else [])]

    def weights(self, order: Order, report: Report, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the fine-tuned head."""
        return super().weights(order, report, weights) if self.fine_tune else {}


def _statistics(learner: Learner) -> Mapping[str, Tensor]:
    import torch

    from fedmutual.learning.ridge import statistics
    from fedmutual.models.pretrained import Head

    private, head = learner.private(), learner.model
    assert isinstance(head, Head)
    scaled = head.scaled(private.images.to(head.centre.device).float()).cpu().numpy()
    found = statistics(scaled, private.labels.cpu().numpy(), len(learner.site.classes))
    return {name: torch.from_numpy(values) for name, values in zip((GRAM, MOMENT), found, strict=True)}
