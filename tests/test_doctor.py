"""Each failure of a site is found, said with its remedy, and ends in exit code 1."""

from __future__ import annotations

import datetime
import http.server
import json
import resource
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from local_grid import CACHE, TINY
from loopback import free_port, make_certificates, make_node_key
from PIL import Image
from small_data import write_images

import fedmutual.learning.device
from fedmutual.cli import main
from fedmutual.doctor.finding import CheckError
from fedmutual.doctor.link import Link
from fedmutual.learning.device import choose_device, describe, why_no_gpu

DATA = [setting for setting in TINY if not setting.startswith(("exchange", "cache_dir"))]
OWN = f'cache-dir="{CACHE.name}"'
NODE = f"partition-id=0 num-partitions=3 {OWN}"


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", "--json", *DATA, *arguments])
    findings = json.loads(capsys.readouterr().out)
    return code, {finding["check"]: finding for finding in findings}


def test_a_site_that_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f'{NODE} state-dir="{tmp_path}/state"'
    code, found = doctor(capsys, "--node-config", config)
    assert code == 0
    assert {finding["status"] for finding in found.values()} == {"ok"}
    assert list(found) == [
        "name",
        "settings",
        "data",
        "pixels",
        "public set",
        "overlap",
        "model",
        "device",
        "sends",
        "disk",
    ]
    assert found["name"]["text"] == "client-0"
    assert found["data"]["text"].startswith("32 private images (")
    assert f"state-dir {tmp_path}/state" in found["disk"]["text"]
    assert list((tmp_path / "state").iterdir()) == []  # nothing is left behind
    digest = found["public set"]["text"].split("digest ")[1].split(":")[0]
    code, found = doctor(capsys, "--node-config", config, "--public-digest", digest)
    assert (code, found["public set"]["status"]) == (0, "ok")


def test_the_images_are_shown_as_the_network_sees_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("a", "b", "[$\\frac$]")):
        write_images(tmp_path / "in/train" / name, 4, seed=number)
    write_images(tmp_path / "in/public", 3, seed=5)
    copy = tmp_path / "in/test/a/copy.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((tmp_path / "in/train/a/0000.png").read_bytes())
    config = (
        f'client-name="here" data-dir="{tmp_path}/in" cache-dir="{tmp_path}/cache" state-dir="{tmp_path}"'
    )
    sheet = tmp_path / "sheet.png"
    code = main(["doctor", "--json", "data=folder", "--node-config", config, "--sheet", str(sheet)])
    findings = json.loads(capsys.readouterr().out)
    assert code == 0
    (pixels,) = [finding for finding in findings if finding["check"] == "pixels"]
    assert pixels["text"].startswith("64 x 64, values 0 to 255: 1 % below ")
    assert pixels["text"].endswith(f"contact sheet and histogram: {sheet}")
    with Image.open(sheet) as picture:
        assert picture.width >= 800
    warned = [finding["text"] for finding in findings if finding["status"] == "warning"]
    assert [text.split(" images")[0] for text in warned] == ["fewer than 10", "the", "1 of the test"]
    assert "copies of training images (1 with the same pixels, 0 nearly)" in warned[-1]


@pytest.mark.parametrize(
    ("arguments", "check", "problem"),
    [
        (["--node-config", ""], "name", "this node has no name"),
        (
            ["--node-config", f"partition-id=7 num-partitions=3 {OWN}"],
            "data",
            "7 is not below num-partitions 3",
        ),
        (["--node-config", NODE, "train.batch=3"], "settings", "train.batch"),
        (["--node-config", f'{NODE} model="no.such.thing"'], "model", "no.such.thing"),
        (["--node-config", "partition-id=0", "cache_dir=/run"], "settings", "cache-dir="),
        (["--node-config", NODE, "model=custom", "model._target_=os.getcwd"], "settings", "allowed-models="),
        (
            ["--node-config", NODE, "model=custom", "model._target_=torchvision.models.get_model"],
            "model",
            "is no model that this site builds",
        ),
        (["--node-config", f'{NODE} device="cuda:99"'], "device", "torch sees"),
        (["--node-config", f'{NODE} privacy-delta="0"'], "sends", "privacy-delta: a node configuration"),
        (["--node-config", f'client-name="a" {OWN}'], "data", "needs its own public"),
        (["--node-config", NODE, "--public-digest", "0123"], "public set", "the server has 0123"),
        (["--node-config", f'{NODE} state-dir="/proc/nowhere"'], "disk", "cannot be written"),
        (["--node-config", NODE, "--superlink", f"127.0.0.1:{free_port()}"], "SuperLink", "refused"),
        (["--node-config", NODE, "--superlink", "nowhere"], "SuperLink", "is not host:port"),
        (
            ["--node-config", NODE, "--superlink", "no.such.host.invalid:80"],
            "SuperLink",
            "no.such.host.invalid",
        ),
    ],
)
def test_what_is_wrong_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], check: str, problem: str
) -> None:
    code, found = doctor(capsys, *arguments)
    assert code == 1
    assert found[check]["status"] == "failed"
    assert problem in found[check]["text"]


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *DATA, "--node-config", NODE, "--public-digest", "0123"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok      name        client-0"
    (position,) = [number for number, line in enumerate(lines) if line.startswith("failed  public set")]
    assert lines[position + 1].strip().startswith("-> copy the server's public images")


