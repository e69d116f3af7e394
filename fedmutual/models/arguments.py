"""Does a model take the arguments that the settings give it? Answered from its source, never imported."""

from __future__ import annotations

import ast
from typing import Any

from fedmutual.models.lookup import definition
from fedmutual.settings import ModelSettings
from fedmutual.settings.pretrained import pretrained_settings

# What a value of the settings must be where the source says so; nothing else is judged.
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def arguments_problem(model: ModelSettings) -> str | None:
    """Say which argument ``model.target`` does not take, or not of that type, key first; None: it may.

    A model whose source is not found, that takes ``**kwargs`` or says no types is not judged: building it
    will tell.
    """
    if pretrained_settings(model) is not None:  # typed, and checked when they are composed
        return None
    found = definition(model.target)
    if isinstance(found, ast.ClassDef):
        found = next((s for s in found.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    if found is None:
        return None
    parameters = [*found.args.args, *found.args.kwonlyargs]
    types = {p.arg: ast.unparse(p.annotation) if p.annotation else "" for p in parameters if p.arg != "self"}
    for name, value in model.arguments.items():
        if name in types and not _fits(value, types[name]):
            return f"model.{name}: {value!r} is no {types[name]}, which {model.target} takes"
        if name not in types and found.args.kwarg is None:
            return f"model.{name}: {model.target} takes no such argument, but {', '.join(types)}"
    return None


def _fits(value: Any, annotation: str) -> bool:
    allowed = _TYPES.get(annotation)
    if allowed is None:
        return True
    return isinstance(value, allowed) and (annotation == "bool" or not isinstance(value, bool))
