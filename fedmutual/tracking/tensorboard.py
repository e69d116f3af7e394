"""TensorBoard: ``tensorboard --logdir outputs`` shows a run during training.

Event files are in ``<run>/tensorboard/``, one folder per client and one for the clients' mean, so that each
chart shows all curves. Written with the ``tensorboard`` package, without torch.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from fedmutual.settings import Settings, as_container
from fedmutual.tracking.tracker import LatestMeans, Record, figures

FOLDER, MEAN = "tensorboard", "mean"


class TensorBoard:
    """Event files of one run; on resume they are rewritten from the kept history."""

    def __init__(self, settings: Settings, folder: Path, history: Sequence[Record]) -> None:
        self._folder = folder / FOLDER
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writers: dict[str, EventFileWriter] = {}
        self._means = LatestMeans()
        text = OmegaConf.to_yaml(OmegaConf.create(as_container(settings)))
        self._write(MEAN, 0, [_text("settings", f"```yaml\n{text}\n```")])
        for number in sorted({int(line["round"]) for line in history}):
            self.log([line for line in history if line["round"] == number])

    def log(self, lines: Sequence[Record]) -> None:
        """Write and flush each client's figures and their mean."""
        for line in lines:
            self._scalars(str(line.get("client")), int(line["round"]), figures(line))
        means = self._means.add(lines)
        if means:
            self._scalars(MEAN, max(int(line["round"]) for line in lines), means)
        for writer in self._writers.values():
            writer.flush()

    def close(self, summary: Record) -> None:
        """Write the run's outcome and close the files."""
        outcome = f"{summary.get('status')} {summary.get('reason') or ''}".strip()
        self._write(MEAN, int(summary.get("rounds_completed") or 0), [_text("outcome", outcome)])
        for writer in self._writers.values():
            writer.close()

    def _scalars(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if values:
            self._write(name, step, [Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])

    def _write(self, name: str, step: int, values: list[Any]) -> None:
        folder = re.sub(r"[^A-Za-z0-9._-]", "_", name)  # names come from clients: sanitise them
        if folder not in self._writers:
            self._writers[folder] = EventFileWriter(str(self._folder / folder))
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writers[folder].add_event(event)


def _text(tag: str, text: str) -> Any:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
