"""From the command line's overrides to what is handed to ``flwr run``: checked, absolute, quoted."""

from __future__ import annotations

import datetime
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from fedmutual.data.cache import cache_folder
from fedmutual.files.disk import WriteError
from fedmutual.models.arguments import arguments_problem
from fedmutual.models.lookup import models_problem
from fedmutual.results.directory import OVERRIDES, ResultsError, saved_overrides
from fedmutual.results.hold import held_by_command
from fedmutual.settings import DataSettings, Settings, SettingsError
from fedmutual.settings.clients import unknown_clients
from fedmutual.settings.compose import compose, model_overrides, without_model
from fedmutual.settings.pretrained import pretrained_settings
from fedmutual.tracking.tracker import missing_logger

DEFAULT_CLIENTS = 5
VISIONNET = ("visionnet", "fedmutual.models.visionnet.VisionNet")
VISIONNET_SIDE = 18  # pixels a side that its convolutions and poolings leave something of
PATH_KEYS = ("data.root", "state_dir", "cache_dir", "resume", "output_dir")
Count = Callable[[DataSettings], tuple[int, int | None] | None]


@dataclass(frozen=True)
class RunRequest:
    """One checked simulation: what to hand to Flower and where its results go."""

    settings: Settings
    overrides: tuple[str, ...]
    output_dir: Path
    num_clients: int
    at_once: int  # clients that learn at the same time
    client_gpus: float

    @property
    def federation_config(self) -> str:
        """The value of ``flwr run --federation-config``."""
        cpus = self.settings.simulation.client_cpus
        return (
            f"num-supernodes={self.num_clients} client-resources-num-cpus={cpus} "
            f"client-resources-num-gpus={self.client_gpus} init-args-num-cpus={self.at_once * cpus}"
        )

    @property
    def run_config(self) -> str:
        """The TOML text of ``flwr run --run-config``: everything travels in the one key ``overrides``."""
        return f"overrides = {toml_string(shlex.join(self.overrides))}\n"


def count_images(data: DataSettings) -> tuple[int, int | None] | None:
    """Count what a run will have; see :meth:`fedmutual.settings.DataSettings.count`."""
    return data.count()


