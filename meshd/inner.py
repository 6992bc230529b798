"""In-session messages: what two meshds say to each other inside WireGuard transport data.

A plaintext whose first nibble is 0 is one of these (4 and 6 are IP packets, an empty one is a keepalive). So
they are encrypted, authenticated and protected against replay by the session that carries them. All numbers
are big-endian. Each message starts with

     0        1        2                 4                                   8
    +--------+--------+-----------------+-----------------------------------+
    | type   | flags  | length u16      | number u32                        |
    +--------+--------+-----------------+-----------------------------------+

`length` counts the whole message with its own padding; WireGuard's zeros may follow it. Types:

    1 Hello      number: the receiver index of the keypair that carries it
        8        9        10       11       12                16
        +--------+--------+--------+--------+-----------------+
        |version | AEADs  | GSO    | 0      | largest chunk   |
        +--------+--------+--------+--------+-----------------+
        version 1; AEADs: bit 0 AES-256-GCM, bit 1 ChaCha20-Poly1305; GSO types that the sender can write:
        bit 0 TCPV4, bit 1 TCPV6, bit 2 UDP_L4; largest chunk u32: the longest chunk datagram it takes.
        flag 1: your Hello of this keypair has arrived; flag 2: answer, I do not know that mine did. A Hello
        is sent again until one with flag 1 comes back; only one with flag 2 is answered
    2 Probe      number: the probe's id
        8                          16
        +--------------------------+---- ... ----+
        | sent u64                 | zeros       |
        +--------------------------+---- ... ----+
        flag 1: answer with as many bytes as this has. The datagram has no fewer bytes than a reply
    3 ProbeReply number: the probe's id
        8                          16                         24                         32       34
        +--------------------------+--------------------------+--------------------------+--------+---- ...
        | sent u64, as it came     | arrived u64              | answered u64             | size   | zeros
        +--------------------------+--------------------------+--------------------------+--------+---- ...
        size u16: UDP payload of the probe's datagram. Times are nanoseconds of a clock of the one who
        stamps, so only differences of two stamps of one side mean anything (RFC 8762)
    4 Statement  number: 0
        8        10       12
        +--------+--------+--- ... ---+--- ... ---+
        | record | certif.| record    | certificate
        +--------+--------+--- ... ---+--- ... ---+
        lengths u16: the sender's newest signed record, and its certificate or nothing
    5 Place      number: how many neighbours follow
        8                          48                         64                         104
        +----- ... ----------------+----- ... ----------------+----- ... ----------------+---- ...
        | own coordinates          | node id of a neighbour   | its coordinates          | the next one
        +----- ... ----------------+----- ... ----------------+----- ... ----------------+---- ...
        coordinates as in a latency report (40 bytes); the neighbours are the nearest that the sender knows
    6 BlocklistAsk    number: the offset of the part
        8                          16
        +--------------------------+
        | serial u64, 0: newest    |
        +--------------------------+
    7 BlocklistPart   number: the offset of the part
        8                          16                20
        +--------------------------+-----------------+--- ... ---+
        | serial u64               | size of the list| the part
        +--------------------------+-----------------+--- ... ---+
    8 Bye             number: the receiver's index of the keypair; nothing more. The session is idle, and the
                      sender sends no more with this keypair
    9 Report          number: the receiver index of the keypair, as in the superframes that it speaks of
        8                          16                         24
        +--------------------------+--------------------------+
        | end u64                  | opened u64               |
        +--------------------------+--------------------------+
        so many superframe datagrams were opened, of those with numbers (counter + index) below the end

A version, bit or type that is not known is no error: unknown types are dropped and counted.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from crossedge.latency.report import COORDINATES_SIZE, Coordinates, pack_coordinates, unpack_coordinates
from crossedge.meshd.constants import TRANSPORT_OVERHEAD
from crossedge.wire.errors import WireError

VERSION: Final = 1
HELLO, PROBE, PROBE_REPLY, STATEMENT, PLACE = 1, 2, 3, 4, 5
BLOCKLIST_ASK, BLOCKLIST_PART, BYE, REPORT = 6, 7, 8, 9
FLAG: Final = 1  # a Hello's "heard", a probe's "answer in full"
FLAG_ANSWER: Final = 2  # of a Hello

_HEADER = struct.Struct(">BBHI")
_HELLO = struct.Struct(">BBBxI")
_PROBE = struct.Struct(">Q")
_REPLY = struct.Struct(">QQQH")
_STATEMENT = struct.Struct(">HH")
_BLOCKLIST_ASK = struct.Struct(">Q")
_BLOCKLIST_PART = struct.Struct(">QI")
_REPORT = struct.Struct(">QQ")
NODE_ID: Final = 16
NEIGHBOURS_MAX: Final = 8
_NEIGHBOUR = NODE_ID + COORDINATES_SIZE
_NANO = 1_000_000_000
_U64 = 0xFFFF_FFFF_FFFF_FFFF

REPLY_MIN: Final = _HEADER.size + _REPLY.size + TRANSPORT_OVERHEAD  # bytes of the smallest reply's datagram
PROBE_MIN: Final = REPLY_MIN  # a shorter probe would be answered by more than it has, so it is not answered


class Aeads(IntFlag):
    """AEADs of superframes that a meshd can use and wants to."""

    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2


class Gso(IntFlag):
    """Segmentation offloads that a meshd can write to its TUN."""

    TCPV4 = 1
    TCPV6 = 2
    UDP_L4 = 4


@dataclass(frozen=True, slots=True)
class Hello:
    """What the sender can take, for the keypair whose receiver index is `receiver`."""

    receiver: int
    heard: bool
    answer: bool
    aeads: Aeads
    gso: Gso
    largest_chunk: int
    version: int = VERSION

    def encode(self) -> bytes:
        """Return the plaintext."""
        body = _HELLO.pack(self.version, self.aeads, self.gso, self.largest_chunk)
        flags = (FLAG if self.heard else 0) | (FLAG_ANSWER if self.answer else 0)
        return _pack(HELLO, flags, self.receiver, body)


@dataclass(frozen=True, slots=True)
class Probe:
    """A heartbeat, a proof of a path, a challenge to a source address, a test of a size: all the same."""

    id: int
    sent: float
    """Seconds of the sender's clock."""
    size: int = PROBE_MIN
    """UDP payload of the whole datagram in bytes."""
    full_reply: bool = False

    def encode(self) -> bytes:
        """Return the plaintext; the datagram has exactly `size` bytes if WireGuard adds no padding."""
        return _pack(PROBE, FLAG if self.full_reply else 0, self.id, _PROBE.pack(_nano(self.sent)), self.size)


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """The answer to a probe, sent back the way it came."""

    id: int
    sent: float
    arrived: float
    answered: float
    probe_size: int
    size: int = REPLY_MIN

    def encode(self) -> bytes:
        """Return the plaintext."""
        body = _REPLY.pack(_nano(self.sent), _nano(self.arrived), _nano(self.answered), self.probe_size)
        return _pack(PROBE_REPLY, 0, self.id, body, self.size)


