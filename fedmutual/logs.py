"""Log output of the apps (Flower configures only its own logger), and foreign text made safe to show."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# Marks, overrides and isolates reorder what a terminal shows. Joiners stay: some scripts need them.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
_BREAKS = frozenset("\u2028\u2029")
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def shown(text: object) -> str:
    r"""Return text for one line of a terminal, log or table: control characters are escaped (``\x1b``).

    Escaped are control characters and line breaks, marks that change the direction of writing, and the bytes
    of file names that are not UTF-8.
    """
    return "".join(_escaped(character) if _is_control(character) else character for character in str(text))


def shown_lines(text: object) -> str:
    """Return text of several lines with :func:`shown` for each; all but the first are indented.

    The indentation tells a line break inside a message from a new message, which a name must not forge.
    """
    first, *rest = str(text).split("\n")
    return "\n".join([shown(first), *(f"  {shown(line.expandtabs(4))}" for line in rest)])


def brief(value: object) -> str:
    """Return a value for an error message: on one line, and short whatever a stranger sent."""
    text = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def complain(text: object, stream: TextIO | None = None) -> None:
    """Print an error or warning of a command to the standard error, without raw control characters."""
    print(shown_lines(text), file=stream or sys.stderr)


def csv_cell(value: object) -> object:
    """Return a cell that spreadsheets do not read as a formula: such text gets a leading apostrophe.

    Numbers, also those written as text, are unchanged; control characters but line feeds are escaped.
    """
    if not isinstance(value, str):
        return value
    text = "\n".join(map(shown, value.split("\n")))
    return f"'{text}" if text.lstrip().startswith(_FORMULA) and not _is_number(text) else text


def show_logs(level: int = logging.INFO) -> None:
    """Write ``fedmutual.*`` to the standard error, once a process, without touching the root logger."""
    logger = logging.getLogger("fedmutual")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(levelname)s fedmutual: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Append ``fedmutual.*`` to a file, each line with its time; warn where it cannot be written."""
    logger = logging.getLogger("fedmutual")
    try:
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logger.warning("%s cannot be written: %s", file, error.strerror)
        yield
        return
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class PlainFormatter(logging.Formatter):
    """A formatter whose records hold no raw control character and start exactly one unindented line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text, with its traceback if it has one."""
        return shown_lines(super().format(record))


def _is_control(character: str) -> bool:
    code = ord(character)
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0xD800 <= code < 0xE000
        or character in _BIDI
        or character in _BREAKS
    )


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8 (PEP 383)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
