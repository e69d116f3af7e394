"""The attacks on a recorded run, and what each finds; what cannot be computed says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.audit.class_mix import class_mix, size_mix
from fedmutual.audit.collusion import reconstructed
from fedmutual.audit.counts import TooMany, fitting
from fedmutual.audit.leak import Leak, centred, measured
from fedmutual.audit.membership import against_others, on_public
from fedmutual.audit.truth import RecordedTruth
from fedmutual.data.overlap import near_pairs
from fedmutual.results.received import Heard
from fedmutual.results.summary import natural_key
from fedmutual.strategies.consensus import Mean

MOST_PEERS = 4
SLACK = 1.5  # what an attacker allows for the number of validation images

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]
Odds = Mapping[str, Mapping[str, Scores]]


@dataclass(frozen=True)
class Finding:
    """What an attack finds.

    Attributes
    ----------
    attack : str
        A name that stays the same from run to run.
    of : str
        What it is about, for people.
    figures : dict
        Numbers by name; empty where it could not be computed.
    note : str
        What to know of it, or why there is no figure.
    """

    attack: str
    of: str
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def attempt(attack: str, of: str, call: Callable[[], tuple[dict[str, Any], str]]) -> Finding:
    """Carry out an attack; a ValueError is the reason why there is no figure."""
    try:
        figures, note = call()
    except ValueError as error:
        return Finding(attack, of, note=f"not computed: {error}")
    return Finding(attack, of, figures, note)


def leaked(leak: Leak) -> dict[str, Any]:
    """Return a leak as figures."""
    return asdict(leak)


def public_copies(
    truth: RecordedTruth, rounds: Sequence[Heard], seed: int = 0, *, changed: bool = False
) -> tuple[dict[str, Any], str]:
    """Tell which public images a client has among its training images, from its predictions.

    Those that it left out because they are public count as well, as they are what an attacker is after. The
    others are the public images that no client has.

    Parameters
    ----------
    rounds : sequence of Heard
        Predictions of public images.
    changed : bool
        Of public images that are changed copies (brighter, mirrored, another JPEG) of training images; the
        others are those of which no client has a copy, changed or not. False: of exact copies.

    Raises
    ------
    ValueError
        There is no such image, no prediction, or no label.
    """
    public = truth.shared.public.images
    if truth.settings.public.views != "plain":
        raise ValueError("the predictions are of mixed images (public.views)")
    if not rounds:
        raise ValueError("no predictions of public images were received")
    owned, anywhere = (_changed_copies if changed else _exact_copies)(truth)
    anyones: Mask = np.logical_or.reduce(list(owned.values()))
    if not anyones.any():
        what = "a changed copy of a private one" if changed else "private as well"
        raise ValueError(f"no public image is {what}")
    if (public.labels < 0).any():
        raise ValueError("the public images have no labels, which this attack needs")
    scores, member, images, groups = [], [], [], []
    heard = on_public(rounds, public.labels)
    for number, (client, values) in enumerate(heard.items()):
        mine = owned.get(client, anyones)
        chosen = np.flatnonzero((mine | ~anywhere) & ~np.isnan(values))
        scores.append(values[chosen])
        member.append(mine[chosen])
        images.append(chosen)
        groups.append(number * 10_000 + public.labels[chosen])
    everything = centred(np.concatenate(scores), np.concatenate(groups))
    leak = measured(everything, np.concatenate(member), np.concatenate(images), seed)
    return leaked(leak), _left_out(truth)


def _exact_copies(truth: RecordedTruth) -> tuple[dict[str, Mask], Mask]:
    """Say of each public image whether a client trained on it, by client, and whether any client has it."""
    hashes = [row.tobytes() for row in truth.shared.public.images.pixel_hashes()]
    owned, anywhere = {}, np.zeros(len(hashes), np.bool_)
    for client, site in truth.sites.items():
        own = [row.tobytes() for row in site.private.pixel_hashes()]
        known, trained = set(own), {own[i] for i in _trained_or_left_out(truth, client)}
        owned[client] = np.array([text in trained for text in hashes])
        anywhere |= np.array([text in known for text in hashes])
    return owned, anywhere


def _changed_copies(truth: RecordedTruth) -> tuple[dict[str, Mask], Mask]:
    """Say the same of changed copies; without those of which a client has the very pixels."""
    public = truth.shared.public.images
    _, exact = _exact_copies(truth)
    owned, anywhere = {}, np.zeros(len(public), np.bool_)
    for client, site in truth.sites.items():
        pairs = near_pairs(site.private, public)
        pairs = pairs[~exact[pairs[:, 1]]]
        trained = pairs[np.isin(pairs[:, 0], _trained_or_left_out(truth, client)), 1]
        owned[client] = np.isin(np.arange(len(public)), trained)
        anywhere[pairs[:, 1]] = True
    return owned, anywhere | exact


def _trained_or_left_out(truth: RecordedTruth, client: str) -> NDArray[np.int64]:
    """Return the positions of a client's private images but those held out for validation."""
    return np.setdiff1d(np.arange(len(truth.sites[client].private)), truth.held_out(client))


