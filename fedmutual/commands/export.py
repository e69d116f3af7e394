"""``fedmutual export``: a client's model for other runtimes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.commands.parser import add_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHECKED = 16  # pictures, at most
_EXAMPLES = """\
examples:
  fedmutual export --model outputs/RUN/clients/NAME/client-0 --format onnx --check photos
  fedmutual export --model DIR --format torchscript --output detector.pt

The program takes uint8 RGB pictures [N, 3, size, size] and gives probabilities [N, classes]; N is free, and
the division by 255 is in it. The file is read back and compared with the model on real pictures before it is
left. --format onnx needs pip install 'fedmutual[export]'.
exit codes: 0 exported and equal, 1 it cannot be exported or differs (nothing is left), 2 no such model or
picture.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser's."""
    parser = add_command(
        commands,
        "export",
        call,
        help="export a client's model to ONNX, TorchScript or torch.export",
        description="Export a client's model, and check the export against it.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a client's model folder")
    parser.add_argument("--format", required=True, choices=("onnx", "torchscript", "torch_export"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in the model folder")
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGE",
        help=f"pictures to compare on, the first {CHECKED}; default: generated portraits",
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a probability")


def call(arguments: argparse.Namespace) -> int:
    """Export, check, and say by how much it differs."""
    from fedmutual.inference.pictures import PicturesError
    from fedmutual.models.stored import StoredModelError, find_models, load_model

    try:
        folders = find_models(arguments.model)
        if len(folders) > 1:
            names = ", ".join(str(folder) for folder in folders)
            raise StoredModelError(f"{arguments.model} holds {len(folders)} models, name one: {names}")
        stored = load_model(folders[0])
        pictures = _pictures(arguments.check, stored.image_size)
    except (StoredModelError, PicturesError) as error:
        print(f"fedmutual export: {error}", file=sys.stderr)
        return 2
    from fedmutual.inference.export import FORMATS, ExportError, export_model

    file = (arguments.output or stored.folder / FORMATS[arguments.format]).absolute()
    try:
        made = export_model(stored, arguments.format, file, pictures, arguments.tolerance)
    except (ExportError, OSError) as error:
        print(f"fedmutual export: {error}", file=sys.stderr)
        return 1
    kind = "pictures" if arguments.check else "generated portraits"
    print(
        f"{made.file}\nlargest difference of a probability on {made.num_inputs} {kind}: {made.difference:.2g}"
    )
    return 0


def _pictures(names: list[str] | None, size: int) -> NDArray[np.uint8]:
    """Pictures to compare on, at least two: a batch of one would not show whether the batch is free."""
    import numpy as np

    if not names:
        from fedmutual.data.faces import POOL, draw

        return np.stack([draw(0, "export", POOL, index, size) for index in range(CHECKED)])
    from fedmutual.inference.pictures import PicturesError, find_pictures, read_pictures

    found, _, failures = read_pictures(find_pictures(names)[:CHECKED], [size])
    if failures:
        path, reason = next(iter(failures.items()))
        raise PicturesError(f"{path} cannot be read: {reason}")
    return found[size] if len(found[size]) > 1 else np.repeat(found[size], 2, axis=0)
