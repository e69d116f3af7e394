"""A server that refuses its run and leaves neither history nor summary."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmutual.settings.compose import from_contexts

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Say what of the run's settings it does not like."""
    raise ValueError(f"seed {from_contexts(context.run_config).seed} is refused")
