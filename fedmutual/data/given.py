"""Data sets that a Python program gives to a run in its own process, as objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_given: Any = None


@contextmanager
def given(data: Any) -> Iterator[list[str]]:
    """Lend data sets to ``data=custom`` for a while; yield the settings that take them.

    Parameters
    ----------
    data : mapping or object
        As :class:`fedmutual.data.custom.CustomSettings` says; None: nothing is lent.
    """
    global _given
    if data is None:
        yield []
        return
    _given = data
    try:
        yield ["data=custom", f"data._target_={__name__}.data_sets"]
    finally:
        _given = None


def data_sets() -> Any:
    """Return what is lent.

    Raises
    ------
    RuntimeError
        Nothing is, as in another process.
    """
    if _given is None:
        raise RuntimeError(
            "the run's data sets were objects: call fedmutual.run(..., data=...) with them again"
        )
    return _given
