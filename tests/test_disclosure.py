"""What a report says of a site's own images: as much as its owner allows, and no class counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedmutual.audit.counts import fitting
from fedmutual.client.answer import _packed
from fedmutual.client.disclosure import (
    LEVELS,
    NODE_KEY,
    VALIDATED,
    disclosed,
    metrics_level,
    multiples,
    power_of_two,
    require_owners_limits,
)
from fedmutual.client.state import ClientState
from fedmutual.learning.competence import odds_weights, validated
from fedmutual.learning.evaluation import quality
from fedmutual.results.diagnostics import lacking
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report

Counts = tuple[int, ...]
SITES = [(9, 3), (12, 0), (1, 2), (5, 4, 2), (0, 7, 1), (11, 10), (2, 0)]


def measured(counts: Counts, right: Counts) -> dict[str, Any]:
    """What a client measures on validation images, ``right[c]`` of ``counts[c]`` of which it recognises."""
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    said = torch.tensor(
        [c if i < right[c] else (c + 1) % len(counts) for c, n in enumerate(counts) for i in range(n)]
    )
    log_p = torch.log_softmax(9.0 * torch.nn.functional.one_hot(said, len(counts)), dim=1)
    found = quality(log_p, labels)
    figures = {f"validation-{name}": found[name] for name in ("accuracy", "recall")}
    return {"num-examples": 9 * len(labels), VALIDATED: len(labels), "train-loss": 0.3, **figures}


def distributions(images: int, classes: int) -> Iterator[Counts]:
    """All numbers of images of each class that add up."""
    for rest in itertools.product(range(images + 1), repeat=classes - 1):
        if sum(rest) <= images:
            yield (*rest, images - sum(rest))


def fits(counts: Counts, report: dict[str, Any]) -> bool:
    """Whether a site with these validation images can have sent the accuracy of a report without recalls."""
    told = report.get("validation-accuracy")
    return told is None or any(
        disclosed(measured(counts, right), "coarse").get("validation-accuracy") == told
        for right in _fillings(counts, sum(counts))
    )


def _fillings(counts: Counts, images: int) -> Iterator[Counts]:
    """One way for every number of recognised images to be spread over the classes."""
    for right in range(images + 1):
        spread, rest = [], right
        for count in counts:
            spread.append(min(count, rest))
            rest -= spread[-1]
        yield tuple(spread)


def one_wrong_each(counts: Counts) -> Counts:
    return tuple(max(n - 1, 0) if n > 1 else n for n in counts)


def remaining(counts: Counts, level: str) -> tuple[int, int]:
    """How many distributions of so many images fit a site's report, and how many there are."""
    report = disclosed(measured(counts, one_wrong_each(counts)), level)
    all_of_them = list(distributions(sum(counts), len(counts)))
    return sum(fits(each, report) for each in all_of_them), len(all_of_them)


def lines(counts: Counts, *rights: Counts) -> list[dict[str, Any]]:
    """The figures of rounds with full disclosure, as the history has them."""
    told = [disclosed(measured(counts, right), "full") for right in rights]
    return [{name.replace("-", "_"): value for name, value in figures.items()} for figures in told]


@pytest.mark.parametrize("counts", [(9, 4), (5, 4, 2), (7, 12)])
def test_full_figures_give_the_class_counts_away(counts: Counts) -> None:
    """The attack of `fedmutual audit`."""
    assert fitting(lines(counts, one_wrong_each(counts)), sum(counts), len(counts), 99) == [counts]


def test_each_round_narrows_the_class_counts() -> None:
    """Where all are recognised there may be any number of each class, until a round in which one is not."""
    rounds = lines((8, 4), (8, 4), (8, 3))
    assert len(fitting(rounds[:1], 12, 2, 99)) == 11
    assert fitting(rounds, 12, 2, 99) == [(8, 4)]
    absent = lines((5, 0, 7), (5, 0, 6))
    assert fitting(absent, 12, 3, 99) == [(5, 0, 7)]
    assert fitting(absent, 13, 3, 99) == []
    silent = [{"validation_accuracy": 0.5}]
    assert len(fitting(silent, 12, 2, 99)) == 13


@pytest.mark.parametrize("counts", SITES)
@pytest.mark.parametrize("level", ["coarse", "none"])
def test_coarse_figures_fit_every_distribution(counts: Counts, level: str) -> None:
    fit, of = remaining(counts, level)
    assert fit == of > 1


@pytest.mark.parametrize("images", [*range(2, 70), 127, 128, 129, 1000])
def test_every_multiple_is_some_number_of_recognised_images(images: int) -> None:
    """So an accuracy excludes no number of images of its size, and no distribution of them."""
    steps = multiples(images)
    assert 1 <= steps < images
    told = {
        disclosed({"num-examples": 9, VALIDATED: images, "validation-accuracy": right / images}, "coarse")[
            "validation-accuracy"
        ]
        for right in range(images + 1)
    }
    assert told == {step / steps for step in range(steps + 1)}


def test_one_image_has_no_accuracy_and_no_count_is_exact() -> None:
    one = {"num-examples": 700, VALIDATED: 1, "validation-accuracy": 1.0, "validation-auroc": 1.0}
    assert disclosed(one, "coarse") == {"num-examples": 512}
    assert [power_of_two(n) for n in (0, 1, 2, 3, 5, 6, 11, 12, 1000)] == [1, 1, 2, 4, 4, 8, 8, 16, 1024]


