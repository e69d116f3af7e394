"""Checks of the site itself: name, data, device, disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedmutual.backbones.intake import intake_of
from fedmutual.backbones.weights import find_backbone
from fedmutual.client.disclosure import (
    RELEASED,
    report_level,
    require_owners_limits,
    require_sound_noise,
)
from fedmutual.client.masking import open_masking
from fedmutual.client.sent import FOLDER, states_of
from fedmutual.data.cache import cache_folder
from fedmutual.data.site import SiteData, load_site
from fedmutual.doctor.finding import CheckError
from fedmutual.files.atomic import atomic_write
from fedmutual.learning.device import choose_device, describe
from fedmutual.learning.ridge import solve, statistics
from fedmutual.models.allowed import require_model
from fedmutual.models.build import build_model
from fedmutual.models.learnt import build_learnt, name_of
from fedmutual.models.pretrained import Head
from fedmutual.results.directory import states_dir
from fedmutual.settings import Settings
from fedmutual.settings.at_site import trusts_run
from fedmutual.settings.identity import partition_of
from fedmutual.settings.pretrained import pretrained_settings

_GENERATIONS = 3  # copies of a state on disk during saving: previous, current, and the one being written
RIDGE = 0.1  # of the linear head that is measured
_COPIES = 3  # weights, and Adam's two moments


def load_data(settings: Settings, node_config: Mapping[str, Any]) -> tuple[SiteData, str]:
    """Load the site's data as its client does; return it with a description.

    Raises
    ------
    DataError, IdentityError
        The message names the remedy.
    """
    site = load_site(settings, partition_of(node_config), intake=intake_of(settings))
    counts = [(site.private.labels == label).sum() for label in range(len(site.classes))]
    classes = ", ".join(f"{count} {name}" for name, count in zip(site.classes, counts, strict=True))
    return site, f"{len(site.private)} private images ({classes}), {len(site.train_indices(1))} to train on"


def check_public(site: SiteData, expected: str | None) -> str:
    """Compare the public set's digest with the server's, if given."""
    digest = site.public.digest
    if expected is not None and digest != expected:
        raise CheckError(
            f"{len(site.public)} images, digest {digest}; the server has {expected}",
            "copy the server's public images to this site again, unchanged, and pass the run's data, public "
            "and seed settings to this command; or run with public.distribute=true",
        )
    same = "the server's" if expected else "must be the server's (public_digest in its summary.json)"
    return f"{len(site.public)} images, digest {digest}: {same}"


FIGURES = {
    "full": "all figures measured on its own images, exact, recall per class too",
    "coarse": "rounded figures measured on its own images",
    "none": "no figure measured on its own images",
}


def what_leaves(settings: Settings, node_config: Mapping[str, Any]) -> str:
    """Say what this site sends under these settings.

    Raises
    ------
    SettingsError
        The owner's word is none, or the owner takes no part in such a run.
    """
    level = report_level(settings.privacy, node_config)
    require_sound_noise(settings, node_config)
    require_owners_limits(settings.privacy, node_config)
    masked = open_masking(Path(), "", settings, node_config) is not None
    said = ["its name and its model's class", *settings.strategy.sends(settings)]
    if level == RELEASED:
        proven = f"epsilon {settings.privacy.epsilon:g}, delta {settings.privacy.delta:g}"
        if masked:
            proven += f", {settings.privacy.colluding} colluding"
        said.append(f"nothing else of its images (privacy.epsilon: {proven} for each image)")
        return f"{'; '.join(said)}. Record: {states_of(node_config) / FOLDER}"
    if masked:
        said[-1] += ", masked, so that the server gets their sum only (privacy.secagg)"
    else:
        said.append("predictions of the shared unseen images, once at the end, where there are any")
    said.append(f"{FIGURES[level]} (privacy.metrics: {level})")
    said.append("KL to the peers, accuracy on shared images, times")
    record = "none in a simulation" if trusts_run(node_config) else states_of(node_config) / FOLDER
    return f"{'; '.join(said)}. Record: {record}"


def check_device(settings: Settings) -> str:
    """Find the device and test it with a small computation."""
    import torch

    device = choose_device(settings.device)
    torch.ones(8, device=device).sum().item()
    memory = psutil.virtual_memory()
    return (
        f"{describe(device, settings.device)}; memory: {memory.available / 2**30:.1f} of "
        f"{memory.total / 2**30:.1f} GiB free"
    )


def build(settings: Settings, node_config: Mapping[str, Any], site: SiteData | None) -> tuple[int, str]:
    """Build what learns of the site's model; return its states' disk space in bytes, and a description.

    Parameters
    ----------
    site : SiteData or None
        None: its data cannot be loaded; two classes are assumed.
    """
    require_model(settings.model.target, node_config)
    chosen = pretrained_settings(settings.model)
    if site is None and chosen is not None:
        backbone = find_backbone(chosen)
        return (
            0,
            f"{backbone.name}: its weights are here ({backbone.source}); without data, no more is checked",
        )
    if site is None:
        model, _ = build_model(settings.model, 2, settings.data.image_size, seed=0)
    else:
        model, _ = build_learnt(settings, site, seed=0)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    said = f"{settings.model.target}: {parameters:,} parameters"
    if site is not None and isinstance(model, Head):
        said = f"{name_of(settings.model, model)}: {parameters:,} parameters; {_linear_head(site, model)}"
    return size * _GENERATIONS * _COPIES, said


def _linear_head(site: SiteData, head: Head) -> str:
    """Say what a ridge regression of the features reaches on the site's own held-out images."""
    import torch

    train, held_out = site.train_indices(1), site.validation_indices(1)
    if len(held_out) == 0:
        return "no held-out images to measure a linear head on"
    scaled = head.scaled(torch.from_numpy(np.array(site.private.seen))).numpy()
    labels = site.private.labels
    weights, constants = solve(*statistics(scaled[train], labels[train], len(site.classes)), RIDGE)
    right = (scaled[held_out] @ weights.T + constants).argmax(axis=1) == labels[held_out]
    return f"a linear head alone is right on {right.mean():.1%} of {len(held_out)} held-out images"


def check_disk(settings: Settings, needed: int) -> str:
    """Check that a client's folders are writable and have space for a run's states."""
    flower = os.environ.get("FLWR_HOME") or Path.home() / ".flwr"
    folders = {
        "state-dir": states_dir(settings.state_dir),
        "cache_dir": cache_folder(settings.cache_dir),
        "FLWR_HOME": Path(flower),
        "temporary files": Path(tempfile.gettempdir()),
    }
    said = []
    for name, folder in folders.items():
        probe = folder / ".fedmutual-doctor"
        try:
            atomic_write(probe, b"x" * 4096)
            probe.unlink()
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise CheckError(
                f"{name} {folder} cannot be written: {error.strerror}",
                f"give the SuperNode's user (uid {os.getuid()}) write permission, free some space, or "
                "choose another folder",
            ) from error
        if free < needed:
            raise CheckError(
                f"{name} {folder}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB are needed",
                "free some space, or choose another folder",
            )
        said.append(f"{name} {folder}: {free / 1e9:.1f} GB free")
    return f"{'; '.join(said)} (a run's state takes up to {needed / 1e6:.0f} MB)"
