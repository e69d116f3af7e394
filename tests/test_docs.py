"""The documentation: it builds without a warning and needs no network, and what it says is there."""

from __future__ import annotations

import ast
import html
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import flwr
import pytest

from fedmutual.cli import make_parser
from fedmutual.commands.completion import complete_override
from fedmutual.compare.settings import load_study
from fedmutual.settings.compose import compose
from fedmutual.settings.origins import meanings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    arguments = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


def text_of(page: Path) -> str:
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_a_warning_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](nowhere.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nplugins: []\n")
    arguments = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "nowhere.md" in result.stderr


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="?(https?:)?//[^">]*', re.IGNORECASE
    )
    pages = [*site.glob("**/*.html")]
    assert len(pages) > 15
    for page in pages:
        assert not loaded.findall(page.read_text(encoding="utf-8")), page.name
    for sheet in site.glob("**/*.css"):
        assert not re.search(r"url\(\s*['\"]?https?:|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_setting_is_on_its_page(site: Path) -> None:
    page = (site / "settings.html").read_text(encoding="utf-8")
    keys = {item.rstrip("=") for item in complete_override("")}
    assert {"rounds", "strategy.kl_weight", "partition.alpha", "train.batch_size"} <= keys
    groups = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    shown = set(re.findall(r"<code>([\w.]+)(?:=[^<]*)?</code>", page))
    values = {key for key in keys - groups if not key.startswith("experiment")} - {"model._target_"}
    named = {key for key in values if not key.endswith("._target_")}
    assert named - shown == set()


def test_every_meaning_is_on_the_page_in_the_schemas_words(site: Path) -> None:
    shown = " ".join(text_of(site / "settings.html").split())
    strategies = [path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")]
    words = meanings(load_study([]).settings)
    for strategy in strategies:
        words |= meanings(compose([f"strategy={strategy}", "model=pretrained"]))
    assert len(words) > 60
    missing = {key for key, said in words.items() if " ".join(said.replace("`", "").split()) not in shown}
    assert missing == set()


def test_every_command_and_option_is_on_its_page(site: Path) -> None:
    shown = text_of(site / "commands.html")
    commands = next(a for a in make_parser()._actions if a.dest == "command").choices
    assert isinstance(commands, dict)
    for name, command in commands.items():
        assert f"usage: fedmutual {name}" in shown
        for action in command._actions:
            assert all(option in shown for option in action.option_strings)


def script(path: Path) -> ModuleType:
    """A Python file of the documentation, which is in no package."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formulas_become_mathml() -> None:
    hook = script(DOCS / "hooks" / "mathml.py")
    shown = hook.on_page_content(r'<p><span class="arithmatex">\(a &lt; b_i\)</span></p>')
    assert "<math" in shown
    assert "<mo>&#x0003C;</mo>" in shown
    assert "<msub>" in shown
    assert "\\(" not in shown


def test_no_formula_is_left_as_it_was_typed(site: Path) -> None:
    for page in site.glob("**/*.html"):
        assert not re.search(r'class="arithmatex">\s*\\[(\[]', page.read_text(encoding="utf-8")), page.name


def said_in(folder: Path) -> Iterator[str]:
    """Every string of a folder's Python files; what an f-string fills in is "…"."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)


def test_every_message_of_troubleshooting_is_one_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    ours, _, others = page.partition("## What Flower says")
    ours, others = (re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE) for part in (ours, others))
    assert len(ours) > 50
    strings = list(said_in(ROOT / "fedmutual"))
    gone = [m for m in ours if not any(m in string for string in strings)]
    assert gone == []
    flowers = list(said_in(Path(flwr.__file__).parent / "supercore"))
    assert [m for m in others if not any(m in string for string in flowers)] == []


def test_the_picture_is_what_its_script_draws() -> None:
    drawn = script(DOCS / "figures" / "draw_round.py").draw()
    assert (DOCS / "figures" / "round.svg").read_text(encoding="utf-8") == drawn


def test_links_of_the_readme_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
        assert len(targets) > 2
        local = [target for target in targets if not target.startswith("http")]
        assert [target for target in local if not (ROOT / target).exists()] == []


def commands_in(text: str) -> list[str]:
    """The ``fedmutual`` commands that a text shows as code, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("    fedmutual ")]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda p: p.stem)
def test_the_commands_that_a_page_shows_are_understood(page: Path) -> None:
    parser = make_parser()
    for line in commands_in(page.read_text(encoding="utf-8")):
        arguments, rest = parser.parse_known_args(
            [word for word in shlex.split(line)[1:] if word != "--help"]
        )
        assert not [word for word in rest if word.startswith("-")], line
        overrides = [*getattr(arguments, "overrides", []), *rest]
        keys = {override.partition("=")[0] for override in overrides if "=" in override}
        assert {key for key in keys if not key.startswith("+")} - known_keys() - OF_RECIPES == set(), line


OF_RECIPES = {"model.width"}  # of a model that a page tells the reader to write


def known_keys() -> set[str]:
    """What can be overridden."""
    study = {f"study.{key}" for key in meanings(load_study([]).settings)}
    return {item.rstrip("=") for item in complete_override("")} | study


def test_every_test_that_security_md_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []
