"""precision=auto: bf16 where the processor has it."""

from __future__ import annotations

import pytest
import torch

from fedmutual.learning.precision import resolve
from fedmutual.settings.compose import compose


@pytest.mark.parametrize("asked", ["fp32", "bf16", "fp16"])
def test_a_format_that_is_asked_for_is_used(asked: str) -> None:
    assert resolve(asked, torch.device("cpu")) == asked


@pytest.mark.parametrize(("device", "there", "used"), [("cpu", True, "bf16"), ("cpu", False, "fp32")])
def test_auto_on_a_processor(monkeypatch: pytest.MonkeyPatch, device: str, there: bool, used: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)
    assert resolve("auto", torch.device(device)) == used


@pytest.mark.parametrize(("there", "used"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_does_not_take_emulation(
    monkeypatch: pytest.MonkeyPatch, there: bool, used: str
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or there

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve("auto", torch.device("cuda", 0)) == used


def test_auto_on_a_device_of_another_kind_is_fp32() -> None:
    assert resolve("auto", torch.device("mps")) == "fp32"


def test_the_setting_takes_it() -> None:
    assert compose(["precision=auto"]).precision == "auto"
