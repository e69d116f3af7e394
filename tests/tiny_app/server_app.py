"""A run with history and summary but without learning; the seed says how it goes."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmutual.settings.compose import from_contexts

REFUSED_SEED, ENDLESS_SEED = 13, 3

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask every client in every round and write down who answered."""
    settings = from_contexts(context.run_config)
    if settings.seed == REFUSED_SEED:
        raise ValueError("thirteen is refused")
    output = Path(settings.output_dir)
    while len(list(grid.get_node_ids())) < settings.num_clients:
        time.sleep(0.05)
    for number in range(1, settings.rounds + 1):
        order = RecordDict(
            {"order": ConfigRecord({"sleep": 600.0 if settings.seed == ENDLESS_SEED else 0.05})}
        )
        nodes = list(grid.get_node_ids())
        pending = set(grid.push_messages([Message(order, node, "query") for node in nodes]))
        (output / "asked").touch()
        while pending:
            for reply in grid.pull_messages(list(pending)):
                pending.discard(reply.metadata.reply_to_message_id)
                client = reply.content["report"]["client"]
                with (output / "history.jsonl").open("a") as file:
                    file.write(
                        json.dumps({"round": number, "client": client, "validation_accuracy": 0.75}) + "\n"
                    )
            time.sleep(0.05)
    summary = {"status": "completed", "reason": "", "clients": {}, "warnings": ["a tiny warning"]}
    (output / "summary.tmp").write_text(json.dumps(summary))
    (output / "summary.tmp").rename(output / "summary.json")
