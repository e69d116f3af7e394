"""What the server's log and summary say to people."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from local_grid import play

from fedmutual.engine.server import _unmeasured
from fedmutual.report.tables import counted
from fedmutual.results.directory import ResultsError, RunDirectory
from fedmutual.settings import as_container
from fedmutual.settings.compose import compose
from fedmutual.wire.exchange import listed


def test_a_round_says_its_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fedmutual")  # it does not propagate once its logs are shown
    caplog.set_level(logging.INFO, "fedmutual")
    logger.addHandler(caplog.handler)
    try:
        run = play(tmp_path, "rounds=1", clients=2)
    finally:
        logger.removeHandler(caplog.handler)
    known = [line["validation_accuracy"] for line in run.history if not line["closing"]]
    said = f"round 1: 2 clients reported; validation {sum(known) / 2:.3f}, worst {min(known):.3f}"
    assert said in caplog.text


def test_names_are_listed_up_to_ten() -> None:
    assert listed(["b", "a"]) == "a, b"
    assert listed([f"c{i}" for i in range(12)]).endswith(" and 2 more")
    assert (counted(1, "round"), counted(2, "round")) == ("1 round", "2 rounds")


def test_test_images_of_the_server_alone_are_told() -> None:
    shared, none = SimpleNamespace(unseen=[1, 2, 3]), SimpleNamespace(unseen=None)
    silent, told = SimpleNamespace(unseen_predictions={}), SimpleNamespace(unseen_predictions={"a": 1})
    assert "nothing was measured on the server's 3 test images" in _unmeasured(silent, shared, {})  # type: ignore[arg-type]
    assert _unmeasured(silent, shared, {"global_model": {"folder": "x"}}) == ""  # type: ignore[arg-type]
    assert _unmeasured(told, shared, {}) == ""  # type: ignore[arg-type]
    assert _unmeasured(silent, none, {}) == ""  # type: ignore[arg-type]


def test_all_settings_that_differ_are_named_at_a_resume(tmp_path: Path) -> None:
    saved = as_container(compose(["rounds=3"]))
    directory = RunDirectory.create(tmp_path / "run", json.loads(json.dumps(saved)), "run", [])
    try:
        directory.require_same(as_container(compose(["rounds=3", "exchange.min_clients=1"])))
        with pytest.raises(ResultsError, match=r"rounds is 4 now and was 3; seed is 9 now and was 0 in"):
            directory.require_same(as_container(compose(["rounds=4", "seed=9"])))
    finally:
        directory.close()
