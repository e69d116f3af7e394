"""``fedmutual export``: export a client's model for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain, show_logs, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedmutual.data.decoding import PictureInput

CHECKED = 16  # maximum number of pictures
_EXAMPLES = """\
examples:
  fedmutual export --model outputs/RUN/clients/NAME/client-0 --format onnx --check photos
  fedmutual export --model DIR --format torchscript --output detector.pt

The program maps uint8 RGB pictures [N, 3, size, size] to probabilities [N, classes]; N is free, and the
program divides by 255 itself. The file is kept only if it is read back and agrees with the model on pictures.
--format onnx needs pip install 'fedmutual[export]'.
exit codes: 0 exported and equal, 1 export failed or differs (no file is kept), 2 no such model or picture.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "export",
        call,
        help="export a client's model to ONNX, TorchScript or torch.export",
        description="Export a client's model and verify the export against the model.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a client's model folder")
    parser.add_argument("--format", required=True, choices=("onnx", "torchscript", "torch_export"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in the model folder")
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGE",
        help=f"pictures for the comparison, the first {CHECKED}; default: generated portraits",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest allowed difference of a probability"
    )


def call(arguments: argparse.Namespace) -> int:
    """Export, verify, and print the largest difference."""
    from fedmutual.inference.pictures import PicturesError
    from fedmutual.models.stored import StoredModelError, find_models, load_model

    show_logs()
    try:
        folders = find_models(arguments.model)
        if len(folders) > 1:
            names = ", ".join(str(folder) for folder in folders)
            raise StoredModelError(f"{arguments.model} has {len(folders)} models, choose one: {names}")
        stored = load_model(folders[0])
        pictures = _pictures(arguments.check, stored.picture)
    except (StoredModelError, PicturesError) as error:
        complain(f"fedmutual export: {error}")
        return 2
    from fedmutual.inference.export import FORMATS, ExportError, export_model

    file = (arguments.output or stored.folder / FORMATS[arguments.format]).absolute()
    try:
        made = export_model(stored, arguments.format, file, pictures, arguments.tolerance)
    except (ExportError, OSError) as error:
        complain(f"fedmutual export: {error}")
        return 1
    kind = "pictures" if arguments.check else "generated portraits"
    print(shown(made.file))
    print(f"largest difference of a probability on {made.num_inputs} {kind}: {made.difference:.2g}")
    return 0


def _pictures(names: list[str] | None, wanted: PictureInput) -> NDArray[np.uint8]:
    """Return pictures for the comparison, at least two, to check that the batch size is free."""
    import numpy as np

    if not names:
        from fedmutual.data.faces import POOL, draw

        return np.stack([draw(0, "export", POOL, index, wanted.size) for index in range(CHECKED)])
    from fedmutual.inference.pictures import PicturesError, find_pictures, read_pictures

    found, _, failures = read_pictures(find_pictures(names)[:CHECKED], [wanted])
    if failures:
        path, reason = next(iter(failures.items()))
        raise PicturesError(f"{shown(path)} cannot be read: {reason}")
    return found[wanted] if len(found[wanted]) > 1 else np.repeat(found[wanted], 2, axis=0)
