"""Known ways in which mutual learning goes wrong, recognised in a run's history.

Each signature is one pure function from history lines to at most one warning: which clients, which rounds,
what to do. Only the latest rounds count: a problem that a run has recovered from gives no warning.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedmutual.results.summary import natural_key

Record = Mapping[str, Any]
Lines = dict[str, list[Record]]

# A signature must hold over this many reports of a client: one round is noise, most of all with the few
# dozen validation images that a small client has.
REPEATED = 3
# ... and is looked for in at most this many of its latest reports.
RECENT = 4
# Validation accuracy that the mutual step costs. A tenth of 400 images is 40 to validate on, one of which is
# 2.5 points; the median of three rounds moves by less than two images by chance.
FORGOTTEN_ACCURACY = 0.05
# Growth of the validation loss that counts as forgetting. Peers' softer targets alone raise the loss of an
# overconfident client by a few per cent.
FORGOTTEN_LOSS_RATIO = 1.5
FORGOTTEN_LOSS = 0.1
# KL divergence as a share of log(classes), its scale. For two classes 0.0007 nats is a difference of
# about 2 points of probability at 50 %: nothing that an epoch of local training does not drown.
TINY_KL = 1e-3
# A mutual step that is felt moves the divergence by far more than one per cent of it.
UNMOVED_KL = 0.01
# Rounds without progress, after at least as many with it, at a level that is less than this share of the way
# from chance to perfect, are a plateau; a smaller gain is within one standard error on 5,000 images.
PLATEAU_ROUNDS = 5
PLATEAU_GAIN = 0.003
FAR_FROM_DONE = 0.6
# One class has more than this share of the public predictions: no useful public set is so skewed ...
ONE_CLASS_SHARE = 0.98
# ... unless the client tells the classes apart (balanced accuracy, share of the way from chance).
TELLS_CLASSES_APART = 0.5
# A class is never found below this recall; with many classes a tenth of them must be so.
NEVER_FOUND = 0.02
NEVER_FOUND_CLASSES = 0.1
# Share of the rounds without a usable report, and at least two rounds.
OFTEN_ABSENT = 0.25


def diagnose(history: Sequence[Record], num_classes: int, kl_weight: float = 1.0) -> list[str]:
    """Return a warning for every failure signature that the history shows; a healthy run has none.

    Parameters
    ----------
    history : Sequence[Mapping[str, Any]]
        History lines; keys may be absent or None.
    num_classes : int
        Number of classes C; with fewer than two there is nothing to tell apart, and only the training loss,
        forgetting and absences are looked at.
    kl_weight : float
        Weight of the KL term; at 0 an idle KL term is meant to be.
    """
    lines = reports_by_client(history)
    found = [*_diverged(lines), *_other_images(lines), *_forgetting(lines)]
    if num_classes > 1:
        found += _idle_kl(lines, num_classes) if kl_weight > 0 else []
        found += [*_plateau(lines, num_classes), *_one_class(lines, num_classes)]
        found += _missing_classes(lines, num_classes)
    return [*found, *_absent(history)]


def lacking(history: Sequence[Record]) -> str | None:
    """Say what the reports do not tell of the clients' own images, in one line; None: nothing is lacking."""
    lines = reports_by_client(history)
    silent = [c for c, r in lines.items() if r and not any(_figures(line, "validation_recall") for line in r)]
    if not silent:
        return None
    accurate = any(number(line, "validation_accuracy") is not None for c in silent for line in lines[c])
    weights = "plain accuracy" if accurate else "nothing, and weighs them alike"
    return (
        f"{_some(silent)}: no recall per class on their own images was reported (privacy.metrics). So there "
        "is no balanced validation accuracy, classes that a client never finds show on the unseen images "
        f"only, and consensus=validation knows {weights}. Numbers of images may be rounded."
    )


def reports_by_client(history: Sequence[Record]) -> Lines:
    """Accepted lines of every client in natural order of the names, each in order of its rounds."""
    lines: Lines = {}
    for line in sorted(history, key=lambda line: int(line["round"])):
        if line.get("client") is not None and not line.get("rejected"):
            lines.setdefault(str(line["client"]), []).append(line)
    return {name: lines[name] for name in sorted(lines, key=natural_key)}


def _diverged(lines: Lines) -> Iterator[str]:
    """The latest training loss is no number (null in history.jsonl)."""
    last = {client: [r for r in reports if "train_loss" in r][-1:] for client, reports in lines.items()}
    hit = {client: r for client, r in last.items() if r and number(r[0], "train_loss") is None}
    if hit:
        yield (
            f"{_where(hit)}: the training loss is no longer a number, the model is lost. "
            "Lower optimizer.learning_rate, and use precision=fp32 if another is set."
        )


def _other_images(lines: Lines) -> Iterator[str]:
    """A client's private images changed during the run."""
    for client, reports in lines.items():
        told = [line for line in reports if line.get("private_digest")]
        for before, after in itertools.pairwise(told):
            if before["private_digest"] != after["private_digest"]:
                yield (
                    f"{client}: its private images changed between the rounds {before['round']} and "
                    f"{after['round']}: its figures before and after are of other images. Start a new run."
                )


