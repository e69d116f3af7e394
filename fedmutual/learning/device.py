"""Choose a client's device, and explain why a GPU is not used."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def choose_device(name: str) -> torch.device:
    """Return the device of a setting: auto (a GPU if available), cpu, mps, cuda or cuda:<n>.

    Raises
    ------
    ValueError
        The device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device={name}: torch sees {count} GPUs here ({why_no_gpu()}); use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}: this machine or this PyTorch has no Metal; use auto or cpu")
    return device


def describe(device: torch.device, setting: str) -> str:
    """Describe a device; for a CPU chosen by ``auto``, say why no GPU is used.

    >>> describe(torch.device("cpu"), "cpu").endswith("(device=cpu)")
    True
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        return f"{device}: {properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if device.type != "cpu":
        return str(device)
    reason = f"device={setting}" if setting != "auto" else f"no GPU: {why_no_gpu()}"
    return f"CPU, {torch.get_num_threads()} threads ({reason})"


def why_no_gpu() -> str:
    """Return why torch finds no CUDA GPU, or that it finds one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} visible"
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"PyTorch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    if not any(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*")):
        return "the system shows no NVIDIA device (in a container: run it with --gpus)"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "torch finds none"