def _left_out(truth: RecordedTruth) -> str:
    count = sum(len(site.left_out) for site in truth.sites.values())
    return f"privacy.overlap={truth.settings.privacy.overlap}" + (
        f": {count} of the private images were left out of training" if count else ""
    )


def private_images(truth: RecordedTruth, scores: Mapping[str, Scores], seed: int = 0) -> dict[str, Any]:
    """Tell a client's training images from its held-out ones, which no client was trained on.

    Those that are public as well, or nearly, are left out of both: see :func:`public_copies`.

    Parameters
    ----------
    scores : mapping of float array [n]
        By client, of all its private images.

    Raises
    ------
    ValueError
        Nothing is held out.
    """
    values, member, groups = [], [], []
    for number, (client, own) in enumerate(scores.items()):
        labels = truth.sites[client].private.labels
        known = truth.also_public(client)
        for chosen, inside in ((truth.trained(client), True), (truth.held_out(client), False)):
            positions = np.setdiff1d(chosen, known)
            values.append(own[positions])
            member.append(np.full(len(positions), inside))
            groups.append(number * 10_000 + labels[positions])
    if not any(len(own) for own in member[1::2]):
        raise ValueError("no image is held out to compare with: set train.validation_fraction above 0")
    return leaked(
        measured(centred(np.concatenate(values), np.concatenate(groups)), np.concatenate(member), seed=seed)
    )


def compared(odds: Odds) -> dict[str, Scores]:
    """Return scores of each site's images: its model's log-odds less the others', or the only model's."""
    result = {}
    for client, by_model in odds.items():
        found = against_others(by_model)
        result[client] = found[client] if client in found else next(iter(found.values()))
    return result


def summed(odds: Odds) -> dict[str, Scores]:
    """Return scores of each site's images for having been trained on by anybody: the mean log-odds of all."""
    return {client: np.mean(list(by_model.values()), axis=0) for client, by_model in odds.items()}


def classes_of_clients(truth: RecordedTruth) -> tuple[dict[str, Any], str]:
    """Estimate each client's class shares from its first predictions.

    Raises
    ------
    ValueError
        There are no predictions by client.
    """
    predictions = _first(truth)
    count = len(truth.shared.classes)
    shares = {}
    for name in predictions:
        labels = truth.sites[name].private.labels[truth.sites[name].train_indices(1)]
        shares[name] = np.bincount(labels, minlength=count) / len(labels)
    prior = "with" if truth.settings.train.prior_correction else "without"
    return asdict(class_mix(predictions, shares)), f"{prior} prior correction"


