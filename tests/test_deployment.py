"""On loopback, the real thing: SuperLink with TLS and node keys, three SuperNodes, and what kills them.

benchmarks/loopback.py starts the parts; what they learn is compared with a run that nothing happened to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from deployment import write_bare_app
from local_grid import TINY, play
from loopback import Loopback, make_node_key, wait_for
from safetensors.torch import load_file

from fedmutual.doctor.finding import CheckError
from fedmutual.doctor.link import Link
from fedmutual.results.directory import RunDirectory, read_history
from fedmutual.warm.host import TITLE

pytestmark = pytest.mark.slow

SETTINGS = ("num_clients=3", "rounds=2", "strategy.burn_in=0")
SELDOM = "exchange.poll_interval=0.2"  # every look is a question to the SuperLink, encrypted
NAMES = ("client-0", "client-1", "client-2")
ROUND_SECONDS = 600.0  # a node is given up after a minute; a busy machine takes its time


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process: equal bits
        patch.setenv("OPENBLAS_NUM_THREADS", "2")  # threads start at the import, as where nothing is set
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


SAYS = """\
import os, sys
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from bare_version import VERSION

app = ClientApp()


@app.train()
def train(message, context):
    print(f"this is {VERSION}, its program {os.path.basename(sys.argv[0])}", flush=True)
    warm = "torch" in sys.modules
    return Message(RecordDict({"report": ConfigRecord({"version": VERSION, "warm": warm})}), reply_to=message)
"""
ASKS = """\
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    content = [RecordDict({"order": ConfigRecord({"x": 1})}) for _ in nodes]
    messages = [Message(record, node, "train") for record, node in zip(content, nodes)]
    replies = list(grid.send_and_receive(messages))
    with open(context.run_config["out"], "w") as file:
        json.dump([dict(reply.content["report"]) for reply in replies], file)
"""


def replies_of(deployment: Loopback, app: Path, out: Path) -> list[dict[str, Any]]:
    run = deployment.submit(app_dir=app, out=str(out), rounds="1")
    wait_for(out.exists, ROUND_SECONDS, "no replies")
    wait_for(
        lambda: deployment.status(run).startswith("finished"), ROUND_SECONDS, "the run does not end", 1.0
    )
    replies: list[dict[str, Any]] = json.loads(out.read_text())
    return replies


def hosts(deployment: Loopback) -> list[psutil.Process]:
    return [p for site in range(deployment.sites) for p in deployment.processes(f"site-{site}", TITLE)]


def test_killed_hosts_are_replaced_and_each_run_has_its_own_code(
    deployment: Loopback, tmp_path: Path
) -> None:
    app = write_bare_app(tmp_path / "bare")
    (app / "client_app.py").write_text(SAYS)
    (app / "server_app.py").write_text(ASKS)
    (app / "bare_version.py").write_text("VERSION = 'the first'")
    assert len(hosts(deployment)) == deployment.sites
    first = replies_of(deployment, app, tmp_path / "first.json")
    assert first == [{"version": "the first", "warm": True}] * 3
    for host in hosts(deployment):
        host.kill()
    (app / "bare_version.py").write_text("VERSION = 'the second'")
    second = replies_of(deployment, app, tmp_path / "second.json")
    assert [reply["version"] for reply in second] == ["the second"] * 3
    wait_for(lambda: len(hosts(deployment)) == deployment.sites, ROUND_SECONDS, "no new hosts")
    for site in range(deployment.sites):
        log = (deployment.folder / f"site-{site}.log").read_text()
        assert "it ended with exit code -9; until there is another, client processes start cold" in log
        assert "this is the first, its program flwr-clientapp" in log
        assert "this is the second, its program flwr-clientapp" in log
