"""On loopback, the real thing: SuperLink with TLS and node keys, three SuperNodes, and what kills them.

benchmarks/loopback.py starts the parts; what they learn is compared with a run that nothing happened to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from local_grid import TINY, play
from loopback import Loopback, make_node_key, wait_for
from safetensors.torch import load_file

from fedmutual.doctor.finding import CheckError
from fedmutual.doctor.link import Link
from fedmutual.results.directory import RunDirectory, read_history

pytestmark = pytest.mark.slow

SETTINGS = ("num_clients=3", "rounds=2", "strategy.burn_in=0")
SELDOM = "exchange.poll_interval=0.2"  # every look is a question to the SuperLink, encrypted
NAMES = ("client-0", "client-1", "client-2")
ROUND_SECONDS = 600.0  # a node is given up after a minute; a busy machine takes its time


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process: equal bits
        with Loopback(tmp_path_factory.mktemp("loopback"), poll_seconds=0.3, warm=True) as started:
            yield started


def wait_for_round(deployment: Loopback, output: Path, round: int) -> float:
    """Wait until a round's reports are written down; returns when they were (Unix time)."""
    wait_for(
        lambda: any(line["round"] >= round for line in read_history(output)),
        ROUND_SECONDS,
        f"round {round} is not done",
    )
    return (output / "history.jsonl").stat().st_mtime


def wait_for_end(deployment: Loopback, output: Path, run: str) -> str:
    """Wait for the summary, which is written last, and then for Flower's status, which takes long to ask."""
    wait_for((output / "summary.json").exists, 2 * ROUND_SECONDS, "the run does not end")
    deadline = time.monotonic() + ROUND_SECONDS
    while not (status := deployment.status(run)).startswith("finished"):
        assert time.monotonic() < deadline, status
        time.sleep(1.0)
    return status


def figures(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History without what differs from run to run: seconds, node ids, and bytes (of the run's name)."""
    kept = [
        {k: v for k, v in line.items() if "seconds" not in k and "bytes" not in k and k != "node_id"}
        for line in history
    ]
    return sorted(kept, key=lambda line: (line["round"], line["client"]))


def test_the_doctor_tells_a_registered_key_from_a_foreign_one(deployment: Loopback, tmp_path: Path) -> None:
    certificates = deployment.folder / "ca.crt"
    known = Link(deployment.address, False, certificates, deployment.folder / "site-1" / "key")
    for _ in range(2):  # its SuperNode is running: it must not be disturbed
        assert "is registered" in known.check_key()
    make_node_key(tmp_path)
    with pytest.raises(CheckError, match="does not know") as error:
        Link(deployment.address, False, certificates, tmp_path / "key").check_key()
    assert "flwr supernode register key.pub" in error.value.remedy
    assert f"{metadata.version('flwr')} at the SuperLink" in known.check_version()
    assert known.check_clock()
    assert deployment.online() == deployment.sites


def test_killed_client_site_and_server_end_with_the_same_bits(deployment: Loopback, tmp_path: Path) -> None:
    output = deployment.folder / "out"
    settings = (*TINY, *SETTINGS, SELDOM)
    deployment.submit(*settings, f"output_dir={output}")

    # in round 2 a client process dies, and another site's power goes
    wait_for_round(deployment, output, 1)
    deaths = [deployment.arm(2, "state"), deployment.arm(1, "saved")]
    wait_for(lambda: all(death.exists() for death in deaths), ROUND_SECONDS, "no client process comes so far")
    deployment.kill_part("site-1")
    deployment.start_part("site-1")
    done = wait_for_round(deployment, output, 2)

    # in the closing round the server dies, and the run is resumed
    deployment.wait_for_process("site-0", "flwr-clientapp", since=done)
    deployment.kill_process("superexec", "flwr-serverapp")
    resumed = deployment.submit(*settings, f"resume={output}")
    assert wait_for_end(deployment, output, resumed) == "finished:completed"

    # each name belongs to its node's registered key: nobody else would get that client's targets
    names = RunDirectory(output).load_checkpoint()[0]["roster"]["names"]
    assert sorted(names) == sorted(NAMES)
    assert all(holder["bound"] and holder["fingerprint"].startswith("SHA256:") for holder in names.values())

    undisturbed = play(tmp_path / "run", *SETTINGS, "privacy.metrics=coarse")  # as sites say by default
    assert undisturbed.error is None
    sent = {line["client"]: line["downlink_bytes"] for line in read_history(output) if line["round"] == 2}
    once = sent["client-0"]  # an order goes out again, unless its report was under way already
    assert {sent["client-1"], sent["client-2"]} <= {once, 2 * once, 3 * once}  # a slow machine: a third time
    assert figures(read_history(output)) == figures(undisturbed.history)
    for site, name in enumerate(NAMES):
        (found,) = (deployment.folder / f"site-{site}" / "state").glob(f"*/{name}/model.safetensors")
        weights, expected = load_file(found), load_file(undisturbed.states() / name / "model.safetensors")
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(weights[key], value), (name, key)
