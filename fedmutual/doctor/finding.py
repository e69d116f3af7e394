"""What a check found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "failed"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes
    ----------
    check : str
        What was looked at, in a word or two.
    status : str
        "ok", "warning" or "failed".
    text : str
        What was found.
    remedy : str
        What to do about it; empty where nothing is to be done.
    """

    check: str
    status: str
    text: str
    remedy: str = ""


class CheckError(Exception):
    """A check failed: what is wrong, and the remedy."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


def run_check(check: str, look: Callable[[], str]) -> Finding:
    """Turn what a check returns or raises into a finding; ValueErrors of fedmutual carry their remedy."""
    try:
        return Finding(check, OK, look())
    except CheckError as error:
        return Finding(check, FAILED, str(error), error.remedy)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return Finding(check, FAILED, f"{type(error).__name__}: {error}")
