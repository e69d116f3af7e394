"""Distributed mutual learning as one plain PyTorch loop: the yardstick of ``overhead.py``.

All clients live in this process and learn one after another; there is no Flower, no message and no
:class:`fedmutual.client.learner.Learner`. Only the settings, the images, the network and the rule for the
seeds are the project's, so that both start from the same weights and see the same batches; every step of the
learning is written out again here, from METHOD: an independent check of the arithmetic. In deterministic
mode and with ``strategy.wire_dtype=float32`` the weights agree with those of ``fedmutual run`` bit for bit.

    python benchmarks/plain_loop.py OUTPUT --clients 5 --threads 2 rounds=4 strategy.phase=separate
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedmutual.data.site import SiteData, load_site
from fedmutual.models.visionnet import VisionNet
from fedmutual.settings import Settings
from fedmutual.settings.compose import compose


@dataclass
class Client:
    """One client: its data, its model and its optimiser."""

    name: str
    site: SiteData
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None = None  # of the weights, over so many steps
    steps: int = 0

    @property
    def predictor(self) -> nn.Module:
        """What predicts and is left at the end."""
        return self.model if self.average is None else self.average


@dataclass(frozen=True)
class Lesson:
    """Public samples and what the peers said of them: ``log_target`` [m, C], ``entropies`` [m] or None."""

    samples: np.ndarray
    log_target: Tensor
    entropies: Tensor | None
    weight: float


@dataclass
class Result:
    """What the loop leaves: final weights and accuracy on the unseen set of each client, and seconds."""

    weights: dict[str, dict[str, Tensor]]
    accuracies: dict[str, float]
    seconds: float
    round_seconds: list[float] = field(default_factory=list)


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for result.json and one file of weights a client")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    settings = compose(arguments.overrides)
    clients = start_clients(settings, arguments.clients)
    ready = time.perf_counter()
    result = learn(settings, clients)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, weights in result.weights.items():
        save_file(weights, arguments.output / f"{name}.safetensors")
    report = {
        "accuracies": result.accuracies,
        "seconds": {"preparation": ready - start, "training": result.seconds},
        "round_seconds": result.round_seconds,
        "threads": torch.get_num_threads(),
    }
    (arguments.output / "result.json").write_text(json.dumps(report, indent=2))


def start_clients(settings: Settings, num_clients: int) -> list[Client]:
    """Load each client's data and build its model.

    Raises
    ------
    ValueError
        For a setting that this loop does not follow.
    """
    _refuse_unsupported(settings)
    torch.set_deterministic_debug_mode("warn" if settings.deterministic else "default")
    clients = []
    for number in range(num_clients):
        name = f"client-{number}"
        site = load_site(settings, (number, num_clients))
        owner = settings.model.target if settings.train.common_start else f"{settings.model.target} {name}"
        torch.manual_seed(seed_of(settings.seed, "model", owner))
        outputs = 1 if len(site.classes) == 2 else len(site.classes)
        model = VisionNet(outputs, settings.data.image_size, **settings.model.arguments)
        model = model.to(memory_format=torch.channels_last)
        warm_start(settings, site, model)
        average = copy.deepcopy(model) if settings.train.ema_decay else None
        clients.append(Client(name, site, model, new_optimizer(settings, model), average))
    return clients


def learn(settings: Settings, clients: list[Client]) -> Result:
    """All rounds, and the last mutual step and the evaluation after them.

    A mutual step belongs to the round whose predictions it uses, but is taken at the start of the next,
    where it has that round's random numbers.
    """
    start = last = time.perf_counter()
    round_seconds = []
    lessons: list[Lesson | None] = [None] * len(clients)
    for current in range(1, settings.rounds + 1):
        public = clients[0].site.public
        samples = public.indices(settings.public, settings.seed, current, settings.rounds)
        predictions = []
        for client, lesson in zip(clients, lessons, strict=True):
            train_one_round(settings, client, current, lesson)
            predictions.append(
                shared(settings, predict(settings, client.predictor, pixels(public.images, samples)))
            )
            every = settings.evaluation.unseen_every
            if every and current % every == 0:
                unseen_accuracy(settings, client, settings.evaluation.unseen_limit)
        lessons = [lesson_for(settings, i, predictions, samples, current) for i in range(len(clients))]
        round_seconds.append(time.perf_counter() - last)
        last = time.perf_counter()
    for client, lesson in zip(clients, lessons, strict=True):
        close(settings, client, lesson)
    accuracies = {client.name: unseen_accuracy(settings, client, None) for client in clients}
    weights = {client.name: client.predictor.state_dict() for client in clients}
    weights = {name: {key: value.contiguous() for key, value in w.items()} for name, w in weights.items()}
    return Result(weights, accuracies, time.perf_counter() - start, round_seconds)


def train_one_round(settings: Settings, client: Client, current: int, lesson: Lesson | None) -> None:
    """The mutual step of the round before, and this round's local training; or both in the same steps."""
    generator = seed_everything(settings, client, current)
    if not settings.optimizer.keep_state:
        client.optimizer = new_optimizer(settings, client.model)
    for group in client.optimizer.param_groups:
        group["lr"] = step_size(settings, current)
    if settings.strategy.phase == "separate":
        separate_mutual_step(settings, client, lesson, generator, settings.strategy.mutual_epochs)
        lesson = None
    mixed_steps(settings, client, current, lesson, generator)


