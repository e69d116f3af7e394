"""The files that the documentation tells a reader to write do what it says: they are written and executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("own-strategy", "own-model", "own-data")
_FILE = re.compile(r'^```\w+ title="(?P<path>[^"]+)"\n(?P<content>.*?)^```$', re.DOTALL | re.MULTILINE)

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
    for page in PAGES:
        for path, content in files_of(page).items():
            assert not (folder / path).exists(), f"{path} of docs/{page}.md is there already"
            (folder / path).write_text(content, encoding="utf-8")
    return folder


def do(checkout: Path, *arguments: str) -> str:
    """Run Python in the copy, with its code and not this checkout's."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_of_a_recipe_pass(checkout: Path, page: str) -> None:
    (test,) = [path for path in files_of(page) if path.startswith("tests/")]
    assert "passed" in do(checkout, "-m", "pytest", test)


def test_recipes_are_as_typed_as_the_rest(checkout: Path) -> None:
    written = [path for page in PAGES for path in files_of(page) if path.startswith("fedmutual/")]
    assert len(written) == len(PAGES)
    assert "Success" in do(checkout, "-m", "mypy", "--config-file", "pyproject.toml", *written)
    do(checkout, "-m", "ruff", "check", *written)


def test_the_new_strategy_model_and_data_make_a_run(checkout: Path) -> None:
    do(
        checkout, "-m", "fedmutual", "compare", "strategy=ring", "model=tiny", "data=stripes",
        "num_clients=2", "rounds=2", "data.pool_size=60", "output_dir=out", "cache_dir=cache",
    )  # fmt: skip
    (summary,) = (checkout / "out").glob("**/summary.json")
    result = json.loads(summary.read_text())
    assert (result["strategy"], result["status"]) == ("ring", "completed")
    assert {client["model"] for client in result["clients"].values()} == {"Tiny"}


def test_the_drawn_shapes_are_a_data_folder(checkout: Path) -> None:
    do(checkout, "make_shapes.py")
    code = (
        "from pathlib import Path; from fedmutual.settings.compose import compose; "
        "data = compose(['data=folder', 'data.root=shapes']).data.load(Path('cache')); "
        "print(data.classes, len(data.pool), len(data.public), set(data.public.labels.tolist()))"
    )
    assert do(checkout, "-c", code).strip() == "('circle', 'square', 'triangle') 450 180 {-1}"
