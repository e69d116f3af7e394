"""Images a second of the training step: the project's, the best loop by hand, and its convolutions alone.

One thread, one network, batches of private and public images as in mixed training, already in memory. The
loop by hand does the same arithmetic and nothing else. The convolutions alone are those of the network,
forward and backward, on inputs of the right shape: the most that the library of kernels (oneDNN) can do. The
last table trains several clients' networks together in one step (``torch.func.vmap``, which makes grouped
convolutions of them), against one after the other.

    python benchmarks/step.py
    python benchmarks/step.py --size 100 --batch 64 --threads 2 --json step.json

Exit code 1: the step reaches less than 0.9 of the loop by hand. Speed depends on the load; the shares do not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from fedmutual.learning.training import Private, Public, Trainer
from fedmutual.models.visionnet import VisionNet

LEAST = 0.9  # of the loop by hand
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
STEPS, REPEATS = 10, 5


def main() -> int:
    """Measure, print, and say whether the step is fast enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--batch", type=int, default=32, help="private images in a step, and public ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", type=int, nargs="*", default=[10, 50], help="clients in one step")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    speeds = {name: speeds_of(name, arguments.size, arguments.batch) for name in PRECISIONS}
    joint = [
        together(name, clients, images, arguments.size)
        for clients in arguments.together
        for name in PRECISIONS
        for images in (2 * arguments.batch, 4)
    ]
    show(console, speeds, joint)
    if arguments.json:
        arguments.json.write_text(json.dumps({"step": speeds, "together": joint}, indent=2))
    slow = [name for name, speed in speeds.items() if speed["step"] < LEAST * speed["by hand"]]
    for name in slow:
        console.print(f"{name}: the step is slower than {LEAST:g} of the loop by hand", style="bold red")
    return 1 if slow else 0


def speeds_of(precision: str, size: int, batch: int) -> dict[str, float]:
    """Return images a second of the step, of the loop by hand, and of the convolutions alone."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, STEPS * batch, 3, size, size), dtype=torch.uint8)
    images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    private, public = images[: STEPS * batch], images[STEPS * batch :]
    labels = torch.arange(len(private)) % 2
    targets = torch.log_softmax(torch.randn(len(public), 2), dim=1)
    runs = {
        "step": the_step(precision, size, batch, private, labels, public, targets),
        "by hand": by_hand(precision, size, batch, private, labels, public, targets),
        "convolutions alone": convolutions_alone(precision, size, 2 * batch),
    }
    best = fastest(runs)
    return {name: STEPS * 2 * batch / seconds for name, seconds in best.items()}


def the_step(precision: str, size: int, batch: int, *data: Tensor) -> Callable[[], object]:
    """Return a function that takes the project's steps."""
    private, labels, public, targets = data
    model = network(size)
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        precision,
        batch,
        torch.Generator().manual_seed(0),
    )
    own = Private(private, labels, torch.zeros(2))
    shared = Public(public, targets, -(targets.exp() * targets).sum(dim=1), None, "peer_own", 1.0, 1.0)
    return lambda: trainer.train(STEPS, own, shared)


def by_hand(precision: str, size: int, batch: int, *data: Tensor) -> Callable[[], object]:
    """Return a function that takes the same steps as one would write them for this case alone."""
    private, labels, public, targets = data
    model, dtype = network(size), PRECISIONS[precision]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def train() -> None:
        model.train()
        orders = [torch.randperm(len(part), generator=generator).split(batch) for part in (private, public)]
        for mine, theirs in zip(*orders, strict=True):
            optimizer.zero_grad(set_to_none=True)
            images = torch.cat([private[mine], public[theirs]]).float() / 255
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                scores = model(images)
            logits = F.pad(scores.float(), (1, 0))
            loss = F.cross_entropy(logits[:batch], labels[mine])
            log_p = F.log_softmax(logits[batch:], dim=1)
            loss = loss + F.kl_div(log_p, targets[theirs], log_target=True, reduction="batchmean")
            loss.backward()
            optimizer.step()

    return train


