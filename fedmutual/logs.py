"""Log output of the apps: Flower configures only its own logger."""

from __future__ import annotations

import logging


def show_logs(level: int = logging.INFO) -> None:
    """Write ``fedmutual.*`` to the standard error, once a process, without touching the root logger."""
    logger = logging.getLogger("fedmutual")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s fedmutual: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
