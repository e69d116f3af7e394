"""Placement of the training images: on the device if they fit, else streamed from host memory."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor

RESIDENT_SHARE = 0.3  # of the device's free memory, for the images of one training

logger = logging.getLogger(__name__)


class Placed(ABC):
    """The images of one training."""

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """Return the images at these positions (int64 [n], on the CPU): uint8 [n, 3, H, W]."""


class Resident(Placed):
    """All images in the memory of the computing device."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self._images = images.to(device)

    def take(self, index: Tensor) -> Tensor:
        return self._images[index.to(self._images.device, non_blocking=True)]


class Streamed(Placed):
    """Images in host memory, copied batch by batch through two pinned buffers.

    The copy runs on its own CUDA stream, in parallel with the previous batch's computation. Meanwhile the
    host, which runs ahead of the device, gathers the next batch.
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self._images = images
        self._device = device
        self._buffers: list[Tensor] = []
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        if self._stream is not None:
            self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def take(self, index: Tensor) -> Tensor:
        buffer = self._buffer(len(index))
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # wait until the copy before last has left this buffer
        torch.index_select(self._images, 0, index, out=buffer)
        if self._stream is None:
            return buffer.to(self._device, copy=True)
        with torch.cuda.stream(self._stream):
            batch = buffer.to(self._device, non_blocking=True)
            assert copied is not None
            copied.record(self._stream)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        batch.record_stream(computing)
        return batch

    def _buffer(self, size: int) -> Tensor:
        """Return the first ``size`` images of the next buffer, in the memory layout of the images."""
        self._turn = 1 - self._turn
        if not self._buffers or len(self._buffers[0]) < size:
            flat, pinned = self._images.ndim != 4, self._stream is not None
            shape = self._images.shape if flat else self._images.permute(0, 2, 3, 1).shape
            empty = [
                torch.empty((size, *shape[1:]), dtype=self._images.dtype, pin_memory=pinned) for _ in range(2)
            ]
            self._buffers = empty if flat else [buffer.permute(0, 3, 1, 2) for buffer in empty]
        return self._buffers[self._turn][:size]


def place(images: Tensor, device: torch.device) -> Placed:
    """Place the images on the device if they fit, else stream them.

    Parameters
    ----------
    images : uint8 Tensor [n, 3, H, W], or float Tensor [n, ...] of a frozen backbone's outputs
        In host memory.
    device : torch.device
    """
    if device.type != "cuda":
        return Resident(images, device)
    free, _ = torch.cuda.mem_get_info(device)
    if images.nbytes <= RESIDENT_SHARE * free:
        try:
            return Resident(images, device)
        except torch.OutOfMemoryError:  # another process took the memory first
            torch.cuda.empty_cache()
    sizes = images.nbytes >> 20, free >> 20
    logger.info("%d MB of images stay in host memory: %s has %d MB free", sizes[0], device, sizes[1])
    return Streamed(images, device)


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Scale uint8 images [n, 3, H, W] to float in [0, 1] on ``device``, in channels-last memory.

    Features [n, F] and maps [n, K, h, w] of a frozen backbone are floats already, and stay as they are.
    """
    moved = images.to(device, non_blocking=True)
    numbers = moved.to(torch.float32)
    if moved.dtype == torch.uint8:
        numbers.div_(255)
    return numbers.contiguous(memory_format=torch.channels_last) if numbers.ndim == 4 else numbers
