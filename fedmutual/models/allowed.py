"""Which models a site builds for a run: checked on the imported object, before it is called.

The settings have checked its name (:mod:`fedmutual.settings.at_site`). But a module holds more than models:
``torchvision.models.get_model`` would build any, with weights from elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedmutual.settings import SettingsError
from fedmutual.settings.at_site import MODEL_PACKAGES, MODELS, listed, own_model, trusts_run


def require_model(target: str, node_config: Mapping[str, Any]) -> None:
    """Refuse what is no model of an allowed package; what the site's owner lists or chooses is built.

    Parameters
    ----------
    target : str
        Dotted path, as the settings have it.
    node_config : Mapping[str, Any]

    Raises
    ------
    SettingsError
        Naming the target and the remedy.
    """
    if trusts_run(node_config) or target in listed(node_config, MODELS) or target == own_model(node_config):
        return
    from hydra.utils import get_object

    package = next((package for package in MODEL_PACKAGES if target.startswith(package)), None)
    try:
        found = None if package is None else get_object(target)
    except Exception as error:
        raise SettingsError(f"model._target_: there is no {target} at this site") from error
    if package is None or not _IS_MODEL[package](found):
        raise SettingsError(
            f"model._target_: {target} is no model that this site builds: a class of a torch.nn.Module, or "
            "a constructor of torchvision's that starts from random weights. Its owner can list it in the "
            f'node configuration, {MODELS}="{target}"'
        )


def _is_own(found: Any) -> bool:
    return _is_module_of("fedmutual.models.", found)


def _is_torchvisions(found: Any) -> bool:
    from torchvision import models

    if not inspect.isfunction(found):
        return _is_module_of("torchvision.models.", found)
    name = found.__name__
    if name not in models.list_models() or models.get_model_builder(name) is not found:
        return False
    parameters = inspect.signature(found).parameters.values()
    return all(p.default is None for p in parameters if p.name.startswith("weights"))


def _is_module_of(package: str, found: Any) -> bool:
    from torch import nn

    return inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__.startswith(package)


_IS_MODEL: dict[str, Callable[[Any], bool]] = dict(
    zip(MODEL_PACKAGES, (_is_own, _is_torchvisions), strict=True)
)
