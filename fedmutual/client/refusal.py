"""What an error reply says: to the owner everything, to the server nothing that is the site's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from fedmutual.data.images import DataError
from fedmutual.settings import SettingsError
from fedmutual.settings.at_site import trusts_run
from fedmutual.settings.identity import IdentityError
from fedmutual.wire.codec import MessageError

# made of what the server sent, and of the names of settings: told without paths and the node's values
_FROM_THE_SERVER = (SettingsError, MessageError, IdentityError)
_PATH = re.compile(r"(?<![\w<>./\\-])(?:file:|~|[A-Za-z]:)?[\\/][^\s'\",;:()\[\]{}]*")
_BELOW = re.compile(r"(<[\w-]+>)[\\/][^\s'\",;:()\[\]{}]*")  # what lies below a folder that was replaced
_CLASSES: tuple[tuple[type[BaseException], str], ...] = (
    (DataError, "this site's images cannot be used as they are"),
    (MemoryError, "out of memory"),
)


def error_reason(error: Exception, node_config: Mapping[str, Any]) -> str:
    """Return an error's class and what may be told of it.

    Where the run is trusted (simulation), that is its whole text. Elsewhere it is what the error itself says
    for others (:class:`fedmutual.told.Told`), or a text made from the run's own values, in which paths and
    values of the node configuration are replaced by their names. Of any other error, only its kind.

    Examples
    --------
    >>> error_reason(DataError("/data/ward 3 is empty"), {"trust-run": True})
    'DataError: /data/ward 3 is empty'
    >>> error_reason(DataError("/data/ward 3 is empty"), {})
    "DataError: this site's images cannot be used as they are; its own log says more"
    """
    kind = type(error).__name__
    if trusts_run(node_config):
        return f"{kind}: {error}"
    told = getattr(error, "told", None)
    if told is None and isinstance(error, _FROM_THE_SERVER):
        told = without_own(str(error), node_config)
    return f"{kind}: {told if told is not None else f'{_kind_of(error)}; its own log says more'}"


def without_own(text: str, node_config: Mapping[str, Any]) -> str:
    """Replace values of the node configuration by ``<key>``, and paths by ``<path>``."""
    values = {str(v): k for k, v in node_config.items() if isinstance(v, str) and v and k != "client-name"}
    for value in sorted(values, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", f"<{values[value]}>", text)
    for folder in (os.path.expanduser("~"), os.getcwd()):
        text = text.replace(folder, "<path>") if len(folder) > 1 else text
    return _BELOW.sub(r"\1", _PATH.sub("<path>", text))


def _kind_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return next((text for kind, text in _CLASSES if isinstance(error, kind)), "the order failed at this site")
