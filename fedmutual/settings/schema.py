"""Typed settings: these dataclasses are the schema, ``conf/`` holds every value.

:mod:`fedmutual.settings.compose` fills them from ``conf/`` and Hydra overrides, and checks every value.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from fedmutual.settings.identity import CLIENT_NAME

OVERLAP = ("allow", "exclude", "refuse")  # each stricter than the one before
LEAST_SUMMED = 3  # clients; of two, each would know the other's predictions
_ABSENCE = r"(.+):(\d+)-(\d+)"
_ALLOWED = rf"({CLIENT_NAME.pattern})(?::(SHA256:[A-Za-z0-9+/]{{43}}))?"


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
    """Declare a setting: its meaning and valid values. Its value is in ``conf/``."""
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

    local_epochs: int = setting("passes over the private training images per round", minimum=1)
    batch_size: int = setting("images per step", minimum=1)
    validation_fraction: float = setting(
        "share of the private images held out for validation", minimum=0, maximum=0.9
    )
    prior_correction: bool = setting(
        "train on logits + log(own class prior), share and predict plain logits (arXiv:2007.07314)"
    )
    prior_smoothing: float | None = setting(
        "images of each class that the prior counts beside a client's own; 0: a class that a client lacks is "
        "left out of its private loss; null: 1 with model=pretrained, else 0",
        minimum=0,
    )
    recompute_norm: bool = setting("recompute the batch-norm statistics before predicting (arXiv:2105.07576)")
    ema_decay: float = setting(
        "EMA decay of the client's weights (0 = off); the averaged weights predict, are evaluated and are "
        "saved (arXiv:1703.01780). Off if the strategy exchanges weights",
        minimum=0,
        maximum=0.9999,
    )
    common_start: bool = setting("all clients of an architecture start from the same seeded initial weights")
    warm_start_epochs: int = setting(
        "epochs on the shared labelled warm-start fold before round 1", minimum=0
    )
    class_weights: str = setting(
        "weights of the private loss. balanced: every class of a client counts the same (in place of "
        "train.prior_correction, which corrects for the same skew)",
        choices=("none", "balanced"),
    )
    focal_gamma: float = setting(
        "focal loss (arXiv:1708.02002): the private loss of a sample is multiplied by (1 - p)^gamma; 0: "
        "cross entropy",
        minimum=0,
        maximum=10,
    )
    keep: str = setting(
        "last: a client's model is that of the last round. best: beside it, in the folder best/, that of the "
        "round with the highest accuracy on the client's own validation images",
        choices=("last", "best"),
    )

    def check(self) -> str | None:
        """Reject two corrections of one skew, and the best of what is not measured."""
        if self.class_weights == "balanced" and self.prior_correction:
            return (
                "class_weights: balanced corrects for the skew that train.prior_correction corrects for: set "
                "train.prior_correction=false with it"
            )
        if self.keep == "best" and self.validation_fraction == 0:
            return "keep: best needs validation images: set train.validation_fraction above 0"
        return None


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimiser of local training."""

    name: str = setting("optimiser", choices=("adam", "adamw", "sgd"))
    learning_rate: float = setting("step size", above=0)
    schedule: str = setting(
        "constant; cosine: from learning_rate in the first round to a tenth of it in the last; cosine_steps: "
        "the same, step by step; decay: a tenth of it after half and again after three quarters of the steps",
        choices=("constant", "cosine", "cosine_steps", "decay"),
    )
    warmup: float = setting(
        "share of all steps in which the step size rises from 0 to what the schedule says; 0: none",
        minimum=0,
        maximum=0.5,
    )
    clip_norm: float | None = setting("largest norm of a step's gradient; null: unlimited", above=0)
    momentum: float = setting("momentum (sgd)", minimum=0, maximum=1)
    weight_decay: float = setting("weight decay", minimum=0)
    keep_state: bool = setting("keep the optimiser's moments from round to round")


