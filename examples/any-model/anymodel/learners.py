"""Three models with one interface: learn from own rows and from the peers, predict probabilities."""

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightgbm import LGBMClassifier
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from fedmutual import Order

from .data import CLASSES, Features, Labels

EPOCHS, BATCH = 10, 32


class Learner(Protocol):
    """What a client needs of its model."""

    name: str

    def fit(self, x: Features, y: Labels, public: Features, order: Order) -> None:
        """Learn from the client's rows, and from the peers if the order has targets."""

    def predict(self, x: Features) -> Features:
        """Probabilities [n, C]."""


class Network:
    """A PyTorch network: it adds ``order.loss`` to its own, and goes on from where it was."""

    name = "network"

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, CLASSES))
        self.generator = np.random.default_rng(seed)

    def fit(self, x: Features, y: Labels, public: Features, order: Order) -> None:
        """Every step takes a batch of own rows and one of public rows."""
        rows, labels, shared = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(public)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        for _ in range(EPOCHS):
            shuffled = self.generator.permutation(len(y))
            for batch in np.array_split(shuffled, -(-len(y) // BATCH)):
                loss = F.cross_entropy(self.net(rows[batch]), labels[batch])
                if order.has_target:
                    index = self.generator.integers(len(order.target_indices), size=BATCH)
                    loss = loss + order.loss(self.net(shared[order.target_indices[index]]), index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def predict(self, x: Features) -> Features:
        """Probabilities [n, C]."""
        with torch.no_grad():
            probabilities: Features = torch.softmax(self.net(torch.from_numpy(x)), dim=1).numpy()
        return probabilities


class Trees:
    """A classifier without gradients: it learns from ``order.targets`` as from soft labels.

    Every public row comes into the training set once per class, weighted with the class's probability; all
    public rows together weigh as much as the client's own, times ``order.kl_weight``.
    """

    def __init__(self, name: str, classifier: Any) -> None:
        self.name = name
        self.classifier = classifier

    def fit(self, x: Features, y: Labels, public: Features, order: Order) -> None:
        """Fit anew."""
        weights: NDArray[np.floating] = np.ones(len(y))
        if order.has_target:
            row, label = np.nonzero(order.targets > 0.01)
            targets = order.targets[row, label] * order.kl_weight * len(y) / len(order.targets)
            x = np.concatenate([x, public[order.target_indices[row]]])
            y = np.concatenate([y, label])
            weights = np.concatenate([weights, targets])
        self.classifier.fit(x, y, sample_weight=weights)

    def predict(self, x: Features) -> Features:
        """Probabilities [n, C]; 0 for a class that the classifier never saw."""
        probabilities = np.zeros((len(x), CLASSES), np.float32)
        probabilities[:, self.classifier.classes_] = self.classifier.predict_proba(x)
        return probabilities


def make_learner(partition: int, seed: int) -> Learner:
    """The client's model: the three kinds in turn."""
    kind = partition % 3
    if kind == 0:
        return Network(seed)
    if kind == 1:
        return Trees("random forest", RandomForestClassifier(n_estimators=100, random_state=seed))
    boosting = LGBMClassifier(
        n_estimators=50, num_leaves=15, min_child_samples=5, random_state=seed, n_jobs=1, verbose=-1
    )
    return Trees("boosted trees", boosting)
