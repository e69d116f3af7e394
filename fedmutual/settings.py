"""Typed settings: the dataclasses are the schema, ``conf/`` holds every value.

``compose`` turns a list of Hydra overrides into a checked :class:`Settings`; ``from_contexts`` does the
same from what Flower hands to an app. A misspelt key, a wrong type or a value out of range raises
:class:`SettingsError` with the key's full name before anything starts.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedmutual.appfolder import app_folder

if TYPE_CHECKING:  # only what reads its settings imports torch or Flower
    from flwr.app import RecordDict
    from torch import Tensor

    from fedmutual.data.site import SharedData
    from fedmutual.learner import Answer, Learner
    from fedmutual.messages import Report
    from fedmutual.results import RunDirectory
    from fedmutual.strategies.interface import RunnableStrategy

CONF_DIR = app_folder() / "conf"

# Keys of `[tool.flwr.app.config]` that choose a Hydra group; an empty string means "as in conf/".
GROUP_KEYS = ("experiment", "strategy", "model", "data", "partition", "public", "optimizer")
PLAIN_KEYS = ("seed", "rounds", "output_dir")

_HYDRA_LOCK = threading.Lock()  # GlobalHydra is a process-wide singleton


class SettingsError(ValueError):
    """A setting is unknown, has the wrong type or is out of range; the message names its key."""


def setting(
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare a setting: what it means and which values it takes. Its value lives in ``conf/``."""
    return field(
        metadata={
            "help": help,
            "choices": tuple(choices),
            "minimum": minimum,
            "maximum": maximum,
            "above": above,
        }
    )


@dataclass(kw_only=True)
class TrainSettings:
    """Local training of one client."""

    local_epochs: int = setting("passes over the private training images a round", minimum=1)
    batch_size: int = setting("images a step", minimum=1)
    validation_fraction: float = setting(
        "share of the private images held out to validate", minimum=0, maximum=0.9
    )
    prior_correction: bool = setting(
        "train on logits + log(own class prior), share and predict plain logits (arXiv:2007.07314)"
    )
    recompute_norm: bool = setting(
        "before predicting, measure the statistics of batch normalisation anew (arXiv:2105.07576)"
    )
    common_start: bool = setting(
        "every client of one architecture starts from the same seeded initial weights"
    )
    warm_start_epochs: int = setting(
        "epochs on the shared labelled warm-start fold before round 1", minimum=0
    )


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimiser of local training."""

    name: str = setting("optimiser", choices=("adam", "adamw", "sgd"))
    learning_rate: float = setting("step size", above=0)
    schedule: str = setting(
        "constant; cosine: from learning_rate in the first round down to a tenth of it in the last",
        choices=("constant", "cosine"),
    )
    momentum: float = setting("momentum (sgd)", minimum=0, maximum=1)
    weight_decay: float = setting("weight decay", minimum=0)
    keep_state: bool = setting("keep the optimiser's moments from round to round")


@dataclass(kw_only=True)
class PublicSettings:
    """The public images that every client predicts."""

    schedule: str = setting(
        "static: the whole public set every round; kfold: a fresh class-stratified fold a round; "
        "sample: a fresh seeded random subset a round",
        choices=("static", "kfold", "sample"),
    )
    size: int | None = setting(
        "images drawn from the pool; null: 15 % of it, or all of the data's own", minimum=1
    )
    per_round: int | None = setting(
        "images a round for schedule=sample; null: a quarter of the set", minimum=1
    )
    labelled: bool = setting("the public labels are known and trained on")
    distribute: bool = setting("the server sends the public images to sites that lack them, once")

    def check(self) -> str | None:
        """The size of a sample means something for samples only."""
        if self.per_round is not None and self.schedule != "sample":
            return f"per_round: {self.per_round}, but schedule={self.schedule}: use public=sample"
        return None


@dataclass(kw_only=True)
class EvaluationSettings:
    """What is measured on the unseen set besides the final evaluation, which always sees all of it."""

    unseen_every: int = setting("evaluate the unseen set every n rounds; 0: only at the end", minimum=0)
    unseen_limit: int | None = setting("images of it used before the end (seeded); null: all", minimum=1)
    batch_size: int = setting("images a forward pass", minimum=1)


@dataclass(kw_only=True)
class ExchangeSettings:
    """Sending orders and collecting reports."""

    min_clients: int | None = setting(
        "reports that a round needs; null: half of the clients, at least one", minimum=1
    )
    enough_clients: int | None = setting(
        "reports with which a round goes on without waiting for the others, which join again when they have "
        "answered; null: wait for all",
        minimum=1,
    )
    join_timeout: float = setting("seconds to wait for the clients to connect", above=0)
    round_timeout: float = setting("seconds after which a round goes on with the reports it has", above=0)
    return_timeout: float = setting(
        "seconds that a round waits for a client whose process or SuperNode died, to send its order again; "
        "0: it is out for that round",
        minimum=0,
    )
    poll_interval: float = setting("seconds between two looks for reports", above=0)

    def check(self) -> str | None:
        """A round cannot go on with fewer reports than it needs."""
        if self.enough_clients is not None and self.enough_clients < (self.min_clients or 1):
            return (
                f"enough_clients: {self.enough_clients} is below exchange.min_clients={self.min_clients}: "
                "raise it, or set it to null"
            )
        return None


@dataclass(kw_only=True)
class TrackingSettings:
    """Loggers that follow the run at the server, besides the results' folder."""

    loggers: list[str] = setting("any of tensorboard, mlflow, wandb; []: none")
    project: str = setting(
        "MLflow's experiment, and the project at Weights & Biases, that runs are listed in"
    )
    mlflow_uri: str | None = setting(
        "MLflow's tracking server; null: the environment's MLFLOW_TRACKING_URI, else mlflow.db in the results"
    )
    wandb_mode: str = setting(
        "offline: files in the results, for `wandb sync`; online: sends the figures to its server",
        choices=("offline", "online", "disabled"),
    )

    def check(self) -> str | None:
        """A logger that there is not is refused; whether it is installed, only the server can tell."""
        known = ("tensorboard", "mlflow", "wandb")
        for name in self.loggers:
            if name not in known:
                return f"loggers: {name!r} is none of {', '.join(known)}"
        return None


