"""Run a Flower program that does not end of a TLS time-out: ``patient.py PROGRAM ARGUMENT ...``.

Flower's SuperNode and SuperExec repeat a request that failed on the way, but not one that failed within TLS:
a SuperLink that stands still for a minute ends them, and with a SuperExec its runs. Here those are repeated.
A connection that cannot be made (a refused certificate, no TLS at the other end) is an error as before.

A SuperNode starts its SuperExec by its name: that start goes to the command in ``$FEDMUTUAL_SUPEREXEC``, a
JSON list, where there is one.

Run as a script of its own: nothing of fedmutual is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import flwr.supercore.retry
import httpx
from flwr.supercore.retry import RetryInvoker

OTHER = "FEDMUTUAL_SUPEREXEC"


def patient(make: Callable[[], RetryInvoker]) -> Callable[[], RetryInvoker]:
    """Have the invokers that a function makes go on after a failure within TLS."""

    def make_patient() -> RetryInvoker:
        invoker = make()
        give_up = invoker.should_giveup

        def should_giveup(error: Exception) -> bool:
            on_the_way = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ConnectError)
            return not on_the_way and give_up is not None and give_up(error)

        invoker.should_giveup = should_giveup
        return invoker

    return make_patient


class OtherPopen(subprocess.Popen[Any]):
    """Starts another SuperExec than Flower's own, with the same arguments."""

    def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
        other = os.environ.get(OTHER, "")
        if other and isinstance(args, list) and args[:1] == ["flower-superexec"]:
            args = [*json.loads(other), *args[1:]]
        super().__init__(args, *rest, **options)


def main() -> None:
    """Run the program that the first argument names."""
    del sys.argv[0]
    subprocess.Popen = OtherPopen  # type: ignore[misc]
    flwr.supercore.retry.make_simple_http_retry_invoker = patient(  # before anything imports it
        flwr.supercore.retry.make_simple_http_retry_invoker
    )
    (program,) = entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(program.load()())


if __name__ == "__main__":
    main()
