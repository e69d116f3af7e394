"""``fedmutual provision``: what its folders hold, who may read it, and what a second run leaves alone."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.config import parse_config_args

from fedmutual.cli import main
from fedmutual.provision.keys import load_authority, make_site_key
from fedmutual.provision.kits import label_of, provision
from fedmutual.provision.project import EXAMPLE, OWNER_KEYS, Project, ProjectError, Site, read_project
from fedmutual.settings.at_site import check_overrides
from fedmutual.settings.compose import compose, run_config_overrides
from fedmutual.settings.identity import client_name
from fedmutual.watch.supervisor import LOOK_SECONDS
from fedmutual.wire.signatures import fingerprint

ROOT = Path(__file__).resolve().parents[1]
SITES = ("clinic-a", "clinic-b", "clinic-c")
SECRETS = "/etc/fedmutual/secrets"
UNITS = (
    "clinic-a/fedmutual-site",
    *(f"server/systemd/fedmutual-{x}" for x in ("superlink", "superexec", "gateway")),
)


def project(*names: str, **values: Any) -> Project:
    return Project(
        ("server.example", "10.0.0.1"), tuple(Site(name, "/srv/images") for name in names), **values
    )


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "kits"
    provision(project(*SITES), folder)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_example_is_a_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["provision", "--example"]) == 0
    file = tmp_path / "project.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["provision", str(file), "-o", str(tmp_path / "kits")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["new"] * 5
    assert sum("SHA256:" in line for line in said) == 3
    assert EXAMPLE in (ROOT / "docs" / "deployment.md").read_text()


def test_nobody_else_reads_a_kit(kits: Path) -> None:
    for path in kits.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE((kits / "clinic-a/secrets/clinic-a.key").stat().st_mode) == 0o600


def test_no_folder_holds_another_s_secret(kits: Path) -> None:
    secret = {path: path.read_bytes() for path in kits.rglob("*") if path.suffix in (".key", ".secret")}
    assert sorted(path.name for path in secret) == sorted(
        ["ca.key", "server.key", "superexec.secret", *(f"{name}.key" for name in SITES)]
    )
    for path, content in secret.items():
        others = [name for name, held in written(kits).items() if content in held and kits / name != path]
        assert others == []


def test_the_keys_are_what_flower_and_openssl_expect(kits: Path) -> None:
    for name in SITES:
        key = load_ssh_private_key((kits / name / f"secrets/{name}.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP384R1)
        assert (kits / "server/sites" / f"{name}.pub").read_text().split()[0::2] == [
            "ecdsa-sha2-nistp384",
            name,
        ]
    secrets = kits / "server/secrets"
    authority = load_authority(*((kits / f"authority/ca.{end}").read_bytes() for end in ("key", "crt")))
    certificate = x509.load_pem_x509_certificate((secrets / "server.pem").read_bytes())
    certificate.verify_directly_issued_by(authority.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example", "superlink", "localhost"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.1", "127.0.0.1"]
    if shutil.which("openssl"):
        command = ["openssl", "verify", "-CAfile", str(secrets / "ca.crt"), "-purpose", "sslserver"]
        subprocess.run([*command, str(secrets / "server.pem")], check=True, capture_output=True)
    if shutil.which("ssh-keygen"):
        public = kits / "clinic-a/secrets/clinic-a.pub"
        shown = subprocess.run(["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=True)
        assert fingerprint(public.read_bytes()) == shown.stdout.split()[1]


def test_again_changes_nothing_and_a_new_site_only_adds(tmp_path: Path) -> None:
    provision(project("clinic-a"), tmp_path)
    before = written(tmp_path)
    assert set(provision(project("clinic-a"), tmp_path).folders.values()) == {"unchanged"}
    assert written(tmp_path) == before
    outcome = provision(project("clinic-a", "clinic-b"), tmp_path)
    assert outcome.folders == {
        "clinic-a": "unchanged", "clinic-b": "new", "server": "changed: run.toml, kustomization.yaml",
    }  # fmt: skip
    after = written(tmp_path)
    changed = {name for name, content in before.items() if after[name] != content}
    assert changed == {"server/run.toml", "server/kustomization.yaml"}
    assert "server/sites/clinic-b.pub" in after


def test_what_was_moved_away_is_made_again_by_the_same_authority(tmp_path: Path) -> None:
    provision(project("clinic-a"), tmp_path)
    before = written(tmp_path)
    (tmp_path / "server/secrets/server.pem").unlink()
    with pytest.raises(ProjectError, match=r"clinic-a\.key is there, and no key is overwritten"):
        provision(project("clinic-a"), tmp_path, ["clinic-a"])
    with pytest.raises(ProjectError, match="no such site; it has clinic-a"):
        provision(project("clinic-a"), tmp_path, ["clinic-b"])
    (tmp_path / "clinic-a/secrets/clinic-a.key").unlink()
    outcome = provision(project("clinic-a"), tmp_path, ["clinic-a"])
    after = written(tmp_path)
    assert after["authority/ca.crt"] == before["authority/ca.crt"] == after["server/secrets/ca.crt"]
    assert after["server/secrets/server.pem"] != before["server/secrets/server.pem"]
    assert after["server/sites/clinic-a.pub"] != before["server/sites/clinic-a.pub"]
    assert "fedmutual site add clinic-a --replace" in outcome.remarks[0]
    (tmp_path / "authority/ca.key").unlink()  # it is offline
    with pytest.raises(ProjectError, match=r"ca\.key is missing.*put it back"):
        provision(project("clinic-a"), tmp_path)


def test_a_key_that_was_handed_over_stays_the_site_s(tmp_path: Path) -> None:
    first = provision(project("clinic-a"), tmp_path)
    shutil.rmtree(tmp_path / "clinic-a")
    again = provision(project("clinic-a", "clinic-b"), tmp_path)
    assert again.fingerprints["clinic-a"] == first.fingerprints["clinic-a"]
    assert [remark for remark in again.remarks if "server.data" not in remark] == []
    assert not (tmp_path / "clinic-a/secrets/clinic-a.key").exists()
    assert (tmp_path / "clinic-b/secrets/clinic-b.key").exists()


def test_a_certificate_for_another_name_is_said(tmp_path: Path) -> None:
    provision(project("clinic-a"), tmp_path)
    moved = Project(("new.example",), (Site("clinic-a", "/srv/images"),))
    remark, data = provision(moved, tmp_path).remarks
    assert "not for new.example: move" in remark
    assert "server.data is not set" in data
    upper = Project(("2001:DB8::1",), (Site("clinic-a"),))
    file = tmp_path / "project.yaml"
    file.write_text("server: {host: '2001:DB8::1'}\nsites: [{name: clinic-a}]\n")
    assert read_project(file).hosts == ("2001:db8::1",) != upper.hosts
    assert provision(read_project(file), tmp_path / "v6").remarks == []
    assert "listen [::]:8443 ssl;" in (tmp_path / "v6/server/systemd/gateway.conf").read_text()
    assert "[::]" not in (tmp_path / "v6/server/gateway.conf").read_text()


def test_an_authority_that_is_away_is_not_replaced(tmp_path: Path) -> None:
    provision(project("clinic-a"), tmp_path)
    shutil.move(tmp_path / "authority", tmp_path / "safe")
    before = (tmp_path / "server/secrets/ca.crt").read_bytes()
    with pytest.raises(ProjectError, match="put it back"):
        provision(project("clinic-a", "clinic-b"), tmp_path)
    assert (tmp_path / "server/secrets/ca.crt").read_bytes() == before
    assert not (tmp_path / "clinic-b").exists()


def test_a_site_with_cuda_gets_the_machines_gpus(tmp_path: Path) -> None:
    sites = (Site("clinic-a"), Site("clinic-b", settings={"device": "cuda:1"}))
    provision(Project(("server.example",), sites), tmp_path)
    line = "COMPOSE_FILE=compose.yaml:compose.gpu.yaml"
    assert f"\n# {line}\n" in (tmp_path / "clinic-a/.env").read_text()
    assert f"\n{line}\n" in (tmp_path / "clinic-b/.env").read_text()


def test_a_certificate_that_ends_soon_is_said(tmp_path: Path) -> None:
    short = Project(("server.example",), (Site("clinic-a"),), days=20)
    (remark,) = provision(short, tmp_path).remarks
    assert re.search(r"certificate expires on 2\d{3}-\d\d-\d\d: move", remark)


def test_a_node_configuration_is_read_by_flower(tmp_path: Path) -> None:
    settings = {"device": "cuda", "accept-public": True, "secagg-min-clients": 4, "privacy-budget": 0.5}
    sites = (Site("clinic-a", "/srv/ä images", settings), Site("clinic-b"), Site("clinic-c"))
    outcome = provision(Project(("server.example",), sites, secagg=True), tmp_path)
    read = {name: parse_config_args([str(tmp_path / name / "site.toml")]) for name in SITES}
    assert client_name(read["clinic-a"]) == "clinic-a"
    assert read["clinic-a"] == settings | {
        "client-name": "clinic-a", "data-dir": "/srv/ä images",
        "state-dir": "/var/lib/fedmutual/state", "cache-dir": "/var/lib/fedmutual/cache",
        "require-secagg": True, "secagg-key": f"{SECRETS}/clinic-a.key",
        "secagg-peers": ",".join(f"{name}:{outcome.fingerprints[name]}" for name in SITES[1:]),
    }  # fmt: skip
    assert "data-dir" not in read["clinic-b"]
    assert "the keys of clinic-a, clinic-b, clinic-c were made here" in outcome.remarks[0]


def test_the_run_admits_the_sites_of_the_project_only(kits: Path) -> None:
    run = tomllib.loads((kits / "server/run.toml").read_text())
    overrides = run_config_overrides(run)
    assert "data.root=/data" in overrides  # beside the compose file
    check_overrides(overrides)  # as a site does
    settings = compose([text for text in overrides if not text.startswith("data")])
    expected = {name: fingerprint((kits / "server/sites" / f"{name}.pub").read_bytes()) for name in SITES}
    assert settings.clients.keys_of_allowed() == expected
    assert settings.num_clients == 3


def test_a_site_s_own_key_and_signers_that_it_trusts(tmp_path: Path) -> None:
    _, public = make_site_key("elsewhere")
    (tmp_path / "own.pub").write_bytes(public)
    signer = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKEz"
    own = Site("clinic-a", public_key=tmp_path / "own.pub")
    outcome = provision(Project(("10.0.0.1",), (own,), trusted={"fpk_us": signer}), tmp_path / "kits")
    assert "only apps that fpk_us has signed" in outcome.remarks[0]
    kit = tmp_path / "kits/clinic-a"
    assert not (kit / "secrets/clinic-a.key").exists()
    assert (kit / "secrets/clinic-a.pub").read_bytes() == public.replace(b"elsewhere", b"clinic-a")
    assert yaml.safe_load((kit / "secrets/trusted.yaml").read_text()) == {"fpk_us": signer}
    (command,) = [s["command"] for n, s in services(kit / "compose.yaml").items() if n == "supernode"]
    assert f"--trusted-entities={SECRETS}/trusted.yaml" in command
    assert f"--trusted-entities {SECRETS}/trusted.yaml" in (kit / "fedmutual-site.service").read_text()
    assert "data=folder" not in (kit / "compose.yaml").read_text()


# ---------------------------------------------------------------------------------------------------
# Project files

GOOD = {"server": {"host": "server.example"}, "sites": [{"name": "clinic-a"}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sties": []}, "sties: there is no such key; did you mean sites?"),
        ({"server": {"hots": "x"}}, "server.hots: there is no such key; did you mean host?"),
        ({"server": {}}, "server.host: name the DNS name"),
        ({"server": {"host": "a b"}}, "server.host: a b is no DNS name and no IP"),
        ({"server": {"host": "10.0.0"}}, "is no DNS name and no IP"),
        ({"server": {"host": "x:8443"}}, "the port is server.port"),
        ({"server": {"host": "x", "port": 99999}}, "server.port: 99999 is no whole number from 1 to 65535"),
        ({"sites": []}, "sites: list at least one site"),
        ({"sites": [{"name": "a"}, {"name": "a"}]}, "sites: a is there twice"),
        ({"sites": [{"name": "a"}, {"name": "A"}]}, "and a is the same folder"),
        ({"sites": [{"name": "../a"}]}, "sites[0].name: ../a is no name of a site"),
        ({"sites": [{"name": "Server"}]}, "is the name of another folder"),
        ({"sites": [{}]}, "sites[0].name: None is no name"),
        ({"sites": [{"name": "a", "data": "images"}]}, "sites[0].data: images is relative"),
        ({"sites": [{"name": "a", "data": "/x$HOME"}]}, "has a quote, a #, a $"),
        ({"sites": [{"name": "a", "settings": {"devise": "cpu"}}]}, "did you mean device?"),
        ({"sites": [{"name": "a", "settings": {"accept-public": "yes"}}]}, "yes is not true or false"),
        ({"sites": [{"name": "a", "settings": {"data-dir": "/x"}}]}, "write it as the site's data"),
        ({"sites": [{"name": "a", "public-key": "no.pub"}]}, "no.pub is no file"),
        ({"settings": {"secagg-min-clients": True}}, "True is not a whole number"),
        ({"secagg": True}, "secagg: sums are of at least 3 sites, and there are 1"),
        ({"secagg": "on"}, "secagg: on is neither true nor false"),
        ({"run": "rounds=3"}, "run: write the settings as a list"),
        ({"run": ["strategy=mutal"]}, "run: strategy: 'mutal' is none of"),
        ({"run": ["ruonds=3"]}, "did you mean"),
    ],
)  # fmt: skip
def test_a_bad_project_is_refused_and_nothing_is_written(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "project.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    assert read_project(file).sites == (Site("clinic-a"),)
    file.write_text(yaml.safe_dump(GOOD | change))
    assert main(["provision", str(file), "-o", str(tmp_path / "kits")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "kits").exists()


def test_a_file_that_is_none_or_has_a_key_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["provision", str(tmp_path / "no.yaml")]) == 2
    assert "--example` prints one" in capsys.readouterr().err
    assert main(["provision"]) == 2
    (tmp_path / "twice.yaml").write_text("server: {host: a}\nserver: {host: b}\n")
    assert main(["provision", str(tmp_path / "twice.yaml")]) == 2
    assert "duplicate key" in capsys.readouterr().err


def test_every_key_that_an_owner_decides_can_be_given() -> None:
    page = (ROOT / "docs/site-owner.md").read_text().partition("## What you set")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE))
    made = {"client-name", "data-dir", "state-dir", "cache-dir", "secagg-key"}
    assert named - made == OWNER_KEYS.keys() - {"partition-id", "num-partitions"}


# ---------------------------------------------------------------------------------------------------
# Compose files and units


def services(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())["services"]
    return found


def secrets_of(file: Path) -> dict[str, set[str]]:
    """Service -> what it gets of the folder of secrets."""
    found = {}
    for name, service in services(file).items():
        sources = [v["source"] for v in service["volumes"] if isinstance(v, dict)]
        found[name] = {s.removeprefix("./secrets").lstrip("/") for s in sources if s.startswith("./secrets")}
    return found


def test_no_container_of_the_server_has_more_secrets_than_it_needs(kits: Path) -> None:
    assert secrets_of(kits / "server/compose.yaml") == {
        "superlink": {"ca.crt", "server.pem", "server.key", "superexec.secret"},
        "superexec": {"superexec.secret"},
        "gateway": {"ca.crt", "server.pem", "server.key"},
        "flwr": {"ca.crt"},
        "fedmutual": {"ca.crt"},
    }
    assert not any("ca.key" in name for name in written(kits / "server"))


def test_what_compose_mounts_is_there(kits: Path) -> None:
    for name in ("server", *SITES):
        for service in services(kits / name / "compose.yaml").values():
            for volume in service["volumes"]:
                source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
                if source.startswith("./"):
                    assert (kits / name / source).exists(), source


def test_every_site_is_watched(kits: Path) -> None:
    service = services(kits / "clinic-a/compose.yaml")["supernode"]
    assert service["command"][:7] == [
        "python",
        "-m",
        "fedmutual",
        "watch",
        "--once",
        "--",
        "flower-supernode",
    ]
    assert service["restart"] == "unless-stopped"


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose")
@pytest.mark.parametrize("name", ["server", "clinic-a"])
def test_compose_accepts_the_files(name: str, kits: Path) -> None:
    for files in (["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]):
        if (kits / name / files[-1]).exists():
            named = [argument for file in files for argument in ("-f", file)]
            command = ["docker-compose", *named, "--profile", "command", "config"]
            done = subprocess.run(command, cwd=kits / name, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""  # no variable is unset


def test_a_folder_of_root_s_is_not_started(kits: Path, tmp_path: Path) -> None:
    (tmp_path / "docker-compose").write_text("#!/bin/sh\necho called $RUN_AS $*\n")
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    for name in ("docker", "docker-compose"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(kits / "clinic-a/compose.sh"), "up", "-d"]
    for user, code in (("0:0", 1), ("1000:7", 0)):
        done = subprocess.run(command, env=environment | {"RUN_AS": user}, capture_output=True, text=True)
        assert done.returncode == code
    assert done.stdout == "called 1000:7 up -d\n"


def unit_lines(file: Path) -> dict[str, list[str]]:
    """Section -> its settings, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", file.read_text())
    sections = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)[1:]
    named = zip(sections[::2], sections[1::2], strict=True)
    return {
        name: [line for line in body.splitlines() if "=" in line and line[0] != "#"] for name, body in named
    }


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_started_again(unit: str, kits: Path) -> None:
    sections = unit_lines(kits / f"{unit}.service")
    assert sections.keys() == {"Unit", "Service", "Install"}
    assert {"User=fedmutual", "Restart=always", "KillMode=control-group", "NoNewPrivileges=true"} <= set(
        sections["Service"]
    )
    assert "WantedBy=multi-user.target" in sections["Install"]
    assert "StartLimitIntervalSec=0" in sections["Unit"]
    (command,) = [line for line in sections["Service"] if line.startswith("ExecStart=")]
    if "fedmutual watch" in command:
        assert "fedmutual watch --once -- flower-super" in command
        assert {"Type=notify", "NotifyAccess=main"} <= set(sections["Service"])
        (seconds,) = [int(line[12:]) for line in sections["Service"] if line.startswith("WatchdogSec=")]
        assert seconds > 10 * LOOK_SECONDS
    assert ("fedmutual watch" in command) == ("site" in unit or "superexec" in unit)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze (apt install systemd)")
