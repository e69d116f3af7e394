"""Is there a model of that name? Answered from the source files, without importing torch or torchvision.

Importing them takes seconds; a misspelt model should be refused at once.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from fedmutual.settings import ModelSettings
from fedmutual.settings.compose import CONF_DIR

MODEL_DIR = CONF_DIR / "model"
_MAX_STAR_IMPORTS = 8  # `from .x import *` in x's own modules: deeper chains than this are no longer followed


def models_problem(model: ModelSettings, model_dir: Path = MODEL_DIR) -> str | None:
    """Say which model setting names no class or function, key first; None when all are found.

    Parameters
    ----------
    model : ModelSettings
        ``target`` is a dotted path; ``per_client`` holds names of ``conf/model/*.yaml`` or dotted paths, and
        values after them (``"pretrained backbone=lite1"``).
    model_dir : Path
        The folder of the named models.
    """
    problem = dotted_path_problem(model.target)
    if problem:
        return f"model._target_: {problem}"
    for name in dict.fromkeys(model.per_client):
        target = (name.split() or [""])[0]
        problem = dotted_path_problem(target) if "." in target else _named_model_problem(target, model_dir)
        if problem:
            return f"model.per_client: {problem}"
    return None


def dotted_path_problem(path: str) -> str | None:
    """Say why ``path`` names no class or function of an installed package; None when it does.

    What cannot be decided without running code (a compiled module, a module-level ``__getattr__``) passes.

    Examples
    --------
    >>> dotted_path_problem("json.JSONDecoder") is None
    True
    >>> dotted_path_problem("json.JSONDecode")
    "'json.JSONDecode' does not exist: json has no 'JSONDecode' (close: JSONDecoder)"
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        return f"{path!r} is no dotted path such as torchvision.models.resnet18"
    module = _top_module(parts[0])
    if module is None:
        return f"{path!r} does not exist: no package {parts[0]!r} is installed"
    for position, part in enumerate(parts[1:], start=1):
        attributes = module.attributes()
        child = module.child(part)
        last = position == len(parts) - 1
        if child is None or (last and part in attributes.objects):
            return _missing(path, parts[:position], part, attributes)
        module = child
    return f"{path!r} is a module, not a class or function in it"


def definition(path: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Find where a class or function is written, through what its modules import; None: not found.

    Examples
    --------
    >>> definition("json.JSONDecoder").lineno > 1  # from json/decoder.py
    True
    """
    *modules, name = path.split(".")
    module = _top_module(modules[0]) if modules else None
    for part in modules[1:]:
        module = module.child(part) if module else None
    return module.definition(name) if module else None


@dataclass(frozen=True)
class _Attributes:
    objects: frozenset[str]  # names that the module's source binds, submodules left out
    certain: bool  # False: there may be more that only running the module shows


@dataclass(frozen=True)
class _Module:
    source: Path | None  # the .py file; None: a namespace package or a compiled module
    folders: tuple[Path, ...]  # where its submodules lie; empty: it is no package
    compiled: bool = False

    def child(self, name: str) -> _Module | None:
        for folder in self.folders:
            if (folder / name / "__init__.py").is_file():
                return _Module(folder / name / "__init__.py", (folder / name,))
            if (folder / f"{name}.py").is_file():
                return _Module(folder / f"{name}.py", ())
            if any(folder.glob(f"{name}.*.so")) or any(folder.glob(f"{name}.*.pyd")):
                return _Module(None, (), compiled=True)
            if (folder / name).is_dir() and name != "__pycache__":
                return _Module(None, (folder / name,))
        return None

    def attributes(self, depth: int = 0) -> _Attributes:
        if self.source is None:
            return _Attributes(frozenset(), certain=not self.compiled)
        names: set[str] = set()
        certain = depth < _MAX_STAR_IMPORTS
        tree = _tree(self.source)
        for statement in _module_level(tree.body):
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                found = self._star_import(statement, depth)
                names |= found.objects
                certain = certain and found.certain
            elif isinstance(statement, ast.ImportFrom):
                names.update(self._imported(statement))
            else:
                names.update(_bound_names(statement))
        return _Attributes(frozenset(names), certain and "__getattr__" not in names)

    def definition(self, name: str, depth: int = 0) -> ast.FunctionDef | ast.ClassDef | None:
        if self.source is None or depth > _MAX_STAR_IMPORTS:
            return None
        found: ast.FunctionDef | ast.ClassDef | None = None
        for statement in _module_level(_tree(self.source).body):
            if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name == name:
                found = statement
            elif isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name or (
                        alias.name == "*" and not name.startswith("_")
                    ):
                        module = self._relative(statement)
                        wanted = name if alias.name == "*" else alias.name
                        found = (module.definition(wanted, depth + 1) if module else None) or found
        return found

    def _imported(self, statement: ast.ImportFrom) -> Iterator[str]:
        module = self._relative(statement)
        for alias in statement.names:
            if module is None or module.child(alias.name) is None:
                yield alias.asname or alias.name

    def _star_import(self, statement: ast.ImportFrom, depth: int) -> _Attributes:
        module = self._relative(statement)
        if module is None or module.source is None or depth >= _MAX_STAR_IMPORTS:
            return _Attributes(frozenset(), certain=False)
        listed = _literal_all(module.source)
        if listed is not None:
            return _Attributes(listed, certain=True)
        found = module.attributes(depth + 1)
        return _Attributes(frozenset(n for n in found.objects if not n.startswith("_")), found.certain)

    def _relative(self, statement: ast.ImportFrom) -> _Module | None:
        parts = (statement.module or "").split(".") if statement.module else []
        if statement.level == 0:
            module = _top_module(parts[0])
            parts = parts[1:]
        else:
            folder = self.source.parent if self.source else None
            for _ in range(statement.level - 1):
                folder = folder.parent if folder else None
            module = _Module(folder / "__init__.py", (folder,)) if folder else None
        for part in parts:
            module = module.child(part) if module else None
        return module


def _top_module(name: str) -> _Module | None:
    try:
        spec = importlib.util.find_spec(name)  # of a top-level name: finds its file, imports nothing
    except ValueError:  # a module that runs as a script has no spec
        return None
    if spec is None:
        return None
    source = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    folders = tuple(Path(folder) for folder in spec.submodule_search_locations or ())
    return _Module(source, folders, compiled=source is None and not folders)


def _tree(source: Path) -> ast.Module:
    """Parse a module; the result is shared and must not be changed."""
    status = source.stat()
    return _parsed(source, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _parsed(source: Path, modified: int, size: int) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, those within if, try and with included."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _module_level(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _module_level(handler.body)


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import):
        yield from ((alias.asname or alias.name.split(".")[0]) for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _literal_all(source: Path) -> frozenset[str] | None:
    """The module's ``__all__`` when it is one plain list of strings, else None."""
    values = [
        statement.value
        for statement in _tree(source).body
        if isinstance(statement, ast.Assign | ast.AugAssign)
        and any(
            isinstance(target, ast.Name) and target.id == "__all__"
            for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
        )
    ]
    if len(values) != 1 or not isinstance(values[0], ast.List | ast.Tuple):
        return None
    names = [item.value for item in values[0].elts if isinstance(item, ast.Constant)]
    return frozenset(str(name) for name in names) if len(names) == len(values[0].elts) else None


def _missing(path: str, module: list[str], name: str, attributes: _Attributes) -> str | None:
    if name in attributes.objects or not attributes.certain:
        return None
    close = difflib.get_close_matches(name, sorted(attributes.objects), n=3)
    hint = f" (close: {', '.join(close)})" if close else ""
    return f"{path!r} does not exist: {'.'.join(module)} has no {name!r}{hint}"


def _named_model_problem(name: str, model_dir: Path) -> str | None:
    file = model_dir / f"{name}.yaml"
    if not file.is_file():
        names = sorted(path.stem for path in model_dir.glob("*.yaml") if path.stem != "custom")
        return f"{name!r} is none of {', '.join(names)}, nor a dotted path such as torchvision.models.vgg11"
    target = OmegaConf.to_container(OmegaConf.load(file))["_target_"]  # type: ignore[index, call-overload]
    if not isinstance(target, str) or "." not in target:
        return f"{name!r}: conf/model/{name}.yaml names no _target_; give the model's dotted path instead"
    return dotted_path_problem(target)