@dataclass(kw_only=True)
class SimulationSettings:
    """Resources of a simulated client (``fedmutual run``)."""

    client_cpus: int = setting("CPU threads a client; as many clients run at once as fit", minimum=1)
    client_gpus: float = setting("share of a GPU a client", minimum=0)


@dataclass(kw_only=True)
class StrategySettings:
    """Base of every strategy's settings; ``_target_`` in ``conf/strategy/*.yaml`` names the subclass."""

    name: str = setting("name in results and plots")
    whole_pool: ClassVar[bool] = False  # a client gets the private images of all

    def misfit(self, settings: Settings) -> str | None:
        """Say which other setting this strategy cannot run with, key first; None: they go together."""
        return None

    def build(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> RunnableStrategy:
        """Make the strategy of a run: the server's side."""
        raise NotImplementedError

    def learn(self, learner: Learner) -> Answer:
        """Do what the learner's order asks: the client's side."""
        raise NotImplementedError

    def pack(self, report: Report, weights: Mapping[str, Tensor]) -> RecordDict:
        """Turn a client's report, and the weights that it has after it, into what travels."""
        raise NotImplementedError


@dataclass(kw_only=True)
class DataSettings:
    """Base of every data source's settings; ``_target_`` in ``conf/data/*.yaml`` names the subclass."""

    image_size: int = setting("images are resized to this many pixels a side", minimum=8)


@dataclass(kw_only=True)
class PartitionSettings:
    """Base of every partition's settings; ``_target_`` in ``conf/partition/*.yaml`` names the subclass."""


@dataclass(kw_only=True)
class ModelSettings:
    """The client's model: ``target(**arguments)``, its head fitted to the number of classes."""

    target: str
    arguments: dict[str, Any]
    per_client: list[str]


@dataclass(kw_only=True)
class Settings:
    """Everything a run depends on."""

    experiment_name: str | None = setting("name of the experiment overlay")
    seed: int = setting("seed of everything random", minimum=0)
    rounds: int = setting("rounds of learning", minimum=1)
    num_clients: int | None = setting(
        "clients to wait for; null: all that are connected (`fedmutual run` then starts 5)", minimum=1
    )
    output_dir: str | None = setting(
        "folder of this run's results, absolute; null: in the user's data folder"
    )
    state_dir: str | None = setting(
        "folder of the clients' states, absolute; null: in the user's data folder "
        "(`fedmutual run`: <output_dir>/clients)"
    )
    cache_dir: str | None = setting("folder of decoded images, absolute; null: in the user's cache folder")
    resume: str | None = setting("results folder of an interrupted run to continue, absolute")
    device: str = setting("auto, cpu, mps, cuda or cuda:<n>")
    precision: str = setting("arithmetic of training", choices=("fp32", "bf16", "fp16"))
    deterministic: bool = setting(
        "deterministic algorithms where torch has them: equal seeds give equal bits on one machine"
    )
    train: TrainSettings
    optimizer: OptimizerSettings
    public: PublicSettings
    evaluation: EvaluationSettings
    exchange: ExchangeSettings
    tracking: TrackingSettings
    simulation: SimulationSettings
    strategy: Any
    data: Any
    partition: Any
    model: Any

    def check(self) -> str | None:
        """A device that torch cannot name is refused; whether it is there, only the node can tell."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            return f"device: {self.device!r} is none of auto, cpu, mps, cuda, cuda:<n>"
        strategy: StrategySettings = self.strategy
        return strategy.misfit(self)


ConfigStore.instance().store(name="schema", node=Settings)


def compose(overrides: Sequence[str] = (), node_config: Mapping[str, Any] | None = None) -> Settings:
    """Resolve Hydra overrides (and a node's own configuration, which wins) into checked settings.

    Parameters
    ----------
    overrides : Sequence[str]
        Hydra overrides, such as ``["partition=dirichlet", "partition.alpha=0.3"]``.
    node_config : Mapping[str, Any] | None
        A SuperNode's ``--node-config``; ``data-dir``, ``state-dir``, ``cache-dir``, ``device`` and ``model``
        are settings.

    Raises
    ------
    SettingsError
        With the full name of the key and what it takes.
    """
    node = tuple(sorted((k, str(v)) for k, v in (node_config or {}).items() if k in _NODE_KEYS))
    return _compose(tuple(overrides), node)


def from_contexts(run_config: Mapping[str, Any], node_config: Mapping[str, Any] | None = None) -> Settings:
    """Compose the settings of a Flower run from ``context.run_config`` and ``context.node_config``.

    Raises
    ------
    SettingsError
        As :func:`compose`, and for a relative path.
    """
    settings = compose(run_config_overrides(run_config), node_config)
    for key in ("output_dir", "state_dir", "cache_dir", "resume"):
        value = getattr(settings, key)
        if value is not None and not Path(value).is_absolute():
            raise SettingsError(
                f"{key}: {value!r} is relative, but an app has its own working folder: make it absolute"
            )
    return settings


def run_config_overrides(run_config: Mapping[str, Any]) -> list[str]:
    """Translate ``[tool.flwr.app.config]`` values into Hydra overrides; ``overrides`` comes last and wins."""
    chosen = [f"{key}={run_config[key]}" for key in GROUP_KEYS + PLAIN_KEYS if run_config.get(key, "") != ""]
    try:
        return chosen + shlex.split(str(run_config.get("overrides", "")))
    except ValueError as error:
        raise SettingsError(f"overrides: {error}: {run_config['overrides']!r}") from error


def as_container(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain nested dicts, the form that is saved with every run."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(settings)))


_NODE_KEYS = {
    "data-dir": "data",
    "state-dir": "state_dir",
    "cache-dir": "cache_dir",
    "device": "device",
    "model": "model",
}
FOLDER_KEYS = ("root", "dataset")  # of a data source that reads a folder: what a node's data-dir sets


@functools.lru_cache(maxsize=64)
def _compose(overrides: tuple[str, ...], node: tuple[tuple[str, str], ...]) -> Settings:
    return _checked(composed(*effective_overrides(overrides, dict(node)), dict(node)))


def effective_overrides(
    overrides: Sequence[str], node_config: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return the run's overrides that a node leaves standing, and the node's own."""
    node = {key: str(node_config[key]) for key in sorted(_NODE_KEYS) if key in node_config}
    own = [
        f"{_NODE_KEYS[key]}={QuotedString(value, Quote.single).with_quotes()}"
        for key, value in node.items()
        if key not in ("model", "data-dir")
    ]
    kept = list(overrides)
    if "model" in node:  # the run's arguments belong to the run's model
        kept = [o for o in overrides if not re.match(r"[+~]*model([.=]|$)", o)]
        own += model_overrides(node["model"])
    return kept, own


def composed(run: Sequence[str], own: Sequence[str], node_config: Mapping[str, Any]) -> DictConfig:
    """Compose ``conf/`` and overrides, the keys as they are typed and the values not yet checked.

    Parameters
    ----------
    run, own : Sequence[str]
        From :func:`effective_overrides`.
    node_config : Mapping[str, Any]
        A node's configuration, for its ``data-dir``.

    Raises
    ------
    SettingsError
        For what Hydra refuses.
    """
    if not CONF_DIR.is_dir():
        raise SettingsError(f"{CONF_DIR} is missing: the app was packed without conf/**/*.yaml")
    try:
        with hydra_on_conf():
            config = hydra_compose(config_name="config", overrides=[*run, *own])
        OmegaConf.resolve(config)
        if "data-dir" in node_config:
            _set_folder(config.data, str(node_config["data-dir"]))
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(_explain(error)) from error
    except SettingsError:
        raise
    except ValueError as error:  # Hydra's, for a group that is set to null or a number
        raise SettingsError(f"{' '.join([*run, *own])}: {error}") from error
    return config


@contextmanager
def hydra_on_conf() -> Iterator[None]:
    """Let Hydra read ``conf/`` while the block runs; one block at a time."""
    with _HYDRA_LOCK:
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            yield


def _set_folder(data: DictConfig, folder: str) -> None:
    key = next((name for name in FOLDER_KEYS if name in data), None)
    if key is None:
        raise SettingsError("data-dir: this run's data source reads no folder; run it with data=folder")
    data[key] = folder


def model_overrides(name: str) -> list[str]:
    """Overrides that select a model by the name of its ``conf/model`` file or by its dotted path."""
    return ["model=custom", f"model._target_={name}"] if "." in name else [f"model={name}"]


def _explain(error: Exception) -> str:
    """The first lines of a Hydra error say what is wrong; the cause below it names the key."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}: {option!r} is none of {', '.join(error.options or ())}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    key = getattr(cause or error, "full_key", None)
    text = " ".join(line.strip() for line in str(cause or error).splitlines()[:1])
    head = str(error).splitlines()[0]
    if "Key 'study' not in 'Settings'" in str(error):
        return f"experiment: {head.split(chr(39))[1]} is a study of several runs: use `fedmutual compare`"
    return f"{key}: {text}" if key and key not in text else f"{head}: {text}" if cause else head


def _checked(config: DictConfig) -> Settings:
    groups = {"strategy": StrategySettings, "data": DataSettings, "partition": PartitionSettings}
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise SettingsError(f"{missing[0]}: needs a value")
    _check_keys("", config, Settings)
    values: dict[str, Any] = {}
    for entry in fields(Settings):
        node = config[entry.name]
        if is_dataclass(entry_type := OmegaConf.get_type(node)):
            _check_keys(f"{entry.name}.", node, entry_type)
        if entry.name == "model":
            values[entry.name] = _model_settings(node)
        elif entry.name in groups:
            values[entry.name] = _typed(entry.name, node, groups[entry.name])
        else:
            values[entry.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
    settings = Settings(**values)
    _check_values("", settings)
    return settings


def _check_keys(prefix: str, node: DictConfig, schema: type) -> None:
    """Hydra lets ``+key=1`` and ``~key`` past the schema."""
    expected = {entry.name for entry in fields(schema)}
    for key in sorted(expected ^ {str(key) for key in node}):
        raise SettingsError(f"{prefix}{key}: {'needs a value' if key in expected else 'no such setting'}")


def _typed(group: str, node: DictConfig, base: type) -> Any:
    """Merge a group's values into the dataclass that its ``_target_`` names; wrong types are refused."""
    values = cast(dict[str, Any], OmegaConf.to_container(node))
    target = str(values.pop("_target_", ""))
    try:
        schema = get_class(target)
    except Exception as error:
        raise SettingsError(f"{group}._target_: no class {target!r}: {error}") from error
    if not (is_dataclass(schema) and issubclass(schema, base)):
        raise SettingsError(f"{group}._target_: {target} is no {base.__name__}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise SettingsError(f"{group}.{error.full_key}: {str(error).splitlines()[0]}") from error


def _model_settings(node: DictConfig) -> ModelSettings:
    values = cast(dict[str, Any], OmegaConf.to_container(node))
    target, per_client = values.pop("_target_", None), values.pop("per_client", None)
    if not isinstance(target, str) or "." not in target:
        raise SettingsError(f"model._target_: {target!r} is no dotted path of a model class or function")
    if not isinstance(per_client, list) or not all(isinstance(name, str) for name in per_client):
        raise SettingsError(f"model.per_client: {per_client!r} is no list of model names")
    return ModelSettings(target=target, arguments=values, per_client=per_client)


def _check_values(prefix: str, settings: Any) -> None:
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            _check_values(f"{prefix}{entry.name}.", value)
        elif value is not None:
            _check_range(f"{prefix}{entry.name}", value, entry)
    check = getattr(settings, "check", None)
    if check is not None:
        problem = check()
        if problem:
            raise SettingsError(f"{prefix}{problem}")


def _check_range(key: str, value: Any, entry: Field[Any]) -> None:
    rules = entry.metadata
    choices, minimum, maximum, above = (
        rules.get(name) for name in ("choices", "minimum", "maximum", "above")
    )
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{key}: {value} is no finite number")
    if choices and value not in choices:
        raise SettingsError(f"{key}: {value!r} is none of {', '.join(choices)}")
    if minimum is not None and value < minimum:
        raise SettingsError(f"{key}: {value} is below {minimum}")
    if maximum is not None and value > maximum:
        raise SettingsError(f"{key}: {value} is above {maximum}")
    if above is not None and value <= above:
        raise SettingsError(f"{key}: {value} is not above {above}")
