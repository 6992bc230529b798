"""Control messages: their golden bytes, what a decoder refuses, and that no answer outgrows its request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest
from pydantic import ValidationError

from crossedge.wire import messages
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError
from crossedge.wire.limits import MAX_CERTIFICATE, MAX_PLAINTEXT, MAX_RECORD
from crossedge.wire.messages import (
    MAX_KNOWN,
    MAX_PART,
    MAX_SEALED,
    NEEDS_COOKIE,
    REQUEST_FLOOR,
    TYPES,
    Bind,
    BlocklistPart,
    Bound,
    Call,
    CallBody,
    Called,
    CallReply,
    Error,
    Find,
    Found,
    GetBlocklist,
    Keepalive,
    KeepaliveReply,
    Message,
    Notify,
    Page,
    Ping,
    Pong,
    Pull,
    PullDigests,
    Register,
    Registered,
    decode,
    encode,
    padded,
)

V4 = UdpEndpoint("198.51.100.7", 41820)
V6 = UdpEndpoint("2001:db8::7", 65535)
A, B = bytes(range(16)), bytes(range(16, 32))
U32, U48, U64 = 2**32 - 1, 2**48 - 1, 2**64 - 1

EXAMPLES: dict[str, Message] = {
    "register": Register(id=1, seq=1700000000000000, record=b"record", certificate=b"certificate"),
    "registered": Registered(
        id=1,
        observed=V4,
        lease=60,
        keepalive=25.0,
        epoch=7,
        version=9,
        unix_time=1700000000.5,
        restarted=True,
    ),
    "keepalive": Keepalive(id=2, seq=1700000000000001, epoch=7, version=9),
    "keepalive-reply": KeepaliveReply(id=2, observed=V6, epoch=7, version=10, keepalive=4.0),
    "pull": Pull(id=3, epoch=7, since=9, window=16),
    "pull-digests": PullDigests(id=4, first=bytes(16), last=b"\xff" * 16, known=((A, 5), (B, U64)), window=2),
    "page": Page(
        id=3,
        epoch=7,
        version=10,
        items=((b"record", b"certificate"), (b"another", b"")),
        gone=(A, B),
        more=True,
        index=3,
        next=B,
    ),
    "find-node": Find(id=5, node=A),
    "find-address": Find(id=5, address=b"\x0a\xa0\x00\x01"),
    "found": Found(id=5, record=b"record", certificate=b"certificate"),
    "found-nothing": Found(id=5),
    "notify": Notify(epoch=7, version=11),
    "call": Call(id=6, seq=1700000000000002, target=A, sealed=b"sealed"),
    "call-reply": CallReply(id=6, status="ok", channel=0xABCDEF012345),
    "call-reply-busy": CallReply(id=6, status="busy"),
    "called": Called(caller=A, caller_seq=5, channel=0xABCDEF012345, observed=V4, sealed=b"sealed"),
    "called-record": Called(
        caller=A, caller_seq=5, channel=1, observed=V4, sealed=b"sealed", record=b"record"
    ),
    "bind": Bind(id=7, seq=1700000000000003, channel=0xABCDEF012345),
    "bound": Bound(id=7, channel=0xABCDEF012345, observed=V4, peer_bound=True),
    "error": Error(id=8, code="stale-sequence", detail="5 is not above 9", record=b"record"),
    "get-blocklist": GetBlocklist(id=9, serial=3, offset=1024),
    "blocklist-part": BlocklistPart(id=9, serial=3, total=1030, offset=1024, data=b"ending"),
    "ping": Ping(id=U64, seq=1700000000000004, attempt=2),
    "pong": Pong(id=U64, seq=1700000000000005, observed=V4),
    "call-body": CallBody(
        seq=1700000000000006,
        attempt=1,
        candidates=(V4, V6),
        observed_by=((b"8 bytes!", V4),),
        rtt=0.03,
        initiation=b"\x01\x00\x00\x00",
    ),
    "call-body-measure": CallBody(seq=1, measure=True),
    "call-body-least": CallBody(seq=1),
}
"""Every message with every field, and where fields are left out also without them."""


@pytest.fixture(scope="module")
def golden(repository: Path) -> dict[str, bytes]:
    lines = (repository / "tests" / "wire_messages.hex").read_text().splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {name: bytes.fromhex(value) for name, value in pairs}


@pytest.mark.parametrize("name", EXAMPLES)
def test_bytes_on_the_wire_do_not_change(name: str, golden: dict[str, bytes]) -> None:
    message = EXAMPLES[name]
    assert encode(message).hex() == golden[name].hex()
    assert decode(golden[name]) == message


def test_every_type_has_golden_bytes() -> None:
    assert {type(message) for message in EXAMPLES.values()} == set(TYPES.values())
    assert all(kind == model.TYPE for kind, model in TYPES.items())


def test_every_field_is_set_in_some_example() -> None:
    for model in TYPES.values():
        examples = [message for message in EXAMPLES.values() if type(message) is model]
        for column in model.COLUMNS:
            assert any(getattr(message, column.name) != column.default for message in examples), column


LARGEST_SMALL_ANSWERS = (
    Registered(
        id=U32, observed=V6, lease=U32, keepalive=0.1, epoch=U64, version=U64, unix_time=0.1, restarted=True
    ),
    KeepaliveReply(id=U32, observed=V6, epoch=U64, version=U64, keepalive=0.1),
    CallReply(id=U32, status="unknown", channel=U48),
    Bound(id=U32, channel=U48, observed=V6, peer_bound=True),
    Error(id=U32, code="c" * 32, detail="d" * 30),
    Pong(id=U64, seq=U64, observed=V6),
    Found(id=U32),
    Page(id=U32, epoch=U64, version=U64, index=2**16 - 1, more=True),
    Notify(epoch=U64, version=U64),
)


@pytest.mark.parametrize("answer", LARGEST_SMALL_ANSWERS, ids=lambda answer: type(answer).__name__)
def test_no_small_answer_outgrows_the_smallest_request(answer: Message) -> None:
    requests = [len(encode(message)) for message in EXAMPLES.values() if message.REQUEST]
    assert len(encode(answer)) <= REQUEST_FLOOR <= min(requests)


def test_requests_whose_answer_may_be_larger_need_a_cookie() -> None:
    assert {Pull, PullDigests, Find, GetBlocklist} == NEEDS_COOKIE
    assert all(model.REQUEST for model in NEEDS_COOKIE)


LARGEST = (
    Register(id=U32, seq=U64, record=bytes(MAX_RECORD), certificate=bytes(MAX_CERTIFICATE)),
    PullDigests(id=U32, first=A, last=B, known=((A, U64),) * MAX_KNOWN, window=16),
    Page(
        id=U32,
        epoch=U64,
        version=U64,
        items=((bytes(MAX_RECORD), bytes(MAX_CERTIFICATE)),),
        more=True,
        index=2**16 - 1,
        next=A,
    ),
    Page(id=U32, epoch=U64, version=U64, gone=(A,) * 64, more=True, index=2**16 - 1, next=A),
    Found(id=U32, record=bytes(MAX_RECORD), certificate=bytes(MAX_CERTIFICATE)),
    Call(id=U32, seq=U64, target=A, sealed=bytes(MAX_SEALED)),
    Called(caller=A, caller_seq=U64, channel=U48, observed=V6, sealed=bytes(MAX_SEALED)),
    Error(id=U32, code="c" * 32, detail="d" * 120, record=bytes(MAX_RECORD)),
    BlocklistPart(id=U32, serial=U64, total=U32, offset=U32, data=bytes(MAX_PART)),
    CallBody(
        seq=U64,
        attempt=255,
        candidates=(V6,) * 12,
        observed_by=((b"8 bytes!", V6),) * 4,
        rtt=0.1,
        initiation=bytes(148),
        measure=True,
    ),
)


@pytest.mark.parametrize("message", LARGEST, ids=lambda message: type(message).__name__)
def test_largest_form_fits_one_control_message(message: Message) -> None:
    assert len(encode(message)) <= MAX_PLAINTEXT
    assert decode(encode(message)) == message


def test_message_that_does_not_fit_is_the_callers_fault() -> None:
    items = ((bytes(MAX_RECORD), bytes(MAX_CERTIFICATE)),) * 2
    with pytest.raises(ValueError, match="Page takes"):
        encode(Page(id=1, epoch=1, version=1, items=items))


@pytest.mark.parametrize("size", [0, 100, 150, 254, 300, 355, 356, 357, 358, 359, 360, 600, MAX_PLAINTEXT])
def test_padding_reaches_the_size_and_changes_nothing(size: int) -> None:
    message = Notify(epoch=1, version=2)
    packed = padded(message, size)
    assert size <= len(packed) <= max(size + 4, len(encode(message)))
    assert len(packed) <= MAX_PLAINTEXT
    assert decode(packed) == message


def packed_map(**fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def test_unknown_field_is_ignored() -> None:
    assert decode(packed_map(t=10, e=1, v=2, zz=[{"later": 1}])) == Notify(epoch=1, version=2)


V4_BYTES = bytes(4) + b"\0\1"
REFUSED = {
    "empty": b"",
    "not msgpack": b"\xc1",
    "not a map": msgpack.packb([10, 1, 2]),
    "cut short": packed_map(t=10, e=1, v=2)[:-1],
    "bytes after the end": packed_map(t=10, e=1, v=2) + b"\0",
    "no type": packed_map(e=1, v=2),
    "unknown type": packed_map(t=99, e=1, v=2),
    "type that is no number": packed_map(t="10", e=1, v=2),
    "type that is true": packed_map(t=True, e=1, v=2),
    "type that is a map": packed_map(t={}, e=1, v=2),
    "field is missing": packed_map(t=10, e=1),
    "text for a number": packed_map(t=10, e="1", v=2),
    "float for a whole number": packed_map(t=10, e=1.0, v=2),
    "true for a number": packed_map(t=10, e=True, v=2),
    "nothing for a number": packed_map(t=10, e=None, v=2),
    "negative number": packed_map(t=10, e=-1, v=2),
    "number too large": packed_map(t=3, i=2**32, q=1, e=1, v=1),
    "channel too large": packed_map(t=14, i=1, q=1, h=2**48),
    "not a number": packed_map(t=4, i=1, o=V4_BYTES, e=1, v=1, k=float("nan")),
    "infinite": packed_map(t=4, i=1, o=V4_BYTES, e=1, v=1, k=float("inf")),
    "negative seconds": packed_map(t=4, i=1, o=V4_BYTES, e=1, v=1, k=-1.0),
    "huge seconds": packed_map(t=4, i=1, o=V4_BYTES, e=1, v=1, k=2**64 - 1),
    "endpoint of a strange length": packed_map(t=33, i=1, q=1, o=bytes(7)),
    "endpoint is text": packed_map(t=33, i=1, q=1, o="1.2.3.4:5"),
    "endpoint with port 0": packed_map(t=33, i=1, q=1, o=bytes(6)),
    "IPv4 endpoint as IPv6": packed_map(t=33, i=1, q=1, o=bytes(10) + b"\xff\xff\1\2\3\4\0\1"),
    "record too long": packed_map(t=9, i=1, r=bytes(MAX_RECORD + 1)),
    "record is text": packed_map(t=9, i=1, r="record"),
    "13 candidates": packed_map(t=34, q=1, c=[V4_BYTES] * 13),
    "candidates are no array": packed_map(t=34, q=1, c=V4_BYTES),
    "candidate is a map": packed_map(t=34, q=1, c=[{}]),
    "initiation too long": packed_map(t=34, q=1, w=bytes(149)),
    "41 digests": packed_map(t=6, i=1, a=A, z=B, k=bytes(24 * 41)),
    "digests cut short": packed_map(t=6, i=1, a=A, z=B, k=bytes(25)),
    "window 0": packed_map(t=5, i=1, e=1, v=1, w=0),
    "window 17": packed_map(t=5, i=1, e=1, v=1, w=17),
    "find neither": packed_map(t=8, i=1),
    "find both": packed_map(t=8, i=1, n=A, a=bytes(4)),
    "find half a node id": packed_map(t=8, i=1, n=A[:8]),
    "error code with a newline": packed_map(t=16, i=1, s="busy\n"),
    "error code with capitals": packed_map(t=16, i=1, s="Busy"),
    "unknown status": packed_map(t=12, i=1, s="fine"),
    "page item of three": packed_map(t=7, i=1, e=1, v=1, r=[[b"", b"", b""]]),
    "65 tombstones": packed_map(t=7, i=1, e=1, v=1, g=bytes(16 * 65)),
    "a key twice": b"\x83" + b"\xa1t\x0a" + b"\xa1e\x01" + b"\xa1e\x01",
    "a number as key": msgpack.packb({"t": 10, "e": 1, "v": 2, 5: 6}),
    "an array as key": b"\x84" + packed_map(t=10, e=1, v=2)[1:] + b"\x91\x01\x01",
    "an ext type": packed_map(t=10, e=1, v=2, z=msgpack.ExtType(5, b"x")),
    "a timestamp": packed_map(t=10, e=1, v=2, z=msgpack.Timestamp(1, 1)),
    "an ext type with a huge length": b"\x84"
    + packed_map(t=10, e=1, v=2)[1:]
    + b"\xa1z\xc9\xff\xff\xff\xff\x05",
    "text that is not UTF-8": b"\x84" + packed_map(t=10, e=1, v=2)[1:] + b"\xa1z\xa1\xff",
    "a bomb of arrays": b"\x84" + packed_map(t=10, e=1, v=2)[1:] + b"\xa1z" + b"\x91" * 1000 + b"\x00",
    "a bomb of maps": b"\x84" + packed_map(t=10, e=1, v=2)[1:] + b"\xa1z" + b"\x81\xa1z" * 300 + b"\x00",
    "an array that claims to be huge": b"\x84"
    + packed_map(t=10, e=1, v=2)[1:]
    + b"\xa1z\xdd\xff\xff\xff\xff",
    "a map that claims to be huge": b"\xdf\xff\xff\xff\xff",
    "bytes that claim to be huge": b"\x81\xa1t\xc6\xff\xff\xff\xff",
    "longer than a control message": packed_map(t=10, e=1, v=2, z=bytes(MAX_PLAINTEXT)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_message_is_a_wire_error(name: str) -> None:
    with pytest.raises(WireError) as raised:
        decode(REFUSED[name])
    assert raised.value.reason in {"malformed", "unknown-message", "too-long", "bad-endpoint", "bad-address"}


def test_error_does_not_quote_what_came_in() -> None:
    with pytest.raises(WireError) as raised:
        decode(packed_map(t=9, i=1, r="secret words"))
    assert "secret" not in str(raised.value)


def test_message_made_here_with_a_wrong_value_is_refused() -> None:
    misspelt: dict[str, Any] = {"versions": 2}
    with pytest.raises(ValidationError):
        Notify(epoch=-1, version=1)
    with pytest.raises(ValidationError):
        Notify(epoch=1, version=1, **misspelt)


def test_message_is_frozen() -> None:
    example = EXAMPLES["notify"]
    assert isinstance(example, Notify)
    with pytest.raises(ValidationError):
        example.epoch = 8


def test_types_are_numbered_apart() -> None:
    models = [
        item for item in vars(messages).values() if isinstance(item, type) and issubclass(item, Message)
    ]
    assert len(models) - 1 == len(TYPES)