@dataclass(kw_only=True)
class AugmentSettings:
    """Random changes of a client's training images, new in every epoch; no other images are changed."""

    name: str = setting(
        "none; flip_crop; randaugment: flip_crop and RandAugment (arXiv:1909.13719); custom: transforms",
        choices=("none", "flip_crop", "randaugment", "custom"),
    )
    transforms: list[Any] = setting(
        "with custom: classes of torchvision.transforms.v2 or one's own, as "
        "`{_target_: ..., argument: ...}`; they map uint8 `[3, size, size]` to the same"
    )

    def check(self) -> str | None:
        """``transforms`` belong to custom, and each names its class."""
        if (self.name == "custom") != bool(self.transforms):
            return (
                f"transforms: {self.transforms}, but augment={self.name}: set augment=custom and transforms"
            )
        for entry in self.transforms:
            if not isinstance(entry, dict) or "." not in str(entry.get("_target_", "")):
                return f"transforms: {entry!r} names no class (_target_)"
        return None


@dataclass(kw_only=True)
class PublicSettings:
    """The public images that every client predicts."""

    schedule: str = setting(
        "static: the whole public set every round; kfold: a new class-stratified fold per round; "
        "sample: a new seeded random subset per round",
        choices=("static", "kfold", "sample"),
    )
    size: int | None = setting(
        "number of images drawn from the pool; null: 15 % of it, or all of the data's own public images",
        minimum=1,
    )
    per_round: int | None = setting(
        "images per round for schedule=sample; null: a quarter of the set", minimum=1
    )
    views: str = setting(
        "plain: unchanged images; mixed: every round, half of them mirrored and half mixed with another "
        "image, identical at all clients (strategy=mutual)",
        choices=("plain", "mixed"),
    )
    fill: int = setting(
        "schedule=static: where there are fewer public images, views of them (turned, scaled, shifted, "
        "sheared) fill the set up to so many in the last round; every site makes the same ones. 0: never. "
        "Not for heads on frozen features, nor for partition=stream",
        minimum=0,
    )
    labelled: bool = setting("the public labels are known and used for training")
    distribute: bool = setting("the server sends the public images once to sites that lack them")

    def check(self) -> str | None:
        """Reject ``per_round`` without schedule=sample, and labels of mixed images."""
        if self.per_round is not None and self.schedule != "sample":
            return f"per_round: {self.per_round}, but schedule={self.schedule}: use public=sample"
        if self.fill and self.schedule != "static":
            return f"fill: {self.fill}, but schedule={self.schedule}: set public.fill=0, or use public=static"
        if self.views == "mixed" and self.labelled:
            return "views: mixed images have no label: set public.views=plain or public.labelled=false"
        return None

    def misfit(self, strategy: StrategySettings) -> str | None:
        """Return which of these settings a strategy does not support, key first."""
        if self.views != "plain" and not strategy.takes_views:
            return f"public.views: strategy={strategy.name} supports only plain"
        return None


@dataclass(kw_only=True)
class EvaluationSettings:
    """Evaluation during the run; the final evaluation always uses the whole unseen set."""

    unseen_every: int = setting("evaluate on the unseen set every n rounds; 0: only at the end", minimum=0)
    unseen_limit: int | None = setting(
        "unseen images used before the end (seeded subset); null: all", minimum=1
    )
    batch_size: int = setting("images per forward pass", minimum=1)
    mistakes: int = setting(
        "unseen images that the clients' ensemble predicts wrong, shown in the report; 0 where pictures of "
        "the unseen set must not be passed on with it",
        minimum=0,
        maximum=100,
    )

    def unseen_in(self, round: int) -> bool:
        """Return whether a round evaluates on the unseen set."""
        return self.unseen_every > 0 and round % self.unseen_every == 0


