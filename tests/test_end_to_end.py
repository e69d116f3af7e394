"""The whole of it: ``fedmutual run``, a real SuperLink, Ray, SuperNodes and the project's own apps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmutual.learning.evaluation import predict
from fedmutual.models.build import build_model, load_weights
from fedmutual.settings import ModelSettings
from fedmutual.settings.compose import compose

pytestmark = pytest.mark.slow

TINY = (
    "num_clients=2", "rounds=3", "data.image_size=24", "data.pool_size=160", "data.unseen_size=60",
    "train.local_epochs=1", "strategy.public_epochs=1", "partition=dirichlet", "partition.alpha=1.0",
)  # fmt: skip


def command(cache: Path, output: Path, *overrides: str) -> list[str]:
    paths = [f"cache_dir={cache}"] if "resume" in " ".join(overrides) else [
        f"cache_dir={cache}", f"output_dir={output}"
    ]  # fmt: skip
    return [sys.executable, "-m", "fedmutual", "run", *overrides, *paths]


def run(cache: Path, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(cache, output, *overrides), capture_output=True, text=True, timeout=400)


def summary(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return content


def history(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def reported(output: Path) -> list[tuple[int, str]]:
    """Who reported when; within a round the order is that of the node ids, which are random."""
    return sorted((line["round"], line["client"]) for line in history(output))


def models(output: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in (output / "clients").glob("*/*/model.safetensors")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder / "cache", folder / "out", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "cache", folder / "out", done.stdout


def test_a_run_leaves_what_it_promises(finished: tuple[Path, Path, str]) -> None:
    _, output, shown = finished
    result = summary(output)
    assert (result["status"], result["strategy"], result["rounds_completed"]) == ("completed", "mutual", 3)
    assert set(result["clients"]) == {"client-0", "client-1"}
    lines = history(output)
    assert reported(output) == [(r, f"client-{i}") for r in range(1, 5) for i in range(2)]
    for name, figures in result["clients"].items():
        own = [line for line in lines if line["client"] == name]
        assert figures["uplink_bytes"] == sum(line["uplink_bytes"] for line in own)
        assert 0 <= figures["unseen_accuracy"] <= 1
        assert figures["finished"]
    assert result["unseen"]["num_examples"] == 60
    for name in ("config.yaml", "accuracy.png", "collaboration.png"):
        assert (output / name).stat().st_size > 0
    assert str(output) in shown.replace("\n", "")


def test_a_client_s_model_is_rebuilt_from_its_folder(finished: tuple[Path, Path, str]) -> None:
    cache, output, _ = finished
    data = compose([*TINY, f"cache_dir={cache}"]).data.load(cache)
    images = torch.from_numpy(data.unseen.images.copy()).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.unseen.labels)
    for name, weights in models(output).items():
        card = json.loads((weights.parent / "model.json").read_text())
        settings = ModelSettings(target=card["target"], arguments=card["arguments"], per_client=[])
        model, _ = build_model(settings, len(card["classes"]), card["image_size"], seed=0)
        load_weights(model, load_file(weights))
        right = (predict(model, images).argmax(dim=1) == labels).float().mean()
        assert float(right) == pytest.approx(summary(output)["clients"][name]["unseen_accuracy"], abs=0.02)


def test_interrupted_and_resumed_ends_with_the_same_bits(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    cache, whole, _ = finished
    output = tmp_path / "out"
    process = subprocess.Popen(command(cache, output, *TINY), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        checkpoint = output / "checkpoint.safetensors"
        if checkpoint.exists():
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130  # it was not over yet
    assert summary(output)["status"] == "stopped"

    resumed = run(cache, output, f"resume={output}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert summary(output)["status"] == "completed"
    assert reported(output) == reported(whole)
    for name, path in models(whole).items():
        expected, found = load_file(path), load_file(models(output)[name])
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
