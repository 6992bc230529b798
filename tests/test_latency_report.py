"""Reports: their bytes, whom they are believed from, and how changes are laid over each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from crossedge.latency.feed import Applied, Feed, NeedsFull
from crossedge.latency.report import (
    AGE_MAX,
    MAX_PAIRS,
    MAX_REPORT,
    RTT_MAX,
    Coordinates,
    Pair,
    PairState,
    Report,
    pack_pairs,
)
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import SigningKey, network_id, node_id
from tests import identities
from tests.identities import CA, LEAST, NETWORK, NODE, NOW, OTHER_CA, STRANGER

EPOCH = b"instance"
PEERS = [bytes([number]) * 16 for number in range(1, 5)]

DIRECT = Pair(PEERS[0], PairState.DIRECT, 0.012345, 0.0131, 0.0004, 0.0, 64, 1.5)
RELAYED = Pair(PEERS[1], PairState.RELAYED, 0.08, 0.0815, 0.002, 0.125, 8, 30.0)
SILENT = Pair(PEERS[2], PairState.UNREACHABLE, None, None, None, 1.0, 10, 12.0)
NEW = Pair(PEERS[3], PairState.DIRECT, 0.000001, 0.000001, 0.0, None, 1, 0.0)
FORGOTTEN = Pair(PEERS[0], PairState.FORGOTTEN)

GOLDEN = (
    "86a163c4c388a16ec410bd933a8f98dba85d6c2990e9bc330200a17311a16da6656467652d37a178c420050505050505"
    "0505050505050505050505050505050505050505050505050505a164c420ed4928c628d1c2c6eae90338905995612959"
    "273a5c63f93636c14614ac8737d1a162ce6553f100a161ce67352480a16bc40855d0918cf5a72ee7874cabe342cf0f84"
    "16805b0e48ad50990eefff8268f48bab68d7f3d0a9fda3356561e263cad52b5d524d3e5fcdb91523d8bd6878f94c0ed0"
    "cd7328744335e008a165c408696e7374616e6365a171cd03e8a169ce6553f100a170c490010101010101010101010101"
    "0101010101400000000030390000332c00000190000005dc02020202020202020202020202020202020804e200013880"
    "00013e5c000007d00000753003030303030303030303030303030303030a271000000000000000000000000000002ee0"
    "040404040404040404040404040404040101ffff00000001000000010000000000000000a176c4283f800000c0000000"
    "3f0000000000000000000000000000000000000041000000406000003e80000073b37b05acb982dbae2e87e7da8cb011"
    "eaaf5b029d1650ff419d091636d0da729f2ef23197ca61f4caa31a7c984c548111dff3ae0276f130043818e0216b1c09"
)


def certificate(ca: SigningKey = CA, **changes: Any) -> Certificate:
    return identities.certificate(ca, **{**LEAST, "name": "edge-7", **changes})


def report(key: SigningKey = NODE, of: Certificate | None = None, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "certificate": of or certificate(),
        "epoch": EPOCH,
        "seq": 1000,
        "issued": NOW,
        "pairs": (DIRECT, RELAYED, SILENT, NEW),
        "coordinates": Coordinates((1.0, -2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 8.0), 3.5, 0.25),
    }
    return Report(**{**fields, **changes}).sign(key)


def packed(changes: Mapping[str, object], key: SigningKey = NODE) -> bytes:
    body: bytes = msgpack.packb({**msgpack.unpackb(report().encode()[:-64]), **changes})
    return body + key.sign(Report.DOMAIN, body)


# Bytes


def test_bytes_on_the_wire_do_not_change() -> None:
    assert report().encode().hex() == GOLDEN
    decoded = Report.decode(report().encode())
    assert decoded == report()
    decoded.verify(CA.public, NOW)
    assert (decoded.name, decoded.network, decoded.node_id) == ("edge-7", NETWORK, node_id(NETWORK, "edge-7"))


def test_largest_report_fits_and_one_pair_more_is_refused() -> None:
    pairs = tuple(
        Pair(number.to_bytes(16, "big"), PairState.DIRECT, RTT_MAX, RTT_MAX, RTT_MAX, 1.0, 64, AGE_MAX)
        for number in range(1, MAX_PAIRS + 2)
    )
    full = report(pairs=pairs[:-1], of=certificate(groups=tuple(f"group-number-{n}" for n in range(12))))
    assert MAX_REPORT - 3000 < len(full.encode()) <= MAX_REPORT - 1024
    assert Report.decode(full.encode()) == full
    with pytest.raises(WireError, match="too-many-pairs"):
        Report.decode(packed({"p": pack_pairs(pairs)}))
    with pytest.raises(WireError, match="too-long"):
        Report.decode(bytes(MAX_REPORT + 1))


def pair_with(**fields: int) -> bytes:
    values = {"state": 1, "samples": 8, "loss": 0, "minimum": 1, "smoothed": 1, "deviation": 0, "age": 0}
    values.update(fields)
    sizes = {"state": 1, "samples": 1, "loss": 2}
    return PEERS[0] + b"".join(value.to_bytes(sizes.get(key, 4), "big") for key, value in values.items())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"state": 0}, "malformed"),
        ({"state": 5}, "malformed"),
        ({"state": 3}, "malformed: a pair that is unreachable has an RTT"),
        ({"state": 3, "minimum": 0}, "unreachable has an RTT"),
        ({"minimum": 0}, "measured has no RTT"),
        ({"smoothed": 0}, "measured has no RTT"),
        ({"minimum": 60_000_001}, "absurd-rtt"),
        ({"smoothed": 2**32 - 1}, "absurd-rtt"),
        ({"deviation": 2**32 - 1}, "absurd-rtt"),
        ({"age": 2**32 - 1}, "absurd-age"),
        ({"loss": 10_001}, "loss"),
        ({"samples": 65}, "loss"),
    ],
)
def test_absurd_pair_is_refused_and_named(fields: dict[str, int], reason: str) -> None:
    Report.decode(packed({"p": pair_with()}))
    with pytest.raises(WireError, match=reason):
        Report.decode(packed({"p": pair_with(**fields)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"c": b"certificate"},
        {"c": 1},
        {"e": b"short"},
        {"q": 0},
        {"q": True},
        {"b": 1000},
        {"b": -1},
        {"i": 1.5},
        {"w": 0},
        {"p": bytes(35)},
        {"p": [1]},
        {"p": pair_with() * 2},
        {"p": pair_with(state=4, minimum=0, smoothed=0)},
        {"p": node_id(NETWORK, "edge-7") + pair_with()[16:]},
        {"v": bytes(39)},
        {"v": b"\x7f\xc0\0\0" * 10},
        {"v": bytes(32) + b"\xbf\x80\0\0" + bytes(4)},
        {"v": 3},
    ],
)
def test_malformed_report_is_a_wire_error(changes: dict[str, object]) -> None:
    with pytest.raises(WireError):
        Report.decode(packed(changes))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(
        st.sampled_from("ceqbiwpv"),
        st.none()
        | st.integers(-(2**63), 2**64 - 1)
        | st.binary(max_size=80)
        | st.text(max_size=4)
        | st.floats(),
        max_size=4,
    )
    | st.binary(max_size=300)
)
def test_garbage_is_a_wire_error_and_nothing_else(garbage: dict[str, object] | bytes) -> None:
    with suppress(WireError):
        Report.decode(garbage if isinstance(garbage, bytes) else packed(garbage))


def test_what_cannot_be_said_cannot_be_made() -> None:
    with pytest.raises(ValidationError, match="forgets by leaving out"):
        report(pairs=(FORGOTTEN,))
    with pytest.raises(ValidationError, match="with itself"):
        report(pairs=(Pair(node_id(NETWORK, "edge-7"), PairState.UNREACHABLE),))


# Whom it is believed from


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda: report(STRANGER), "bad-signature"),
        (lambda: report(of=certificate(OTHER_CA)), "bad-signature"),
        (lambda: report(of=certificate(OTHER_CA, network=network_id(OTHER_CA.public))), "other-network"),
        (lambda: report(of=certificate(not_after=NOW)), "expired"),
        (lambda: report(issued=NOW + 400), "clock-skew"),
        (lambda: report(issued=NOW - 400), "clock-skew"),
    ],
)
def test_what_is_not_believed_changes_nothing(bad: Callable[[], Report], reason: str) -> None:
    feed = Feed(CA.public)
    with pytest.raises(WireError, match=reason):
        feed.apply(bad().encode(), 0.0, NOW + 1)
    assert not feed.nodes


def test_signature_covers_every_byte() -> None:
    encoded = report().encode()
    for at in range(0, len(encoded), 7):
        changed = bytearray(encoded)
        changed[at] ^= 4
        with pytest.raises(WireError):
            Report.decode(bytes(changed)).verify(CA.public, NOW)


def test_revoked_and_superseded_certificates_are_refused() -> None:
    feed = Feed(CA.public)
    assert isinstance(feed.apply(report(of=certificate(serial=20)).encode(), 0.0, NOW), Applied)
    with pytest.raises(IdentityError, match="superseded"):
        feed.apply(report(seq=1001).encode(), 0.0, NOW)
    feed.blocklist = Blocklist(network=NETWORK, serial=1, issued=NOW, revoked={"edge-7": 21}).sign(CA)
    with pytest.raises(IdentityError, match="revoked"):
        feed.apply(report(of=certificate(serial=20), seq=1002).encode(), 0.0, NOW)
    assert feed.drop_revoked() == [node_id(NETWORK, "edge-7")]
    assert not feed.nodes


def test_nodes_are_bounded_and_silent_ones_are_forgotten() -> None:
    feed = Feed(CA.public, max_nodes=1)
    feed.apply(report().encode(), 0.0, NOW)
    other = report(of=certificate(name="edge-8"))
    with pytest.raises(WireError, match="too-many-nodes"):
        feed.apply(other.encode(), 1.0, NOW)
    assert feed.drop_silent(50.0, 60.0) == []
    assert feed.drop_silent(61.0, 60.0) == [node_id(NETWORK, "edge-7")]
    assert isinstance(feed.apply(other.encode(), 62.0, NOW), Applied)


# Changes


def taken(feed: Feed, now: float = 0.0, **fields: Any) -> Applied | NeedsFull:
    return feed.apply(report(**fields).encode(), now, NOW)


def test_changes_are_laid_over_the_state_after_their_base_or_any_later_report() -> None:
    feed = Feed(CA.public)
    first = taken(feed, seq=10)
    assert isinstance(first, Applied)
    assert first.restarted
    assert set(first.changes) == {DIRECT, RELAYED, SILENT, NEW}
    slower = Pair(PEERS[1], PairState.DIRECT, 0.07, 0.07, 0.001, 0.0, 16, 2.0)
    assert isinstance(taken(feed, 15.0, seq=11, base=10, pairs=(FORGOTTEN,)), Applied)
    # The answer to 11 was lost, so 12 says again what changed since 10.
    second = taken(feed, 30.0, seq=12, base=10, pairs=(FORGOTTEN, slower))
    assert isinstance(second, Applied)
    assert second.changes == (slower,)
    assert not second.restarted
    held = feed.nodes[node_id(NETWORK, "edge-7")]
    assert held.pairs == {pair.peer: pair for pair in (slower, SILENT, NEW)}
    assert held.age(PEERS[1], 40.0) == 12.0
    assert held.age(PEERS[2], 40.0) == 52.0
    with pytest.raises(KeyError):
        held.age(PEERS[0], 40.0)


def test_report_that_lacks_its_base_needs_a_full_one() -> None:
    feed = Feed(CA.public)
    assert taken(feed, seq=11, base=10) == NeedsFull("unknown-base", 0)
    assert not feed.nodes
    taken(feed, seq=12)
    assert taken(feed, seq=14, base=13) == NeedsFull("unknown-base", 12)
    assert taken(feed, seq=14, base=12, epoch=b"another!") == NeedsFull("unknown-base", 12)
    again = taken(feed, seq=14, epoch=b"another!", pairs=(RELAYED,))
    assert isinstance(again, Applied)
    assert again.restarted
    assert {(pair.peer, pair.state) for pair in again.changes} == {
        (peer, PairState.FORGOTTEN) for peer in (PEERS[0], PEERS[2], PEERS[3])
    }


def test_replayed_report_changes_nothing() -> None:
    feed = Feed(CA.public)
    taken(feed, seq=10)
    taken(feed, seq=11, base=10, pairs=(FORGOTTEN,))
    repeated = taken(feed, 99.0, seq=11, base=10, pairs=(FORGOTTEN,))
    assert isinstance(repeated, Applied)
    assert repeated.duplicate
    assert taken(feed, seq=10) == NeedsFull("old", 11)
    held = feed.nodes[node_id(NETWORK, "edge-7")]
    assert PEERS[0] not in held.pairs
    assert held.received == 0.0