@dataclass(kw_only=True)
class ExchangeSettings:
    """How orders are sent and reports collected."""

    min_clients: int | None = setting(
        "quorum of reports per round; null: half of the clients, at least one", minimum=1
    )
    enough_clients: int | None = setting(
        "number of reports after which a round does not wait for the others, which rejoin after their "
        "answer; null: wait for all",
        minimum=1,
    )
    join_timeout: float = setting("seconds to wait for the clients to connect", above=0)
    round_timeout: float | None = setting(
        "seconds after which a round ends with the reports received; half of it after which an order is sent "
        "again that got no answer; null: an hour at first, then five times the longest wait for a report, at "
        "least 600",
        above=0,
    )
    return_timeout: float = setting(
        "seconds that a round waits for a crashed client process or SuperNode to return, and then resends "
        "its order; 0: the client misses that round",
        minimum=0,
    )
    poll_interval: float = setting("seconds between two polls for reports", above=0)

    def check(self) -> str | None:
        """Reject ``enough_clients`` below the quorum."""
        if self.enough_clients is not None and self.enough_clients < (self.min_clients or 1):
            return (
                f"enough_clients: {self.enough_clients} is below exchange.min_clients={self.min_clients}: "
                "raise it, or set it to null"
            )
        return None


@dataclass(kw_only=True)
class ClientsSettings:
    """Who may join a run, and which node a client's name belongs to."""

    allowed: list[str] = setting(
        "clients that may join, NAME or NAME:FINGERPRINT, with the SHA256 fingerprint of the node's key as "
        "`ssh-keygen -lf` prints it; []: anyone whom the SuperLink lets in"
    )
    bind: str = setting(
        "what a client's name belongs to for the length of a run. key: the key of its node. node: its node; "
        "once Flower knows that this one is gone, another node may take the name. auto: key, where the node "
        "was registered with `flwr supernode register --name`, else node",
        choices=("auto", "key", "node"),
    )

    def check(self) -> str | None:
        """Reject malformed or repeated names."""
        wrong = [text for text in self.allowed if re.fullmatch(_ALLOWED, text) is None]
        if wrong:
            return f"allowed: {wrong[0]!r} is not NAME or NAME:SHA256:... (ssh-keygen -lf KEY.pub prints it)"
        if len(self.keys_of_allowed()) < len(self.allowed):
            return "allowed: a name stands there twice"
        return None

    def keys_of_allowed(self) -> dict[str, str]:
        """Return name -> fingerprint of its key; an empty fingerprint: any key."""
        found = [re.fullmatch(_ALLOWED, text) for text in self.allowed]
        return {match[1]: match[2] or "" for match in found if match is not None}


@dataclass(kw_only=True)
class ParticipationSettings:
    """Which clients get an order in a round; all get the closing order."""

    fraction: float = setting(
        "share of clients that participate in a round (seeded); 1: all connected clients",
        above=0,
        maximum=1,
    )
    absent: list[str] = setting(
        "emulated absences, NAME:FIRST-LAST (rounds), such as [client-4:1-7, client-1:3-3]"
    )

    def check(self) -> str | None:
        """Reject malformed absences."""
        wrong = [text for text in self.absent if re.fullmatch(_ABSENCE, text) is None]
        if wrong:
            return f"absent: {wrong[0]!r} is not NAME:FIRST-LAST, such as client-4:1-7"
        for text in self.absent:
            first, last = map(int, re.fullmatch(_ABSENCE, text).groups()[1:])  # type: ignore[union-attr]
            if not 1 <= first <= last:
                return (
                    f"absent: {text!r} names no round: rounds are counted from 1, the first before the last"
                )
        return None

    def misses(self, client: str | None, round: int) -> bool:
        """Return whether a client is absent in a round (emulated)."""
        for text in self.absent:
            name, first, last = re.fullmatch(_ABSENCE, text).groups()  # type: ignore[union-attr]
            if name == client and int(first) <= round <= int(last):
                return True
        return False

    @property
    def is_full(self) -> bool:
        """Whether all clients participate in every round."""
        return self.fraction == 1 and not self.absent


@dataclass(kw_only=True)
class AttackSettings:
    """Emulated hostile clients, for robustness studies: they train normally but report other predictions."""

    name: str = setting(
        "label_flip; random; constant: always class 0; one_hot: the class that the client believes least "
        "probable (arXiv:2402.12265)",
        choices=("none", "label_flip", "random", "constant", "one_hot"),
    )
    clients: list[str] = setting(
        "names of hostile clients; excluded from the run's mean, worst client and ensemble"
    )

    def by(self, client: str) -> str:
        """Return the attack of a client."""
        return self.name if client in self.clients else "none"

    def check(self) -> str | None:
        """``name`` and ``clients`` must be set together."""
        if (self.name == "none") != (not self.clients):
            return f"name: {self.name}, but attack.clients={self.clients}: set both or none"
        return None


