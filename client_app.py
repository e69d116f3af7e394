"""Flower ClientApp of fedmutual."""

import gc
import logging
import os
import sys
from types import ModuleType

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmutual.logs import show_logs

app = ClientApp()
_turn = None  # kept until the process ends

# In simulation, Ray's workers first import from the folder where the SuperLink was started, then from the
# app: another checkout in that folder would run instead of this one.
if os.path.basename(sys.argv[0]) == "flwr-simulation":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))


@app.train("round")
def train_round(message: Message, context: Context) -> Message:
    """Carry out an order of any strategy."""
    reply: Message = _client_in_turn(context).handle(message, context)
    return reply


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Return this node's client name."""
    from fedmutual.client.sent import record_reply
    from fedmutual.settings.identity import client_name
    from fedmutual.wire.reports import identification_record

    name = client_name(context.node_config)
    reply = Message(identification_record(name), reply_to=message)
    record_reply(message, reply, name, context.node_config)
    return reply


@app.query("public")
def public(message: Message, context: Context) -> Message:
    """Return whether this node has the server's public set, or store a part of it."""
    reply: Message = _client_in_turn(context).handle_public(message, context)
    return reply


@app.query("key")
def key(message: Message, context: Context) -> Message:
    """Return this node's public key for the run (privacy.secagg)."""
    reply: Message = _client_in_turn(context).handle_key(message, context)
    return reply


def _client_in_turn(context: Context) -> ModuleType:
    """Import the client, after an earlier process of this node has ended: nothing heavy before that."""
    global _turn
    show_logs()
    from fedmutual.client.turn import take_turn

    _turn = take_turn(context.node_id, context.node_config)
    return _client()


def _client() -> ModuleType:
    """Import the client with the garbage collector off, which saves a fifth of the import time.

    In deployment every message has its own process. The imported objects are frozen: later collections skip
    them.
    """
    first = "fedmutual.client.answer" not in sys.modules
    if first:
        gc.disable()
    try:
        from fedmutual.client import answer as client
    except ImportError as error:  # its text names files of the site, and Flower would send it
        logging.getLogger("fedmutual").exception("the client cannot be imported")
        raise ImportError("the client cannot be imported at this site; its own log says more") from error
    finally:
        if first:
            gc.freeze()
            gc.enable()
    return client
