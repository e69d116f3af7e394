"""Flower ServerApp of fedmutual."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmutual.logs import show_logs

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy chosen in the settings."""
    from fedmutual.engine.server import run

    show_logs()
    run(grid, context)