@dataclass(kw_only=True)
class PrivacySettings:
    """What leaves a site, and what is proven of it.

    Its owner's ``privacy-metrics`` is the most that it says of its own images.
    """

    metrics: str = setting(
        "none: no figure of its own images; coarse: rounded, so that they fit every distribution over the "
        "classes; full: everything, recall per class too; auto: as much as the site's owner allows, which is "
        "coarse where nothing is said, and full in simulation",
        choices=("auto", "none", "coarse", "full"),
    )
    overlap: str = setting(
        "private images that are also public, or nearly: exclude: they are not trained on; refuse: the site "
        "takes no part; allow: they are trained on, and not looked for. Of the words of the run and of the "
        "site's owner the stricter holds. Nothing is looked for where the public set is drawn from the pool",
        choices=OVERLAP,
    )
    secagg: bool = setting(
        "secure aggregation: predictions are masked, so that the server gets only their sum (at least three "
        "clients; strategies and consensus that need no more than it)"
    )
    epsilon: float | None = setting(
        "differential privacy: all that leaves a site in the run is (epsilon, delta)-differentially private "
        "for each of its images (strategy=speaker; strategy=fedavg and fedprox by DP-SGD, a baseline, in "
        "simulation); null: nothing is proven",
        above=0,
        maximum=32,
    )
    colluding: int = setting(
        "with secagg and epsilon: sites that may tell the server their share of the noise; what the others "
        "add is enough without them. The owner's privacy-colluding is the least that a site takes",
        minimum=0,
    )
    delta: float = setting(
        "of epsilon; it should be below 1 over the number of a site's images. The owner's privacy-delta is "
        "the most that a site takes",
        above=0,
        maximum=0.01,
    )
    speaker: str = setting(
        "of strategy=speaker: joint: the sites' noisy sums of products of features make one ridge "
        "regression; own: each site makes a noisy speaker of its own, and the mean of what these say of the "
        "public images teaches (not with secagg)",
        choices=("joint", "own"),
    )
    budget: float | None = setting(
        "the epsilon that all releases on the same images may spend at a site, in all runs; null: as much as "
        "this run asks for. The owner's privacy-budget goes before it",
        above=0,
    )
    max_grad_norm: float = setting(
        "epsilon with averaged weights: the gradient of each image is scaled to at most this norm "
        "(arXiv:1607.00133)",
        above=0,
    )
    sample_rate: float = setting(
        "epsilon with averaged weights: probability of each image to be in a step. A round has "
        "train.local_epochs / sample_rate steps, whose sums are divided by train.batch_size",
        above=0,
        maximum=1,
    )
    record: bool = setting(
        "the server keeps what it receives, for `fedmutual audit`: every prediction (with secagg their sum), "
        "and the last weights"
    )

    def misfit(self, settings: Settings) -> str | None:
        """Return the setting that the strategy cannot keep to, key first."""
        if self.speaker != "joint" and settings.strategy.name != "speaker":
            return f"privacy.speaker: {self.speaker} is of strategy=speaker, not of {settings.strategy.name}"
        return self._unproven(settings) or self._not_summed(settings)

    def _unproven(self, settings: Settings) -> str | None:
        if self.epsilon is None:
            return None
        if not settings.strategy.takes_dp:
            return f"privacy.epsilon: strategy={settings.strategy.name} has no noise: set strategy=speaker"
        if self.budget is not None and self.budget < self.epsilon:
            return f"privacy.epsilon: {self.epsilon:g} is above privacy.budget={self.budget:g}"
        library = settings.strategy.dp_library
        if importlib.util.find_spec(library) is None:
            return (
                f"privacy.epsilon: {library} makes the noise and its account: pip install "
                "'fedmutual[privacy]'"
            )
        return None

    def _not_summed(self, settings: Settings) -> str | None:
        if not self.secagg:
            return None
        if not settings.strategy.takes_secagg:
            return f"privacy.secagg: strategy={settings.strategy.name} needs more than a sum of predictions"
        if not settings.consensus.takes_secagg:
            return "privacy.secagg: this consensus needs each client's predictions: set consensus=mean"
        if not settings.participation.is_full:
            return (
                "privacy.secagg: everyone takes part in every round: unset participation.fraction and absent"
            )
        if settings.exchange.enough_clients is not None:
            return "privacy.secagg: a sum needs every client: set exchange.enough_clients=null"
        if settings.num_clients is not None and settings.num_clients < LEAST_SUMMED:
            return (
                f"privacy.secagg: num_clients={settings.num_clients}; a sum hides nobody among fewer than 3"
            )
        if settings.num_clients is not None and settings.num_clients <= self.colluding:
            return f"privacy.colluding: {self.colluding} of num_clients={settings.num_clients} is everyone"
        return None


