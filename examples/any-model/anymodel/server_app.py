"""The server."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

import fedmutual

from .data import CLASSES, PUBLIC

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    run_rounds(grid, context.run_config)


def run_rounds(grid: Grid, config: Mapping[str, Any]) -> Result:
    """Run the rounds; the result has each model's accuracy in each round."""
    strategy = fedmutual.MutualLearning(
        num_samples=PUBLIC,
        num_classes=CLASSES,
        consensus="confidence",
        kl_weight=float(config["kl-weight"]),
        evaluate_metrics_aggr_fn=by_name,
    )
    return strategy.start(
        grid=grid, initial_arrays=ArrayRecord(), num_rounds=int(config["num-server-rounds"])
    )


def by_name(records: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The mean of each metric over the clients that report it: one number for each kind of model."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.metric_records["metrics"].items():
            if name != weighted_by_key:
                values[name].append(cast(float, value))
    return MetricRecord({name: sum(found) / len(found) for name, found in values.items()})
