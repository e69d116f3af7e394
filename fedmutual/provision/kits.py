"""Write the folders of a project: keys that are there are kept, everything else is as the project says."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmutual.files.atomic import atomic_write
from fedmutual.files.disk import make_private
from fedmutual.provision.keys import (
    Authority,
    checked_public,
    expires,
    hosts_of,
    load_authority,
    make_authority,
    make_secret,
    make_server_certificate,
    make_site_key,
    public_of,
)
from fedmutual.provision.project import Project, ProjectError, Site
from fedmutual.provision.registry import Registry
from fedmutual.settings.compose import compose
from fedmutual.settings.schema import SettingsError
from fedmutual.wire.signatures import fingerprint

AUTHORITY, SERVER = "authority", "server"
HOME = "/var/lib/fedmutual"
INSTALLED = "/etc/fedmutual"  # where secrets and settings are in a container and on a machine with systemd
SUPERLINK_PORT = 8000
SOON = datetime.timedelta(days=30)  # before the end of a certificate
_SITE_FILES = (
    "site.toml", "compose.yaml", "compose.gpu.yaml", "fedmutual-site.service", "kustomization.yaml",
    "kubernetes.yaml", "README.md",
)  # fmt: skip
_UNITS = ("fedmutual-superlink.service", "fedmutual-superexec.service", "fedmutual-gateway.service")


@dataclass
class Outcome:
    """What :func:`provision` has done.

    Attributes
    ----------
    folders : dict[str, str]
        Folder -> "new", "unchanged", or the files that have changed.
    fingerprints : dict[str, str]
        Site -> ``SHA256:...`` of its key.
    remarks : list[str]
        What to know or to do.
    """

    folders: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def provision(project: Project, output: Path, renew: Collection[str] = ()) -> Outcome:
    """Write ``output/server``, ``output/<site>`` and ``output/authority``.

    A site whose public key is known and whose private key is gone, since it was handed over, keeps its key.

    Parameters
    ----------
    project : Project
    output : Path
        Made if it is missing, for its owner only.
    renew : collection of str
        Sites that get a new key.

    Raises
    ------
    ProjectError
        The run's settings are invalid, or a file that is there is no key or certificate.
    WriteError
        A folder cannot be written.
    """
    overrides = _overrides(project)  # checked before anything is written
    _require_renewable(project, output, renew)
    writer = _Writer(output)
    authority = _authority(writer)
    known = Registry(output / SERVER / "sites").read()
    public = {
        site.name: _site_key(writer, site, None if site.name in renew else known.get(site.name))
        for site in project.sites
    }
    outcome = writer.outcome
    outcome.fingerprints = {name: fingerprint(line) for name, line in public.items()}
    for site in project.sites:
        _write_site(writer, project, site, authority, outcome.fingerprints)
    if not any(text.startswith("clients.allowed=") for text in overrides):
        allowed = [f"{name}:{key}" for name, key in outcome.fingerprints.items()]
        overrides.append(f"clients.allowed=[{','.join(allowed)}]")
    _write_server(writer, project, authority, overrides)
    _register(output / SERVER / "sites", public, outcome)
    made = [site.name for site in project.sites if site.public_key is None]
    if project.secagg and made:
        outcome.remarks.append(
            f"secagg: the keys of {', '.join(made)} were made here, so whoever runs this could sign in their "
            "place: sites that do not trust the server's operator make their own (public-key)"
        )
    if project.trusted:
        outcome.remarks.append(
            f"the sites execute only apps that {', '.join(project.trusted)} has signed: publish the app and "
            "start that one, not /app (docs/site-owner.md, Pin the app)"
        )
    if any(site.data for site in project.sites) and not project.data.startswith("/"):
        outcome.remarks.append(
            "server.data is not set, and the sites have images: put the server's into "
            f"{output / SERVER / 'data'} (Docker), or set it (systemd and Kubernetes need that)"
        )
    writer.close()
    return outcome


class _Writer:
    """Writes files below one folder, and keeps account of what changed."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.outcome = Outcome()
        self._new: set[str] = set()
        self._changed: dict[str, list[str]] = {}
        self._templates = Environment(
            loader=PackageLoader("fedmutual.provision"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,  # nothing of it is HTML; values are checked in project.py
        )

    def read(self, path: str) -> bytes | None:
        """Return a file's content; None where there is none."""
        file = self.output / path
        try:
            return file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ProjectError(f"{file} cannot be read: {error.strerror}") from error

    def write(self, path: str, content: bytes, executable: bool = False) -> None:
        """Write a file where it differs, for its owner only."""
        file, (folder, _, rest) = self.output / path, path.partition("/")
        self._changed.setdefault(folder, [])
        if not (self.output / folder).exists():
            self._new.add(folder)
        if self.read(path) != content:
            atomic_write(file, content)
            self._changed[folder].append(rest)
        if executable:
            os.chmod(file, 0o700)

    def render(self, path: str, template: str, values: Mapping[str, Any], executable: bool = False) -> None:
        """Write what a template makes of the values."""
        text = self._templates.get_template(template).render(values)
        self.write(path, text.encode(), executable)

    def close(self) -> None:
        for folder, files in self._changed.items():
            changed = (
                "new" if folder in self._new else f"changed: {', '.join(files)}" if files else "unchanged"
            )
            self.outcome.folders[folder] = changed


def _authority(writer: _Writer) -> Authority:
    key, certificate = (writer.read(f"{AUTHORITY}/ca.{end}") for end in ("key", "crt"))
    if key is None and certificate is None:
        if writer.read(f"{SERVER}/secrets/ca.crt") is not None:
            raise ProjectError(
                f"{writer.output / AUTHORITY} is missing, and this project has an authority: put it back for "
                "as long as this takes"
            )
        authority = make_authority()
        writer.write(f"{AUTHORITY}/ca.key", authority.key_pem)
        writer.write(f"{AUTHORITY}/ca.crt", authority.certificate_pem)
        return authority
    if key is None or certificate is None:
        missing = "ca.key" if key is None else "ca.crt"
        raise ProjectError(
            f"{writer.output / AUTHORITY}/{missing} is missing, and the other file is there: put it back for "
            "as long as this takes"
        )
    try:
        return load_authority(key, certificate)
    except ValueError as error:
        raise ProjectError(f"{writer.output / AUTHORITY}: {error}") from error


def _require_renewable(project: Project, output: Path, renew: Collection[str]) -> None:
    """Refuse to renew what is no site's, or what would overwrite a key."""
    own = {site.name: site for site in project.sites}
    for name in renew:
        if name not in own:
            raise ProjectError(f"--new-key {name}: the project has no such site; it has {', '.join(own)}")
        key = output / name / "secrets" / f"{name}.key"
        if key.exists() or own[name].public_key is not None:
            there = key if key.exists() else own[name].public_key
            raise ProjectError(f"--new-key {name}: {there} is there, and no key is overwritten: move it away")


def _site_key(writer: _Writer, site: Site, known: bytes | None) -> bytes:
    """Return the public line of a site's key; make the key if none is known."""
    path = f"{site.name}/secrets/{site.name}.key"
    if site.public_key is not None:
        try:
            line = checked_public(site.public_key.read_bytes(), site.name)
        except (OSError, ValueError) as error:
            raise ProjectError(f"{site.public_key}: {error}") from error
    else:
        private = writer.read(path)
        if private is None and known is not None:  # it was handed over
            line = known
        elif private is None:
            private, line = make_site_key(site.name)
            writer.write(path, private)
        else:
            try:
                line = public_of(private, site.name)
            except ValueError as error:
                raise ProjectError(f"{writer.output / path} is no key of a site: {error}") from error
    writer.write(f"{site.name}/secrets/{site.name}.pub", line)
    return line


def _write_site(
    writer: _Writer, project: Project, site: Site, authority: Authority, fingerprints: Mapping[str, str]
) -> None:
    folder = site.name
    values = {
        "name": site.name,
        "label": label_of(site.name),
        "data": site.data,
        "address": project.address,
        "image": project.image,
        "trusted": bool(project.trusted),
        "has_key": site.public_key is None,
        "gpu": str(site.settings.get("device", "")).startswith("cuda"),
        "settings": as_toml(node_configuration(project, site, fingerprints)),
    }
    writer.write(f"{folder}/secrets/ca.crt", authority.certificate_pem)
    if project.trusted:
        writer.write(f"{folder}/secrets/trusted.yaml", as_yaml(project.trusted))
    for name in _SITE_FILES:
        writer.render(f"{folder}/{name}", f"supernode/{name}", values)
    writer.render(f"{folder}/.env", "supernode/env", values)
    writer.render(f"{folder}/compose.sh", "compose.sh", {}, executable=True)


def node_configuration(project: Project, site: Site, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return a site's node configuration, as its SuperNode reads it from ``site.toml``.

    Parameters
    ----------
    fingerprints : Mapping[str, str]
        Site -> ``SHA256:...`` of its key; with ``secagg`` a site is added up with these only.
    """
    configuration: dict[str, Any] = {
        "client-name": site.name,
        "state-dir": f"{HOME}/state",
        "cache-dir": f"{HOME}/cache",
    }
    if site.data:
        configuration["data-dir"] = site.data
    if project.secagg:
        peers = [f"{name}:{key}" for name, key in fingerprints.items() if name != site.name]
        configuration |= {
            "require-secagg": True,
            "secagg-key": f"{INSTALLED}/secrets/{site.name}.key",
            "secagg-peers": ",".join(peers),
        }
    return configuration | dict(site.settings)


def _write_server(writer: _Writer, project: Project, authority: Authority, overrides: list[str]) -> None:
    secrets = f"{SERVER}/secrets"
    writer.write(f"{secrets}/ca.crt", authority.certificate_pem)
    _server_certificate(writer, project, authority, secrets)
    if writer.read(f"{secrets}/superexec.secret") is None:
        writer.write(f"{secrets}/superexec.secret", make_secret())
    values: dict[str, Any] = {
        "address": project.address,
        "image": project.image,
        "port": project.port,
        "data": project.data,
        "root": _root(project),
        "overrides": json.dumps(shlex.join(overrides)),
    }
    superlink = f"superlink:{SUPERLINK_PORT}"
    docker = {
        "docker": True,
        "inner": True,
        "upstream": "",
        "port": 8443,
        "superlink": superlink,
        "ipv6": False,
    }
    cluster = docker | {"docker": False, "upstream": superlink, "superlink": "fedmutual_superlink"}
    local = docker | {"docker": False, "inner": False, "port": project.port}
    local["ipv6"] = any(":" in host for host in project.hosts)
    local["superlink"] = f"127.0.0.1:{SUPERLINK_PORT}"
    writer.render(f"{SERVER}/compose.yaml", "server/compose.yaml", values)
    writer.render(f"{SERVER}/.env", "server/env", values)
    writer.render(f"{SERVER}/compose.sh", "compose.sh", {}, executable=True)
    writer.render(f"{SERVER}/gateway.conf", "server/gateway.conf", docker)
    writer.render(f"{SERVER}/kubernetes.gateway.conf", "server/gateway.conf", cluster)
    writer.render(f"{SERVER}/systemd/gateway.conf", "server/gateway.conf", local)
    writer.render(f"{SERVER}/flower.toml", "server/flower.toml", docker)
    writer.render(f"{SERVER}/systemd/flower.toml", "server/flower.toml", local)
    registered = sorted(path.stem for path in (writer.output / SERVER / "sites").glob("*.pub"))
    values["names"] = sorted({*registered, *(site.name for site in project.sites)})
    for name in ("run.toml", "kustomization.yaml", "kubernetes.yaml", "README.md"):
        writer.render(f"{SERVER}/{name}", f"server/{name}", values)
    for name in _UNITS:
        writer.render(f"{SERVER}/systemd/{name}", f"server/{name}", values)
    if not project.data.startswith("/"):
        make_private(writer.output / SERVER / project.data)


def _server_certificate(writer: _Writer, project: Project, authority: Authority, secrets: str) -> None:
    """Make the server's certificate where there is none; say what is wrong with one that is there."""
    certificate = writer.read(f"{secrets}/server.pem")
    if certificate is None or writer.read(f"{secrets}/server.key") is None:
        key, certificate = make_server_certificate(authority, project.hosts, project.days)
        writer.write(f"{secrets}/server.key", key)
        writer.write(f"{secrets}/server.pem", certificate)
    remedy = f"move server.key and server.pem in {writer.output / secrets} away, and run this again"
    lacking = set(project.hosts) - hosts_of(certificate)
    if lacking:
        names = ", ".join(sorted(lacking))
        writer.outcome.remarks.append(f"the server's certificate is not for {names}: {remedy}")
    end = expires(certificate)
    if end - datetime.datetime.now(datetime.UTC) < SOON:
        writer.outcome.remarks.append(f"the server's certificate expires on {end:%Y-%m-%d}: {remedy}")


def _overrides(project: Project) -> list[str]:
    """Settings of a run: the folder of the images and the number of sites, unless the project says others."""
    given = {text.partition("=")[0] for text in project.run}
    overrides = list(project.run)
    if any(site.data for site in project.sites) and "data" not in given:
        overrides += ["data=folder"] + ([] if "data.root" in given else [f"data.root={_root(project)}"])
    if "num_clients" not in given:
        overrides.append(f"num_clients={len(project.sites)}")
    if project.secagg and "privacy.secagg" not in given:
        overrides.append("privacy.secagg=true")
    try:
        compose([text for text in overrides if not text.startswith("data")])  # whose folder is the server's
    except SettingsError as error:
        raise ProjectError(f"run: {error}") from error
    return overrides


def _root(project: Project) -> str:
    """Where a run finds the server's images: the same folder on the machine and in a container."""
    return project.data if project.data.startswith("/") else "/data"


def _register(folder: Path, public: Mapping[str, bytes], outcome: Outcome) -> None:
    """Put the sites' public keys into the server's registry; others that are there stay."""
    registry = Registry(folder)
    known = registry.read()
    for name, line in public.items():
        if name in known and known[name] != line:
            outcome.remarks.append(
                f"{name} has another key than before: if the old one is registered, replace it on the server "
                f"with `fedmutual site add {name} --replace`"
            )
        registry.put(name, line)
    for name in sorted(known.keys() - public.keys()):
        outcome.remarks.append(
            f"{name} is not in the project: if it is to leave, `fedmutual site remove {name}` on the server"
        )


def label_of(name: str) -> str:
    """Return a site's name as Kubernetes takes it: at most 40 lower-case letters, digits and hyphens."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return f"fedmutual-{plain}"


def as_toml(values: Mapping[str, Any]) -> str:
    """Return flat values as TOML; texts must have neither quotes nor backslashes."""
    return "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())


def as_yaml(values: Mapping[str, str]) -> bytes:
    """Return texts by name as YAML."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in values.items()]
    return "".join(lines).encode()
