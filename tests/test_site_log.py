"""What a site reads of itself: the sentences, worked out by hand, and that they are in its own log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_grid import play

from fedmutual.client.site_log import progress
from fedmutual.wire.reports import Report


def report(round: int = 3, **metrics: Any) -> Report:
    named = {key.replace("_", "-"): value for key, value in metrics.items()}
    return Report("ward", round, "digest", "VisionNet", np.zeros((0, 2), np.float32), named)


def test_a_round() -> None:
    now = report(
        num_examples=306, seconds=4.14, validation_accuracy=0.912, unseen_accuracy=0.9, kl_before=0.5123,
        kl_after=0.11, train_loss=0.3,
    )  # fmt: skip
    assert progress(now, report(2, validation_accuracy=0.881), closing=False) == (
        "ward, round 3: trained on 306 own images in 4.1 s; "
        "right on 91.2 % of its own held-out images (round 2: 88.1 %); "
        "right on 90.0 % of the unseen images that all sites share; "
        "learning from the others brought it nearer to its peers (KL 0.512 -> 0.110)"
    )


def test_the_end_and_what_was_not_measured() -> None:
    assert progress(report(4, num_examples=5, seconds=1.0), None, closing=True) == (
        "ward, end of the run: done in 1.0 s"
    )
    assert (
        progress(report(1, num_examples=5), None, closing=False) == "ward, round 1: trained on 5 own images"
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(0.5, 0.6, "away from its peers"), (0.5, 0.5001, "did not change its distance from its peers")],
)
def test_peers_that_do_not_come_nearer(before: float, after: float, said: str) -> None:
    assert said in progress(report(kl_before=before, kl_after=after), None, closing=False)


def test_every_round_of_a_real_run_is_said(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    played = play(tmp_path / "run", "rounds=2", "tracking.loggers=[]", clients=2)
    assert played.summary["status"] == "completed"
    for name in ("client-0", "client-1"):
        own = [line for line in said() if line.startswith(f"{name}, ")]
        assert [line.split(":")[0] for line in own] == [
            f"{name}, round 1", f"{name}, round 2", f"{name}, end of the run",
        ]  # fmt: skip
        assert "(round 1: " in own[1]
        assert "KL" in own[1]
