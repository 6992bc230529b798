"""The parts of the demo that judge: ping's output, pairs of both ends, the search of the capture."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from crossedge.lab import flows
from crossedge.lab.capture import MAGIC, PCAP, RECORD, frames, kind_of, search
from crossedge.lab.demo import both_ends
from crossedge.lab.demo_mesh import rounds
from crossedge.lab.evidence import grown, of_ping
from crossedge.lab.network import Network
from crossedge.lab.pings import PingResult, PingRun, parse_ping, run_together
from crossedge.lab.topology import Conditions, parse_topology
from crossedge.lab.workers import Worker
from tests.underlays import WEST, node, two_regions
from tests.waiting import answered, until

PING = """PING 10.160.1.2 (10.160.1.2) 56(84) bytes of data.
64 bytes from 10.160.1.2: icmp_seq=1 ttl=62 time=70.5 ms
64 bytes from 10.160.1.2: icmp_seq=2 ttl=62 time=60.5 ms
64 bytes from 10.160.1.2: icmp_seq=2 ttl=62 time=61.5 ms (DUP!)
64 bytes from 10.160.1.2: icmp_seq=4 ttl=62 time=30.25 ms

--- 10.160.1.2 ping statistics ---
4 packets transmitted, 3 received, +1 duplicates, 25% packet loss, time 31ms
rtt min/avg/max/mdev = 30.250/50.416/70.500/1.000 ms
"""


def test_ping_output_is_read() -> None:
    result = parse_ping(PING)
    assert (result.sent, result.received, result.lost, result.all) == (4, 3, 1, False)
    assert (result.first_ms, result.settled_ms) == (70.5, 30.25)
    silent = parse_ping("ping: connect: Network is unreachable\n")
    assert (silent.sent, silent.all, silent.first_ms, silent.settled_ms) == (0, False, None, None)


@pytest.mark.parametrize("size", [2, 5, 6, 7])
def test_rounds_meet_everyone_once_and_nobody_twice_at_a_time(size: int) -> None:
    names = [f"n{index}" for index in range(size)]
    table = rounds(names)
    assert sorted(tuple(sorted(pair)) for turn in table for pair in turn) == [
        (a, b) for a in names for b in names if a < b
    ]
    for turn in table:
        present = [name for pair in turn for name in pair]
        assert len(present) == len(set(present))


def test_a_pair_is_direct_only_if_both_ends_say_so() -> None:
    direct = {"path": "direct", "time_to_direct_ms": 70.0}
    slower = {"path": "direct", "time_to_direct_ms": 90.0}
    assert both_ends(direct, slower) == ("direct", 90.0)
    assert both_ends(direct, {"path": "relay", "time_to_direct_ms": None}) == ("mixed", 70.0)
    assert both_ends({}, {}) == ("none", None)


def ethernet(payload: bytes, protocol: int = 17) -> bytes:
    ip = struct.pack("!BBHHHBBH8x", 0x45, 0, 28 + len(payload), 0, 0, 64, protocol, 0)
    return bytes(12) + b"\x08\x00" + ip + bytes(8) + payload


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"\x01\0\0\0" + bytes(144), "WireGuard handshake"),
        (b"\x04\0\0\0" + bytes(28), "WireGuard data"),
        (b"\x00\x01\x00\x00\x21\x12\xa4\x42", "STUN"),
        (b"\xce\x01" + bytes(100), "sealed control"),
        (b"\xce\x02" + bytes(100), "relayed"),
        (b"\xce\x03" + bytes(100), "superframe"),
        (b"GET / HTTP/1.1", "other UDP"),
    ],
)
def test_frames_are_told_apart(payload: bytes, kind: str) -> None:
    assert kind_of(ethernet(payload)) == kind


def test_what_is_in_the_clear_is_found(tmp_path: Path) -> None:
    path = tmp_path / "wan.pcap"
    clear = [ethernet(b"\xce\x01" + b"..shop-counter.."), ethernet(b"", 6), ethernet(b"\xce\x03" + bytes(40))]
    data = PCAP.pack(MAGIC, 2, 4, 0, 0, 65_535, 1)
    path.write_bytes(data + b"".join(RECORD.pack(1, 2, len(f), len(f)) + f for f in clear))
    kinds, found = search(path, {"the name shop-counter": [b"shop-counter"], "a secret": [b"secret"]})
    assert kinds == {"sealed control": 1, "protocol 6": 1, "superframe": 1}
    assert found == ["1 frames that are not ours: protocol 6", "the name shop-counter, 1 times"]


TOPOLOGY = two_regions("line", node("left", ipv6=True), node("right", WEST, ipv6=True), servers="")


@pytest.fixture(scope="module")
def line() -> Iterator[Network]:
    with Network(parse_topology(TOPOLOGY, "line.toml")) as network:
        yield network


@pytest.mark.namespaces
def test_flows_arrive_whole_by_both_protocols(line: Network) -> None:
    right = line.nodes["right"]
    assert right.address6 is not None
    wanted = [("left", right.address4), ("left", right.address6), ("left", "5.9.9.9")]
    good4, good6, bad = flows.run_flows(line, ["right"], wanted, 300_000)
    assert (good4, good6) == ("", "")
    assert bad


@pytest.mark.namespaces
def test_pings_run_together_and_keep_their_output(line: Network, tmp_path: Path) -> None:
    run = [PingRun("left", line.nodes["right"].address4, tmp_path / f"{n}.txt", 5, 0.01) for n in range(3)]
    results = run_together(line, run)
    assert [result.all for result in results] == [True] * 3
    assert all(10.0 < (result.settled_ms or 0) < 20.0 for result in results)
    assert "icmp_seq=5" in (tmp_path / "2.txt").read_text()


@pytest.mark.namespaces
def test_the_capture_sees_what_crosses_the_regions(line: Network, tmp_path: Path) -> None:
    path = tmp_path / "wan.pcap"
    descriptor = line.site("region-east").namespace.fileno()
    tap = Worker("crossedge.lab.capture", {"namespaces": [descriptor], "file": str(path)}, [descriptor])
    try:
        line.run("left", ["ping", "-c", "2", "-i", "0.05", "-p", "c0ffee", line.nodes["right"].address4])
        counts = tap.ask({"stop": True})["counts"]
    finally:
        tap.stop()
    assert counts["frames"] == len(list(frames(path))) >= 4
    kinds, found = search(path, {"a ping": [bytes.fromhex("c0ffee") * 4]})
    assert kinds["ICMP"] >= 4  # neighbours may ask for each other meanwhile, by ICMPv6
    assert found == ["a ping, 12 times"]


UDP_SEGMENT = 103


@pytest.mark.namespaces
def test_a_train_loses_single_packets_and_the_rest_arrives_unharmed(line: Network) -> None:
    """64 datagrams go out as one frame; a link that loses a quarter of the packets cuts it, not drops it."""
    with ExitStack() as stack:
        sender, receiver = (
            stack.enter_context(
                line.site(name).namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
            )
            for name in ("left", "right")
        )
        receiver.bind(("", 9000))
        receiver.settimeout(0.5)
        datagrams = [struct.pack("!I", n) + os.urandom(996) for n in range(64)]
        try:
            line.set_wire("east-west", Conditions(delay_ms=5, loss=0.25))
            sender.sendmsg(
                [b"".join(datagrams)],
                [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1000))],
                0,
                (line.nodes["right"].address4, 9000),
            )
            arrived = []
            while True:
                try:
                    arrived.append(receiver.recv(2048))
                except TimeoutError:
                    break
        finally:
            line.set_wire("east-west", Conditions(delay_ms=5))
    assert 32 <= len(arrived) < 64
    assert arrived == [datagrams[struct.unpack("!I", each[:4])[0]] for each in arrived]


@pytest.mark.namespaces
def test_reordering_holds_packets_of_a_train_back_and_loses_none(line: Network) -> None:
    with ExitStack() as stack:
        sender, receiver = (
            stack.enter_context(
                line.site(name).namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
            )
            for name in ("left", "right")
        )
        receiver.bind(("", 9000))
        receiver.settimeout(5.0)
        datagrams = [struct.pack("!I", n) + os.urandom(996) for n in range(64)]
        try:
            line.set_wire("east-west", Conditions(delay_ms=5, reorder=0.25, reorder_ms=2))
            sender.sendmsg(
                [b"".join(datagrams)],
                [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1000))],
                0,
                (line.nodes["right"].address4, 9000),
            )
            arrived = [receiver.recv(2048) for _ in datagrams]
        finally:
            line.set_wire("east-west", Conditions(delay_ms=5))
    assert sorted(arrived) == sorted(datagrams)
    numbers = [struct.unpack("!I", each[:4])[0] for each in arrived]
    on_time, late = numbers[: numbers.index(max(numbers)) + 1], numbers[numbers.index(max(numbers)) + 1 :]
    if not late:  # the last was one of those that were held back
        turn = next(at for at in range(1, 64) if numbers[at] < numbers[at - 1])
        on_time, late = numbers[:turn], numbers[turn:]
    assert on_time == sorted(on_time)
    assert late == sorted(late)
    assert 4 < len(late) < 32


@pytest.mark.namespaces
def test_residence_counts_from_the_kernels_stamp(line: Network) -> None:
    """What the wire adds is its delay, whatever the process was doing when the packet came."""
    sender, receiver = (
        line.site(name).namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        for name in ("left", "right")
    )
    with sender, receiver:
        receiver.bind(("", 9001))
        receiver.settimeout(2.0)
        target = (line.nodes["right"].address4, 9001)
        best = 1.0
        for _ in range(20):
            started = time.monotonic()
            sender.sendto(b"x", target)
            receiver.recv(16)
            best = min(best, time.monotonic() - started)
    assert 0.005 <= best < 0.008
    counts = next(wire for wire in line.status()["wires"] if wire["name"] == "east-west")["counts"]["a"]
    assert counts["residence_us"]["p50"] >= 5_000
    assert counts["late_us"]["p50"] >= 0


@pytest.mark.namespaces
def test_what_answers_when_ping_has_ended_is_no_loss(line: Network, tmp_path: Path) -> None:
    """The last answers take longer than twice any before them, which is all that ping waits for."""
    address = line.nodes["right"].address4
    running = PingRun("left", address, tmp_path / "late.txt", 20, 0.05).start(line)
    try:
        until("ten pings are answered", lambda: answered(running.run) >= 10, 10.0)
        line.set_wire("east-west", Conditions(delay_ms=400))
        result = running.wait(10.0)
    finally:
        line.set_wire("east-west", Conditions(delay_ms=5))
    assert (result.sent, result.lost, result.missing) == (20, 0, [])
    assert result.late
    assert result.times.keys().isdisjoint(result.late)
    assert parse_ping(running.run.file.read_text()) == result
    assert of_ping(result).startswith(f"of pings 1-20 lost none; when ping had ended came {result.late[0]}")


def test_what_was_lost_and_who_dropped_is_told_in_short() -> None:
    lossy = PingResult(9, 4, {1: 20.0, 5: 70.0, 6: 8.0, 9: 1.0})
    assert of_ping(lossy) == "of pings 1-9 lost 2-4, 7-8; slowest answer 70 ms"
    assert of_ping(PingResult(0, 0, {})) == "ping says nothing"
    before = {"barn": Counter({"replay": 2})}
    after = {
        "barn": Counter({"replay": 2, "bad-tag": 1}),
        "wire a-b, a": Counter({"loss": 3}),
        "c": Counter(),
    }
    assert grown(before, after) == ["barn: bad-tag 1", "wire a-b, a: loss 3"]


@pytest.mark.namespaces
def test_a_flow_that_stalls_ends_with_a_word_and_leaves_nothing_behind(
    line: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flows, "FLOW_TIMEOUT", 0.5)
    right = line.nodes["right"]
    line.set_wire("east-west", Conditions(delay_ms=5, mtu=600, mtu_icmp=False))
    try:
        errors = flows.run_flows(line, ["right"], [("left", right.address4)] * 2, 300_000)
    finally:
        line.set_wire("east-west", Conditions(delay_ms=5))
    assert errors == ["time-out"] * 2
    assert flows.run_flows(line, ["right"], [("left", right.address4)], 300_000) == [""]
    assert not caplog.records
