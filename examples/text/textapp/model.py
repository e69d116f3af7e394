"""A bag of embedded tokens, and two ways to cut a text into tokens."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmutual import Order

from .texts import CHAPTERS, Texts

EPOCHS, BATCH, WIDTH = 3, 32, 64

Tokenizer = Callable[[str], list[str]]
Tokens = list[list[int]]


def words(text: str) -> list[str]:
    """Words of at least two letters."""
    return re.findall("[a-z]{2,}", text.lower())


def trigrams(text: str) -> list[str]:
    """All three letters in a row, spaces included."""
    letters = f" {' '.join(words(text))} "
    return [letters[i : i + 3] for i in range(len(letters) - 2)]


class Classifier(nn.Module):
    """The mean of a text's embedded tokens, and a linear layer.

    Parameters
    ----------
    tokenizer : Tokenizer
    sentences : list of str
        The vocabulary is that of these; other tokens are skipped.
    """

    def __init__(self, tokenizer: Tokenizer, sentences: list[str]) -> None:
        super().__init__()
        known = sorted({token for sentence in sentences for token in tokenizer(sentence)})
        self.tokenizer = tokenizer
        self.vocabulary = {token: i for i, token in enumerate(known)}
        self.embedding = nn.EmbeddingBag(len(known), WIDTH)
        self.output = nn.Linear(WIDTH, len(CHAPTERS))

    def tokens(self, sentences: list[str]) -> Tokens:
        """The tokens' numbers."""
        ids = self.vocabulary
        return [[ids[t] for t in self.tokenizer(sentence) if t in ids] for sentence in sentences]

    def forward(self, tokens: Tokens) -> Tensor:
        """Scores [n, C]."""
        starts = np.cumsum([0, *(len(text) for text in tokens[:-1])])
        joined = torch.tensor([i for text in tokens for i in text], dtype=torch.int64)
        scores: Tensor = self.output(self.embedding(joined, torch.from_numpy(starts)))
        return scores


def train(model: Classifier, own: Texts, public: Texts, order: Order, rng: np.random.Generator) -> None:
    """Every step takes a batch of own sentences and one of public sentences."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens, labels = model.tokens(own.sentences), torch.from_numpy(own.labels)
    shared = model.tokens(public.sentences)
    for _ in range(EPOCHS):
        for batch in np.array_split(rng.permutation(len(tokens)), -(-len(tokens) // BATCH)):
            loss = F.cross_entropy(model(_chosen(tokens, batch)), labels[batch])
            if order.has_target:
                index = rng.integers(len(order.target_indices), size=BATCH)
                loss = loss + order.loss(model(_chosen(shared, order.target_indices[index])), index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def predict(model: Classifier, sentences: Sequence[str]) -> Tensor:
    """Probabilities [n, C]."""
    with torch.no_grad():
        return torch.softmax(model(model.tokens(list(sentences))), dim=1)


def _chosen(tokens: Tokens, positions: NDArray[np.integer]) -> Tokens:
    return [tokens[i] for i in positions]
