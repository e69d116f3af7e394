"""The registry: a folder with the public key of every site, ``NAME.pub``."""

from __future__ import annotations

from pathlib import Path

from fedmutual.files.atomic import atomic_write
from fedmutual.settings.identity import CLIENT_NAME

SUFFIX = ".pub"


class Registry:
    """Names and public keys of the sites.

    Parameters
    ----------
    folder : Path
        ``sites`` of the server's folder, which ``fedmutual provision`` writes; a missing one is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, bytes]:
        """Return name -> public key in OpenSSH's format, in the order of the names."""
        files = sorted(self.folder.glob(f"*{SUFFIX}"))
        return {file.name.removesuffix(SUFFIX): file.read_bytes() for file in files if _named(file)}

    def put(self, name: str, key: bytes) -> None:
        """Write a site's public key.

        Raises
        ------
        WriteError
            The folder cannot be written.
        """
        file = self.folder / f"{name}{SUFFIX}"
        if not file.exists() or file.read_bytes() != key:
            atomic_write(file, key)

    def drop(self, name: str) -> None:
        """Forget a site."""
        (self.folder / f"{name}{SUFFIX}").unlink(missing_ok=True)


def _named(file: Path) -> bool:
    return CLIENT_NAME.fullmatch(file.name.removesuffix(SUFFIX)) is not None
