"""The client."""

from typing import cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedmutual

from . import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's images."""
    order = fedmutual.Order.of(message)

    # The model
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    net = task.Net().to(device)
    if "net" in context.state:  # not in round 1
        net.load_state_dict(context.state.array_records["net"].to_torch_state_dict())

    # The data
    partition, partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    data, _ = task.load_data(int(partition), int(partitions))

    # The training
    epochs = int(context.run_config["local-epochs"])
    lr = cast(float, message.content.config_records["config"]["lr"])
    loss = task.train(net, data, epochs, lr, device, order)

    # The reply
    context.state["net"] = ArrayRecord(net.state_dict())
    probabilities = torch.softmax(net(task.load_public()[order.indices].to(device)), dim=1)
    return order.reply(probabilities, num_examples=len(data), metrics={"train_loss": loss})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test on images of the client that no training used."""
    # The model
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    net = task.Net().to(device)
    net.load_state_dict(context.state.array_records["net"].to_torch_state_dict())

    # The data
    partition, partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    _, data = task.load_data(int(partition), int(partitions))

    # The reply
    loss, accuracy = task.test(net, data, device)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
