"""The files that the documentation tells a reader to write do what it says: they are written and executed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("own-strategy", "own-model", "own-data")
_FILE = re.compile(r'^```\w+ title="(?P<path>[^"]+)"\n(?P<content>.*?)^```$', re.DOTALL | re.MULTILINE)

TOGETHER = "tests/test_together.py"
TOGETHER_CONTENT = """
import json
from pathlib import Path

from fedmutual.settings.compose import compose
from fedmutual.simulation.inprocess import run_inprocess


def test_the_new_strategy_model_and_data_make_a_run(tmp_path: Path) -> None:
    overrides = ["strategy=ring", "model=tiny", "data=stripes", "num_clients=2", "rounds=2"]
    overrides += ["data.pool_size=60", f"cache_dir={tmp_path}/cache"]
    assert run_inprocess(overrides, tmp_path / "out") == 0
    result = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (result["strategy"], result["status"]) == ("ring", "completed")
    assert {client["model"] for client in result["clients"].values()} == {"Tiny"}


def test_the_drawn_shapes_are_a_data_folder(tmp_path: Path) -> None:
    data = compose(["data=folder", "data.root=shapes"]).data.load(tmp_path)
    assert data.classes == ("circle", "square", "triangle")
    assert (len(data.pool), len(data.public), set(data.public.labels.tolist())) == (450, 180, {-1})
"""

pytestmark = pytest.mark.slow


def files_of(page: str) -> dict[str, str]:
    """Path -> content of the files that a page shows."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return {match["path"]: match["content"] for match in _FILE.finditer(text)}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout in which somebody has followed every recipe."""
    folder = tmp_path_factory.mktemp("clone") / "fedmutual"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "outputs", "dist", "build", "site", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    if (ROOT / ".mypy_cache").is_dir():  # without it mypy first reads all of torch
        shutil.copytree(ROOT / ".mypy_cache", folder / ".mypy_cache")
    for page in PAGES:
        for path, content in files_of(page).items():
            assert not (folder / path).exists(), f"{path} of docs/{page}.md is there already"
            (folder / path).write_text(content, encoding="utf-8")
    return folder


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, with its code and not this checkout's."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=400)


def do(checkout: Path, *arguments: str) -> str:
    """Run Python in the copy; it must end well."""
    result = run(checkout, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tested(checkout: Path) -> dict[str, list[ElementTree.Element]]:
    """File -> its tests as pytest reports them; one process for all: most of its time is torch's."""
    do(checkout, "make_shapes.py")
    (checkout / TOGETHER).write_text(TOGETHER_CONTENT, encoding="utf-8")
    files = [path for page in PAGES for path in files_of(page) if path.startswith("tests/")]
    result = run(checkout, "-m", "pytest", "-n", "0", "--junit-xml=tested.xml", *files, TOGETHER)
    assert (checkout / "tested.xml").is_file(), result.stdout + result.stderr
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(checkout / "tested.xml").iter("testcase"):
        cases.setdefault(case.attrib["classname"].replace(".", "/") + ".py", []).append(case)
    return cases


def require_passed(cases: list[ElementTree.Element], content: str) -> None:
    assert len(cases) == content.count("\ndef test_") > 0
    # a failure, an error or a skip is an element below the test's
    assert [problem.text for case in cases for problem in case] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_of_a_recipe_pass(tested: dict[str, list[ElementTree.Element]], page: str) -> None:
    ((test, content),) = [file for file in files_of(page).items() if file[0].startswith("tests/")]
    require_passed(tested[test], content)


def test_the_recipes_work_together(tested: dict[str, list[ElementTree.Element]]) -> None:
    require_passed(tested[TOGETHER], TOGETHER_CONTENT)


def test_recipes_are_as_typed_as_the_rest(checkout: Path) -> None:
    written = [path for page in PAGES for path in files_of(page) if path.startswith("fedmutual/")]
    assert len(written) == len(PAGES)
    assert "Success" in do(checkout, "-m", "mypy", "--config-file", "pyproject.toml", *written)
    do(checkout, "-m", "ruff", "check", *written)