def _forgetting(lines: Lines) -> Iterator[str]:
    """Local validation is worse after the mutual step than before it, in the median of the latest rounds."""
    hit: Lines = {}
    worst = 0.0
    for client, reports in lines.items():
        accuracy = _recent(reports, "accuracy_before", "accuracy_after")
        loss = _recent(reports, "loss_before", "loss_after")
        drops = [line["accuracy_before"] - line["accuracy_after"] for line in accuracy]
        risen = [line["loss_after"] > _too_high(line["loss_before"]) for line in loss]
        drop = statistics.median(drops or [0.0])
        if drop > FORGOTTEN_ACCURACY or sum(risen) > len(risen) / 2:
            hit[client], worst = accuracy or loss, max(worst, drop)
    if hit:
        points = f"costs up to {100 * worst:.0f} points of"
        cost = points if worst > FORGOTTEN_ACCURACY else "raises the loss of"
        yield (
            f"{_where(hit)}: forgetting: the mutual step {cost} the local validation, round after round. "
            "Use strategy.phase=mixed, or lower strategy.kl_weight or strategy.mutual_epochs."
        )


def _too_high(loss: float) -> float:
    return max(FORGOTTEN_LOSS_RATIO * loss, loss + FORGOTTEN_LOSS)


def _idle_kl(lines: Lines, num_classes: int) -> Iterator[str]:
    """The divergence from the peers is too small to teach anything, or the mutual step does not move it."""
    tiny: Lines = {}
    unmoved: Lines = {}
    least = TINY_KL * math.log(num_classes)
    for client, reports in lines.items():
        before = _recent(reports, "kl_before")
        both = _recent(reports, "kl_before", "kl_after")
        changes = [abs(line["kl_after"] / line["kl_before"] - 1) for line in both if line["kl_before"] > 0]
        if before and max(line["kl_before"] for line in before) < least:
            tiny[client] = before
        elif changes and statistics.median(changes) < UNMOVED_KL:
            unmoved[client] = both
    if tiny:
        yield (
            f"{_where(tiny)}: the predictions on the public set hardly differ from the peers' "
            f"(KL below {least:.1g} nats), so the KL term does nothing. Train longer between exchanges "
            "(train.local_epochs), or use public images on which the clients disagree."
        )
    elif unmoved:
        yield (
            f"{_where(unmoved)}: the mutual step leaves the KL to the peers where it was (within "
            f"{100 * UNMOVED_KL:.0f} %). Raise strategy.kl_weight, strategy.mutual_epochs or "
            "optimizer.learning_rate."
        )


def _plateau(lines: Lines, num_classes: int) -> Iterator[str]:
    """The mean accuracy has stopped rising far from its goal."""
    for key in ("unseen_accuracy", "validation_accuracy"):
        curve = _mean_curve(lines, key)
        if len(curve) >= 2 * PLATEAU_ROUNDS:
            break
    else:
        return
    rounds, values = list(curve), list(curve.values())
    best, recent = max(values[:-PLATEAU_ROUNDS]), max(values[-PLATEAU_ROUNDS:])
    if recent - best < PLATEAU_GAIN and _above_chance(recent, num_classes) < FAR_FROM_DONE:
        yield (
            f"all clients (rounds {rounds[-PLATEAU_ROUNDS]} to {rounds[-1]}): the mean "
            f"{key.replace('_', ' ')} has stopped at {100 * recent:.1f} %, no better than before. Compare "
            "with strategy.kl_weight=0: if that is better, lower strategy.kl_weight; if not, try another "
            "optimizer.learning_rate, more train.local_epochs or another model."
        )


def _one_class(lines: Lines, num_classes: int) -> Iterator[str]:
    """Nearly all public images are given the same class, in the latest reports in a row."""
    hit: Lines = {}
    for client, reports in lines.items():
        recent = [line for line in reports if _figures(line, "prediction_shares")][-REPEATED:]
        collapsed = len(recent) == REPEATED and all(_one_sided(line) for line in recent)
        if collapsed and not _tells_apart(reports, num_classes):
            hit[client] = recent
    if hit:
        yield (
            f"{_where(hit)}: collapse: nearly all public images are given one class. Use "
            "train.prior_correction=true and strategy.phase=mixed, or a labelled public set "
            "(public.labelled). A later start of the exchange (strategy.burn_in) helps too."
        )


def _missing_classes(lines: Lines, num_classes: int) -> Iterator[str]:
    """Classes of the unseen set (else of the validation images) that a client never finds."""
    hit: Lines = {}
    classes: set[int] = set()
    for client, reports in lines.items():
        shown = [line for line in reports if _figures(line, "prediction_shares")][-1:]
        never, recent = _never_found(reports)
        enough = len(never) >= max(1.0, NEVER_FOUND_CLASSES * num_classes)
        if enough and not any(_one_sided(line) for line in shown):  # that is said by _one_class
            hit[client], classes = recent, classes | never
    if hit:
        yield (
            f"{_where(hit)}: {_some([f'class {c}' for c in sorted(classes)])} "
            f"{'is' if len(classes) == 1 else 'are'} never recognised (recall below {NEVER_FOUND:.0%}). Use "
            "train.prior_correction=true, and see that the public set holds images of every class."
        )


