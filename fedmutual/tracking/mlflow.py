"""MLflow: a run in the experiment ``tracking.project``, with settings as parameters and metrics per client.

Destination: ``tracking.mlflow_uri``, else the environment's ``MLFLOW_TRACKING_URI``, else a database in the
run's own folder (``mlflow ui --backend-store-uri sqlite:///<run>/mlflow.db``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from fedmutual.files.atomic import atomic_write
from fedmutual.settings import Settings, as_container
from fedmutual.settings.described import flat
from fedmutual.tracking.tracker import LatestMeans, Record, figures

DATABASE, RUN_ID = "mlflow.db", "mlflow-run-id.txt"
_STATUS = {"completed": "FINISHED", "stopped": "KILLED"}
_LONGEST_PARAMETER = 500  # characters, allowed in every store


class MLflow:
    """One MLflow run; a resumed run continues its MLflow run."""

    def __init__(self, settings: Settings, folder: Path, history: Sequence[Record]) -> None:
        uri = settings.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / DATABASE}")
        self._means = LatestMeans()
        known = folder / RUN_ID
        if history and known.exists():
            self._run = known.read_text().strip()
            self._means.add(history)
            self._client.update_run(self._run, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(settings.tracking.project)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(settings.tracking.project)
        )
        self._run = self._client.create_run(number, run_name=folder.name).info.run_id
        atomic_write(known, self._run.encode())
        values = flat(as_container(settings))
        parameters = [Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in values.items()]
        for start in range(0, len(parameters), 100):  # a store accepts 100 at a time
            self._client.log_batch(self._run, params=parameters[start : start + 100])
        self.log(history)

    def log(self, lines: Sequence[Record]) -> None:
        """Log clients' figures as ``<client>/<group>/<name>``, their means as ``mean/<group>/<name>``."""
        if not lines:
            return
        now = int(time.time() * 1000)
        metrics = [
            Metric(f"{line.get('client')}/{name}", value, now, int(line["round"]))
            for line in lines
            for name, value in figures(line).items()
        ]
        last = max(int(line["round"]) for line in lines)
        metrics += [
            Metric(f"mean/{name}", value, now, last) for name, value in self._means.add(lines).items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])

    def close(self, summary: Record) -> None:
        """End the run with its status."""
        self._client.set_tag(self._run, "reason", str(summary.get("reason") or ""))
        self._client.set_terminated(self._run, _STATUS.get(str(summary.get("status")), "FAILED"))
