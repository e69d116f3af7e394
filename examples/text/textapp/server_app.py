"""The server, which knows how many public sentences there are, and not what they say."""

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

import fedmutual

from .texts import CHAPTERS, load_texts

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    run_rounds(grid, context.run_config)


def run_rounds(grid: Grid, config: Mapping[str, Any]) -> Result:
    """Run the rounds; the result has the clients' mean accuracy in each round."""
    _, public, _ = load_texts(0, 1, 1.0, int(config["seed"]))
    strategy = fedmutual.MutualLearning(
        num_samples=len(public.labels),
        num_classes=len(CHAPTERS),
        consensus="confidence",
        kl_weight=float(config["kl-weight"]),
    )
    return strategy.start(
        grid=grid, initial_arrays=ArrayRecord(), num_rounds=int(config["num-server-rounds"])
    )
