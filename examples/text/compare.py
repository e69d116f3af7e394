"""The clients alone and together, over five splits of the sentences: ``python compare.py``."""

import logging
import tomllib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import ttest_rel
from textapp.client_app import app
from textapp.server_app import run_rounds

from fedmutual.simulation.inprocess import InProcessGrid

CLIENTS, SEEDS = 3, 5
PROJECT = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())
CONFIG: dict[str, Any] = PROJECT["tool"]["flwr"]["app"]["config"]


def play(kl_weight: float, seed: int, rounds: int) -> float:
    """The clients' mean accuracy after the last round. They learn in this process, in turn."""
    config = CONFIG | {"num-server-rounds": rounds, "kl-weight": kl_weight, "seed": seed}
    result = run_rounds(InProcessGrid(app, CLIENTS, config), config)
    return cast(float, result.evaluate_metrics_clientapp[rounds]["accuracy"])


def main(seeds: int = SEEDS, rounds: int = int(CONFIG["num-server-rounds"])) -> None:
    """Print a table."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    alone, together = (
        np.array([play(kl_weight, seed, rounds) for seed in range(seeds)]) for kl_weight in (0.0, 1.0)
    )
    low, high = ttest_rel(together, alone).confidence_interval(0.95)
    print(f"Mean accuracy of {CLIENTS} clients on {seeds} seeds.\n")
    print("| seed | alone | together | gain   |")
    print("|------|-------|----------|--------|")
    rows = [(str(seed), alone[seed], together[seed]) for seed in range(seeds)]
    for name, before, after in [*rows, ("mean", alone.mean(), together.mean())]:
        print(f"| {name:4} | {before:.3f} | {after:.3f}    | {after - before:+.3f} |")
    print(f"\nMean gain: 95% interval {low:+.3f} to {high:+.3f}.")


if __name__ == "__main__":
    main()
