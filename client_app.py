"""Flower ClientApp of fedmutual."""

import gc
import os
import sys
from types import ModuleType

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmutual.logs import show_logs

app = ClientApp()

# In simulation, Ray's workers import from the folder that the SuperLink was started in before they look
# into the app: another checkout there would be run instead of this one.
if os.path.basename(sys.argv[0]) == "flwr-simulation":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))


@app.train("round")
def train_round(message: Message, context: Context) -> Message:
    """One round of learning, whatever the strategy."""
    client = _client()
    show_logs()
    return client.handle(message, context)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Say who this node is."""
    from fedmutual.settings.identity import client_name
    from fedmutual.wire.reports import identification_record

    return Message(identification_record(client_name(context.node_config)), reply_to=message)


@app.query("public")
def public(message: Message, context: Context) -> Message:
    """Say whether this node has the server's public set, or take a part of it."""
    client = _client()
    show_logs()
    return client.handle_public(message, context)


def _client() -> ModuleType:
    """Import the client without collecting garbage: there is none yet, and looking takes a fifth of the time.

    In deployment every message has a process of its own. What was imported stays: it is not looked at again.
    """
    first = "fedmutual.client.answer" not in sys.modules
    if first:
        gc.disable()
    try:
        from fedmutual.client import answer as client
    finally:
        if first:
            gc.freeze()
            gc.enable()
    return client