def test_only_what_is_known_to_be_harmless_is_sent() -> None:
    everything = measured((9, 3), (8, 2)) | {
        "seconds": 1.2345,
        "train-seconds": 1.1111,
        "kl-after": 0.123456,
        "unseen-recall": [0.5, 0.25],
        "loss-after": 0.3333,
        "new-figure": 7.7,
    }
    assert disclosed(everything, "none") == {
        "num-examples": 1,
        "seconds": 1.2,
        "kl-after": 0.123456,
        "unseen-recall": [0.5, 0.25],
    }
    coarse = disclosed(everything, "coarse")
    assert {k: v for k, v in coarse.items() if k not in disclosed(everything, "none")} == {
        "validation-accuracy": 0.875,
        "train-loss": 0.3125,
        "loss-after": 0.3125,
    }
    assert disclosed(everything, "full") == {k: v for k, v in everything.items() if k != VALIDATED}


def test_a_diverged_loss_stays_one() -> None:
    assert math.isnan(disclosed({"num-examples": 1, "train-loss": math.nan}, "coarse")["train-loss"])  # type: ignore[arg-type]


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("chosen", ["auto", *LEVELS])
@pytest.mark.parametrize("owner", [None, *LEVELS])
def test_a_run_cannot_make_a_site_say_more_than_its_owner_allows(
    trust: bool, chosen: str, owner: str | None
) -> None:
    node = {"trust-run": trust} | ({} if owner is None else {NODE_KEY: owner})
    most = owner or ("full" if trust else "coarse")
    level = metrics_level(chosen, node)
    assert LEVELS.index(level) <= LEVELS.index(most)
    assert level == (most if chosen == "auto" or LEVELS.index(chosen) > LEVELS.index(most) else chosen)


def test_a_misspelt_word_of_the_owner_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"privacy-metrics: .* none, coarse, full"):
        metrics_level("auto", {NODE_KEY: "some"})


PROMISED = {"epsilon": 1.0, "delta": 1e-3, "secagg": True, "colluding": 1}


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        ({"privacy-delta": 1e-4}, r"privacy.delta: 0.001 is above .* set privacy.delta=0.0001, .* raise"),
        ({"privacy-delta": "1e-4"}, r"privacy.delta: 0.001 is above this site's privacy-delta=0.0001"),
        ({"privacy-colluding": 2}, r"privacy.colluding: 1 is below .* set privacy.colluding=2, .* lower"),
        ({"privacy-delta": 0}, r"privacy-delta: a node configuration takes a number above 0"),
        ({"privacy-delta": "nan"}, r"privacy-delta: a node configuration takes a number above 0"),
        ({"privacy-delta": "small"}, r"privacy-delta: a node configuration takes a number above 0"),
        ({"privacy-colluding": -1}, r"privacy-colluding: a node configuration takes a whole number"),
    ],
)
def test_a_promise_below_the_owners_is_refused(owner: dict[str, Any], said: str) -> None:
    privacy = replace(compose().privacy, **PROMISED)
    with pytest.raises(SettingsError, match=said):
        require_owners_limits(privacy, owner)


@pytest.mark.parametrize(
    ("run", "owner"),
    [
        ({}, {}),
        ({}, {"privacy-delta": 1e-3, "privacy-colluding": 1}),
        ({"delta": 1e-5, "colluding": 3}, {"privacy-delta": "1e-4", "privacy-colluding": "2"}),
        ({"secagg": False}, {"privacy-colluding": 2}),  # each site has all of the noise
        ({"epsilon": None}, {"privacy-delta": 1e-4, "privacy-colluding": 2}),  # nothing is promised
    ],
)
def test_a_promise_that_is_enough_is_not(run: dict[str, Any], owner: dict[str, Any]) -> None:
    require_owners_limits(replace(compose().privacy, **{**PROMISED, **run}), owner)


def test_the_setting() -> None:
    assert compose().privacy.metrics == "auto"
    with pytest.raises(SettingsError, match=r"privacy\.metrics: 'all' is none of auto, none, coarse, full"):
        compose(["privacy.metrics=all"])


def test_consensus_validation_works_with_what_is_there() -> None:
    good, poor = measured((20, 20), (19, 19)), measured((20, 20), (12, 12))
    weights = {
        level: odds_weights(
            {name: validated(disclosed(m, level)) for name, m in (("good", good), ("poor", poor))}, 2
        )
        for level in LEVELS
    }
    assert weights["full"]["good"] > weights["full"]["poor"]
    assert weights["coarse"]["good"] > weights["coarse"]["poor"] > 0
    assert weights["none"] == {"good": 1.0, "poor": 1.0}


def test_what_reports_lack_is_said() -> None:
    full = {"round": 1, "client": "a", "validation_accuracy": 0.9, "validation_recall": [0.9, None]}
    coarse = {"round": 1, "client": "b", "validation_accuracy": 0.875}
    none = {"round": 1, "client": "c"}
    assert lacking([]) is None
    assert lacking([full]) is None
    assert (said := lacking([full, coarse])) is not None
    assert said.startswith("b: ")
    assert "consensus=validation knows plain accuracy" in said
    assert "knows nothing" in str(lacking([none]))


@pytest.mark.parametrize(("level", "told"), [("full", "d" * 32), ("coarse", ""), ("none", "")])
def test_a_digest_of_the_images_is_told_with_full_figures_only(level: str, told: str) -> None:
    """Whoever guesses the images could test all class counts against it."""
    settings = compose()
    report = Report(
        "a", 1, "", "", np.zeros((0, 2), np.float32), {"num-examples": 4}, private_digest="d" * 32
    )
    state = ClientState("", {}, {}, report)
    record = _packed(state, settings, Order(round=1, num_classes=2), level, None)
    assert dict(record["report"]).get("private-digest", "") == told  # type: ignore[call-overload]
