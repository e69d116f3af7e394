"""The first line of a report: did exchanging help?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fedmutual.report.verdict import run_verdict, verdicts


def _run(name: str, strategy: str, seed: int = 0, measure: str = "unseen_accuracy", **clients: float) -> Any:
    figures = {client: {measure: value} for client, value in clients.items()}
    return SimpleNamespace(name=name, summary={"strategy": strategy, "seed": seed, "clients": figures})


def test_gains_are_those_of_each_client_against_learning_alone_with_the_same_seed() -> None:
    runs = [
        _run("l1", "local", seed=1, a=0.0, b=0.0),
        _run("l0", "local", a=0.80, b=0.70),
        _run("m0", "mutual", a=0.85, b=0.79),
        _run("f0", "fedavg", a=0.70, b=0.72),
    ]
    mutual, fedavg = verdicts(runs)
    assert mutual == (
        "Did exchanging help? m0: yes. +7.0 points on unseen images against learning alone; 2 of 2 clients "
        "gained, 0 lost (a +5.0, b +9.0)."
    )
    assert "f0: no. -4.0 points" in fedavg
    assert "1 of 2 clients gained, 1 lost (a -10.0, b +2.0)" in fedavg


def test_validation_stands_in_for_unseen_images() -> None:
    runs = [
        _run(n, s, measure="validation_accuracy", a=v)
        for n, s, v in (("l", "local", 0.5), ("m", "mutual", 0.6))
    ]
    assert "+10.0 points on their own validation images" in verdicts(runs)[0]


def test_what_cannot_be_said_is_not() -> None:
    assert "nothing to compare with" in verdicts([_run("m", "mutual", a=1), _run("f", "fedavg", a=1)])[0]
    assert "no client in common" in verdicts([_run("l", "local", a=1), _run("m", "mutual", b=1)])[0]
    assert verdicts([_run("l", "local", a=1), _run("c", "centralised", a=1)]) == []
    assert "fedmutual compare strategy=mutual,local" in run_verdict({"strategy": "mutual"})
    assert run_verdict({"strategy": "local"}).startswith("Nothing is exchanged")
