"""Each example is a Flower app of its own: a real ``flwr run`` of it completes, and its clients learn."""

from __future__ import annotations

import difflib
import importlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedmutual.simulation.inprocess import InProcessGrid
from fedmutual.simulation.superlink import SuperLink

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# example -> its package, and run configuration that is quick
APPS = {
    "quickstart-pytorch": ("quickstart_mutual", {"num-server-rounds": 2, "local-epochs": 1}),
    "any-model": ("anymodel", {"num-server-rounds": 2}),
    "text": ("textapp", {"num-server-rounds": 2}),
}
FILES = ("server_app.py", "client_app.py", "task.py")


@pytest.fixture(params=APPS)
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An example whose package can be imported."""
    name = str(request.param)
    if name == "any-model":
        pytest.importorskip("lightgbm")
    monkeypatch.syspath_prepend(str(EXAMPLES / name))
    yield name
    package = APPS[name][0]
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        del sys.modules[module]


def defaults(name: str) -> dict[str, Any]:
    """The app's own run configuration."""
    import tomllib

    app = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return dict(app["config"])


def test_the_clients_learn_from_each_other_in_one_process(
    example: str, caplog: pytest.LogCaptureFixture
) -> None:
    package, quick = APPS[example]
    config = {**defaults(example), **quick}
    client_app = importlib.import_module(f"{package}.client_app").app
    server_app = importlib.import_module(f"{package}.server_app").app
    replies = []

    class Watched(InProcessGrid):
        def _answer(self, order: Any) -> Any:
            answer = super()._answer(order)
            replies.append(answer)
            return answer

    grid = Watched(client_app, 3, config)
    server_app(grid, Context(1, 1, {}, RecordDict(), dict(config)))
    trained = [r for r in replies if r.metadata.message_type == "train"]
    assert len(trained) == 3 * 2
    assert not any(reply.has_error() for reply in replies)
    assert not any(reply.content.array_records for reply in replies)  # no weight travels
    assert not [record for record in caplog.records if "rejected" in record.getMessage()]


@pytest.mark.slow
def test_flwr_run_completes(example: str, tmp_path: Path) -> None:
    app = tmp_path / example
    shutil.copytree(EXAMPLES / example, app, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    quick = "\n".join(f"{key} = {value}" for key, value in APPS[example][1].items())
    superlink = SuperLink(app, tmp_path / "superlink.log")
    try:
        superlink.start(lambda: time.sleep(0.2))
        run = superlink.submit(
            quick,
            "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=3",
            lambda: time.sleep(0.2),
        )
        deadline = time.monotonic() + 240
        status, details = "", ""
        while not status.startswith("finished") and time.monotonic() < deadline:
            time.sleep(1)
            status, details = superlink.status(run, lambda: time.sleep(0.2))
        superlink.save_log(run, tmp_path / "run.log", lambda: time.sleep(0.2))
    finally:
        superlink.close(lambda: False)
    log = (tmp_path / "run.log").read_text()
    assert (status, details) == ("finished:completed", ""), log
    assert "[ROUND 2/2]" in log
    assert "rejected" not in log
    assert "Aggregated MetricRecord" in log


def quickstart_diff() -> list[str]:
    """From the FedAvg quickstart to this one, as `diff -u` prints it."""
    lines: list[str] = []
    for file in FILES:
        old = (EXAMPLES / "quickstart-pytorch/fedavg/quickstart_fedavg" / file).read_text().splitlines()
        new = (EXAMPLES / "quickstart-pytorch/quickstart_mutual" / file).read_text().splitlines()
        names = f"fedavg/{file}", f"mutual/{file}"
        lines += [line.rstrip("\n") for line in difflib.unified_diff(old, new, *names, lineterm="")]
    return lines


def test_the_quickstarts_diff_is_short_and_on_its_page() -> None:
    diff = quickstart_diff()
    changed = [line for line in diff if line[0] in "+-" and not line.startswith(("+++", "---"))]
    assert 10 < len(changed) <= 40
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert "```diff\n" + "\n".join(diff) + "\n```" in page
