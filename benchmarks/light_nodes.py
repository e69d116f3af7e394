"""Many SuperNodes in one process, which answer every order at once with made-up distributions.

Each speaks Flower's Fleet API as a SuperNode does (flwr/supernode/start_client_internal.py): it registers
with a key of its own, activates, sends heartbeats, asks for a message every 3 s, pulls its objects one by
one, confirms it, and pushes a report of fedmutual. What it does not do is to start a client process or to
learn. benchmarks/thousand_nodes.py starts it.
"""

from __future__ import annotations

import argparse
import base64
import heapq
import http.client
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_BASE_MULTIPLIER, HEARTBEAT_DEFAULT_INTERVAL, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import Message as Proto

from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report, report_record

POLL_SECONDS = 3.0  # a SuperNode's, between two questions for a message
SIGNATURE_SECONDS = 120.0  # Flower takes a signed time for 300 s; a SuperNode signs every request
HEARTBEAT_SECONDS = HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_BASE_MULTIPLIER
PEAKED = 0.3  # of the Dirichlet distribution of the predictions

ResponseT = TypeVar("ResponseT", bound=Proto)


class Client(FleetHttpClient):
    """Flower's client of the Fleet API over one plain connection, which takes a tenth of httpx' CPU time.

    ``headers`` are those of the node that speaks.
    """

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=120)
        self.headers: dict[str, str] = {}
        self.requests = 0

    def _unary_unary(
        self,
        *,
        path: str,
        rpc_method: str,
        request: Proto,
        response_type: type[ResponseT],
        timeout: float | None = None,
    ) -> ResponseT:
        headers = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE, **self.headers}
        body = request.SerializeToString()
        try:
            status, content = self._exchange(path, body, headers)
        except (http.client.RemoteDisconnected, ConnectionError):  # an idle connection that was closed
            self._connection.close()
            status, content = self._exchange(path, body, headers)
        except Exception:  # such as a timeout: what answers later must not be taken for the next answer
            self._connection.close()
            raise
        if status != http.client.OK:
            raise RuntimeError(f"{rpc_method}: {status} {content[:300]!r}")
        self.requests += 1
        response = response_type()
        response.ParseFromString(content)
        return response

    def _exchange(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        self._connection.request("POST", path, body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()


class Signer:
    """A node's key, and the headers that prove it has it."""

    def __init__(self) -> None:
        self._private, public = generate_key_pairs()
        self.public = public_key_to_bytes(public)
        self._headers: dict[str, str] = {}
        self._until = 0.0

    def headers(self) -> dict[str, str]:
        """Return the headers of a request, signed anew once in a while."""
        if time.monotonic() >= self._until:
            moment = now().isoformat()
            signature = sign_message(self._private, moment.encode("ascii"))
            self._headers = {
                FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self.public).decode("ascii"),
                TIMESTAMP_HEADER: moment,
                FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode("ascii"),
            }
            self._until = time.monotonic() + SIGNATURE_SECONDS
        return self._headers


@dataclass
class Round:
    """What the nodes did in one round.

    Attributes
    ----------
    first, last : float
        Unix time of the first order's arrival and of the last report's departure.
    own : float
        Seconds of making reports, over all nodes: this would be the training.
    reports, targets : int
        Reports sent; orders that had targets.
    distinct : set of int
        Hashes of the targets: as many as there are different ones.
    """

    first: float = 0.0
    last: float = 0.0
    own: float = 0.0
    reports: int = 0
    targets: int = 0
    distinct: set[int] = field(default_factory=set)


class LightNode:
    """One node: what it does when its turn comes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._signer = Signer()
        self._random = np.random.default_rng(number)
        self._node = Node()
        self.heartbeat = 0.0  # when the next one is due

    def join(self, client: Client) -> None:
        """Register and activate."""
        client.headers = self._signer.headers()
        client.RegisterNode(RegisterNodeFleetRequest(public_key=self._signer.public))
        request = ActivateNodeRequest(
            public_key=self._signer.public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        self._node = Node(node_id=client.ActivateNode(request).node_id)
        self.heartbeat = time.monotonic() + HEARTBEAT_SECONDS

    def beat(self, client: Client) -> None:
        """Send a heartbeat if it is due."""
        if time.monotonic() >= self.heartbeat:
            self.heartbeat = time.monotonic() + HEARTBEAT_SECONDS
            client.headers = self._signer.headers()
            beat = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            client.SendNodeHeartbeat(beat)

    def turn(self, client: Client) -> tuple[Order, float] | None:
        """Ask for a message and answer it; returns the order and the seconds of own work, or None."""
        client.headers = self._signer.headers()
        pulled = client.PullMessages(PullMessagesRequest(node=self._node))
        if not pulled.messages_list:
            return None
        message = self._fetch(client, pulled)
        start = time.thread_time()
        order = Order.of(message)
        reply = self._answer(message, order)
        own = time.thread_time() - start
        self._push(client, reply)
        return order, own

    def _fetch(self, client: Client, pulled: PullMessagesResponse) -> Message:
        metadata = message_from_proto(pulled.messages_list[0]).metadata
        contents = {}
        for tree in iterate_object_tree(pulled.message_object_trees[0]):
            request = PullObjectRequest(node=self._node, run_id=metadata.run_id, object_id=tree.object_id)
            while not (answer := client.PullObject(request)).object_available:
                time.sleep(0.05)
            contents[tree.object_id] = answer.object_content
        received = ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        client.ConfirmMessageReceived(received)
        message = cast(Message, inflate_object_from_contents(metadata.message_id, contents))
        message.metadata.__dict__["_message_id"] = metadata.message_id
        return message

    def _answer(self, message: Message, order: Order) -> Message:
        shape = (len(order.indices), order.num_classes)
        odds = self._random.standard_gamma(PEAKED, shape).astype(np.float32) + np.float32(1e-6)
        accuracy = float(self._random.uniform(0.5, 1.0))
        report = Report(
            client=f"client-{self.number}",
            round=order.round,
            public_digest=order.public_digest,
            architecture="light",
            predictions=np.log(np.maximum(odds / odds.sum(axis=1, keepdims=True), order.floor)),
            metrics={"num-examples": 10, "seconds": 0.001, "validation-accuracy": accuracy},
        )
        return Message(report_record(report, order.wire_dtype, order.floor), reply_to=message)

    def _push(self, client: Client, reply: Message) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            tree = get_object_tree(reply)
        bare = message_to_proto(remove_content_from_message(reply))
        run_id = reply.metadata.run_id
        request = PushMessagesRequest(
            node=self._node, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[0.001]
        )
        taken = client.PushMessages(request)
        for name in taken.objects_to_push:
            content = objects[name].deflate()
            client.PushObject(
                PushObjectRequest(
                    node=self._node, run_id=run_id, object_id=name, object_content=content,
                    session_id=taken.session_id,
                )
            )  # fmt: skip


class Crowd:
    """All nodes, and the threads that give each its turn."""

    def __init__(self, address: str, nodes: int, threads: int, poll: float) -> None:
        self._address, self._threads, self._poll = address, threads, poll
        self._due: list[tuple[float, int, LightNode]] = []  # when each node has its turn
        self._nodes = [LightNode(number) for number in range(nodes)]
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.rounds: dict[int, Round] = {}
        self.clients: list[Client] = []
        self.errors: list[str] = []

    def run(self) -> None:
        """Join, say so on the standard output, and answer until :attr:`stop`."""
        client = Client(self._address)
        for node in self._nodes:
            node.join(client)
            heapq.heappush(self._due, (time.monotonic(), node.number, node))
        print("joined", flush=True)
        work = [self._work] * self._threads
        threads = [threading.Thread(target=each, daemon=True) for each in (*work, self._beat)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _beat(self) -> None:
        client = Client(self._address)
        self.clients.append(client)
        while not self.stop.wait(1.0):
            for node in self._nodes:
                try:
                    node.beat(client)
                except Exception as error:
                    self.errors.append(f"client-{node.number}: no heartbeat: {error!r}")

    def _work(self) -> None:
        client = Client(self._address)
        self.clients.append(client)
        while not self.stop.is_set():
            with self._lock:
                ready = self._due and self._due[0][0] <= time.monotonic()
                node = heapq.heappop(self._due)[2] if ready else None
            if node is None:
                self.stop.wait(0.02)
                continue
            begun = time.time()
            answered = None
            try:
                answered = node.turn(client)
            except Exception as error:  # the run may have ended meanwhile; what was missed shows in it
                self.errors.append(f"client-{node.number}: {error!r}")
            with self._lock:
                if answered is not None:
                    self._note(begun, *answered)
                # a SuperNode asks at once for more when it has answered
                due = time.monotonic() + (self._poll if answered is None else 0.0)
                heapq.heappush(self._due, (due, node.number, node))

    def _note(self, begun: float, order: Order, own: float) -> None:
        round = self.rounds.setdefault(order.round, Round(first=begun))
        round.last = time.time()
        round.own += own
        round.reports += 1
        if order.log_targets is not None:
            round.targets += 1
            round.distinct.add(hash(order.log_targets.tobytes()))

    def figures(self) -> dict[str, object]:
        """Return what was done, for JSON."""
        rounds = {
            number: {
                "first": r.first, "last": r.last, "own": r.own, "reports": r.reports,
                "targets": r.targets, "distinct": len(r.distinct),
            }
            for number, r in sorted(self.rounds.items())
        }  # fmt: skip
        requests = sum(client.requests for client in self.clients)
        return {"rounds": rounds, "requests": requests, "errors": self.errors}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many light SuperNodes in one process, until SIGTERM.")
    parser.add_argument("--address", required=True, help="the SuperLink's, HOST:PORT")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--poll", type=float, default=POLL_SECONDS, help="seconds between two questions")
    parser.add_argument("--json", type=Path, required=True, help="write what was done there at the end")
    arguments = parser.parse_args(argv)
    crowd = Crowd(arguments.address, arguments.nodes, arguments.threads, arguments.poll)
    signal.signal(signal.SIGTERM, lambda *_: crowd.stop.set())
    crowd.run()
    arguments.json.write_text(json.dumps(crowd.figures()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
