"""The result of a check."""

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
        Name of the check, one or two words.
    status : str
        "ok", "warning" or "failed".
    text : str
        The result.
    remedy : str
        What to do; empty if nothing is needed.
    """

    check: str
    status: str
    text: str
    remedy: str = ""


class CheckError(Exception):
    """A failed check: the problem and the remedy."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


def run_check(check: str, look: Callable[[], str]) -> Finding:
    """Run a check and return its result as a finding; fedmutual's ValueErrors include their remedy."""
    try:
        return Finding(check, OK, look())
    except CheckError as error:
        return Finding(check, FAILED, str(error), error.remedy)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return Finding(check, FAILED, f"{type(error).__name__}: {error}")
