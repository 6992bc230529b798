"""STUN Binding (RFC 8489) with what RFC 5780 needs to discover a NAT's behaviour.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-------------------------------+-------------------------------+
    | 0001 request, 0101, 0111 error|  length after these 20 bytes  |
    +-------------------------------+-------------------------------+
    |                  magic cookie = 0x2112A442                    |
    +---------------------------------------------------------------+
    |                  transaction id (12 bytes)                    |
    +-------------------------------+-------------------------------+
    |        attribute type         |  its length, padding aside    |  repeated
    +-------------------------------+-------------------------------+
    |                  value, padded to 4 bytes  ...                |
    +---------------------------------------------------------------+

A success carries XOR-MAPPED-ADDRESS, RESPONSE-ORIGIN and OTHER-ADDRESS and nothing else: 56 bytes over IPv4,
92 over IPv6. Our own requests are padded to as much (with SOFTWARE, which every server ignores), so that
nothing is amplified. RESPONSE-PORT sends the answer to another port of the asker's address: that is how the
lifetime of a mapping is measured, and no more than a forged source port could do. PADDING, which would let a
stranger choose sizes, is refused.
"""

from __future__ import annotations

from binascii import crc32
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from crossedge.wire.demux import MAGIC_COOKIE
from crossedge.wire.endpoint import UdpEndpoint, pack_endpoint, unpack_endpoint
from crossedge.wire.errors import WireError

REQUEST: Final = 0x0001
SUCCESS: Final = 0x0101
FAILURE: Final = 0x0111

HEADER: Final = 20
TRANSACTION: Final = 12
MAX_MESSAGE: Final = 1600
"""Bytes: a stock client pads a request by 1,500, and waits for ever for the refusal if it gets none."""
MAX_ATTRIBUTES: Final = 24
MAX_UNKNOWN: Final = 4
"""Unknown attributes that an error names; with more, a 420 would be larger than a success."""

REQUEST_SIZE: Final = 92
"""Bytes of our own requests: no answer is larger."""

MAPPED_ADDRESS: Final = 0x0001
CHANGE_REQUEST: Final = 0x0003  # RFC 5780, 7.2
ERROR_CODE: Final = 0x0009
UNKNOWN_ATTRIBUTES: Final = 0x000A
XOR_MAPPED_ADDRESS: Final = 0x0020
PADDING: Final = 0x0026  # RFC 5780, 7.6
RESPONSE_PORT: Final = 0x0027  # RFC 5780, 7.5
SOFTWARE: Final = 0x8022
FINGERPRINT: Final = 0x8028
RESPONSE_ORIGIN: Final = 0x802B  # RFC 5780, 7.3
OTHER_ADDRESS: Final = 0x802C  # RFC 5780, 7.4

COMPREHENSION_OPTIONAL: Final = 0x8000  # RFC 8489, 14: types from here on may be ignored
FINGERPRINT_XOR: Final = 0x5354554E  # RFC 8489, 14.7

UNKNOWN_ATTRIBUTE: Final = 420

CHANGE_IP: Final = 0x4
CHANGE_PORT: Final = 0x2

_HEADER = Struct(">HHI12s")
_ATTRIBUTE = Struct(">HH")
_COOKIE_BYTES: Final = MAGIC_COOKIE.to_bytes(4, "big")

_MESSAGE_INTEGRITY: Final = frozenset({0x0008, 0x001C})
_CREDENTIALS: Final = frozenset({0x0006, 0x0014, 0x0015, 0x001D, 0x001E})
_KNOWN_IN_REQUEST: Final = frozenset({CHANGE_REQUEST, RESPONSE_PORT}) | _CREDENTIALS | _MESSAGE_INTEGRITY
_KNOWN_IN_RESPONSE: Final = (
    frozenset({MAPPED_ADDRESS, XOR_MAPPED_ADDRESS, ERROR_CODE, UNKNOWN_ATTRIBUTES, 0x0004, 0x0005})
    | _CREDENTIALS
    | _MESSAGE_INTEGRITY
)


