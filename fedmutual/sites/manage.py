"""Add and remove sites by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedmutual.provision.keys import checked_public
from fedmutual.provision.registry import Registry
from fedmutual.settings.identity import CLIENT_NAME
from fedmutual.sites.superlink import REMOVED, Registered, SuperLink, of_name
from fedmutual.wire.signatures import fingerprint


class SiteError(ValueError):
    """A site cannot be added or removed; the message names the site and the remedy."""


def add(superlink: SuperLink, registry: Registry, name: str, key: Path | None, replace: bool) -> str:
    """Register a site's key under its name; returns what was done.

    Parameters
    ----------
    key : Path or None
        Its public key; None: the registry has it.
    replace : bool
        Remove nodes of this name that have another key.

    Raises
    ------
    SiteError, SuperLinkError
    """
    line = _key(registry, name, key)
    wanted = fingerprint(line)
    nodes, _ = superlink.nodes()
    if any(node.fingerprint == wanted and node.state == REMOVED for node in nodes):
        raise SiteError(
            f"{name}: its key {wanted} was removed, and Flower never takes such a key again: make a new one "
            f"with `fedmutual provision PROJECT.yaml --new-key {name}`, and hand the site its folder"
        )
    mine = of_name(nodes, name, wanted)
    same = [node for node in mine if node.fingerprint == wanted]
    if same and same[0].name != name:
        raise SiteError(
            f"{name}: its key {wanted} is registered as {same[0].name or 'a node without a name'}: one "
            "key is one site"
        )
    others = [node for node in mine if node.fingerprint != wanted]
    if others and not replace:
        raise SiteError(
            f"{name}: registered with another key, {others[0].fingerprint}; --replace takes {wanted} "
            "in its place"
        )
    if key is not None:
        registry.put(name, line)
    said = f"{name} is registered: node {same[0].id}" if same else ""
    if not same:
        said = f"{name} registered as node {superlink.register(name, line)}"
    for node in others:
        superlink.unregister(node.id)
    removed = f"; node {others[0].id} with the key {others[0].fingerprint} removed" if others else ""
    return f"{said}, {wanted}{removed}"


def remove(
    superlink: SuperLink, registry: Registry, name: str, agreed: Callable[[Sequence[Registered]], bool]
) -> str:
    """Remove the nodes of a name; returns what was done, empty where nobody agreed.

    Parameters
    ----------
    agreed : callable
        Called with the nodes that are to be removed.

    Raises
    ------
    SiteError, SuperLinkError
    """
    known = registry.read()
    key = fingerprint(known[name]) if name in known else ""
    nodes, _ = superlink.nodes()
    mine = of_name(nodes, name, key)
    foreign = [node for node in mine if node.name not in ("", name)]
    if foreign:
        raise SiteError(
            f"{name}: the registry's key {key} is registered as {foreign[0].name}: correct "
            f"{registry.folder} first"
        )
    if not mine and name not in known:
        names = sorted({node.name for node in nodes if node.name and node.state != REMOVED} | known.keys())
        raise SiteError(f"{name}: there is no such site; there are {', '.join(names) or 'none'}")
    if not agreed(mine):
        return ""
    for node in mine:
        superlink.unregister(node.id)
    removed = ", ".join(f"node {node.id} with the key {node.fingerprint}" for node in mine)
    said = f"{name} removed: {removed or 'it was not registered'}"
    try:
        registry.drop(name)
    except OSError as error:  # it is mounted read-only
        return f"{said}; {registry.folder} still lists it ({error.strerror}): take it out of the project"
    return said


def _key(registry: Registry, name: str, key: Path | None) -> bytes:
    if not CLIENT_NAME.fullmatch(name):
        raise SiteError(f"{name!r} is no name of a site")
    if key is not None:
        try:
            return checked_public(key.read_bytes(), name)
        except OSError as error:
            raise SiteError(f"{name}: {key}: {error.strerror}") from error
        except ValueError as error:
            raise SiteError(f"{name}: {key} is no public key of a site: {error}") from error
    known = registry.read()
    if name not in known:
        raise SiteError(
            f"{name}: {registry.folder} has no {name}.pub; it has {', '.join(known) or 'none'}. Provision "
            "the site, or give its public key with --key FILE"
        )
    return known[name]
