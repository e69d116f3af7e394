"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fedmutual.client.learner import Learner

# how long an example takes says something about the machine, not about the code
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is no UTF-8 in captured output: one such log line would end a run in several processes."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole federations, and run files with a slow test first, so that no process is idle at the end."""
    for item in items:
        if hasattr(getattr(item, "module", None), "play"):  # of local_grid
            item.add_marker("federation")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def facemask_root() -> Path:
    """The photographs of two sources; tests that need them are skipped where they are absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "facemask"
    root = Path(os.environ.get("FEDMUTUAL_FACEMASK", default))
    if not (root / "pool").is_dir():
        pytest.skip(f"no photographs in {root}: set FEDMUTUAL_FACEMASK to the folder with pool/ and unseen/")
    return root


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every local or mixed training: (client, round)."""
    done: list[tuple[str, int]] = []
    for name in ("local_training", "mixed_training"):
        original = getattr(Learner, name)

        def counted(self: Learner, *args: Any, original: Any = original) -> None:
            done.append((self.client, self.order.round))
            original(self, *args)

        monkeypatch.setattr(Learner, name, counted)
    return done


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What ``fedmutual`` logs, although the apps keep it from the root logger."""
    logger = logging.getLogger("fedmutual")
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="fedmutual")
    return lambda: list(caplog.messages)