def prepare(
    overrides: Sequence[str], cwd: Path, now: datetime.datetime | None = None, count: Count = count_images
) -> RunRequest:
    """Check the settings of a simulation and complete them.

    Paths are made absolute (an app's working directory is not the caller's), the number of clients and
    the results' folder are filled in. Nothing is written and nothing is started.

    Parameters
    ----------
    overrides : Sequence[str]
        Hydra overrides as typed.
    cwd : Path
        Absolute; relative paths in the settings start here.
    now : datetime.datetime | None
        Names the default results' folder.
    count : Callable[[DataSettings], tuple[int, int | None] | None]
        Counts the images; to prepare many runs, one that remembers.

    Raises
    ------
    SettingsError
        With the key's name: unknown, of the wrong type, out of range, a model that does not exist,
        settings that do not fit each other, a results' folder that already holds a run.
    """
    typed = [_expand_user(override) for override in overrides]
    settings = compose(typed)
    if settings.resume is not None:  # with the settings it was started with
        resumed = _absolute(settings.resume, cwd)
        typed = [*_saved(resumed), *typed]
        settings = compose(typed)
    num_clients = settings.num_clients or DEFAULT_CLIENTS
    problem = models_problem(settings.model) or arguments_problem(settings.model)
    problem = problem or _misfit(settings, num_clients) or missing_logger(settings)
    problem = problem or _weights_problem(typed, settings)
    if problem:
        raise SettingsError(problem)
    output_dir = _output_dir(settings, cwd, now or datetime.datetime.now())
    _require_writable("output_dir", output_dir)
    cache_dir = None if settings.cache_dir is None else str(_absolute(settings.cache_dir, cwd))
    _require_writable("cache_dir", cache_folder(cache_dir))
    own = {"output_dir": str(output_dir), "state_dir": str(output_dir / "clients")}
    paths = {**own, **_absolute_paths(settings, cwd)}
    completed = [*typed, *(hydra_override(key, value) for key, value in paths.items())]
    if settings.num_clients is None:
        completed.append(f"num_clients={num_clients}")
    at_once = min(num_clients, max(1, available_cores() // settings.simulation.client_cpus))
    gpus = _client_gpus(settings, at_once, os.environ)
    settings = compose(completed)
    problem = _data_problem(settings, num_clients, count)
    if problem:
        raise SettingsError(problem)
    return RunRequest(settings, tuple(completed), output_dir, num_clients, at_once, gpus)


@contextmanager
def held(output_dir: Path) -> Iterator[None]:
    """Hold the results folder for a command that starts a run in it.

    Raises
    ------
    SettingsError
        Another run holds it, or it cannot be made.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held_by_command(output_dir))
        except (ResultsError, WriteError) as error:
            raise SettingsError(f"output_dir: {error}") from error
        yield


def hydra_override(key: str, value: str) -> str:
    """Write ``key=value`` so that Hydra reads the value as that very string."""
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def toml_string(text: str) -> str:
    """Quote text as a TOML basic string (JSON's escapes are TOML's, except for DEL)."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _misfit(settings: Settings, num_clients: int) -> str | None:
    """Say which setting does not fit another, key first; the clients would find out only when they start."""
    unknown = unknown_clients(settings, [f"client-{i}" for i in range(num_clients)])
    if unknown:
        return unknown
    models, size = settings.model.per_client, settings.data.image_size
    if len(models) > num_clients:
        return f"model.per_client: {len(models)} models for {num_clients} clients (num_clients)"
    if size < VISIONNET_SIDE and set(models or [settings.model.target]) & set(VISIONNET):
        return f"data.image_size: {size} is below {VISIONNET_SIDE}, the least that model=visionnet takes"
    patch = settings.model.arguments.get("patch_size")
    if isinstance(patch, int) and patch > 0 and size % patch:
        return f"data.image_size: {size} is no multiple of model.patch_size={patch}"
    weights = getattr(settings.partition, "weights", [])
    if len(weights) not in (0, num_clients):
        return (
            f"partition.weights: {len(weights)} weights for {num_clients} clients (num_clients); "
            "give one a client, or none"
        )
    return None


def _weights_problem(typed: Sequence[str], settings: Settings) -> str | None:
    """Say which backbone's weights cannot be reached; what can be fetched is fetched now."""
    from fedmutual.backbones.weights import WeightsError, find_backbone

    own = settings.model.per_client
    models = [compose([*without_model(typed), *model_overrides(name)]).model for name in own]
    for model in models or [settings.model]:
        chosen = pretrained_settings(model)
        try:
            if chosen is not None:
                find_backbone(chosen, fetch=True)
        except WeightsError as error:
            return str(error)
    return None


def _data_problem(settings: Settings, num_clients: int, count: Count) -> str | None:
    """Say why the data cannot be divided as asked, as far as that is known without reading an image."""
    from fedmutual.data.images import DataError
    from fedmutual.data.partition import Stream, require_shares
    from fedmutual.data.public import drawn_size
    from fedmutual.data.stream import num_folds

    try:
        counted = count(settings.data)
        if counted is None:
            return None
        pool, public = counted
        if isinstance(settings.partition, Stream):
            num_folds(pool, num_clients, settings.rounds)
        else:
            private = pool - drawn_size(pool, settings.public) if public is None else pool
            require_shares(private, 1 if settings.strategy.whole_pool else num_clients)
    except DataError as error:
        return str(error)
    return None


def _expand_user(override: str) -> str:
    """``data.root=~/photos``: the shell leaves a tilde within a word alone."""
    key, _, value = override.partition("=")
    if key.lstrip("+") in PATH_KEYS and value.startswith("~"):
        return hydra_override(key, str(Path(value).expanduser()))
    return override


def _saved(resumed: Path) -> list[str]:
    try:
        return _at_home(saved_overrides(resumed), resumed)
    except ResultsError as error:
        raise SettingsError(f"resume: {error}") from error
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"resume: {resumed / OVERRIDES} is damaged: {reason}") from error


def _at_home(saved: Sequence[str], folder: Path) -> list[str]:
    """An earlier run's overrides without the folder it had then: it may have been moved, or be a link.

    The clients' states move along where they lay in it.
    """
    parsed = OverridesParser.create().parse_overrides(list(saved))
    own = ("output_dir", "state_dir")
    kept = [text for text, override in zip(saved, parsed, strict=True) if override.key_or_group not in own]
    # the last one of a key holds; `fedmutual run` has made it absolute
    before, states = (
        next((o.value() for o in reversed(parsed) if o.key_or_group == key), None) for key in own
    )
    if states is not None:
        place = Path(str(states))
        if before is not None and place.is_relative_to(str(before)):
            place = folder / place.relative_to(str(before))
        kept.append(hydra_override("state_dir", str(place)))
    return kept


def _absolute_paths(settings: Settings, cwd: Path) -> dict[str, str]:
    paths = {}
    for key in PATH_KEYS[:-1]:
        holder, _, name = key.rpartition(".")
        value = getattr(getattr(settings, holder) if holder else settings, name, None)
        if value is not None:
            paths[key] = str(_absolute(value, cwd))
    backbone = settings.model.arguments.get("backbone")
    if pretrained_settings(settings.model) is not None and (cwd / str(backbone)).is_file():
        paths["model.backbone"] = str(_absolute(backbone, cwd))
    dataset = getattr(settings.data, "dataset", None)
    if dataset is not None and (cwd / dataset).exists():  # else a name on the Hugging Face hub
        paths["data.dataset"] = str(_absolute(dataset, cwd))
    return paths


def _output_dir(settings: Settings, cwd: Path, now: datetime.datetime) -> Path:
    """The chosen folder, the resumed run's own, or ``outputs/<date>/<time>-<strategy>``."""
    chosen = _absolute(settings.output_dir, cwd) if settings.output_dir is not None else None
    if settings.resume is not None:
        resumed = _absolute(settings.resume, cwd)
        if not resumed.is_dir():
            raise SettingsError(f"resume: {resumed} is no folder; give the results' folder of an earlier run")
        if chosen not in (None, resumed):
            raise SettingsError(
                f"output_dir: a resumed run goes on in its own folder {resumed}; leave it out"
            )
        return resumed
    if chosen is not None:
        if (chosen / "history.jsonl").exists() or (chosen / "summary.json").exists():
            raise SettingsError(
                f"output_dir: {chosen} already holds a run; choose another folder, "
                f"or continue that run with resume={chosen}"
            )
        return chosen
    base = cwd / "outputs" / f"{now:%Y-%m-%d}"
    name = f"{now:%H-%M-%S}-{settings.strategy.name}"
    candidates = (base / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(candidate for candidate in candidates if not candidate.exists())


def _require_writable(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, as far as that is known without making it."""
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not above.is_dir():
        raise SettingsError(f"{key}: {folder} cannot be made: {above} is a file; set {key}=DIR")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SettingsError(
            f"{key}: {folder} cannot be made: {above} is not writable; set {key}=DIR to another folder"
        )


def _absolute(path: str, cwd: Path) -> Path:
    return Path(os.path.abspath(cwd / Path(path).expanduser()))


def _client_gpus(settings: Settings, at_once: int, environment: Mapping[str, str]) -> float:
    """A client's share of a GPU: as set, or an equal share of those there are.

    Ray hides every GPU from a client whose share is 0, so that ``device=auto`` would quietly mean the CPU.
    """
    if settings.simulation.client_gpus > 0 or settings.device == "cpu":
        return settings.simulation.client_gpus
    gpus = _visible_gpus(environment)
    if gpus == 0:
        return 0.0
    share = gpus / at_once
    return float(math.floor(share)) if share >= 1 else math.floor(share * 1000) / 1000


def _visible_gpus(environment: Mapping[str, str]) -> int:
    present = len(
        [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