@dataclass(frozen=True, slots=True)
class Request:
    """A Binding request."""

    transaction: bytes
    change_ip: bool = False
    change_port: bool = False
    unknown: tuple[int, ...] = ()
    """Attributes that must be understood and are not, or are refused: the answer is a 420 that names them."""
    response_port: int | None = None
    """Port of the asker's address that the answer is to go to, instead of the one that asked."""


@dataclass(frozen=True, slots=True)
class Success:
    """A Binding success."""

    transaction: bytes
    mapped: UdpEndpoint
    origin: UdpEndpoint | None = None
    """Where the answer was sent from."""
    other: UdpEndpoint | None = None
    """The server's other address and port."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A Binding error."""

    transaction: bytes
    code: int
    unknown: tuple[int, ...] = ()


def encode_request(
    transaction: bytes,
    change_ip: bool = False,
    change_port: bool = False,
    size: int = REQUEST_SIZE,
    response_port: int | None = None,
) -> bytes:
    """Return a Binding request with 12 random bytes of transaction id, padded to `size` (a multiple of 4)."""
    if len(transaction) != TRANSACTION or size % 4:
        raise ValueError(f"{len(transaction)} bytes of transaction id, size {size}")
    body = b""
    if change_ip or change_port:
        flags = (CHANGE_IP if change_ip else 0) | (CHANGE_PORT if change_port else 0)
        body = _attribute(CHANGE_REQUEST, flags.to_bytes(4, "big"))
    if response_port is not None:
        body += _attribute(RESPONSE_PORT, response_port.to_bytes(2, "big") + bytes(2))
    room = size - HEADER - len(body) - _ATTRIBUTE.size
    if room >= 0:
        body += _attribute(SOFTWARE, b"crossedge".ljust(room)[:room])
    return _message(REQUEST, transaction, body)


def encode_success(
    transaction: bytes,
    mapped: UdpEndpoint,
    origin: UdpEndpoint | None = None,
    other: UdpEndpoint | None = None,
) -> bytes:
    """Return a Binding success: 56 bytes over IPv4 and 92 over IPv6 at most."""
    body = _attribute(XOR_MAPPED_ADDRESS, _xored(_address(mapped), transaction))
    if origin is not None:
        body += _attribute(RESPONSE_ORIGIN, _address(origin))
    if other is not None:
        body += _attribute(OTHER_ADDRESS, _address(other))
    return _message(SUCCESS, transaction, body)


