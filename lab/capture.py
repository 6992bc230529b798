"""A capture of everything that enters the regions' routers, and the search for what must not be in it.

The process reads AF_PACKET sockets in the namespaces it was given and writes a pcap file (Ethernet, whole
frames; a train stays one frame). The parent ends it with a line {"stop": true}, answered by what was counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from crossedge.host.namespaces import Namespace
from crossedge.lab.delayline import (
    ETH_P_ALL,
    PACKET_IGNORE_OUTGOING,
    SO_RCVBUFFORCE,
    SOL_PACKET,
    answer,
    grow_buffer,
)

PCAP = struct.Struct("=IHHiIII")
RECORD = struct.Struct("=IIII")
MAGIC = 0xA1B2C3D4
ETHERNET = 1  # link type
SNAP = 262_144
LIMIT = 512 * 1024 * 1024
"""Largest file in bytes; what comes later is counted and not kept."""
FRAMES_PER_TURN = 256

IPV4, IPV6, ARP = 0x0800, 0x86DD, 0x0806
UDP, ICMP, ICMPV6 = 17, 1, 58
HOP_BY_HOP, DESTINATION = 0, 60  # IPv6 extension headers: multicast listeners report behind one


def open_tap() -> socket.socket:
    """Return a packet socket that sees what comes in at every interface of this thread's namespace."""
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETH_P_ALL))
    tap.setblocking(False)
    tap.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    grow_buffer(tap, SO_RCVBUFFORCE, socket.SO_RCVBUF, 64 * 1024 * 1024)
    return tap


def record(taps: list[socket.socket], path: Path, control: int) -> Counter[str]:
    """Write what the taps see to a pcap file until a line comes on the control descriptor."""
    counts: Counter[str] = Counter()
    by_descriptor = {tap.fileno(): tap for tap in taps}
    with path.open("wb") as file:
        file.write(PCAP.pack(MAGIC, 2, 4, 0, 0, SNAP, ETHERNET))
        while True:
            ready, _, _ = select.select([control, *by_descriptor], (), ())
            for descriptor in ready:
                if descriptor != control:
                    _drain(by_descriptor[descriptor], file.write, counts)
            if control in ready:
                os.read(control, 4096)
                for tap in taps:
                    while _drain(tap, file.write, counts):
                        pass
                return counts


def _drain(tap: socket.socket, write: Callable[[bytes], object], counts: Counter[str]) -> bool:
    """Write what waits, up to a bound; return whether there may be more."""
    for _ in range(FRAMES_PER_TURN):
        try:
            frame = tap.recv(SNAP)
        except BlockingIOError:
            return False
        counts["frames"] += 1
        if counts["bytes"] + len(frame) > LIMIT:
            counts["not kept"] += 1
            continue
        counts["bytes"] += len(frame)
        now = time.time()
        head = RECORD.pack(int(now), int(now % 1 * 1e6), len(frame), len(frame))
        write(head + frame)
    return True


def frames(path: Path) -> Iterator[bytes]:
    """Yield the frames of a pcap file that this module wrote."""
    data = path.read_bytes()
    offset = PCAP.size
    while offset < len(data):
        length = RECORD.unpack_from(data, offset)[2]
        offset += RECORD.size
        yield data[offset : offset + length]
        offset += length


def kind_of(frame: bytes) -> str:
    """Return what a frame is, by the names of what crossedge sends; others by protocol."""
    ethertype = int.from_bytes(frame[12:14], "big")
    if ethertype == ARP:
        return "ARP"
    if ethertype == IPV4:
        protocol, start = frame[23], 14 + (frame[14] & 15) * 4
    elif ethertype == IPV6:
        protocol, start = frame[20], 54
        while protocol in (HOP_BY_HOP, DESTINATION) and len(frame) > start + 1:
            protocol, start = frame[start], start + 8 + frame[start + 1] * 8
    else:
        return f"ethertype {ethertype:04x}"
    if protocol in (ICMP, ICMPV6):
        return "ICMP"
    if protocol != UDP:
        return f"protocol {protocol}"
    payload = frame[start + 8 : start + 20]
    if payload[:1] in (b"\x01", b"\x02", b"\x03") and payload[1:4] == b"\0\0\0":
        return "WireGuard handshake"
    if payload[:4] == b"\x04\0\0\0":
        return "WireGuard data"
    if payload[4:8] == b"\x21\x12\xa4\x42":
        return "STUN"
    names = {b"\xce\x01": "sealed control", b"\xce\x02": "relayed", b"\xce\x03": "superframe"}
    return names.get(payload[:2], "other UDP")


OURS = frozenset(
    {
        "WireGuard handshake",
        "WireGuard data",
        "STUN",
        "sealed control",
        "relayed",
        "superframe",
        "ARP",
        "ICMP",
    }
)
"""What a lab whose nodes speak only crossedge may show on the WAN."""


def search(path: Path, needles: Mapping[str, list[bytes]]) -> tuple[Counter[str], list[str]]:
    """Return how many frames of each kind there are, and what was found that must not be there.

    `needles` maps what it is ("a certificate of x") to byte strings that would give it away.
    """
    everything = list(frames(path))
    kinds = Counter(kind_of(frame) for frame in everything)
    found = [f"{count} frames that are not ours: {name}" for name, count in kinds.items() if name not in OURS]
    stream = b"\0".join(everything)
    for what, strings in needles.items():
        hits = sum(stream.count(string) for string in strings)
        if hits:
            found.append(f"{what}, {hits} times")
    return kinds, found


def main() -> None:
    """Run as `python -m crossedge.lab.capture`: {"namespaces": [fd], "file": PATH} first."""
    control = sys.stdin.fileno()
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(control, 65_536) or b"\n"
    if not text.strip():
        return  # who started it has ended already
    first = json.loads(text)
    taps = [Namespace(descriptor).call(open_tap) for descriptor in first["namespaces"]]
    answer({"ok": True})
    with contextlib.suppress(KeyboardInterrupt):
        answer({"ok": True, "counts": record(taps, Path(first["file"]), control)})


if __name__ == "__main__":
    main()
