"""Kills a client process at a chosen moment; on a site's PYTHONPATH (benchmarks/soak.py --worst).

``$FEDMUTUAL_KILL_AT`` names a folder. The first client process that finds a file there takes it away, and
gets SIGKILL at the moment that the file is named after: ``state`` (the new state is written, but not yet in
its place), ``saved`` (it is in its place), ``reply`` (the SuperNode waits for the report).
"""

import os
import signal
import sys
from pathlib import Path

MOMENTS = ("state", "saved", "reply")
STATE = "state.safetensors"


def _armed(folder: Path) -> str:
    for moment in MOMENTS:
        try:
            (folder / moment).rename(folder / f"{moment}.done")
        except OSError:
            continue
        return moment
    return ""


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _watch(folder: Path) -> None:
    moment = ""

    def hook(event: str, arguments: tuple[object, ...]) -> None:  # called before the event takes place
        nonlocal moment
        if moment == "saved":
            _die()
        if moment or event != "os.rename" or os.path.basename(str(arguments[1])) != STATE:
            return
        moment = _armed(folder)
        if moment == "state":
            _die()
        if moment == "reply":
            sys.modules["flwr.supernode.runtime.run_clientapp"].push_objects = _die  # type: ignore[attr-defined]

    sys.addaudithook(hook)


_words = sys.orig_argv[:3]
if "flwr-clientapp" in [os.path.basename(word) for word in _words[:2]]:
    _watch(Path(os.environ["FEDMUTUAL_KILL_AT"]))
elif "host.py" in [os.path.basename(word) for word in _words]:  # it forks client processes
    os.register_at_fork(after_in_child=lambda: _watch(Path(os.environ["FEDMUTUAL_KILL_AT"])))
