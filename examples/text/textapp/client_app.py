"""The client: it reads words or letters, and its vocabulary is that of its own and the public sentences."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

import fedmutual

from .model import Classifier, predict, train, trigrams, words
from .texts import Texts, load_texts

app = ClientApp()


@app.train()
def learn(message: Message, context: Context) -> Message:
    """Learn from the client's sentences and from its peers; predict the public sentences."""
    order = fedmutual.Order.of(message)
    model, own, public, _ = load(context)
    rng = np.random.default_rng([int(context.run_config["seed"]), order.round])
    train(model, own, public, order, rng)
    context.state["model"] = ArrayRecord(model.state_dict())
    probabilities = predict(model, [public.sentences[i] for i in order.indices])
    return order.reply(probabilities, num_examples=len(own.labels))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the model on sentences that no client trains on."""
    model, _, _, test = load(context)
    right = predict(model, test.sentences).argmax(dim=1).numpy() == test.labels
    metrics = {"accuracy": float(right.mean())}
    return fedmutual.Order.of(message).reply(num_examples=len(test.labels), metrics=metrics)


def load(context: Context) -> tuple[Classifier, Texts, Texts, Texts]:
    """The client's model as the last message left it; its own, the public, and the test's sentences."""
    partition, seed = int(context.node_config["partition-id"]), int(context.run_config["seed"])
    partitions, alpha = int(context.node_config["num-partitions"]), float(context.run_config["alpha"])
    own, public, test = load_texts(partition, partitions, alpha, seed)
    torch.manual_seed(seed)
    model = Classifier(trigrams if partition % 2 else words, own.sentences + public.sentences)
    if "model" in context.state:
        model.load_state_dict(context.state.array_records["model"].to_torch_state_dict())
    return model, own, public, test