def convolutions_alone(precision: str, size: int, images: int) -> Callable[[], object]:
    """Return a function that runs the network's convolutions, forward and backward."""
    dtype = PRECISIONS[precision] or torch.float32
    inputs: list[tuple[nn.Conv2d, Tensor]] = []
    model = network(size)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, given, _: inputs.append((layer, given[0].detach())))
    model(torch.rand(images, 3, size, size).contiguous(memory_format=torch.channels_last))
    cases = []
    for number, (layer, given) in enumerate(inputs):
        given = given.to(dtype).requires_grad_(number > 0)  # images need no gradient
        weights = layer.weight.detach().to(dtype).requires_grad_()
        bias = None if layer.bias is None else layer.bias.detach().to(dtype).requires_grad_()
        cases.append((given, weights, bias, torch.ones_like(F.conv2d(given, weights, bias))))

    def run() -> None:
        for _ in range(STEPS):
            for given, weights, bias, ones in cases:
                wanted = [part for part in (given, weights, bias) if part is not None and part.requires_grad]
                torch.autograd.grad(F.conv2d(given, weights, bias), wanted, ones)

    return run


def together(precision: str, clients: int, images: int, size: int) -> dict[str, Any]:
    """Return milliseconds a client of forward and backward: one after the other, and in one step."""
    dtype = PRECISIONS[precision]
    models = [network(size, dropout=0.0) for _ in range(clients)]
    inputs = torch.rand(clients, images, 3, size, size)
    labels = (torch.arange(clients * images) % 2).float().view(clients, images)
    weights, buffers = stack_module_state(models)
    skeleton = network(size, dropout=0.0).to("meta")

    def in_turn() -> None:
        for model, own, right in zip(models, inputs, labels, strict=True):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                scores = model(own.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(scores[:, 0].float(), right)
            torch.autograd.grad(loss, list(model.parameters()))

    def loss_of(weights: Any, buffers: Any, own: Tensor, right: Tensor) -> Tensor:
        scores = functional_call(skeleton, (weights, buffers), (own,))
        return F.binary_cross_entropy_with_logits(scores[:, 0].float(), right)

    def at_once() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            vmap(grad(loss_of))(weights, buffers, inputs, labels)

    best = fastest({"in turn": in_turn, "at once": at_once}, repeats=3)
    milliseconds = {name: 1000 * seconds / clients for name, seconds in best.items()}
    return {"clients": clients, "images": images, "precision": precision, **milliseconds}


def network(size: int, dropout: float = 0.2) -> VisionNet:
    """Return the default network, in the memory format that the project trains in."""
    return VisionNet(1, size, dropout).to(memory_format=torch.channels_last)


def fastest(runs: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Return the seconds of each run's fastest repetition; they take turns, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def show(console: Console, speeds: dict[str, dict[str, float]], joint: Sequence[dict[str, Any]]) -> None:
    """Print both tables."""
    table = Table(
        "precision", "step", "by hand", "convolutions alone", "step / by hand", "step / convolutions"
    )
    for name, speed in speeds.items():
        shares = (speed["step"] / speed[other] for other in ("by hand", "convolutions alone"))
        table.add_row(
            name, *(f"{value:,.0f}" for value in speed.values()), *(f"{share:.2f}" for share in shares)
        )
    console.print("images a second", table)
    table = Table(
        "clients", "images", "precision", "in turn, ms a client", "at once, ms a client", "times as fast"
    )
    for case in joint:
        figures = (f"{case[name]:.2f}" for name in ("in turn", "at once"))
        ratio = f"{case['in turn'] / case['at once']:.2f}"
        table.add_row(str(case["clients"]), str(case["images"]), case["precision"], *figures, ratio)
    if joint:
        console.print("several clients' networks, forward and backward", table)


if __name__ == "__main__":
    sys.exit(main())
