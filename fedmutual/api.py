"""The application from Python: do a run, read what it left, predict with its models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from fedmutual.models.stored import StoredModel
    from fedmutual.simulation.request import RunRequest

ENGINES = ("in-process", "flower")


class RunError(RuntimeError):
    """A run failed; the message has its reason and its folder."""


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes
    ----------
    path : Path
        Its results folder.
    """

    path: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: final figures, traffic, versions, warnings.

        Raises
        ------
        RunError
            If the run is not over, or the file is damaged.
        """
        from fedmutual.results.directory import ResultsError, read_summary

        try:
            found = read_summary(self.path)
        except ResultsError as error:
            raise RunError(str(error)) from error
        if found is None:
            raise RunError(f"{self.path} has no summary.json: the run is not over, or this is no run")
        return found

    @cached_property
    def history(self) -> pd.DataFrame:
        """``history.jsonl``: a row a round and client, a column a measurement."""
        import pandas as pd

        from fedmutual.results.directory import read_history

        return pd.DataFrame(read_history(self.path))

    @cached_property
    def models(self) -> Mapping[str, StoredModel]:
        """The clients' models by name, on the CPU in evaluation mode; else the global one."""
        from fedmutual.models.stored import find_models, load_model

        found = [load_model(folder) for folder in find_models(self.path)]
        return {stored.name: stored for stored in found}

    def predict(self, images: Any) -> NDArray[np.floating]:
        """Predict images with all of the run's models together.

        Parameters
        ----------
        images : path, sequence of paths, or uint8 array [n, H, W, 3]
            A folder is searched for pictures, in order of their names. Every picture is decoded and resized
            as in training.

        Returns
        -------
        float array [n, C]
            Probabilities of the mean-logit ensemble; classes in the order of ``StoredModel.classes``.

        Raises
        ------
        ValueError
            If a picture cannot be read; its name and the reason are in the message.
        """
        from fedmutual.inference.predict import predict_images

        return predict_images(list(self.models.values()), images)


def run(
    overrides: Sequence[str] | str = (),
    *,
    data: Any = None,
    engine: str = "in-process",
    verbose: bool = False,
) -> Run:
    """Simulate a federation, as ``fedmutual run`` does.

    Parameters
    ----------
    overrides : sequence of str, or str
        Hydra overrides, such as ``["strategy=fedavg", "rounds=3"]`` or ``"strategy=fedavg rounds=3"``.
    data : mapping or object
        Torch data sets of all clients, which ``partition`` deals out: ``train``, optionally ``public`` and
        ``test``, and ``classes`` unless ``train`` has them (see
        :class:`fedmutual.data.custom.CustomSettings`). None: what the overrides say. Only in-process.
    engine : str
        ``in-process``: all clients learn in this process, one after the other; ``flower``: a SuperLink and
        Flower's simulation, as the command starts them. Equal seeds give equal models.
    verbose : bool
        Show the log of the server and the clients.

    Returns
    -------
    Run

    Raises
    ------
    SettingsError
        A setting is refused; nothing was started.
    RunError
        The run failed.
    """
    import shlex

    from fedmutual.data.given import given
    from fedmutual.simulation.request import prepare

    if engine not in ENGINES:
        raise ValueError(f"engine: {engine!r} is none of {', '.join(ENGINES)}")
    typed = (
        shlex.split(overrides) if isinstance(overrides, str) else [str(override) for override in overrides]
    )
    if data is not None and engine != "in-process":
        raise ValueError(
            "data: objects stay in this process; for engine='flower' name a function that returns them with "
            "data=custom data._target_=..."
        )
    with given(data) as taking:
        request = prepare([*taking, *typed], Path.cwd())
        status = _with_flower(request, verbose) if engine == "flower" else _in_process(request, verbose)
    done = Run(request.output_dir)
    if status != 0:
        raise RunError(f"{done.path}: {done.summary.get('reason') or 'the run failed'}")
    return done


def _with_flower(request: RunRequest, verbose: bool) -> int:
    from rich.console import Console

    from fedmutual.appfolder import app_folder
    from fedmutual.simulation.run import LocalRun

    return LocalRun(request, app_folder(), Console(quiet=not verbose), verbose).run()


def _in_process(request: RunRequest, verbose: bool) -> int:
    from fedmutual.simulation.inprocess import carry_out

    logger = logging.getLogger("fedmutual")
    before = logger.level
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    try:
        return carry_out(request)
    finally:
        logger.setLevel(before)


def load_model(folder: str | PathLike[str]) -> StoredModel:
    """Rebuild a client's model, or a run's global model, from its folder.

    Raises
    ------
    StoredModelError
        A file is missing or damaged, or the weights are another architecture's.
    """
    from fedmutual.models.stored import load_model as load

    return load(Path(fspath(folder)))