def encode_error(transaction: bytes, code: int, unknown: Sequence[int] = ()) -> bytes:
    """Return a Binding error: 40 bytes at most, with the first unknown attributes and no reason phrase."""
    body = _attribute(ERROR_CODE, bytes((0, 0, code // 100, code % 100)))
    if unknown:
        types = b"".join(kind.to_bytes(2, "big") for kind in unknown[:MAX_UNKNOWN])
        body += _attribute(UNKNOWN_ATTRIBUTES, types)
    return _message(FAILURE, transaction, body)


def decode(datagram: bytes) -> Request | Success | Failure:
    """Return the Binding message in untrusted bytes; raises only `WireError`."""
    size = len(datagram)
    if size < HEADER:
        raise WireError("truncated", "STUN header")
    if size > MAX_MESSAGE:
        raise WireError("too-long", "STUN")
    kind, length, cookie, transaction = _HEADER.unpack_from(datagram)
    if cookie != MAGIC_COOKIE or kind not in (REQUEST, SUCCESS, FAILURE):
        raise WireError("not-binding")
    if length != size - HEADER or length % 4:
        raise WireError("malformed", "STUN length")
    attributes: dict[int, bytes] = {}
    for name, value in _attributes(bytes(datagram)):
        attributes.setdefault(name, value)  # RFC 8489, 14: only the first of a kind counts
    known = _KNOWN_IN_REQUEST if kind == REQUEST else _KNOWN_IN_RESPONSE
    unknown = tuple(name for name in attributes if name < COMPREHENSION_OPTIONAL and name not in known)
    if kind == REQUEST:
        return _request(transaction, attributes, unknown)
    if unknown:
        raise WireError("unknown-attribute", f"{unknown[0]:#06x}")
    return _success(transaction, attributes) if kind == SUCCESS else _failure(transaction, attributes)


def _message(kind: int, transaction: bytes, body: bytes) -> bytes:
    return _HEADER.pack(kind, len(body), MAGIC_COOKIE, transaction) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(kind, len(value)) + value + bytes(-len(value) % 4)


def _address(endpoint: UdpEndpoint) -> bytes:
    packed = pack_endpoint(endpoint)
    return bytes((0, 1 if len(packed) == 6 else 2)) + packed[-2:] + packed[:-2]


def _xored(value: bytes, transaction: bytes) -> bytes:
    mask = b"\0\0" + _COOKIE_BYTES[:2] + _COOKIE_BYTES + transaction
    if len(value) > len(mask):
        raise WireError("malformed", "STUN address")
    return bytes(one ^ other for one, other in zip(value, mask, strict=False))


def _endpoint(value: bytes) -> UdpEndpoint:
    if len(value) < 4 or (value[1], len(value)) not in ((1, 8), (2, 20)):
        raise WireError("malformed", "STUN address")
    return unpack_endpoint(value[4:] + value[2:4])


def _attributes(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    at = HEADER
    signed = False
    for _ in range(MAX_ATTRIBUTES):
        if at == len(datagram):
            return
        name, length = _ATTRIBUTE.unpack_from(datagram, at)
        start = at + _ATTRIBUTE.size
        following = start + length + -length % 4
        if following > len(datagram):
            raise WireError("malformed", "STUN attribute length")
        value = datagram[start : start + length]
        if name == FINGERPRINT:
            if following != len(datagram) or length != 4:
                raise WireError("malformed", "STUN fingerprint")
            if int.from_bytes(value, "big") != crc32(datagram[:at]) ^ FINGERPRINT_XOR:
                raise WireError("bad-fingerprint")
        if not signed:  # RFC 8489, 14.5: what follows a MESSAGE-INTEGRITY is ignored
            yield name, value
        signed = signed or name in _MESSAGE_INTEGRITY
        at = following
    if at != len(datagram):
        raise WireError("malformed", "too many STUN attributes")


def _request(transaction: bytes, attributes: dict[int, bytes], unknown: tuple[int, ...]) -> Request:
    flags = 0
    port = None
    if RESPONSE_PORT in attributes:
        value = attributes[RESPONSE_PORT]
        if len(value) != 4 or not any(value[:2]):
            raise WireError("malformed", "STUN response port")
        port = int.from_bytes(value[:2], "big")
    if CHANGE_REQUEST in attributes:
        value = attributes[CHANGE_REQUEST]
        if len(value) != 4:
            raise WireError("malformed", "STUN change request")
        flags = value[3]
    return Request(transaction, bool(flags & CHANGE_IP), bool(flags & CHANGE_PORT), unknown, port)


def _success(transaction: bytes, attributes: dict[int, bytes]) -> Success:
    if XOR_MAPPED_ADDRESS in attributes:
        mapped = _endpoint(_xored(attributes[XOR_MAPPED_ADDRESS], transaction))
    elif MAPPED_ADDRESS in attributes:
        mapped = _endpoint(attributes[MAPPED_ADDRESS])
    else:
        raise WireError("malformed", "STUN success without an address")
    origin, other = (
        _endpoint(attributes[name]) if name in attributes else None
        for name in (RESPONSE_ORIGIN, OTHER_ADDRESS)
    )
    return Success(transaction, mapped, origin, other)


def _failure(transaction: bytes, attributes: dict[int, bytes]) -> Failure:
    value = attributes.get(ERROR_CODE, b"")
    if len(value) < 4 or not 3 <= value[2] & 7 <= 6 or value[3] > 99:
        raise WireError("malformed", "STUN error code")
    named = attributes.get(UNKNOWN_ATTRIBUTES, b"")
    unknown = tuple(int.from_bytes(named[at : at + 2], "big") for at in range(0, len(named) - 1, 2))
    return Failure(transaction, (value[2] & 7) * 100 + value[3], unknown[:MAX_ATTRIBUTES])