def close(settings: Settings, client: Client, lesson: Lesson | None) -> None:
    """The step after the last round, with that round's targets: separate, or a consolidation."""
    generator = seed_everything(settings, client, settings.rounds + 1)
    if lesson is None:
        return
    if settings.strategy.phase == "separate":
        separate_mutual_step(settings, client, lesson, generator, settings.strategy.mutual_epochs)
        return
    client.model.train()
    client.optimizer = new_optimizer(settings, client.model)
    lesson = replace(lesson, weight=3 * lesson.weight)
    mixed_steps(settings, client, settings.rounds, lesson, generator, rounds=3)


def mixed_steps(
    settings: Settings,
    client: Client,
    current: int,
    lesson: Lesson | None,
    generator: torch.Generator,
    rounds: int = 0,
) -> None:
    """Steps on private images, and on public ones where there is a lesson; ``rounds``: of a consolidation."""
    site, size, epochs = client.site, settings.train.batch_size, settings.train.local_epochs
    private = site.train_indices(current)
    images, labels = pixels(site.private, private), torch.from_numpy(site.private.labels[private])
    correction = torch.zeros(len(site.classes))
    if settings.train.prior_correction:
        shares = torch.bincount(labels, minlength=len(site.classes)).float() / len(labels)
        if lesson is not None:  # the mean target counts as much as the private labels
            shares = (shares + torch.softmax(lesson.log_target, dim=1).mean(dim=0)) / 2
        correction = shares.log().clamp(min=torch.finfo(torch.float32).min / 2)
    private_batches = batches(len(private), size, generator)
    steps = epochs * batches_an_epoch(len(private), size)
    if lesson is None:
        for _ in range(steps):
            index = next(private_batches)
            z = logits(client.model, images[index])
            descend(client.optimizer, F.cross_entropy(z + correction, labels[index]))
            follow(settings, client)
        return
    public_images = pixels(site.public.images, lesson.samples)
    public_batches = batches(len(lesson.samples), size, generator)
    public_steps = settings.strategy.public_epochs * batches_an_epoch(len(lesson.samples), size)
    steps = max(steps, public_steps, settings.strategy.min_steps) * max(rounds, 1)
    for step in range(steps):
        if rounds:
            decay = 0.01 + 0.99 * (1 + math.cos(math.pi * (step + 1) / steps)) / 2
            for group in client.optimizer.param_groups:
                group["lr"] = settings.optimizer.learning_rate * decay
        index, public_index = next(private_batches), next(public_batches)
        z = logits(client.model, torch.cat([images[index], public_images[public_index]]))
        own, public = z[: len(index)], z[len(index) :]
        loss = F.cross_entropy(own + correction, labels[index])
        descend(client.optimizer, loss + public_loss(settings, site, lesson, public, public_index))
        follow(settings, client)


def separate_mutual_step(
    settings: Settings,
    client: Client,
    lesson: Lesson | None,
    generator: torch.Generator,
    epochs: int,
) -> None:
    """Passes over the public samples alone, with a fresh optimiser."""
    if lesson is None:
        return
    client.model.train()
    optimizer = new_optimizer(settings, client.model)
    images = pixels(client.site.public.images, lesson.samples)
    public_batches = batches(len(images), settings.train.batch_size, generator)
    for _ in range(epochs * batches_an_epoch(len(images), settings.train.batch_size)):
        index = next(public_batches)
        z = logits(client.model, images[index])
        descend(optimizer, public_loss(settings, client.site, lesson, z, index))
        follow(settings, client)