@dataclass(kw_only=True)
class TrackingSettings:
    """External loggers at the server, in addition to the results folder."""

    loggers: list[str] = setting("any of tensorboard, mlflow, wandb; []: none")
    project: str = setting("MLflow experiment, and Weights & Biases project, of the runs")
    mlflow_uri: str | None = setting(
        "MLflow tracking server; null: the environment's MLFLOW_TRACKING_URI, else mlflow.db in the results"
    )
    wandb_mode: str = setting(
        "offline: files in the results, for `wandb sync`; online: send the figures to the W&B server",
        choices=("offline", "online", "disabled"),
    )

    def check(self) -> str | None:
        """Reject unknown logger names; installation is checked on the server."""
        known = ("tensorboard", "mlflow", "wandb")
        for name in self.loggers:
            if name not in known:
                return f"loggers: {name!r} is none of {', '.join(known)}"
        return None


@dataclass(kw_only=True)
class SimulationSettings:
    """Resources of a simulated client (``fedmutual run``)."""

    client_cpus: int = setting("CPU threads per client; as many clients run in parallel as fit", minimum=1)
    client_gpus: float = setting("share of a GPU per client", minimum=0)


@dataclass(kw_only=True)
class EmulationSettings:
    """Emulated client speeds, and the clock of a run's history."""

    clock: str = setting(
        "wall: the machine's clock; virtual: an update takes speed * nominal_seconds and a round as long as "
        "its slowest client, identical on every machine; auto: virtual for strategies without rounds if one "
        "process runs all clients (fedmutual compare), and for strategies with rounds if speeds differ",
        choices=("auto", "wall", "virtual"),
    )
    speeds: list[float] = setting(
        "slowness factors of updates, assigned to the clients in order of their names"
    )
    nominal_seconds: float = setting("virtual clock: seconds of an update at speed 1", above=0)

    def check(self) -> str | None:
        """``speeds`` must be a non-empty list of positive numbers."""
        if not self.speeds or not all(math.isfinite(speed) and speed > 0 for speed in self.speeds):
            return f"speeds: {self.speeds} is not a list of numbers above 0, such as [1] or [1,1,2,4,8]"
        return None


@dataclass(kw_only=True)
class StrategySettings:
    """Base of every strategy's settings; ``_target_`` in ``conf/strategy/*.yaml`` names the subclass."""

    name: str = setting("name in results and plots")
    takes_consensus: ClassVar[bool] = False  # whether the settings group `consensus` is used
    takes_views: ClassVar[bool] = False  # whether public.views is used
    fills_public: ClassVar[bool] = False  # whether public.fill is used
    needs_peers: ClassVar[bool] = True  # whether one client alone learns nothing from it
    takes_secagg: ClassVar[bool] = False  # whether the sum of all predictions is enough (privacy.secagg)
    takes_dp: ClassVar[bool] = False  # whether only noisy figures leave a client (privacy.epsilon)
    dp_library: ClassVar[str] = "opendp"  # makes the noise and its account

    @property
    def closing_rounds(self) -> int:
        """How many rounds' time the answer to the closing order may take."""
        return 1

    def misfit(self, settings: Settings) -> str | None:
        """Return the setting that this strategy does not support, key first; None if there is none."""
        return None


