"""The client: one code for every kind of model."""

import pickle
from typing import cast

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

import fedmutual

from .data import Data, load_data
from .learners import Learner, make_learner

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Learn from the client's rows and from its peers; predict the public rows."""
    order = fedmutual.Order.of(message)
    learner, data = load(context)
    learner.fit(data.x, data.y, data.public, order)
    context.state["learner"] = ConfigRecord({"pickle": pickle.dumps(learner)})
    return order.reply(
        learner.predict(data.public[order.indices]), num_examples=len(data.y), model_name=learner.name
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the model on rows that no client trains on; the metric has the model's name."""
    learner, data = load(context)
    accuracy = float((learner.predict(data.test_x).argmax(axis=1) == data.test_y).mean())
    return fedmutual.Order.of(message).reply(num_examples=len(data.y), metrics={learner.name: accuracy})


def load(context: Context) -> tuple[Learner, Data]:
    """The client's model as the last message left it, and its data."""
    partition, seed = int(context.node_config["partition-id"]), int(context.run_config["seed"])
    partitions, alpha = int(context.node_config["num-partitions"]), float(context.run_config["alpha"])
    data = load_data(partition, partitions, alpha, seed)
    if "learner" not in context.state:
        return make_learner(partition, seed), data
    learner: Learner = pickle.loads(cast(bytes, context.state.config_records["learner"]["pickle"]))
    return learner, data
