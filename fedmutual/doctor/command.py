"""All checks of a site, one line each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmutual.doctor.finding import FAILED, OK, WARNING, Finding, run_check
from fedmutual.doctor.link import Link
from fedmutual.logs import shown_lines
from fedmutual.settings import Settings


@dataclass(frozen=True)
class Patient:
    """A site, described by its SuperNode's options.

    Attributes
    ----------
    overrides : tuple[str, ...]
        The run's settings that differ from ``conf/``.
    node_config : Mapping[str, Any]
    link : Link or None
        None: skip the checks of the SuperLink.
    public_digest : str or None
        Digest of the server's public set.
    sheet : Path or None
        Where to write a contact sheet of the private images.
    """

    overrides: tuple[str, ...]
    node_config: Mapping[str, Any]
    link: Link | None
    public_digest: str | None
    sheet: Path | None = None


def examine(patient: Patient) -> list[Finding]:
    """Run all checks; skip those that depend on a failed check."""
    from fedmutual.settings.compose import compose
    from fedmutual.settings.identity import client_name

    findings = [run_check("name", lambda: client_name(patient.node_config))]
    settings: list[Settings] = []

    def read() -> str:
        from fedmutual.client.answer import client_settings

        folder = {key: patient.node_config[key] for key in ("data-dir",) if key in patient.node_config}
        compose(patient.overrides, folder)  # report a wrong key of the run before one of the node
        settings.append(client_settings(_run_config(patient.overrides), patient.node_config))
        return "accepted"

    findings.append(run_check("settings", read))
    if settings:
        findings += _site(patient, settings[0])
    return findings + (_link(patient.link) if patient.link else [])


def _site(patient: Patient, settings: Settings) -> list[Finding]:
    from fedmutual.doctor import site as checks

    loaded: list[Any] = []

    def data() -> str:
        site, text = checks.load_data(settings, patient.node_config)
        loaded.append(site)
        return text

    findings = [run_check("data", data)]
    if loaded:
        findings += _pictures(loaded[0], settings, patient.sheet)
        findings.append(
            run_check("public set", lambda: checks.check_public(loaded[0], patient.public_digest))
        )
        findings.append(_overlap(loaded[0], settings))
    sizes = [0]

    def model() -> str:
        size, text = checks.build(settings, patient.node_config, loaded[0] if loaded else None)
        sizes.append(size)
        return text

    findings.append(run_check("model", model))
    findings.append(run_check("device", lambda: checks.check_device(settings)))
    findings.append(run_check("sends", lambda: checks.what_leaves(settings, patient.node_config)))
    findings.append(run_check("disk", lambda: checks.check_disk(settings, sizes[-1])))
    return findings


def _overlap(site: Any, settings: Settings) -> Finding:
    """Private images that are also public; these figures are for this site alone."""
    from fedmutual.data.site import overlap_text

    if settings.privacy.overlap == "allow":
        return Finding("overlap", OK, "not looked for: privacy.overlap=allow")
    if len(site.left_out):
        return Finding("overlap", WARNING, overlap_text(site), "take them out of one of the two")
    return Finding("overlap", OK, "no private training image had to be left out")


def _pictures(site: Any, settings: Settings, sheet: Path | None) -> list[Finding]:
    """What the network sees of the images, and what is worth knowing about them."""
    from fedmutual.backbones.weights import WeightsError
    from fedmutual.data.review import review_site
    from fedmutual.doctor.sheet import describe_pixels, write_sheet
    from fedmutual.models.learnt import picture_of

    def look() -> str:
        text = describe_pixels(site.private)
        if sheet is None:
            return text
        write_sheet(site.private, site.classes, sheet)
        return f"{text}; contact sheet and histogram: {sheet}"

    try:
        size = picture_of(settings).size
    except WeightsError:  # the model's own check says it
        size = settings.data.image_size
    remarks = [Finding("images", WARNING, remark) for remark in review_site(site, settings, size)]
    return [run_check("pixels", look), *remarks]


def _link(link: Link) -> list[Finding]:
    findings = [run_check("SuperLink", link.reach)]
    if findings[-1].status == OK:
        findings.append(run_check("TLS", link.check_tls))
    if findings[-1].status == OK and len(findings) > 1:
        checks = {"versions": link.check_version, "clock": link.check_clock, "key": link.check_key}
        findings += [run_check(name, look) for name, look in checks.items()]
    return findings


def _run_config(overrides: Sequence[str]) -> dict[str, str]:
    import shlex

    return {"overrides": shlex.join(overrides)}


def show(findings: Sequence[Finding], as_json: bool) -> int:
    """Print the findings; return the exit code: 0 if no check failed, else 1."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(shown_lines(f"{finding.status:<8}{finding.check:<12}{finding.text}"))
            if finding.remedy:
                print(shown_lines(f"{'':<20}-> {finding.remedy}"))
    return int(any(finding.status == FAILED for finding in findings))


def node_configuration(text: str) -> dict[str, Any]:
    """Parse the value of ``flower-supernode --node-config`` as Flower does.

    Raises
    ------
    ValueError
        It cannot be parsed.
    """
    import click
    from flwr.common.config import parse_config_args

    try:
        return dict(parse_config_args([text] if text else None))
    except (click.ClickException, OSError) as error:
        raise ValueError(f"--node-config {text!r}: {getattr(error, 'message', error)}") from error


def link_of(
    superlink: str | None, insecure: bool, certificates: Path | None, key: Path | None
) -> Link | None:
    """Return the connection that the options describe; None without an address."""
    return None if superlink is None else Link(superlink, insecure, certificates, key)
