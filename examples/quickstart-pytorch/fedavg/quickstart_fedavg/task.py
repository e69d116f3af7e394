"""The network, the images and the training."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 32


class Net(nn.Module):
    """A small convolutional network for grey images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [n, 10] of images [n, 1, 8, 8]."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        scores: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return scores


def load_images() -> TensorDataset:
    """All 1797 images with their labels, in a fixed random order."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return TensorDataset(images[order], torch.tensor(digits.target)[order])


def load_data(partition: int, partitions: int) -> tuple[TensorDataset, TensorDataset]:
    """A client's images: 80% to train on, 20% to test."""
    images, labels = load_images()[:]
    own = TensorDataset(images[partition::partitions], labels[partition::partitions])
    tests = len(own) // 5
    return TensorDataset(*own[tests:]), TensorDataset(*own[:tests])


def train(net: Net, data: TensorDataset, epochs: int, lr: float, device: torch.device) -> float:
    """Train the network and return the mean loss."""
    loader = DataLoader(data, BATCH, shuffle=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(net(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(net: Net, data: TensorDataset, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy."""
    net.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for images, labels in DataLoader(data, BATCH):
            scores, truth = net(images.to(device)), labels.to(device)
            loss += F.cross_entropy(scores, truth, reduction="sum").item()
            right += int((scores.argmax(dim=1) == truth).sum())
    return loss / len(data), right / len(data)
