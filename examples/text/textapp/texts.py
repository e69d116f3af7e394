"""Sentences of SciPy's documentation; the class is the chapter that a sentence is from.

The documentation lies in the package itself, so that nothing is downloaded.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

CHAPTERS = ("optimize", "signal", "special", "stats")
PER_CHAPTER = 500  # sentences
PUBLIC, TEST = 0.25, 0.25  # shares of the functions; the others' sentences are private
LEAST = 30  # a client has at least so many sentences

_SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", re.MULTILINE)
_NO_PROSE = ("::", ">>>", ".. ", ":math:", "Array API")

Labelled = tuple[str, int]


@dataclass(frozen=True)
class Texts:
    """Sentences and their classes."""

    sentences: list[str]
    labels: NDArray[np.int64]


def load_texts(partition: int, partitions: int, alpha: float, seed: int) -> tuple[Texts, Texts, Texts]:
    """A client's own sentences, the public ones, and those of the test.

    The three parts are of different functions. How often a client sees a class is drawn from a Dirichlet
    distribution.
    """
    rng = np.random.default_rng(seed)
    private: list[Labelled] = []
    public: list[Labelled] = []
    test: list[Labelled] = []
    for label, chapter in enumerate(CHAPTERS):
        sentences = sentences_of(chapter)
        functions = sorted({function for function, _ in sentences})
        place = dict(zip(functions, rng.permutation(len(functions)) / len(functions), strict=True))
        for i in rng.permutation(len(sentences))[:PER_CHAPTER]:
            function, sentence = sentences[i]
            at = place[function]
            part = public if at < PUBLIC else test if at < PUBLIC + TEST else private
            part.append((sentence, label))
    labels = np.array([label for _, label in private])
    owner = np.zeros_like(labels)
    while np.bincount(owner, minlength=partitions).min() < LEAST:
        shares = rng.dirichlet([alpha] * partitions, len(CHAPTERS))
        owner = np.array([rng.choice(partitions, p=shares[label]) for label in labels])
    own = [private[i] for i in np.flatnonzero(owner == partition)]
    return _texts(own), _texts(public), _texts(test)


def _texts(pairs: list[Labelled]) -> Texts:
    return Texts([sentence for sentence, _ in pairs], np.array([label for _, label in pairs]))


@cache
def sentences_of(chapter: str) -> list[tuple[str, str]]:
    """Every function's name with each sentence of its description and notes, without repetitions."""
    module = import_module(f"scipy.{chapter}")
    found: dict[str, str] = {}
    for name in sorted(module.__all__):
        text = inspect.getdoc(getattr(module, name)) if callable(getattr(module, name)) else None
        for sentence in _prose(text or ""):
            found.setdefault(sentence, name)
    return [(name, sentence) for sentence, name in found.items()]


def _prose(documentation: str) -> Iterator[str]:
    """Sentences of at least six words; no code, no formulas."""
    description, *sections = _SECTION.split(documentation)
    notes = [text for title, text in zip(sections[::2], sections[1::2], strict=True) if title == "Notes"]
    for paragraph in "\n\n".join([description, *notes]).split("\n\n"):
        if not any(mark in paragraph for mark in _NO_PROSE):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 6:
                    yield sentence
