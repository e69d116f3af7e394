"""Memory: images on the device or streamed to it, and micro-batches where a batch does not fit."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import pixels, private, public
from torch import Tensor, nn

from fedmutual.learning import placement
from fedmutual.learning.evaluation import predict
from fedmutual.learning.optimizers import make_optimizer
from fedmutual.learning.placement import Resident, Streamed, place
from fedmutual.learning.training import Trainer

CPU = torch.device("cpu")


class Small(nn.Module):
    """A network whose device, from ``full`` images a forward pass on, is out of memory."""

    def __init__(self, full: int, normalise: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4) if normalise else nn.Identity()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        self.full = full
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if len(images) >= self.full:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        self.seen.append(len(images))
        scores: Tensor = self.layers(images)
        return scores


def trained(full: int, normalise: bool = False, **parts: Any) -> tuple[Small, float]:
    model = Small(full, normalise)
    trainer = Trainer(
        model,
        make_optimizer("sgd", model.parameters(), 0.05, 0.9, 0.0),
        "fp32",
        16,
        torch.Generator().manual_seed(3),
    )
    loss = trainer.train(6, parts.get("private"), parts.get("public"))
    return model, loss


PARTS = {
    "private": {"private": private(40, size=8)},
    "public": {"public": public(24, size=8)},
    "both": {"private": private(40, size=8), "public": public(24, size=8)},
}


@pytest.mark.parametrize(("kind", "full"), [("both", 30), *itertools.product(PARTS, [12, 5, 3])])
def test_micro_batches_do_the_whole_batchs_arithmetic(
    kind: str, full: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole, expected = trained(1000, **PARTS[kind])
    with caplog.at_level(logging.WARNING):
        cut, loss = trained(full, **PARTS[kind])
    assert max(cut.seen) < full
    assert sum(cut.seen) >= sum(whole.seen)
    assert loss == pytest.approx(expected, rel=1e-5)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[key], value, rtol=1e-4, atol=1e-6)
    said = [record.message for record in caplog.records]
    assert "cpu is out of memory: every batch is now split into" in said[0]
    assert len(said) <= 5  # once a halving, not once a step
    assert "batch normalisation" not in caplog.text


def test_batch_normalisation_is_not_the_same_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(12, normalise=True, private=private(40, size=8))
    assert "batch normalisation now uses one micro-batch at a time: results differ" in caplog.text


def test_a_single_image_that_does_not_fit_is_an_error_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"no memory for a single image.*Tried to allocate.*device=cpu"):
        trained(1, private=private(40, size=8))


def test_what_fits_is_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = trained(17, private=private(48, size=8))
    assert model.seen == [16] * 6
    assert caplog.text == ""


def test_predictions_in_smaller_batches_are_the_same(caplog: pytest.LogCaptureFixture) -> None:
    images = pixels(20, size=8)
    expected = predict(Small(1000), images, 16)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(predict(Small(5), images, 16), expected)
    assert "predicting 4 images at a time" in caplog.text
    with pytest.raises(torch.cuda.OutOfMemoryError):
        predict(Small(1), images, 16)


# ---------------------------------------------------------------------------------------------------
# Where the images lie


@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=9), min_size=1, max_size=6))
def test_streamed_images_are_those_asked_for(batches: list[list[int]]) -> None:
    images = pixels(20, size=4).contiguous(memory_format=torch.channels_last)
    streamed, resident = Streamed(images, CPU), Resident(images, CPU)
    taken = [streamed.take(torch.tensor(batch)) for batch in batches]  # all kept: no batch is overwritten
    for batch, found in zip(batches, taken, strict=True):
        assert torch.equal(found, images[batch])
        assert torch.equal(found, resident.take(torch.tensor(batch)))


def test_a_cpu_keeps_images_where_they_are() -> None:
    images = pixels(5, size=4)
    placed = place(images, CPU)
    assert isinstance(placed, Resident)
    assert placed._images is images


@pytest.mark.parametrize(("free", "kind"), [(10 * 300, Resident), (2 * 300, Streamed)])
def test_images_go_to_the_gpu_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, free: int, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    class Fake:
        """Stands for either class: there is no GPU here to put anything on."""

        def __init__(self, images: Tensor, device: torch.device) -> None:
            pass

    fakes = {name: type(name, (Fake,), {}) for name in ("Resident", "Streamed")}
    for name, fake in fakes.items():
        monkeypatch.setattr(placement, name, fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    images = pixels(25, size=2)  # 300 bytes
    with caplog.at_level(logging.INFO):
        assert isinstance(place(images, torch.device("cuda")), fakes[kind.__name__])
    assert ("stay in host memory" in caplog.text) == (kind is Streamed)


def test_a_gpu_that_filled_up_meanwhile_is_streamed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(images: Tensor, device: torch.device) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(placement, "Resident", full)
    monkeypatch.setattr(placement, "Streamed", lambda images, device: "streamed")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert place(pixels(5), torch.device("cuda")) == "streamed"


# ---------------------------------------------------------------------------------------------------
# The optimiser

LEAN = """
import sys, torch
from torch import nn
from fedmutual.learning.optimizers import make_optimizer
model = nn.Linear(3, 2)
for name in ("adam", "adamw", "sgd"):
    optimizer = make_optimizer(name, model.parameters(), 0.1, 0.9 if name == "sgd" else 0.0, 0.0)
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def in_a_new_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_optimiser_does_not_import_the_compiler() -> None:
    assert in_a_new_process(LEAN) == "False"


COLLECTIONS = """
import gc, client_app
before = [generation["collections"] for generation in gc.get_stats()][1:]
client_app._client()
first = gc.get_freeze_count()
client_app._client()
after = [generation["collections"] for generation in gc.get_stats()][1:]
print(after == before, gc.isenabled(), first > 100_000, gc.get_freeze_count() == first)
"""


def test_a_client_process_collects_no_garbage_while_it_imports_and_does_afterwards() -> None:
    assert in_a_new_process(COLLECTIONS) == "True True True True"


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_it_is_torchs_own_arithmetic(name: str) -> None:
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    weights = []
    for lean in (True, False):
        model = Small(1000)
        if lean:
            optimizer = make_optimizer(name, model.parameters(), 0.01, 0.9, 0.1)
        elif name == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        else:
            optimizer = kinds[name](model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-7)
        for step in range(3):
            optimizer.zero_grad()
            model(pixels(4, seed=step, size=8).float()).square().mean().backward()
            optimizer.step()
        assert isinstance(optimizer, kinds[name])
        weights.append(model.state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])
