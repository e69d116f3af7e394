"""How much of what a site measures on its own images leaves it (``privacy.metrics``).

``coarse`` is built so that the figures of a report fit every distribution of the validation images over the
classes. An accuracy is the share ``h / n`` of ``n`` images, sent as the nearest multiple of ``1 / g`` with
``g < n``. The shares that ``n`` images can have are ``1 / n`` apart, so every multiple is the nearest one of
some ``h``; and any distribution of ``n`` images over the classes allows any ``h``. Recall and AUROC, which
tell distributions apart, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedmutual.settings import PrivacySettings, Settings, SettingsError
from fedmutual.settings.at_site import trusts_run
from fedmutual.settings.schema import OVERLAP
from fedmutual.wire.metrics import EXAMPLES
from fedmutual.wire.records import Metrics

RELEASED = "released"  # differential privacy: nothing but the noisy release
LEVELS = ("none", "coarse", "full")  # each says more than the one before
NODE_KEY = "privacy-metrics"
OVERLAP_KEY = "privacy-overlap"
DELTA_KEY, COLLUDING_KEY = "privacy-delta", "privacy-colluding"
VALIDATED = "num-validation"  # images that the validation figures are of; never sent
FINEST = 128  # multiples of an accuracy, at most
LOSS_STEPS = 16  # a nat
_SHARED = (  # of no private image
    *("unseen-accuracy", "unseen-recall", "unseen-auroc", "unseen-f1", "unseen-ece"),
    *("kl-before", "kl-after"),
)
_ACCURACIES = ("validation-accuracy", "accuracy-after")
_LOSSES = ("train-loss", "validation-loss", "loss-after")


def metrics_level(chosen: str, node_config: Mapping[str, Any]) -> str:
    """Return how much a site says: what the run asks for, and no more than its owner allows.

    Parameters
    ----------
    chosen : str
        ``privacy.metrics`` of the run; ``auto`` is as much as the owner allows.
    node_config : Mapping[str, Any]
        ``privacy-metrics`` is the owner's word. Without it a site allows ``coarse``, and a simulation, where
        server and site are one person, ``full``.

    Raises
    ------
    SettingsError
        The owner's word is none of the levels.
    """
    most = _owners_word(node_config, NODE_KEY, LEVELS, at_site="coarse", in_simulation="full")
    return most if chosen == "auto" else min(chosen, most, key=LEVELS.index)


def overlap_rule(chosen: str, node_config: Mapping[str, Any]) -> str:
    """Return what becomes of private images that are also public: the stricter word holds.

    Parameters
    ----------
    chosen : str
        ``privacy.overlap`` of the run.
    node_config : Mapping[str, Any]
        ``privacy-overlap`` is the owner's word. Without it a site says ``exclude``, and a simulation what the
        run says.

    Raises
    ------
    SettingsError
        The owner's word is none of the rules.
    """
    own = _owners_word(node_config, OVERLAP_KEY, OVERLAP, at_site="exclude", in_simulation="allow")
    return max(chosen, own, key=OVERLAP.index)


def _owners_word(
    node_config: Mapping[str, Any], key: str, words: Sequence[str], *, at_site: str, in_simulation: str
) -> str:
    """Return what a site's owner says under ``key``, or what it is where nothing is said."""
    said = str(node_config.get(key, in_simulation if trusts_run(node_config) else at_site))
    if said not in words:
        raise SettingsError(f"{key}: a node configuration takes {', '.join(words)}")
    return said


def report_level(privacy: PrivacySettings, node_config: Mapping[str, Any]) -> str:
    """Return the level of a report: :func:`metrics_level`, or ``released`` with ``privacy.epsilon``.

    With differential privacy a site says nothing but what has noise, whatever its owner allows. Only a
    simulation still measures its clients, unless ``privacy.metrics`` says otherwise: they are nobody's.
    """
    level = metrics_level(privacy.metrics, node_config)
    measured = level == "full" and trusts_run(node_config)
    return level if privacy.epsilon is None or measured else RELEASED


def require_sound_noise(settings: Settings, node_config: Mapping[str, Any]) -> None:
    """Refuse noise that no proof covers in floating-point numbers, unless the owner trusts the run.

    Raises
    ------
    SettingsError
        The strategy's noise is Opacus', and the owner has not said ``trust-run``.
    """
    if settings.privacy.epsilon is None or settings.strategy.dp_library != "opacus":
        return
    if not trusts_run(node_config):
        raise SettingsError(
            f"privacy.epsilon: the noise of strategy={settings.strategy.name} is floating-point numbers, "
            "against which attacks are known, and no promise for a real site: set strategy=speaker, or let "
            "the site's owner set trust-run=true"
        )


