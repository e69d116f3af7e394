"""A federation on a pretrained backbone from files to report, beside a plain script that pools the data.

Three things, one after the other: ``fedmutual run model=pretrained`` with an empty cache, the same with the
cache that this has left, and one process that makes the features of the same photographs with timm and fits
scikit-learn's logistic regression to those of all clients together.

    python benchmarks/pretrained.py data=facemask data.root=PHOTOS
    python benchmarks/pretrained.py data=folder data.root=PHOTOS rounds=8 --json pretrained.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

RUN = ("model=pretrained", "num_clients=5", "rounds=12", "public.size=600", "evaluation.unseen_every=0")


def federation(overrides: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Seconds of a run, its clients' mean accuracy on the unseen set, and its worst client's, in per cent."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "fedmutual", "run", *RUN, *overrides, f"output_dir={folder / 'run'}"]
    command.append(f"cache_dir={folder / 'cache'}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode or not (folder / "run" / "report.html").exists():
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    clients = json.loads((folder / "run" / "summary.json").read_text())["clients"].values()
    reached = [100 * client["unseen_accuracy"] for client in clients]
    (folder / "run").rename(folder / f"run-{time.time_ns()}")
    return seconds, float(np.mean(reached)), min(reached)


def pooled(overrides: Sequence[str]) -> tuple[float, float]:
    """Seconds of the plain script, in a process of its own, and its accuracy in per cent."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--plain", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, float(done.stdout)


def plain(overrides: Sequence[str]) -> float:
    """Make features with a plain timm loop and fit a logistic regression; return its accuracy in per cent."""
    import timm
    import torch
    from PIL import Image
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from fedmutual.backbones.weights import find_backbone
    from fedmutual.settings.compose import compose
    from fedmutual.settings.pretrained import pretrained_settings

    settings = compose([*RUN, *overrides])
    chosen = pretrained_settings(settings.model)
    assert chosen is not None
    backbone = find_backbone(chosen)
    network = timm.create_model(backbone.architecture.partition(":")[2], num_classes=0)
    weights = torch.load(backbone.file, map_location="cpu", weights_only=True).values()
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=False)))
    network.eval()
    size = backbone.picture.size
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (backbone.mean, backbone.std))
    root = Path(str(getattr(settings.data, "root", None)))
    parts = ("pool", "unseen") if (root / "pool").is_dir() else ("train", "test")

    def features(part: str) -> tuple[np.ndarray, np.ndarray]:
        found, labels = [], []
        folders = sorted(path for path in (root / part).iterdir() if path.is_dir())
        files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
        for start in range(0, len(files), 64):
            batch = []
            for file, label in files[start : start + 64]:
                picture = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
                batch.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
                labels.append(label)
            with torch.inference_mode():
                found.append(network((torch.stack(batch) - mean) / std).numpy())
        return np.concatenate(found), np.array(labels)

    train, labels = features(parts[0])
    test, expected = features(parts[1])
    scale = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=200).fit(scale.transform(train), labels)
    return 100 * float(model.score(scale.transform(test), expected))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="A federation on a pretrained backbone beside a plain script."
    )
    parser.add_argument("overrides", nargs="+", help="settings of the run: data=..., data.root=...")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.plain:
        print(plain(arguments.overrides))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        empty = federation(arguments.overrides, Path(folder))
        full = federation(arguments.overrides, Path(folder))
    alone = pooled(arguments.overrides)
    table = Table("", "seconds", "mean %", "worst %", title=f"{os.cpu_count()} cores")
    table.add_row("fedmutual run, empty cache", f"{empty[0]:.1f}", f"{empty[1]:.1f}", f"{empty[2]:.1f}")
    table.add_row("fedmutual run, full cache", f"{full[0]:.1f}", f"{full[1]:.1f}", f"{full[2]:.1f}")
    table.add_row("timm and scikit-learn, pooled", f"{alone[0]:.1f}", f"{alone[1]:.1f}", "")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"empty": empty, "full": full, "pooled": alone}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
