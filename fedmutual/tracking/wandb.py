"""Weights & Biases: a run in the project ``tracking.project``; offline unless ``tracking.wandb_mode=online``.

Offline, the run is stored in ``<run>/wandb/``; ``wandb sync`` uploads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import wandb

from fedmutual.settings import Settings, as_container
from fedmutual.tracking.tracker import LatestMeans, Record, figures


class WeightsAndBiases:
    """One W&B run, with the round as x-axis; a resumed run continues the W&B run of its folder."""

    def __init__(self, settings: Settings, folder: Path, history: Sequence[Record]) -> None:
        self._means = LatestMeans()
        self._run = wandb.init(
            project=settings.tracking.project,
            name=folder.name,
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            mode=cast(Any, settings.tracking.wandb_mode),  # the schema allows only its literals
            config=as_container(settings),
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")
        for number in sorted({int(line["round"]) for line in history}):
            self.log([line for line in history if line["round"] == number])

    def log(self, lines: Sequence[Record]) -> None:
        """Log the figures as ``<group>/<name>/<client>`` (all clients in one chart), and their means."""
        if not lines:
            return
        row: dict[str, float] = {"round": max(int(line["round"]) for line in lines)}
        for line in lines:
            row |= {f"{name}/{line.get('client')}": value for name, value in figures(line).items()}
        row |= {f"{name}/mean": value for name, value in self._means.add(lines).items()}
        self._run.log(row)

    def close(self, summary: Record) -> None:
        """End the run; mark it as failed if it did not complete."""
        completed = summary.get("status") == "completed"
        self._run.summary.update({"status": summary.get("status"), "reason": summary.get("reason")})
        self._run.finish(exit_code=0 if completed else 1)
