"""Decoders of untrusted bytes: what goes in comes out again, garbage is a `WireError` and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.wire import stun
from crossedge.wire.armour import armour, dearmour
from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import Bundle, RendezvousAddress
from crossedge.wire.certificate import Certificate, Request
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import UdpEndpoint, pack_endpoint, unpack_endpoint
from crossedge.wire.envelope import ControlKey, CookieReply, PairKeys, Sealed, seal
from crossedge.wire.errors import WireError
from crossedge.wire.identity import Signed, SigningKey, network_id
from crossedge.wire.keyfiles import KeyKind, parse_key
from crossedge.wire.limits import MAX_PLAINTEXT
from crossedge.wire.messages import TYPES, CallBody, PullDigests, decode, encode
from crossedge.wire.record import Candidate, CandidateKind, Record
from crossedge.wire.relay import pack_header, unpack_header

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SIGNED: tuple[type[Signed], ...] = (Request, Certificate, Record, Delegation, Blocklist, Bundle)
KEY = SigningKey(b"\x01" * 32)
ALICE, BOB = ControlKey(b"\x01" * 32), ControlKey(b"\x02" * 32)
TO_BOB, TO_ALICE = PairKeys.derive(ALICE, BOB.public), PairKeys.derive(BOB, ALICE.public)

u64 = st.integers(0, 2**64 - 1)
hosts = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda value: str(IPv4Address(value))),
    st.integers(2**64, 2**128 - 1).map(lambda value: str(IPv6Address(value))),
)
endpoints = st.builds(UdpEndpoint, hosts, st.integers(1, 65535))

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=40),
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=2) | st.binary(max_size=1), inner, max_size=4),
    ),
    max_leaves=10,
)
keys = sorted({column.key for model in (*TYPES.values(), *SIGNED) for column in model.COLUMNS})
maps = st.dictionaries(st.sampled_from(keys), values, max_size=10)


def only_wire_errors(decoder: Callable[[bytes], object], data: bytes) -> None:
    with suppress(WireError):
        decoder(data)


DECODERS: tuple[Callable[[bytes], object], ...] = (
    decode,
    stun.decode,
    Sealed.parse,
    CookieReply.parse,
    unpack_endpoint,
    unpack_header,
    *(kind.decode for kind in SIGNED),
    Bundle.from_text,
    Request.from_text,
    Blocklist.from_text,
    Delegation.from_text,
    lambda data: dearmour("BUNDLE", data, 100),
    lambda data: parse_key(KeyKind.CA, data),
    lambda data: RendezvousAddress.parse(data.decode("utf-8", "surrogateescape")),
)


@few
@given(st.binary(max_size=1300))
def test_garbage_is_a_wire_error_everywhere(data: bytes) -> None:
    for decoder in DECODERS:
        only_wire_errors(decoder, data)
    assert classify(data) in Kind


@settings(few, max_examples=300)
@given(st.sampled_from(sorted(TYPES)), maps)
def test_messages_of_any_content_are_read_or_refused(kind: int, content: dict[str, object]) -> None:
    data = msgpack.packb({**content, "t": kind})
    only_wire_errors(decode, data)


@settings(few, max_examples=200)
@given(st.sampled_from(SIGNED), maps)
def test_signed_objects_of_any_content_are_read_or_refused(
    kind: type[Signed], content: dict[str, object]
) -> None:
    body = msgpack.packb(content)
    only_wire_errors(kind.decode, body + KEY.sign(kind.DOMAIN, body))


@few
@given(values)
def test_msgpack_of_any_shape_is_read_or_refused(value: object) -> None:
    only_wire_errors(decode, msgpack.packb(value))


GOLDEN: dict[str, bytes] = {}
for name in ("wire_messages.hex", "wire_identity.hex"):
    for line in (Path(__file__).parent / name).read_text().splitlines():
        if not line.startswith("#"):
            label, value = line.split()
            GOLDEN[label] = bytes.fromhex(value)
MESSAGES = [data for data in GOLDEN.values() if data[1:3] == b"\xa1t"]


@settings(few, max_examples=400)
@given(st.sampled_from(MESSAGES), st.integers(0, 20), plain | values)
def test_what_is_read_is_written_and_read_the_same(data: bytes, which: int, value: object) -> None:
    content = msgpack.unpackb(data)
    content[sorted(content)[which % len(content)]] = value
    try:
        message = decode(msgpack.packb(content))
    except WireError:
        return
    assert decode(encode(message)) == message


@settings(few, max_examples=400)
@given(st.sampled_from(sorted(GOLDEN)), st.integers(0, 700), st.integers(1, 255), st.booleans())
def test_changed_and_cut_golden_bytes_are_read_or_refused(name: str, at: int, change: int, cut: bool) -> None:
    data = bytearray(GOLDEN[name])
    at %= len(data)
    data[at] ^= change
    for decoder in (decode, *(kind.decode for kind in SIGNED)):
        only_wire_errors(decoder, bytes(data[:at] if cut else data))


@few
@given(u64, st.lists(endpoints, max_size=12), st.floats(0, 1e12), st.binary(max_size=148))
def test_call_body_round_trips(
    seq: int, candidates: list[UdpEndpoint], rtt: float, initiation: bytes
) -> None:
    body = CallBody(
        seq=seq,
        candidates=tuple(candidates),
        observed_by=tuple((bytes(8), endpoint) for endpoint in candidates[:4]),
        rtt=rtt,
        initiation=initiation,
    )
    assert decode(encode(body)) == body


@few
@given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), u64), max_size=40))
def test_digests_round_trip(known: list[tuple[bytes, int]]) -> None:
    message = PullDigests(id=1, first=bytes(16), last=bytes(16), known=tuple(known))
    assert decode(encode(message)) == message


@few
@given(u64, st.lists(st.tuples(st.sampled_from(CandidateKind), endpoints), max_size=12))
def test_record_round_trips(seq: int, drawn: list[tuple[CandidateKind, UdpEndpoint]]) -> None:
    record = Record(
        node_id=bytes(16),
        certificate=bytes(16),
        control_key=bytes(32),
        seq=seq,
        issued=1,
        expires=2,
        candidates=tuple(Candidate(*one) for one in drawn),
    ).sign(KEY)
    assert Record.decode(record.encode()) == record


@few
@given(st.dictionaries(st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,20}[a-z0-9]\Z"), u64, max_size=30), u64)
def test_blocklist_round_trips(revoked: dict[str, int], serial: int) -> None:
    network = network_id(KEY.public)
    blocklist = Blocklist(network=network, serial=serial, issued=1, revoked=revoked).sign(KEY)
    read = Blocklist.from_text(blocklist.to_text().encode())
    read.verify(KEY.public)
    assert read == blocklist


@few
@given(endpoints)
def test_endpoint_round_trips(endpoint: UdpEndpoint) -> None:
    read = unpack_endpoint(pack_endpoint(endpoint))
    assert pack_endpoint(read) == pack_endpoint(endpoint)
    assert read.port == endpoint.port


@few
@given(st.integers(0, 2**48 - 1))
def test_channel_round_trips(channel: int) -> None:
    assert unpack_header(pack_header(channel)) == channel


@few
@given(st.binary(max_size=MAX_PLAINTEXT), st.binary(min_size=24, max_size=24))
def test_envelope_round_trips(plaintext: bytes, nonce: bytes) -> None:
    sealed = Sealed.parse(seal(plaintext, TO_BOB, nonce))
    assert sealed.check_mac1(BOB.public)
    assert sealed.open(TO_ALICE) == plaintext


@few
@given(st.binary(min_size=12, max_size=12), endpoints, endpoints, endpoints)
def test_stun_success_round_trips(
    transaction: bytes, mapped: UdpEndpoint, origin: UdpEndpoint, other: UdpEndpoint
) -> None:
    datagram = stun.encode_success(transaction, mapped, origin, other)
    read = stun.decode(datagram)
    assert isinstance(read, stun.Success)
    assert stun.encode_success(transaction, read.mapped, read.origin, read.other) == datagram


stun_attributes = st.lists(
    st.tuples(
        st.sampled_from([1, 3, 6, 8, 9, 10, 0x20, 0x26, 0x27, 0x8022, 0x8028, 0x802B, 0x802C]),
        st.binary(max_size=24),
    ),
    max_size=6,
)


@settings(few, max_examples=300)
@given(st.sampled_from([stun.REQUEST, stun.SUCCESS, stun.FAILURE]), stun_attributes)
def test_stun_of_any_attributes_is_read_or_refused(kind: int, attributes: list[tuple[int, bytes]]) -> None:
    body = b""
    for name, value in attributes:
        body += name.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)
    header = kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + bytes(12)
    only_wire_errors(stun.decode, header + body)


@few
@given(st.binary(max_size=300))
def test_armour_round_trips(data: bytes) -> None:
    assert dearmour("BUNDLE", armour("BUNDLE", data).encode(), 300) == data