def _absent(history: Sequence[Record]) -> Iterator[str]:
    """A client answers, or is accepted, in too few of the rounds; asynchronous runs have no common rounds."""
    opening = [line for line in history if not line.get("closing")]
    crowd = Counter(int(line["round"]) for line in opening)
    senders = {_sender(line) for line in opening}
    if len(senders) > 1 and statistics.median(crowd.values()) <= 1:
        return
    texts = []
    for sender in sorted(senders, key=natural_key):
        own = [line for line in opening if _sender(line) == sender]
        missing = crowd.keys() - {int(line["round"]) for line in own if not line.get("rejected")}
        reasons = [f": {line['rejected']}" for line in own if line.get("rejected")]
        if len(missing) >= 2 and len(missing) > OFTEN_ABSENT * len(crowd):
            texts.append(f"{sender} ({_rounds(missing)}{''.join(reasons[-1:])})")
    if texts:
        yield (
            f"{_some(texts)}: absent or rejected in many rounds, so the others learn without it. See its "
            "log; where it is only slow, raise exchange.round_timeout or lower its train.local_epochs."
        )


def _mean_curve(lines: Lines, key: str) -> dict[int, float]:
    """Mean over clients of ``key`` in every round but the closing one and those that half of them miss."""
    rounds: dict[int, list[float]] = {}
    for line in itertools.chain.from_iterable(lines.values()):
        value = number(line, key)
        if value is not None and not line.get("closing"):
            rounds.setdefault(int(line["round"]), []).append(value)
    return {
        round: statistics.fmean(rounds[round])
        for round in sorted(rounds)
        if 2 * len(rounds[round]) > len(lines)
    }


def number(line: Record, key: str) -> float | None:
    """The finite number under ``key``, or None."""
    value = line.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _figures(line: Record, key: str) -> list[float | None]:
    """The figures per class under ``key``: non-finite entries become None; a missing list becomes []."""
    values = line.get(key)
    return [number({key: v}, key) for v in values] if isinstance(values, (list, tuple)) else []


def _recent(reports: Sequence[Record], *keys: str) -> list[Record]:
    """The latest reports in which all the keys have numbers; none when they are too few to tell."""
    having = [line for line in reports if all(number(line, key) is not None for key in keys)]
    return having[-RECENT:] if len(having) >= REPEATED else []


def _one_sided(line: Record) -> bool:
    shares = _figures(line, "prediction_shares")
    return any(share is not None and share > ONE_CLASS_SHARE for share in shares)


def _tells_apart(reports: Sequence[Record], num_classes: int) -> bool:
    """Whether the latest balanced accuracy shows that the public images, not the client, are one-sided."""
    for key in ("unseen_balanced_accuracy", "validation_balanced_accuracy"):
        known = [value for line in reports if (value := number(line, key)) is not None]
        if known:
            return _above_chance(known[-1], num_classes) > TELLS_CLASSES_APART
    return False


def _above_chance(accuracy: float, num_classes: int) -> float:
    """Share of the way from chance (0) to perfect (1)."""
    return (accuracy - 1 / num_classes) / (1 - 1 / num_classes)


def _never_found(reports: Sequence[Record]) -> tuple[set[int], list[Record]]:
    """Classes with almost no recall in every one of the latest reports, or in the closing one, and these."""
    unseen, validation = (
        [line for line in reports if _figures(line, key)] for key in ("unseen_recall", "validation_recall")
    )
    having, key = (unseen, "unseen_recall") if unseen else (validation, "validation_recall")
    # the closing report sees the whole unseen set: it needs no repetition
    final = [line for line in unseen[-1:] if line.get("closing")]
    recent = final or having[-REPEATED:]
    if not final and len(recent) < REPEATED:
        return set(), []
    recalls = itertools.zip_longest(*(_figures(line, key) for line in recent))  # None: not in the set
    never = (all(recall is not None and recall < NEVER_FOUND for recall in column) for column in recalls)
    return {c for c, low in enumerate(never) if low}, recent


def _sender(line: Record) -> str:
    return str(line["client"] if line.get("client") is not None else f"node {line.get('node_id')}")


def _where(hit: Lines) -> str:
    rounds = {int(line["round"]) for reports in hit.values() for line in reports}
    return f"{_some(list(hit))} ({_rounds(rounds)})"


def _rounds(rounds: Iterable[int]) -> str:
    """ "round 3", "rounds 3 to 6", "rounds 1, 4 and 7"."""
    numbers = sorted(rounds)
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)) or len(numbers) > 6:
        inside = "" if len(numbers) == numbers[-1] - numbers[0] + 1 else f"{len(numbers)} of the "
        return f"{inside}rounds {numbers[0]} to {numbers[-1]}"
    return f"rounds {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _some(names: Sequence[str], most: int = 5) -> str:
    """At most five of the names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