@dataclass(frozen=True, slots=True)
class Statement:
    """The sender's newest record (and certificate), for a peer that a rendezvous may not reach."""

    record: bytes
    certificate: bytes = b""

    def encode(self) -> bytes:
        """Return the plaintext."""
        lengths = _STATEMENT.pack(len(self.record), len(self.certificate))
        return _pack(STATEMENT, 0, 0, lengths + self.record + self.certificate)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the sender sees itself, and a few of its nearest."""

    own: Coordinates
    neighbours: tuple[tuple[bytes, Coordinates], ...] = ()
    """(node id, coordinates), at most 8."""

    def encode(self) -> bytes:
        """Return the plaintext."""
        body = pack_coordinates(self.own)
        body += b"".join(node + pack_coordinates(place) for node, place in self.neighbours)
        return _pack(PLACE, 0, len(self.neighbours), body)


@dataclass(frozen=True, slots=True)
class BlocklistAsk:
    """A question for one part of a blocklist."""

    serial: int
    """0: the newest that the peer holds."""
    offset: int

    def encode(self) -> bytes:
        """Return the plaintext."""
        return _pack(BLOCKLIST_ASK, 0, self.offset, _BLOCKLIST_ASK.pack(self.serial))


@dataclass(frozen=True, slots=True)
class BlocklistPart:
    """One part of a blocklist."""

    serial: int
    total: int
    """Bytes of the whole list."""
    offset: int
    data: bytes

    def encode(self) -> bytes:
        """Return the plaintext."""
        return _pack(
            BLOCKLIST_PART, 0, self.offset, _BLOCKLIST_PART.pack(self.serial, self.total) + self.data
        )


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender lets go of the keypair that has this index at the receiver, as nobody uses the session."""

    receiver: int

    def encode(self) -> bytes:
        """Return the plaintext."""
        return _pack(BYE, 0, self.receiver, b"")


@dataclass(frozen=True, slots=True)
class Report:
    """How many superframe datagrams have come under the keypair with this receiver index, of how many."""

    receiver: int
    end: int
    opened: int

    def encode(self) -> bytes:
        """Return the plaintext."""
        return _pack(REPORT, 0, self.receiver, _REPORT.pack(self.end, self.opened))


