"""Clients that answer with their name after a while."""

import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def answer(message: Message, context: Context) -> Message:
    """Sleep as long as told."""
    time.sleep(float(message.content["order"]["sleep"]))
    name = f"client-{context.node_config['partition-id']}"
    return Message(RecordDict({"report": ConfigRecord({"client": name})}), reply_to=message)
