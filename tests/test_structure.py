"""The package's imports have no circle: not between files, not between folders, types included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fedmutual"


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports anywhere, for types too."""
    files = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (submodules & modules.keys()) or {node.module}
        graph[name] = (found & modules.keys()) - {name, "fedmutual"}
    graph["fedmutual"] = set()  # the public face names everything, and is imported by anyone for its version
    return graph


def test_no_circle_of_files() -> None:
    assert len(imports()) > 100
    order = list(TopologicalSorter(imports()).static_order())
    assert order.index("fedmutual.settings.schema") < order.index("fedmutual.engine.server")


def test_no_circle_of_folders() -> None:
    folders: dict[str, set[str]] = {}
    for name, found in imports().items():
        if name != "fedmutual":
            own = name.split(".")[1]
            folders.setdefault(own, set()).update({other.split(".")[1] for other in found} - {own})
    TopologicalSorter(folders).prepare()
    assert folders["settings"] <= {"appfolder", "logs"}
    assert folders["strategies"] == {"learning", "wire"}
    assert folders["learning"] == set()


def test_a_circle_would_be_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_nothing_unpickles_and_pictures_are_opened_in_one_place() -> None:
    opened, unpickled = [], []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.endswith("Image.open"):
                opened.append((path.name, {keyword.arg for keyword in node.keywords}))
            loads = called in ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "torch.hub.load")
            loads = loads and "weights_only=True" not in ast.unparse(node)  # tensors, and nothing else
            if loads or "allow_pickle=True" in ast.unparse(node):
                unpickled.append((path.name, called))
    assert opened == [("decoding.py", {"formats"})]
    assert unpickled == [("hydra_conf.py", "pickle.loads")]  # what the same process has pickled