def require_owners_limits(privacy: PrivacySettings, node_config: Mapping[str, Any]) -> None:
    """Refuse a run that promises less than the owner asks for, before anything is released.

    Parameters
    ----------
    privacy : PrivacySettings
        Of the run, which chooses ``delta`` and ``colluding``.
    node_config : Mapping[str, Any]
        ``privacy-delta`` is the largest delta that the owner takes, ``privacy-colluding`` the least number of
        colluding sites, with secure aggregation. Without them the run's choice holds.

    Raises
    ------
    SettingsError
        The run's delta is larger, or it has fewer colluding sites; or the owner's word is no such number.
    """
    delta, colluding = _owners_delta(node_config), _owners_colluding(node_config)
    if privacy.epsilon is None:
        return
    if privacy.delta > delta:
        raise SettingsError(
            f"privacy.delta: {privacy.delta:g} is above this site's {DELTA_KEY}={delta:g}: set "
            f"privacy.delta={delta:g}, or let the site's owner raise {DELTA_KEY} in the node configuration"
        )
    if privacy.secagg and privacy.colluding < colluding:
        raise SettingsError(
            f"privacy.colluding: {privacy.colluding} is below this site's {COLLUDING_KEY}={colluding}: set "
            f"privacy.colluding={colluding}, or let the site's owner lower {COLLUDING_KEY} in the node "
            "configuration"
        )


def _owners_delta(node_config: Mapping[str, Any]) -> float:
    try:
        delta = float(node_config.get(DELTA_KEY, 1))
    except ValueError:
        delta = math.nan
    if not 0 < delta <= 1:
        raise SettingsError(f"{DELTA_KEY}: a node configuration takes a number above 0, and at most 1")
    return delta


def _owners_colluding(node_config: Mapping[str, Any]) -> int:
    text = str(node_config.get(COLLUDING_KEY, 0))
    if not text.isdecimal():
        raise SettingsError(f"{COLLUDING_KEY}: a node configuration takes a whole number from 0 on")
    return int(text)


def disclosed(metrics: Metrics, level: str) -> Metrics:
    """Return the measurements that leave the site.

    Parameters
    ----------
    metrics : Metrics
        All of a round, with :data:`VALIDATED` where there are validation images.
    level : str
        ``full``: all. ``coarse``: without recall and AUROC of the own images; accuracies as multiples of
        ``1 / g``, with the largest power of two ``g`` below their number (at most 128); losses as multiples
        of 1/16 nat; the number of training images as the nearest power of two. ``none``: only what is
        measured on shared images; the number of training images is 1 for everybody. ``released``: nothing
        but that 1.
    """
    if level == RELEASED:
        return {EXAMPLES: 1}
    if level == "full":
        return {name: value for name, value in metrics.items() if name != VALIDATED}
    count = metrics[EXAMPLES]
    assert isinstance(count, int)
    said: Metrics = {EXAMPLES: power_of_two(count) if level == "coarse" else 1}
    said |= {name: metrics[name] for name in _SHARED if name in metrics}
    if "seconds" in metrics:
        said["seconds"] = float(f"{metrics['seconds']:.2g}")
    return said | _rounded(metrics) if level == "coarse" else said


def power_of_two(count: int) -> int:
    """Return the power of two that is nearest by its ratio; 1 for 0."""
    return 1 << round(math.log2(max(count, 1)))


def multiples(images: int) -> int:
    """Return how many steps from 0 to 1 an accuracy on so many images is told in; 0: it is not told.

    >>> [multiples(n) for n in (1, 2, 3, 4, 5, 8, 9, 1000)]
    [0, 1, 2, 2, 4, 4, 8, 128]
    """
    return 0 if images < 2 else min(1 << ((images - 1).bit_length() - 1), FINEST)


def _rounded(metrics: Metrics) -> Metrics:
    images = metrics.get(VALIDATED, 0)
    assert isinstance(images, int)
    steps = {name: multiples(images) for name in _ACCURACIES} | dict.fromkeys(_LOSSES, LOSS_STEPS)
    return {name: _nearest(metrics[name], step) for name, step in steps.items() if step and name in metrics}


def _nearest(value: Any, steps: int) -> float:
    """The nearest multiple of ``1 / steps``; what is not finite stays, and the server says so."""
    return round(value * steps) / steps if math.isfinite(value) else float(value)
