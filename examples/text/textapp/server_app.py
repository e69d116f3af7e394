"""The server, which knows how many public sentences there are, and not what they say."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

import fedmutual

from .texts import CHAPTERS, load_texts

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config = context.run_config
    _, public, _ = load_texts(0, 1, 1.0, int(config["seed"]))
    strategy = fedmutual.MutualLearning(
        num_samples=len(public.labels),
        num_classes=len(CHAPTERS),
        consensus="confidence",
        kl_weight=float(config["kl-weight"]),
    )
    strategy.start(grid=grid, initial_arrays=ArrayRecord(), num_rounds=int(config["num-server-rounds"]))