def public_loss(settings: Settings, site: SiteData, lesson: Lesson, z: Tensor, index: Tensor) -> Tensor:
    """Lambda T^2 times the mean KL to the peers, and cross entropy where the labels are known (METHOD, 1)."""
    temperature = settings.strategy.temperature
    log_p = torch.log_softmax(z / temperature, dim=1)
    target = lesson.log_target[index]
    if lesson.entropies is None:  # own || peer: sum_c P (log P - mean_j log P_j)
        kl = (log_p.exp() * (log_p - target)).sum(dim=1).mean()
    else:  # peer || own: CE(mean_j P_j, P) - mean_j H(P_j)
        kl = (-(target.exp() * log_p).sum(dim=1) - lesson.entropies[index]).mean()
    loss = lesson.weight * temperature**2 * kl
    if settings.public.labelled:
        labels = torch.from_numpy(site.public.images.labels[lesson.samples])
        loss = loss + F.cross_entropy(z, labels[index])
    return loss


def shared(settings: Settings, log_p: np.ndarray) -> np.ndarray:
    """What peers see of predictions [n, C]: in the wire's precision, above the floor, normalised."""
    limit = np.float32(-np.log(settings.strategy.probability_floor))
    wire = np.dtype(settings.strategy.wire_dtype)
    if log_p.shape[1] == 2:
        log_odds = np.clip(log_p[:, 1] - log_p[:, 0], -limit, limit).astype(wire).astype(np.float32)
        scores = np.stack([np.zeros_like(log_odds), log_odds], axis=1)
    else:
        scores = np.maximum(log_p, -limit).astype(wire).astype(np.float32)
    scores = scores - scores.max(axis=1, keepdims=True)
    normalised = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return np.asarray(normalised.astype(wire).astype(np.float32))  # the server keeps them in that precision


def lesson_for(
    settings: Settings, own: int, predictions: list[np.ndarray], samples: np.ndarray, current: int
) -> Lesson | None:
    """The mean over all the others, written out; None while lambda is 0."""
    strategy = settings.strategy
    weight = strategy.kl_weight if current > strategy.burn_in else 0.0
    peers = [p for number, p in enumerate(predictions) if number != own]
    if weight == 0 or not peers:
        return None
    if strategy.temperature != 1:
        peers = [np_log_softmax(p / np.float32(strategy.temperature)) for p in peers]
    wire = np.dtype("float32" if strategy.wire_dtype == "float32" else "float16")
    if strategy.divergence == "own_peer":
        return Lesson(samples, over_the_wire(mean_of(peers), wire), None, weight)
    mean = np.maximum(mean_of([np.exp(p) for p in peers]), np.finfo(np.float32).tiny)
    entropies = mean_of([-(np.exp(p) * p).sum(axis=1) for p in peers])
    return Lesson(samples, over_the_wire(np.log(mean), wire), over_the_wire(entropies, wire), weight)


def mean_of(arrays: list[np.ndarray]) -> np.ndarray:
    """Mean of float32 arrays, summed in float64 and divided in float32."""
    return np.sum(arrays, axis=0, dtype=np.float64).astype(np.float32) / np.float32(len(arrays))


def np_log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def over_the_wire(values: np.ndarray, dtype: np.dtype) -> Tensor:
    return torch.from_numpy(values.astype(dtype).astype(np.float32))


