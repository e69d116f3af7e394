"""Where the Flower app lies: in a checkout and in an app bundle beside the package, in a wheel inside it.

An app is ``pyproject.toml``, ``server_app.py``, ``client_app.py``, ``conf/`` and the package itself. A wheel
cannot put the first four beside the package, where they would lie among everybody's packages: it carries
them in ``fedmutual/_app`` (see ``[tool.hatch.build.targets.wheel.force-include]``).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = "_app"


def app_folder(package: Path = PACKAGE) -> Path:
    """Return the folder of ``server_app.py``, ``client_app.py``, ``pyproject.toml`` and ``conf/``."""
    packed = package / _IN_WHEEL
    return packed if packed.is_dir() else package.parent


@contextmanager
def runnable_app(folder: Path, package: Path = PACKAGE) -> Iterator[Path]:
    """Give a folder that ``flwr run`` takes: the checkout itself, or the wheel's parts put together.

    ``flwr run`` packs a folder's files, and follows no link, so that the parts of a wheel are copied (some
    hundred small files) into a temporary folder, which is removed at the end. The bundle is then the very one
    that the checkout gives.

    Parameters
    ----------
    folder : Path
        An app's folder, such as :func:`app_folder` gives.
    package : Path
        The installed package.
    """
    if folder != package / _IN_WHEEL:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fedmutual-app-") as temporary:
        target = Path(temporary).resolve() / "fedmutual"
        shutil.copytree(folder, target)
        ignored = shutil.ignore_patterns(_IN_WHEEL, "__pycache__")
        shutil.copytree(package, target / "fedmutual", ignore=ignored)
        yield target
