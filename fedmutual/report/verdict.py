"""The first line of a report: did exchanging help?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmutual.report.recorded import RecordedRun

_ALONE = ("local", "centralised")


def run_verdict(summary: Mapping[str, Any]) -> str:
    """Say what a single run can say: only a comparison with clients that learn alone answers the question."""
    name = summary["strategy"]
    if name in _ALONE:
        return "Nothing is exchanged in this run: it is what others are compared with."
    return (
        "Did exchanging help? A run alone does not say. Compare it with clients that learn alone: "
        f"fedmutual compare strategy={name},local and this run's other settings."
    )


def verdicts(runs: Sequence[RecordedRun]) -> list[str]:
    """Say of every run that exchanges something what each client gained over learning alone.

    Parameters
    ----------
    runs : sequence of RecordedRun
        Those without exchange (``strategy=local``) are the reference, by the same seed where there is one.
    """
    alone = [run.summary for run in runs if run.summary["strategy"] == "local"]
    others = [run for run in runs if run.summary["strategy"] not in _ALONE]
    if not others:
        return []
    if not alone:
        return [
            "Did exchanging help? None of these runs is strategy=local: there is nothing to compare with."
        ]
    return [_verdict(run, alone) for run in others]


def _verdict(run: RecordedRun, alone: Sequence[Mapping[str, Any]]) -> str:
    summary = run.summary
    same = [reference for reference in alone if reference["seed"] == summary["seed"]]
    reference = (same or list(alone))[0]
    for measure, where in (("unseen_accuracy", "unseen"), ("validation_accuracy", "their own validation")):
        gains = _gains(summary, reference, measure)
        if gains:
            return _sentence(run.name, gains, where)
    return f"{run.name}: it has no client in common with the run that learns alone."


def _gains(summary: Mapping[str, Any], reference: Mapping[str, Any], measure: str) -> dict[str, float]:
    own = {name: client.get(measure) for name, client in summary["clients"].items()}
    other = {name: client.get(measure) for name, client in reference["clients"].items()}
    return {
        name: 100 * (value - other[name])
        for name, value in own.items()
        if value is not None and other.get(name) is not None
    }


def _sentence(name: str, gains: Mapping[str, float], where: str) -> str:
    average = sum(gains.values()) / len(gains)
    up, down = (sum(sign * gain > 0.05 for gain in gains.values()) for sign in (1, -1))
    least, most = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
    answer = "yes" if average > 0.5 and down == 0 else "no" if average <= 0 else "on average"
    return (
        f"Did exchanging help? {name}: {answer}. {average:+.1f} points on {where} images against learning "
        f"alone; {up} of {len(gains)} clients gained, {down} lost ({least} {gains[least]:+.1f}, {most} "
        f"{gains[most]:+.1f})."
    )
