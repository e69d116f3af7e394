"""Measures all TCP traffic of one port in the network namespace that it runs in; needs CAP_NET_RAW.

    python sniffer.py PORT      until SIGTERM; then one line of JSON

A burst is what flows one way on one connection until something flows the other way: with HTTP/1.1 over TLS,
one request or response with its headers. ``up`` is towards PORT. Retransmitted bytes count once.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import sys

ETH_P_ALL, SOL_PACKET, PACKET_STATISTICS, SYN = 3, 263, 6, 2


class Connection:
    """One TCP connection, by the address and port of its client."""

    def __init__(self) -> None:
        self.bursts: dict[str, list[int]] = {"up": [], "down": []}
        self._next: dict[str, int] = {}
        self._last = ""

    def add(self, direction: str, sequence: int, length: int) -> None:
        """Count the bytes of a segment that were not seen before."""
        end = (sequence + length) % 2**32
        ahead = (end - self._next.get(direction, sequence)) % 2**32
        if length == 0 or ahead == 0 or ahead >= 2**31:
            return
        self._next[direction] = end
        if self._last != direction:
            self.bursts[direction].append(0)
            self._last = direction
        self.bursts[direction][-1] += ahead


def segment(packet: bytes) -> tuple[bytes, int, bytes, int, int, int, int] | None:
    """Addresses, ports, sequence number, flags and payload length of a TCP segment over IPv4 on Ethernet."""
    if len(packet) < 54 or packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
        return None
    header = (packet[14] & 15) * 4
    tcp = 14 + header
    source, target, sequence = struct.unpack_from("!HHI", packet, tcp)
    total = struct.unpack_from("!H", packet, 16)[0] or len(packet) - 14
    length = total - header - (packet[tcp + 12] >> 4) * 4
    return packet[26:30], source, packet[30:34], target, sequence, packet[tcp + 13], length


def main(port: int) -> None:
    """Capture until SIGTERM."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    connections: list[Connection] = []
    current: dict[tuple[bytes, int], Connection] = {}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 2**20)
        tap.settimeout(0.5)
        print("ready", flush=True)
        while not stopped:
            try:
                packet, where = tap.recvfrom(65600)
            except TimeoutError:
                continue
            found = segment(packet) if where[0] != "lo" else None  # the health check of this container itself
            if found is None:
                continue
            source, source_port, target, target_port, sequence, flags, length = found
            if port not in (source_port, target_port):
                continue
            up = target_port == port
            client = (source, source_port) if up else (target, target_port)
            if client not in current or (up and flags & SYN):
                current[client] = Connection()
                connections.append(current[client])
            current[client].add("up" if up else "down", sequence + (flags & SYN) // SYN, length)
        packets, dropped = struct.unpack("II", tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    bursts = {way: [size for c in connections for size in c.bursts[way]] for way in ("up", "down")}
    print(json.dumps({"packets": packets, "dropped": dropped, "connections": len(connections), **bursts}))


main(int(sys.argv[1]))
