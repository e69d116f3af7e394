"""Settings and versions in the forms that a run records."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import fedmutual


def installed_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    # inside a Flower app bundle fedmutual is no installed package
    others = {name: metadata.version(name) for name in ("flwr", "torch")}
    return {"fedmutual": fedmutual.__version__, **others}


def without_paths(settings: Any) -> Any:
    """Return the settings without the entries whose value is an absolute path: they say nothing elsewhere."""
    if isinstance(settings, Mapping):
        return {str(k): without_paths(v) for k, v in settings.items() if not _is_path(v)}
    if isinstance(settings, (list, tuple)):
        return [without_paths(entry) for entry in settings if not _is_path(entry)]
    return settings


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _is_path(value: Any) -> bool:
    if isinstance(value, (PurePosixPath, PureWindowsPath)):
        return True
    text = value if isinstance(value, str) else ""
    return (
        text.startswith(("~", "file:"))
        or PurePosixPath(text).is_absolute()
        or bool(PureWindowsPath(text).drive)
    )
