"""Flower ClientApp of fedmutual."""

import os
import sys

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
    from fedmutual.client import handle

    show_logs()
    return handle(message, context)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Say who this node is."""
    from fedmutual.identity import client_name
    from fedmutual.messages import identification_record

    return Message(identification_record(client_name(context.node_config)), reply_to=message)


@app.query("public")
def public(message: Message, context: Context) -> Message:
    """Say whether this node has the server's public set, or take a part of it."""
    from fedmutual.client import handle_public

    show_logs()
    return handle_public(message, context)