Inner = Hello | Probe | ProbeReply | Statement | Place | BlocklistAsk | BlocklistPart | Bye | Report


def _nano(seconds: float) -> int:
    return round(seconds * _NANO) & _U64


def _pack(kind: int, flags: int, number: int, body: bytes, size: int = 0) -> bytes:
    """Return header, body and zeros up to a datagram of `size` bytes."""
    length = max(_HEADER.size + len(body), size - TRANSPORT_OVERHEAD)
    message = _HEADER.pack(kind, flags, length, number) + body
    return message + bytes(length - len(message))


def is_inner(plaintext: bytes | memoryview) -> bool:
    """Tell whether a decrypted plaintext is an in-session message and not a packet or a keepalive."""
    return len(plaintext) > 0 and plaintext[0] >> 4 == 0


def decode(plaintext: bytes) -> Inner:
    """Return the message in a peer's plaintext.

    The peer is authenticated and still untrusted: raises only `WireError` ("unknown-type" for the types of a
    later version, "truncated", "bad-length").
    """
    if len(plaintext) < _HEADER.size:
        raise WireError("truncated", "in-session message")
    kind, flags, length, number = _HEADER.unpack_from(plaintext)
    if not _HEADER.size <= length <= len(plaintext):
        raise WireError("bad-length", "in-session message")
    body = length - _HEADER.size
    flag = bool(flags & FLAG)
    if kind == PROBE:
        _need(body, _PROBE)
        if len(plaintext) + TRANSPORT_OVERHEAD < PROBE_MIN:
            raise WireError("short-probe")
        (sent,) = _PROBE.unpack_from(plaintext, _HEADER.size)
        return Probe(number, sent / _NANO, len(plaintext) + TRANSPORT_OVERHEAD, flag)
    if kind == PROBE_REPLY:
        _need(body, _REPLY)
        sent, arrived, answered, probe_size = _REPLY.unpack_from(plaintext, _HEADER.size)
        size = len(plaintext) + TRANSPORT_OVERHEAD
        return ProbeReply(number, sent / _NANO, arrived / _NANO, answered / _NANO, probe_size, size)
    if kind == HELLO:
        _need(body, _HELLO)
        version, aeads, gso, largest = _HELLO.unpack_from(plaintext, _HEADER.size)
        if not version:
            raise WireError("bad-version", "hello")
        answer = bool(flags & FLAG_ANSWER)
        return Hello(number, flag, answer, Aeads(aeads & 3), Gso(gso & 7), largest, version)
    if kind == STATEMENT:
        _need(body, _STATEMENT)
        record, certificate = _STATEMENT.unpack_from(plaintext, _HEADER.size)
        start = _HEADER.size + _STATEMENT.size
        if start + record + certificate != length:
            raise WireError("bad-length", "statement")
        middle = start + record
        return Statement(bytes(plaintext[start:middle]), bytes(plaintext[middle:length]))
    if kind == PLACE:
        if number > NEIGHBOURS_MAX or body < COORDINATES_SIZE + number * _NEIGHBOUR:
            raise WireError("bad-length", "place")
        return _place(bytes(plaintext[_HEADER.size : length]), number)
    if kind == BLOCKLIST_ASK:
        _need(body, _BLOCKLIST_ASK)
        (serial,) = _BLOCKLIST_ASK.unpack_from(plaintext, _HEADER.size)
        return BlocklistAsk(serial, number)
    if kind == BLOCKLIST_PART:
        _need(body, _BLOCKLIST_PART)
        serial, total = _BLOCKLIST_PART.unpack_from(plaintext, _HEADER.size)
        start = _HEADER.size + _BLOCKLIST_PART.size
        return BlocklistPart(serial, total, number, bytes(plaintext[start:length]))
    if kind == BYE:
        return Bye(number)
    if kind == REPORT:
        _need(body, _REPORT)
        return Report(number, *_REPORT.unpack_from(plaintext, _HEADER.size))
    raise WireError("unknown-type", f"in-session message {kind}")


def _place(body: bytes, count: int) -> Place:
    own = unpack_coordinates(body[:COORDINATES_SIZE])
    found: list[tuple[bytes, Coordinates]] = []
    for start in range(COORDINATES_SIZE, COORDINATES_SIZE + count * _NEIGHBOUR, _NEIGHBOUR):
        middle = start + NODE_ID
        found.append((body[start:middle], unpack_coordinates(body[middle : middle + COORDINATES_SIZE])))
    return Place(own, tuple(found))


def _need(body: int, layout: struct.Struct) -> None:
    if body < layout.size:
        raise WireError("truncated", "in-session message")
