"""The floating-point format of training: as the settings say, or what the processor is fast in."""

from __future__ import annotations

import torch


def resolve(precision: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; for ``auto`` bf16 where the device has instructions for it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
