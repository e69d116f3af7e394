"""The project file: the server, the sites, and what they share."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import OmegaConf

import fedmutual
from fedmutual.logs import brief
from fedmutual.settings.identity import CLIENT_NAME
from fedmutual.settings.schema import LEAST_SUMMED

EXAMPLE = """\
# One project: a server and the sites that learn together. `fedmutual provision project.yaml` makes the
# folders kits/server and kits/<site>. Run it again after a change: keys that are there are kept.
server:
  host: server.example        # DNS name or address at which the sites reach the server; a list for several
  port: 8443
  data: /srv/server-images    # its public and unseen images; leave it out if a run generates its images
sites:
  - name: clinic-a
    data: /srv/images         # train/<class>/*, public/<class>/*
  - name: clinic-b
    data: /srv/images
    settings: {device: cuda, privacy-metrics: none}   # what this site's owner decides: docs/site-owner.md
  - name: clinic-c
    data: /srv/images
    # a site can make its own key: ssh-keygen -t ecdsa -b 384 -N '' -f clinic-c.key
    # public-key: clinic-c.key.pub
settings: {accept-public: false}                      # for every site
secagg: false                 # true: secure aggregation, among sites that know each other's keys
run: [rounds=20, strategy=mutual]                     # the settings of a run
"""

# What an owner decides (docs/site-owner.md), and of which type it is.
OWNER_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "device": str,
    "model": str,
    "allowed-models": str,
    "allowed-classes": str,
    "accept-public": bool,
    "max-public-bytes": int,
    "privacy-metrics": str,
    "privacy-overlap": str,
    "require-secagg": bool,
    "secagg-min-clients": int,
    "secagg-peers": str,
    "privacy-budget": (int, float),
    "privacy-delta": (int, float),
    "privacy-colluding": int,
    "trust-run": bool,
    "partition-id": int,
    "num-partitions": int,
}
_GIVEN = {  # keys that the project file has a place for, or that the folders decide
    "client-name": "it is the site's name",
    "data-dir": "write it as the site's data",
    "state-dir": "it is /var/lib/fedmutual/state in every kit",
    "cache-dir": "it is /var/lib/fedmutual/cache in every kit",
    "secagg-key": "secagg: true sets it",
}
_RESERVED = ("server", "authority")
_HOST_NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f#$\"'\\{}]")  # of a value in compose files, units and TOML


class ProjectError(ValueError):
    """The project file cannot be used; the message names the key and the remedy."""


@dataclass(frozen=True)
class Site:
    """A site of the project.

    Attributes
    ----------
    data : str
        Absolute folder of its images, on its machine; empty: it has none.
    settings : Mapping[str, Any]
        Keys of its node configuration that its owner decides.
    public_key : Path or None
        The public key of a site that keeps its private key to itself; None: a key is made.
    """

    name: str
    data: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    public_key: Path | None = None


@dataclass(frozen=True)
class Project:
    """A checked project file.

    Attributes
    ----------
    hosts : tuple[str, ...]
        Names and addresses of the server; the sites use the first.
    data : str
        Folder of the server's images; ``./data`` is one beside its compose file.
    days : int
        Validity of the server's certificate.
    trusted : Mapping[str, str]
        Signers whose apps the sites execute, and no others; empty: any app.
    run : tuple[str, ...]
        Settings of a run.
    """

    hosts: tuple[str, ...]
    sites: tuple[Site, ...]
    port: int = 8443
    data: str = "./data"
    days: int = 365
    image: str = f"fedmutual:{fedmutual.__version__}"
    trusted: Mapping[str, str] = field(default_factory=dict)
    secagg: bool = False
    run: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """``host:port`` as sites write it."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def read_project(file: Path) -> Project:
    """Read and check a project file.

    Raises
    ------
    ProjectError
        It cannot be read, or holds what no project has.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except OSError as error:
        raise ProjectError(
            f"{file} cannot be read: {error.strerror}; `fedmutual provision --example` prints one"
        ) from error
    except Exception as error:  # those of YAML and of OmegaConf, a doubled key among them
        raise ProjectError(f"{file} is no YAML: {error}") from error
    try:
        return _project(content, file.parent)
    except ProjectError as error:
        raise ProjectError(f"{file}: {error}") from error


def _project(content: Any, folder: Path) -> Project:
    top = _mapping("", content, ("server", "sites", "settings", "trusted", "secagg", "run", "image"))
    if "server" not in top:
        raise ProjectError("server: is missing; it needs at least a host")
    server = _mapping("server", top["server"], ("host", "port", "data", "days"))
    common = _settings("settings", top.get("settings", {}))
    entries = top.get("sites")
    if not isinstance(entries, list) or not entries:
        raise ProjectError("sites: list at least one site, as `- name: clinic-a`")
    sites = tuple(_site(f"sites[{number}]", entry, common, folder) for number, entry in enumerate(entries))
    _distinct([site.name for site in sites])
    secagg = _flag("secagg", top.get("secagg", False))
    if secagg and len(sites) < LEAST_SUMMED:
        raise ProjectError(f"secagg: sums are of at least {LEAST_SUMMED} sites, and there are {len(sites)}")
    optional = {"data": _folder("server.data", server["data"])} if server.get("data") else {}
    if "image" in top:
        optional["image"] = _text("image", top["image"])
    return Project(
        hosts=_hosts(server.get("host")),
        sites=sites,
        port=_number("server.port", server.get("port", 8443), 1, 65535),
        days=_number("server.days", server.get("days", 365), 1, 3650),
        trusted={
            str(k): _text(f"trusted.{k}", v) for k, v in _mapping("trusted", top.get("trusted", {})).items()
        },
        secagg=secagg,
        run=_run(top.get("run", [])),
        **optional,
    )


def _site(where: str, entry: Any, common: Mapping[str, Any], folder: Path) -> Site:
    site = _mapping(where, entry, ("name", "data", "settings", "public-key"))
    name = site.get("name")
    if not isinstance(name, str) or not CLIENT_NAME.fullmatch(name):
        raise ProjectError(
            f"{where}.name: {brief(name)} is no name of a site: use up to 64 letters, digits, dots, hyphens "
            "and underscores"
        )
    if name.lower() in _RESERVED:
        raise ProjectError(f"{where}.name: {name} is the name of another folder; choose another name")
    key = site.get("public-key")
    if key is not None:
        key = folder / _text(f"{where}.public-key", key)
        if not key.is_file():
            raise ProjectError(f"{where}.public-key: {key} is no file: put the site's public key there")
    settings = {**common, **_settings(f"{where}.settings", site.get("settings", {}))}
    data = site.get("data", "")
    return Site(name, _folder(f"{where}.data", data) if data else "", settings, key)


def _settings(where: str, value: Any) -> dict[str, Any]:
    settings = _mapping(where, value)
    for key, given in settings.items():
        if key in _GIVEN:
            raise ProjectError(f"{where}.{key}: {_GIVEN[key]}")
        _require_known(f"{where}.{key}", key, OWNER_KEYS)
        wanted = OWNER_KEYS[key]
        if not isinstance(given, wanted) or (wanted is not bool and isinstance(given, bool)):
            names = {str: "a text", bool: "true or false", int: "a whole number"}
            what = names.get(wanted, "a number") if isinstance(wanted, type) else "a number"
            raise ProjectError(f"{where}.{key}: {brief(given)} is not {what}")
        if isinstance(given, float) and not math.isfinite(given):
            raise ProjectError(f"{where}.{key}: {brief(given)} is not a number")
        if isinstance(given, str):
            _text(f"{where}.{key}", given)
    return settings


def _mapping(where: str, value: Any, known: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProjectError(
            f"{where or 'the file'}: has no keys; `fedmutual provision --example` shows the form"
        )
    for key in value:
        if known is not None:
            _require_known(f"{where}.{key}" if where else str(key), str(key), known)
    return {str(key): entry for key, entry in value.items()}


def _require_known(where: str, key: str, known: Any) -> None:
    if key not in known:
        near = get_close_matches(key, [*known], 1)
        meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise ProjectError(f"{where}: there is no such key; {meant}")


def _distinct(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.get(name.lower())
        seen[name.lower()] = name
        if other is not None:
            also = "" if other == name else f" (and {other} is the same folder on some file systems)"
            raise ProjectError(f"sites: {name} is there twice{also}; every site has its own name")


def _hosts(value: Any) -> tuple[str, ...]:
    hosts = value if isinstance(value, list) else [value]
    if not hosts or hosts == [None] or hosts == [""]:
        raise ProjectError("server.host: name the DNS name or address at which the sites reach the server")
    for host in hosts:
        if not isinstance(host, str) or not _is_host(host):
            raise ProjectError(
                f"server.host: {brief(host)} is no DNS name and no IP address; the port is server.port"
            )
    return tuple(str(ipaddress.ip_address(host)) if ":" in host else host for host in hosts)


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        # four numbers are an address, and a wrong one
        return _HOST_NAME.fullmatch(text) is not None and not re.fullmatch(r"[\d.]+", text)
    return True


def _folder(where: str, value: Any) -> str:
    text = _text(where, value)
    if not PurePosixPath(text).is_absolute():
        raise ProjectError(f"{where}: {text} is relative: write the whole path, as it is on that machine")
    return text


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ProjectError(f"{where}: {brief(value)} is no text")
    if _UNSAFE.search(value):
        raise ProjectError(
            f"{where}: {brief(value)} has a quote, a #, a $, a brace, a backslash or a control character"
        )
    return value


def _number(where: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ProjectError(f"{where}: {brief(value)} is no whole number from {least} to {most}")
    return value


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ProjectError(f"{where}: {brief(value)} is neither true nor false")
    return value


def _run(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) and "=" in entry for entry in value):
        raise ProjectError("run: write the settings as a list, as [rounds=20, strategy=mutual]")
    return tuple(value)
