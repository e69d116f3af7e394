"""Progress of a site in its SuperNode's log: a short line per round."""

from __future__ import annotations

from fedmutual.wire.reports import Report

_NEAR = 0.0005  # a smaller change of the KL rounds to 0


def progress(report: Report, before: Report | None, closing: bool) -> str:
    """Summarise a round at this site in one line.

    Parameters
    ----------
    report : Report
        Report of this round.
    before : Report | None
        Report of the previous round, for comparison.
    closing : bool
        Whether the order was the closing one.

    Examples
    --------
    >>> import numpy as np
    >>> metrics = {"num-examples": 306, "seconds": 4.1, "validation-accuracy": 0.912}
    >>> report = Report("ward", 2, "", "VisionNet", np.zeros((0, 2)), metrics)
    >>> progress(report, None, False)
    'ward, round 2: trained on 306 own images in 4.1 s; right on 91.2 % of its own held-out images'
    """
    title = "end of the run" if closing else f"round {report.round}"
    done = [
        _training(report, closing),
        _accuracy(report, before, "validation-accuracy", "its own held-out images"),
        _accuracy(report, before, "unseen-accuracy", "the unseen images that all sites share"),
        _agreement(report),
    ]
    return f"{report.client}, {title}: " + "; ".join(part for part in done if part)


def _number(report: Report, key: str) -> float | None:
    value = report.metrics.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def _training(report: Report, closing: bool) -> str:
    images, seconds = _number(report, "num-examples"), _number(report, "seconds")
    time = "" if seconds is None else f" in {seconds:.1f} s"
    if closing or images is None:
        return f"done{time}"
    return f"trained on {images:.0f} own images{time}"


def _accuracy(report: Report, before: Report | None, key: str, where: str) -> str:
    now, earlier = _number(report, key), _number(before, key) if before is not None else None
    if now is None:
        return ""
    compared = "" if before is None or earlier is None else f" (round {before.round}: {100 * earlier:.1f} %)"
    return f"right on {100 * now:.1f} % of {where}{compared}"


def _agreement(report: Report) -> str:
    before, after = _number(report, "kl-before"), _number(report, "kl-after")
    if before is None or after is None:
        return ""
    if abs(before - after) < _NEAR:
        change = "did not change its distance from its peers"
    elif after < before:
        change = "brought it nearer to its peers"
    else:
        change = "moved it away from its peers: its own images can outweigh the exchange"
    return f"learning from the others {change} (KL {before:.3f} -> {after:.3f})"