def test_systemd_accepts_the_units(kits: Path, tmp_path: Path) -> None:
    for unit in UNITS:
        file = kits / f"{unit}.service"
        text = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", file.read_text())  # nothing is installed here
        (tmp_path / file.name).write_text(text.replace("User=fedmutual", "User=root"))
    for name in sorted(path.name for path in tmp_path.iterdir()):
        command = ["systemd-analyze", "verify", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / name).write_text((tmp_path / name).read_text().replace("Restart=always", "Restrat=always"))
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert "'Restrat'" in wrong.stderr  # the check can fail


def test_units_and_containers_run_the_same_command(kits: Path) -> None:
    service = unit_lines(kits / "clinic-a/fedmutual-site.service")["Service"]
    (line,) = [text for text in service if text.startswith("ExecStart=")]
    unit = line.split("flower-supernode ")[1].split()
    container = services(kits / "clinic-a/compose.yaml")["supernode"]["command"][7:]
    assert {f"{a}={b}" for a, b in zip(unit[::2], unit[1::2], strict=True)} == set(container)


# ---------------------------------------------------------------------------------------------------
# Kubernetes


def manifests(folder: Path) -> list[dict[str, Any]]:
    """What ``kubectl apply -k`` would send; without kubectl, the manifest alone."""
    if not shutil.which("kubectl"):
        return list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    made = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def pods(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a StatefulSet or Deployment -> the specification of its pod."""
    made = [manifest for manifest in manifests(folder) if "template" in manifest.get("spec", {})]
    return {manifest["metadata"]["name"]: manifest["spec"]["template"]["spec"] for manifest in made}


@pytest.mark.parametrize("name", ["server", "clinic-a"])
def test_the_manifests_are_valid(name: str, kits: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    found = manifests(kits / name)
    assert {"StatefulSet"} <= {manifest["kind"] for manifest in found}
    for manifest in found:
        validator.validate(manifest, validator.latest_version(), strict=True)
    wrong = next(manifest for manifest in found if manifest["kind"] == "StatefulSet")
    wrong["spec"]["replica"] = wrong["spec"].pop("replicas")
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, validator.latest_version(), strict=True)


def test_kubernetes_and_compose_run_the_same_commands(kits: Path) -> None:
    (site,) = pods(kits / "clinic-a").values()
    container = services(kits / "clinic-a/compose.yaml")["supernode"]
    assert site["containers"][0]["command"] == container["command"]
    server = services(kits / "server/compose.yaml")
    made = {c["name"]: c["command"] for pod in pods(kits / "server").values() for c in pod["containers"]}
    assert {name: made[name] for name in ("superlink", "superexec", "gateway")} == {
        name: server[name]["command"] for name in ("superlink", "superexec", "gateway")
    }


def test_no_pod_has_more_rights_or_secrets_than_it_needs(kits: Path) -> None:
    found = pods(kits / "server") | pods(kits / "clinic-a")
    secrets = {}
    for pod in found.values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            volumes = [volume for volume in pod["volumes"] if volume["name"] in mounted]
            given = [v["secret"]["secretName"] for v in volumes if "secret" in v]
            given += [s["secret"]["name"] for v in volumes for s in v.get("projected", {}).get("sources", [])]
            # kubectl adds a digest to each name
            secrets[container["name"]] = {re.sub("-[a-z0-9]{10}$", "", secret) for secret in given}
    assert secrets == {
        "superlink": {"fedmutual-ca", "fedmutual-certificate", "fedmutual-superexec"},
        "superexec": {"fedmutual-superexec"},
        "gateway": {"fedmutual-ca", "fedmutual-certificate"},
        "commands": {"fedmutual-ca"},
        "supernode": {"fedmutual-clinic-a-secrets"},
    }


def test_only_the_server_s_own_pods_reach_the_superlink(kits: Path) -> None:
    found = [manifest for manifest in manifests(kits / "server") if manifest["kind"] == "NetworkPolicy"]
    policies = {manifest["metadata"]["name"]: manifest["spec"] for manifest in found}
    (rule,) = policies["fedmutual-superlink"]["ingress"]
    (source,) = rule["from"]
    allowed = source["podSelector"]["matchExpressions"][1]["values"]
    assert allowed == ["gateway", "superexec"]
    exposed = [m for m in manifests(kits / "server") if m["kind"] == "Service" and m["spec"].get("type")]
    assert [m["spec"]["selector"]["app.kubernetes.io/component"] for m in exposed] == ["gateway"]


def test_a_name_becomes_one_that_kubernetes_takes() -> None:
    assert label_of("Klinik_A.2") == "fedmutual-klinik-a-2"
    assert len(label_of("x" * 64)) <= 52


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx (apt install nginx-light)")
@pytest.mark.parametrize("name", ["gateway.conf", "kubernetes.gateway.conf", "systemd/gateway.conf"])
def test_nginx_accepts_the_gateways(name: str, kits: Path, tmp_path: Path) -> None:
    text = (kits / "server" / name).read_text().replace("/tmp/", f"{tmp_path}/")
    text = text.replace(SECRETS, str(kits / "server/secrets")).replace("superlink:8000", "127.0.0.1:8000")
    (tmp_path / "gateway.conf").write_text(text)
    command = ["nginx", "-t", "-e", str(tmp_path / "error.log"), "-c", str(tmp_path / "gateway.conf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("listen 8000" in text) == (name != "systemd/gateway.conf")
