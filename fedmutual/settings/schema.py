"""Typed settings: these dataclasses are the schema, ``conf/`` holds every value.

:mod:`fedmutual.settings.compose` fills them from ``conf/`` and Hydra overrides, and checks every value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

_ABSENCE = r"(.+):(\d+)-(\d+)"


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
    ema_decay: float = setting(
        "what a step leaves of the moving average of a client's own weights, which predicts, is measured and "
        "is kept at the end (arXiv:1703.01780); 0: the newest weights do. Not where weights are exchanged",
        minimum=0,
        maximum=0.9999,
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
    views: str = setting(
        "plain: as they are; mixed: every round half of them mirrored and half mixed with another one, the "
        "same at all clients (strategy=mutual)",
        choices=("plain", "mixed"),
    )
    labelled: bool = setting("the public labels are known and trained on")
    distribute: bool = setting("the server sends the public images to sites that lack them, once")

    def check(self) -> str | None:
        """The size of a sample means something for samples only, and a label for one image only."""
        if self.per_round is not None and self.schedule != "sample":
            return f"per_round: {self.per_round}, but schedule={self.schedule}: use public=sample"
        if self.views == "mixed" and self.labelled:
            return "views: mixed images have no label: set public.views=plain or public.labelled=false"
        return None

    def misfit(self, strategy: StrategySettings) -> str | None:
        """Say which of these settings a strategy does not go with, key first."""
        if self.views != "plain" and not strategy.takes_views:
            return f"public.views: strategy={strategy.name} knows plain only"
        return None


@dataclass(kw_only=True)
class EvaluationSettings:
    """What is measured on the unseen set besides the final evaluation, which always sees all of it."""

    unseen_every: int = setting("evaluate the unseen set every n rounds; 0: only at the end", minimum=0)
    unseen_limit: int | None = setting("images of it used before the end (seeded); null: all", minimum=1)
    batch_size: int = setting("images a forward pass", minimum=1)

    def unseen_in(self, round: int) -> bool:
        """Whether the unseen set is measured in a round."""
        return self.unseen_every > 0 and round % self.unseen_every == 0


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
class ParticipationSettings:
    """Which clients get an order in a round; everyone gets the closing one."""

    fraction: float = setting(
        "share of the clients that take part in a round (seeded); 1: all that are connected",
        above=0,
        maximum=1,
    )
    absent: list[str] = setting(
        "emulated absences, NAME:FIRST-LAST in rounds, such as [client-4:1-7, client-1:3-3]"
    )

    def check(self) -> str | None:
        """Every absence can be read."""
        wrong = [text for text in self.absent if re.fullmatch(_ABSENCE, text) is None]
        return f"absent: {wrong[0]!r} is no NAME:FIRST-LAST, such as client-4:1-7" if wrong else None

    def misses(self, client: str | None, round: int) -> bool:
        """Whether a client is emulated to be away."""
        for text in self.absent:
            name, first, last = re.fullmatch(_ABSENCE, text).groups()  # type: ignore[union-attr]
            if name == client and int(first) <= round <= int(last):
                return True
        return False

    @property
    def is_full(self) -> bool:
        """Everyone takes part in every round."""
        return self.fraction == 1 and not self.absent


@dataclass(kw_only=True)
class AttackSettings:
    """Emulated hostile clients, for studies of robustness: they learn like all and report something else."""

    name: str = setting(
        "label_flip; random; constant: always class 0; one_hot: the class that is least probable to the best "
        "of a client's knowledge (arXiv:2402.12265)",
        choices=("none", "label_flip", "random", "constant", "one_hot"),
    )
    clients: list[str] = setting(
        "names of the hostile ones; not counted in the run's mean, worst and ensemble"
    )

    def by(self, client: str) -> str:
        """What a client does."""
        return self.name if client in self.clients else "none"

    def check(self) -> str | None:
        """An attack has an attacker."""
        if (self.name == "none") != (not self.clients):
            return f"name: {self.name}, but attack.clients={self.clients}: set both or none"
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
class EmulationSettings:
    """Clients of unequal speed, emulated, and the clock by which a run's history tells the time."""

    clock: str = setting(
        "wall: as time passes; virtual: as if an update took speed * nominal_seconds, and a round as long as "
        "its slowest client, the same on every machine; auto: virtual where one process plays all clients of "
        "a strategy without rounds (fedmutual compare), and where clients of one with rounds differ in speed",
        choices=("auto", "wall", "virtual"),
    )
    speeds: list[float] = setting(
        "how many times as long an update takes, dealt out to the clients in order of their names"
    )
    nominal_seconds: float = setting("virtual clock: what an update takes at speed 1", above=0)

    def check(self) -> str | None:
        """There is a speed, and each one is a time."""
        if not self.speeds or not all(math.isfinite(speed) and speed > 0 for speed in self.speeds):
            return f"speeds: {self.speeds} is no list of numbers above 0, such as [1] or [1,1,2,4,8]"
        return None


@dataclass(kw_only=True)
class StrategySettings:
    """Base of every strategy's settings; ``_target_`` in ``conf/strategy/*.yaml`` names the subclass."""

    name: str = setting("name in results and plots")
    takes_consensus: ClassVar[bool] = False  # the settings group `consensus` has a meaning
    takes_views: ClassVar[bool] = False  # public.views has a meaning

    def misfit(self, settings: Settings) -> str | None:
        """Say which other setting this strategy cannot run with, key first; None: they go together."""
        return None


@dataclass(kw_only=True)
class ConsensusSettings:
    """Base of every consensus' settings; ``_target_`` in ``conf/consensus/*.yaml`` names the subclass."""

    def misfit(self, strategy: StrategySettings) -> str | None:
        """Say which setting of the strategy this consensus does not go with, key first."""
        return None


@dataclass(kw_only=True)
class DataSettings:
    """Base of every data source's settings; ``_target_`` in ``conf/data/*.yaml`` names the subclass."""

    image_size: int = setting("images are resized to this many pixels a side", minimum=8)

    def count(self) -> tuple[int, int | None] | None:
        """Images of the pool and of the public set that the data bring (None: none), without reading one.

        Returns None where that cannot be known before they are loaded; unreadable images still count.

        Raises
        ------
        DataError
            Naming the folder or setting, and the remedy.
        """
        return None


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
    participation: ParticipationSettings
    attack: AttackSettings
    tracking: TrackingSettings
    simulation: SimulationSettings
    emulation: EmulationSettings
    strategy: Any
    consensus: Any
    data: Any
    partition: Any
    model: Any

    def check(self) -> str | None:
        """A device that torch cannot name is refused; whether it is there, only the node can tell."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            return f"device: {self.device!r} is none of auto, cpu, mps, cuda, cuda:<n>"
        strategy: StrategySettings = self.strategy
        consensus: ConsensusSettings = self.consensus
        return self.public.misfit(strategy) or consensus.misfit(strategy) or strategy.misfit(self)


def as_container(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain nested dicts, the form that is saved with every run.

    A group of which a class was chosen says which, as in ``conf/``: two classes may have the same fields.
    """
    container = asdict(settings)
    for group in ("strategy", "consensus", "data", "partition"):
        chosen = type(getattr(settings, group))
        container[group] = {"_target_": f"{chosen.__module__}.{chosen.__qualname__}"} | container[group]
    return container
