"""What a client's mixed step costs with ``strategy.public_epochs=auto``: image passes, steps, CPU seconds.

    python benchmarks/public_work.py

Random images, as many and as large as the digits (20x20, 400 public ones) and the photographs (32x32, 600);
one thread, bf16; the median of ``--repeat`` rounds without the first. For accuracy:
``fedmutual compare experiment=public_work``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from fedmutual.learning.training import Private, Public, Trainer
from fedmutual.models.build import build_model
from fedmutual.settings.compose import compose

BATCH, LOCAL_EPOCHS, PASSES = 32, 3, 3
CASES = (  # side in pixels, classes, public images, clients, private images of each
    (20, 10, 400, 5, 180),
    (20, 10, 400, 20, 45),
    (20, 10, 400, 50, 18),
    (32, 2, 600, 20, 130),
    (32, 2, 600, 50, 52),
)
CHOICES = ((PASSES, 50), (None, 50), (None, 25), (None, 12))  # public_epochs (None: auto), min_steps


def images(count: int, size: int) -> torch.Tensor:
    """Return noise, uint8 [count, 3, size, size]."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def cost(
    model: torch.nn.Module, own: Private, public: Public, passes: int | None, least: int
) -> tuple[int, int, float]:
    """Train for one round; return image passes, steps and CPU seconds."""
    optimizer = torch.optim.Adam(model.parameters())
    trainer = Trainer(model, optimizer, "bf16", BATCH, torch.Generator().manual_seed(0))
    steps, lesson = trainer.mixed(len(own.images), public, LOCAL_EPOCHS, passes, least)
    start = time.process_time()
    trainer.train(steps, own, lesson)
    return trainer.images, steps, time.process_time() - start


def main() -> None:
    """Print one line for each size of a federation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    for size, classes, shared, clients, count in CASES:
        model, _ = build_model(compose([f"data.image_size={size}"]).model, classes, size, seed=0)
        own = Private(images(count, size), torch.arange(count) % classes)
        targets = torch.log_softmax(torch.randn(shared, classes), dim=1)
        public = Public(images(shared, size), targets, torch.zeros(shared), None, "peer_own", 1.0, 1.0)
        print(f"{size}x{size}, {shared} public images, {clients} clients of {count} private images")
        for passes, least in CHOICES:
            found = [cost(model, own, public, passes, least) for _ in range(repeat + 1)][1:]
            seconds = statistics.median(entry[2] for entry in found)
            name = "auto" if passes is None else f"{passes} passes"
            print(f"  {name}, min_steps={least}: {found[0][0]:,} ({found[0][1]} steps), {seconds:.2f} CPU s")


if __name__ == "__main__":
    main()