@dataclass(kw_only=True)
class ConsensusSettings:
    """Base of every consensus' settings; ``_target_`` in ``conf/consensus/*.yaml`` names the subclass."""

    takes_secagg: ClassVar[bool] = False  # whether the sum of all predictions is enough (privacy.secagg)

    def misfit(self, strategy: StrategySettings) -> str | None:
        """Return the strategy setting that this consensus does not support, key first."""
        return None


@dataclass(kw_only=True)
class DataSettings:
    """Base of every data source's settings; ``_target_`` in ``conf/data/*.yaml`` names the subclass."""

    image_size: int = setting("side length in pixels to which images are resized", minimum=8)

    def count(self) -> tuple[int, int | None] | None:
        """Return the numbers of pool images and of the data's public images (None: no public set).

        Images are not read, so unreadable ones count. Return None if the numbers are unknown before loading.

        Raises
        ------
        DataError
            The message names the folder or setting, and the remedy.
        """
        return None


@dataclass(kw_only=True)
class PartitionSettings:
    """Base of every partition's settings; ``_target_`` in ``conf/partition/*.yaml`` names the subclass."""


@dataclass(kw_only=True)
class ModelSettings:
    """The client's model: ``target(**arguments)``, with a head for the number of classes."""

    target: str
    arguments: dict[str, Any]
    per_client: list[str]


@dataclass(kw_only=True)
class Settings:
    """Everything a run depends on."""

    experiment_name: str | None = setting("name of the experiment overlay")
    seed: int = setting("seed of all randomness", minimum=0)
    rounds: int = setting("rounds of learning", minimum=1)
    num_clients: int | None = setting(
        "number of clients to wait for; null: all connected clients (`fedmutual run` starts 5)", minimum=1
    )
    output_dir: str | None = setting(
        "absolute path of this run's results folder; null: in the user's data folder"
    )
    state_dir: str | None = setting(
        "absolute path of the clients' states; null: in the user's data folder "
        "(`fedmutual run`: <output_dir>/clients)"
    )
    cache_dir: str | None = setting("absolute path of the decoded images; null: in the user's cache folder")
    resume: str | None = setting("absolute path of the results folder of an interrupted run, to continue it")
    device: str = setting("auto, cpu, mps, cuda or cuda:<n>")
    precision: str = setting(
        "floating-point precision of training; auto: at each site bf16 where its device has instructions "
        "for it, else fp32",
        choices=("fp32", "bf16", "fp16", "auto"),
    )
    deterministic: bool = setting(
        "deterministic algorithms where torch has them: on one machine, equal seeds give identical bits"
    )
    train: TrainSettings
    optimizer: OptimizerSettings
    augment: AugmentSettings
    public: PublicSettings
    evaluation: EvaluationSettings
    exchange: ExchangeSettings
    participation: ParticipationSettings
    clients: ClientsSettings
    attack: AttackSettings
    privacy: PrivacySettings
    tracking: TrackingSettings
    simulation: SimulationSettings
    emulation: EmulationSettings
    strategy: Any
    consensus: Any
    data: Any
    partition: Any
    model: Any

    def check(self) -> str | None:
        """Reject unknown device names and unsupported combinations; devices are checked on the node."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            return f"device: {self.device!r} is none of auto, cpu, mps, cuda, cuda:<n>"
        strategy: StrategySettings = self.strategy
        consensus: ConsensusSettings = self.consensus
        misfit = self.public.misfit(strategy) or consensus.misfit(strategy) or strategy.misfit(self)
        return misfit or self.privacy.misfit(self)


def as_container(settings: Settings) -> dict[str, Any]:
    """Return the settings as nested dicts, as saved with every run.

    Each group with a chosen class names it as in ``conf/``, since two classes can have the same fields.
    """
    container = asdict(settings)
    for group in ("strategy", "consensus", "data", "partition"):
        chosen = type(getattr(settings, group))
        container[group] = {"_target_": f"{chosen.__module__}.{chosen.__qualname__}"} | container[group]
    return container
