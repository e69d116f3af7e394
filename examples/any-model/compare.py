"""Each model alone and together with its peers, over five splits of the data: ``python compare.py``."""

import logging
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anymodel.client_app import app
from anymodel.server_app import run_rounds
from scipy.stats import ttest_rel

from fedmutual.simulation.inprocess import InProcessGrid

CLIENTS, SEEDS = 3, 5
PROJECT = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())
CONFIG: dict[str, Any] = PROJECT["tool"]["flwr"]["app"]["config"]


def play(kl_weight: float, seed: int, rounds: int) -> dict[str, float]:
    """Accuracies after the last round, by model. All clients learn in this process, in turn."""
    config = CONFIG | {"num-server-rounds": rounds, "kl-weight": kl_weight, "seed": seed}
    result = run_rounds(InProcessGrid(app, CLIENTS, config), config)
    last = result.evaluate_metrics_clientapp[rounds]
    return {name: value for name, value in last.items() if isinstance(value, float)}


def main(seeds: int = SEEDS, rounds: int = int(CONFIG["num-server-rounds"])) -> None:
    """Print a table."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    alone = [play(0.0, seed, rounds) for seed in range(seeds)]
    together = [play(1.0, seed, rounds) for seed in range(seeds)]
    print(f"Accuracy, mean of {seeds} seeds; the interval is that of the paired gain.\n")
    print("| model         | alone | together | gain   | 95% interval     |")
    print("|---------------|-------|----------|--------|------------------|")
    for name in alone[0]:
        before, after = np.array([a[name] for a in alone]), np.array([t[name] for t in together])
        low, high = ttest_rel(after, before).confidence_interval(0.95)
        gain = (after - before).mean()
        figures = f"{before.mean():.3f} | {after.mean():.3f}    | {gain:+.3f} | {low:+.3f} to {high:+.3f} |"
        print(f"| {name:13} | {figures}")


if __name__ == "__main__":
    main()