def test_an_option_that_cannot_be_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--node-config", "client-name=[x"]) == 2
    assert "--node-config" in capsys.readouterr().err


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    doctor(capsys, "--node-config", NODE)  # the images are in the cache now
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, found = doctor(capsys, "--node-config", f'{NODE} state-dir="{tmp_path}"')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "cannot be written: File too large" in found["disk"]["text"]
    assert "free some space" in found["disk"]["remedy"]


# ---------------------------------------------------------------------------------------------------
# The way to the SuperLink


class Answers(http.server.BaseHTTPRequestHandler):
    """What a SuperLink answers to the requests that need no key."""

    flwr = metadata.version("flwr")
    ahead = 0.0

    def do_GET(self) -> None:
        body = json.dumps({"info": {"version": self.flwr}}).encode()
        self.send_response_only(200 if self.path in ("/health", "/openapi.json") else 404)
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.ahead)
        self.send_header("date", format_datetime(now, usegmt=True))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(certificates: Path | None = None, **answers: Any) -> Iterator[str]:
    handler = type("Handler", (Answers,), answers)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if certificates is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


def test_a_connection_that_is_good(certificates: Path) -> None:
    with serving(certificates) as address:
        link = Link(address, False, certificates / "ca.crt", None)
        assert "listens" in link.reach()
        assert "certificate accepted" in link.check_tls()
        assert "the SuperLink's" in link.check_clock()
        assert f"{metadata.version('flwr')} at the SuperLink" in link.check_version()
        assert "no key given" in link.check_key()


def test_another_authority(certificates: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    with serving(certificates) as address, pytest.raises(CheckError, match="verify failed") as error:
        Link(address, False, tmp_path / "ca.crt", None).check_tls()
    assert "copy this server's ca.crt here" in error.value.remedy


def test_an_authority_is_replaced_by_way_of_a_file_with_both(certificates: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    both = tmp_path / "both.crt"
    both.write_text((certificates / "ca.crt").read_text() + (tmp_path / "ca.crt").read_text())
    for folder in (certificates, tmp_path):
        with serving(folder) as address:
            assert "certificate accepted" in Link(address, False, both, None).check_tls()


def test_a_certificate_that_has_expired(tmp_path: Path) -> None:
    make_certificates(tmp_path, hours=-1.0)
    with serving(tmp_path) as address, pytest.raises(CheckError, match="expired") as error:
        Link(address, False, tmp_path / "ca.crt", None).check_tls()
    assert error.value.remedy.startswith("the server's certificate has expired: create a new one")


def test_a_certificate_of_another_host(tmp_path: Path) -> None:
    make_certificates(tmp_path, host="10.1.2.3")
    with serving(tmp_path) as address, pytest.raises(CheckError) as error:
        Link(address, False, tmp_path / "ca.crt", None).check_tls()
    assert "is for another host" in error.value.remedy


def test_tls_on_one_side_only(certificates: Path) -> None:
    with serving() as address, pytest.raises(CheckError) as error:
        Link(address, False, certificates / "ca.crt", None).check_tls()
    assert "does not use TLS" in error.value.remedy
    with serving(certificates) as address, pytest.raises(CheckError) as error:
        Link(address, True, None, None).check_tls()
    assert "may use TLS" in error.value.remedy


def test_a_missing_certificate_file(certificates: Path) -> None:
    with serving(certificates) as address, pytest.raises(CheckError) as error:
        Link(address, False, certificates / "none.crt", None).check_tls()
    assert "--root-certificates" in error.value.remedy


def test_another_version_of_flower() -> None:
    with serving(flwr="1.29.0") as address, pytest.raises(CheckError, match=r"1\.29\.0 at the") as error:
        Link(address, True, None, None).check_version()
    assert error.value.remedy == "pip install 'flwr[simulation]==1.29.0' here"


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_a_wrong_clock(ahead: float) -> None:
    with serving(ahead=ahead) as address, pytest.raises(CheckError, match=r"this clock is 3[56]") as error:
        Link(address, True, None, None).check_clock()
    assert ("behind" if ahead > 0 else "ahead of") in str(error.value)
    assert "NTP" in error.value.remedy


def test_a_clock_that_is_behind_within_flowers_tolerance() -> None:
    with serving(ahead=120.0) as address:
        assert "behind" in Link(address, True, None, None).check_clock()


def test_a_key_that_is_none(certificates: Path, tmp_path: Path) -> None:
    make_node_key(tmp_path)
    for name in ("missing", "key.pub"):
        with pytest.raises(CheckError, match="cannot be read") as error:
            Link("127.0.0.1:1", False, certificates / "ca.crt", tmp_path / name).check_key()
        assert "ssh-keygen" in error.value.remedy


# ---------------------------------------------------------------------------------------------------
# The device


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    assert describe(torch.device("cpu"), "cpu").endswith("threads (device=cpu)")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "built without CUDA" in describe(torch.device("cpu"), "auto")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_no_gpu() == "CUDA_VISIBLE_DEVICES='' hides every GPU"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(fedmutual.learning.device.Path, "glob", lambda *_: iter(()))
    assert "no NVIDIA device" in why_no_gpu()
    monkeypatch.setattr(fedmutual.learning.device.Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore words.")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert why_no_gpu() == "Found no NVIDIA driver on your system."


def test_auto_takes_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