def warm_start(settings: Settings, site: SiteData, model: nn.Module) -> None:
    """Epochs on the labelled fold that all clients share, where the data has one (partition=stream)."""
    fold = site.public.warm_start
    if fold is None or settings.train.warm_start_epochs == 0:
        return
    seed = seed_of(settings.seed, "warm start")
    torch.manual_seed(seed)
    model.train()
    optimizer = new_optimizer(settings, model)
    images, labels = pixels(fold, np.arange(len(fold))), torch.from_numpy(fold.labels)
    size = settings.train.batch_size
    order = batches(len(fold), size, torch.Generator().manual_seed(seed))
    for _ in range(settings.train.warm_start_epochs * batches_an_epoch(len(fold), size)):
        index = next(order)
        descend(optimizer, F.cross_entropy(logits(model, images[index]), labels[index]))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def follow(settings: Settings, client: Client) -> None:
    """Move the average of the weights, where there is one, towards the weights after a step."""
    if client.average is None:
        return
    client.steps += 1
    decay = min(settings.train.ema_decay, (1 + client.steps) / (10 + client.steps))
    for kept, new in zip(client.average.parameters(), client.model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores [n, C] of uint8 images; one output is the log-odds of class 1."""
    inputs = (images.float() / 255).contiguous(memory_format=torch.channels_last)
    outputs = model(inputs)
    return outputs if outputs.shape[1] > 1 else torch.cat([torch.zeros_like(outputs), outputs], dim=1)


@torch.no_grad()
def predict(settings: Settings, model: nn.Module, images: Tensor) -> np.ndarray:
    """Log-probabilities [n, C] in evaluation mode; leaves the model in training mode."""
    model.eval()
    parts = images.split(settings.evaluation.batch_size)
    log_p = torch.cat([torch.log_softmax(logits(model, part), dim=1) for part in parts])
    model.train()
    return log_p.numpy()


def unseen_accuracy(settings: Settings, client: Client, limit: int | None) -> float:
    """Accuracy on the unseen set, or on its first ``limit`` images: which of them does not matter here."""
    unseen = client.site.unseen
    assert unseen is not None
    chosen = np.arange(min(limit or len(unseen), len(unseen)))
    log_p = predict(settings, client.predictor, pixels(unseen, chosen))
    return float((log_p.argmax(axis=1) == unseen.labels[chosen]).mean())


def pixels(images: object, chosen: np.ndarray) -> Tensor:
    """uint8 [n, 3, H, W]."""
    return torch.from_numpy(images.images[chosen]).permute(0, 3, 1, 2)


def batches(samples: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless positions, shuffled anew each epoch; a last batch of one image joins the batch before it."""
    while True:
        order = torch.randperm(samples, generator=generator)
        count = batches_an_epoch(samples, size)
        for number in range(count):
            stop = samples if number == count - 1 else (number + 1) * size
            yield order[number * size : stop]


def batches_an_epoch(samples: int, size: int) -> int:
    count = -(-samples // size)
    return count - 1 if count > 1 and samples % size == 1 else count


def seed_everything(settings: Settings, client: Client, current: int) -> torch.Generator:
    """Seed the dropout of a client's round; returns what draws the order of its samples."""
    torch.manual_seed(seed_of(settings.seed, client.name, current, "dropout"))
    return torch.Generator().manual_seed(seed_of(settings.seed, client.name, current, "samples"))


def seed_of(*parts: object) -> int:
    """The project's rule: 63 bits of a hash of all that the random numbers are for."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_size(settings: Settings, current: int) -> float:
    """The learning rate of a round of local training."""
    rate, rounds = settings.optimizer.learning_rate, settings.rounds
    if settings.optimizer.schedule == "constant" or rounds == 1:
        return rate
    return rate * (0.1 + 0.9 * (1 + math.cos(math.pi * (current - 1) / (rounds - 1))) / 2)


def new_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    chosen, parameters = settings.optimizer, model.parameters()
    if chosen.name == "sgd":
        return torch.optim.SGD(
            parameters, chosen.learning_rate, chosen.momentum, weight_decay=chosen.weight_decay
        )
    kind = torch.optim.AdamW if chosen.name == "adamw" else torch.optim.Adam
    return kind(parameters, chosen.learning_rate, eps=1e-7, weight_decay=chosen.weight_decay)


def _refuse_unsupported(settings: Settings) -> None:
    strategy = settings.strategy
    unsupported = {
        "strategy": strategy.name != "mutual",
        "strategy.divergence": strategy.divergence == "published_code",
        "strategy.public_epochs": strategy.public_epochs == "auto",
        "consensus": settings.consensus != compose().consensus,
        "participation": not settings.participation.is_full,
        "public.fill": bool(settings.public.fill) and settings.public.schedule == "static",
        "strategy.wire_dtype": strategy.wire_dtype == "int8",
        "model": not settings.model.target.endswith(".VisionNet"),
        "model.per_client": bool(settings.model.per_client),
        "precision": settings.precision != "fp32",
        "device": settings.device not in ("auto", "cpu"),
    }
    for key, wrong in unsupported.items():
        if wrong:
            raise ValueError(f"{key}: the plain loop does not follow this value")


if __name__ == "__main__":
    main()