def sizes_of_clients(truth: RecordedTruth) -> tuple[dict[str, Any], str]:
    """Estimate each client's number of training images from how sure its first predictions are.

    Raises
    ------
    ValueError
        There are no predictions by client.
    """
    predictions = _first(truth)
    sizes = {name: len(truth.sites[name].train_indices(1)) for name in predictions}
    if len(set(sizes.values())) == 1:
        raise ValueError(f"all clients have {next(iter(sizes.values()))} images")
    told = {line["client"]: line.get("num_examples") for line in truth.history if "rejected" not in line}
    exact = sum(told.get(name) == size for name, size in sizes.items())
    return asdict(size_mix(predictions, sizes)), f"told exactly by {exact} of {len(sizes)} clients' reports"


def _first(truth: RecordedTruth) -> dict[str, NDArray[np.float32]]:
    """Return the first predictions of each client that are of the same public images as the first one's."""
    found: dict[str, NDArray[np.float32]] = {}
    rounds = truth.received.rounds
    for heard in rounds:
        for name, values in heard.predictions.items():
            if name in truth.sites and np.array_equal(heard.indices, rounds[0].indices):
                found.setdefault(name, values)
    if len(found) < 2:
        raise ValueError(
            "only the sum of the predictions was received" if rounds else "no predictions were received"
        )
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def counts_of_validation(truth: RecordedTruth) -> tuple[dict[str, Any], str]:
    """Reconstruct the class counts of each client's validation images from the figures in its reports.

    Raises
    ------
    ValueError
        Its reports have no such figures.
    """
    if any(len(site.held_out_parts) > 1 for site in truth.sites.values()):
        raise ValueError("the validation images change from round to round")
    right = single = asked = 0
    for name in truth.sites:
        lines = [line for line in truth.history if line["client"] == name and "rejected" not in line]
        told = [line for line in lines if line.get("validation_recall")]
        if not told:
            continue
        asked += 1
        found = _distributions(truth, told)
        labels = truth.sites[name].private.labels[truth.held_out(name)]
        counts = tuple(np.bincount(labels, minlength=len(truth.shared.classes)).tolist())
        single += len(found) == 1
        right += found == [counts]
    if not asked:
        raise ValueError("the reports have no recall per class, and accuracies alone fit every distribution")
    return {"exact": right, "single": single, "clients": asked, "share": right / asked}, ""


def _distributions(truth: RecordedTruth, told: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Return those that fit of the number of images nearest to what the settings make likely."""
    fraction = truth.settings.train.validation_fraction
    expected = told[0]["num_examples"] * fraction / (1 - fraction)
    classes = len(truth.shared.classes)
    likely = range(max(1, int(expected / SLACK)), int(expected * SLACK) + 2)
    for images in sorted(likely, key=lambda n: abs(n - expected)):
        try:
            found = fitting(told, images, classes, 2)
        except TooMany:
            return []
        if found:
            return found
    return []


def peers(truth: RecordedTruth) -> list[Finding]:
    """Reconstruct the others' predictions as one, two, ... of the clients can who work together."""
    of = "another's predictions, by peers"
    settings, rounds = truth.settings, truth.received.rounds
    if settings.strategy.name != "mutual":
        return [Finding("peers", of, note="not computed: for strategy=mutual only")]
    if type(settings.consensus.rule()) is not Mean or settings.consensus.include_own:
        return [Finding("peers", of, note="not computed: for consensus=mean without one's own only")]
    known = rounds[-1].predictions if rounds else {}
    if len(known) < 2:
        return [Finding("peers", of, note="not computed: only the sum of the predictions was received")]
    chosen = settings.strategy
    divergence = chosen.divergence_for(settings)
    found = []
    for count in sorted({*range(1, min(len(known), MOST_PEERS)), len(known) - 1}):
        result = reconstructed(known, divergence, chosen.temperature, count)
        of = f"another's predictions, by {count} of {len(known)} clients"
        found.append(Finding(f"peers-{count}", of, asdict(result)))
    return found
