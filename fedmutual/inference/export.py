"""Export a client's model to one file for another runtime, verified against the original."""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmutual.learning.divergence import as_logits
from fedmutual.models.card import preprocessing
from fedmutual.models.stored import StoredModel

FORMATS = {"onnx": "model.onnx", "torchscript": "model.torchscript.pt", "torch_export": "model.pt2"}
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_CARD = "model.json"  # name of the model card inside a file written by torch

Runner = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class ExportError(RuntimeError):
    """The export failed or differs from the model; no file is kept."""


@dataclass(frozen=True)
class Exported:
    """A verified export.

    Attributes
    ----------
    file : Path
    difference : float
        Largest absolute difference from the model's own probabilities.
    num_inputs : int
        Number of pictures compared.
    """

    file: Path
    difference: float
    num_inputs: int


class Program(nn.Module):
    """A model with input scaling and softmax: uint8 [N, 3, S, S] to probabilities [N, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return class probabilities of RGB pictures."""
        return torch.softmax(as_logits(self.model(images.to(torch.float32) / 255)), dim=1)


def export_model(
    stored: StoredModel, kind: str, file: Path, pictures: NDArray[np.uint8], tolerance: float
) -> Exported:
    """Export, read the file back, compare on single pictures and on a batch, and keep it if equal.

    Parameters
    ----------
    kind : str
        A key of :data:`FORMATS`.
    pictures : uint8 array [n, S, S, 3]
        Real inputs, at least two.
    tolerance : float
        Largest allowed difference of a probability.

    Raises
    ------
    ExportError
        A package is missing, the export fails, or the difference exceeds the tolerance.
    """
    inputs = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
    program = Program(stored.model).eval().requires_grad_(False)  # for prediction only: no gradients
    write, read = {
        "onnx": (_write_onnx, _read_onnx),
        "torchscript": (_write_torchscript, _read_torchscript),
        "torch_export": (_write_torch_export, _read_torch_export),
    }[kind]
    if kind == "onnx":
        _require_onnx()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{uuid.uuid4().hex[:12]}.{file.name}")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporters' deprecation warnings
            try:
                write(program, torch.from_numpy(inputs[:2]), part, _described(stored))
            except Exception as error:  # exporters raise many types for unsupported operations
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise ExportError(f"{stored.name} cannot be exported to {kind}: {reason[0]}") from error
            difference = _difference(program, read(part), inputs)
        if not difference <= tolerance:
            raise ExportError(
                f"{file.name} differs from the model by up to {difference:.3g} in a probability, more than "
                f"the tolerance of {tolerance:g}: the file is not kept"
            )
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return Exported(file, difference, len(inputs))


def _difference(program: Program, run: Runner, inputs: NDArray[np.uint8]) -> float:
    """Compare on all pictures at once and on each alone, which also checks that the batch size is free."""
    expected = program(torch.from_numpy(inputs)).numpy()
    together = run(inputs)
    alone = np.concatenate([run(inputs[i : i + 1]) for i in range(len(inputs))])
    if together.shape != expected.shape or alone.shape != expected.shape:
        raise ExportError(f"the export gives {together.shape}, the model {expected.shape}")
    return float(max(np.abs(together - expected).max(), np.abs(alone - expected).max()))


def _described(stored: StoredModel) -> dict[str, str]:
    size = stored.picture.size
    return {
        "classes": json.dumps(list(stored.classes)),
        "image_size": str(size),
        "preprocessing": preprocessing(stored.picture),
        "input": f"images: uint8 [N, 3, {size}, {size}], RGB; the program divides by 255",
        "output": f"probabilities: float32 [N, {len(stored.classes)}], in the order of the classes",
        "card": json.dumps(stored.card),
    }


def _require_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--format onnx needs {', '.join(missing)}: install them with pip install 'fedmutual[export]', "
            "or use --format torchscript or torch_export"
        )


def _write_onnx(program: Program, example: Tensor, file: Path, described: dict[str, str]) -> None:
    import onnx

    batch = torch.export.Dim("batch")
    made = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        dynamic_shapes={"images": {0: batch}},
        input_names=["images"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    model.doc_string = f"{described['input']}\n{described['output']}\n{described['preprocessing']}"
    onnx.helper.set_model_props(model, described)
    onnx.checker.check_model(model)
    onnx.save(model, file)


def _read_onnx(file: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["probabilities"], {"images": images})[0], dtype=np.float32)


def _write_torchscript(program: Program, example: Tensor, file: Path, described: dict[str, str]) -> None:
    traced = torch.jit.trace(program, example, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(file), _extra_files={_CARD: json.dumps(described)})


def _read_torchscript(file: Path) -> Runner:
    program = torch.jit.load(str(file))  # type: ignore[no-untyped-call]
    return lambda images: np.asarray(program(torch.from_numpy(images)).numpy())


def _write_torch_export(program: Program, example: Tensor, file: Path, described: dict[str, str]) -> None:
    shapes: dict[str, Any] = {"images": {0: torch.export.Dim("batch")}}
    made = torch.export.export(program, (example,), dynamic_shapes=shapes)
    with file.open("wb") as stream:  # given a name, torch requires the suffix .pt2
        torch.export.save(made, stream, extra_files={_CARD: json.dumps(described)})


def _read_torch_export(file: Path) -> Runner:
    with file.open("rb") as stream:
        program = torch.export.load(stream).module()
    return lambda images: np.asarray(program(torch.from_numpy(images)).numpy())
