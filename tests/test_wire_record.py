"""Records of nodes: whom they are believed of, for how long, and what may stand in them."""

from __future__ import annotations

import msgpack
import pytest
from pydantic import ValidationError

from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.record import (
    Allocation,
    Behaviour,
    Candidate,
    CandidateKind,
    NatVerdict,
    Record,
    pack_verdict,
    unpack_verdict,
)
from tests.identities import (
    NODE,
    NOW,
    STRANGER,
    certificate,
    packed,
    record,
)


def test_record_is_believed_only_with_its_own_certificate() -> None:
    record().verify(certificate())
    with pytest.raises(IdentityError, match="other-certificate"):
        record().verify(certificate(serial=18))
    with pytest.raises(IdentityError, match="bad-signature"):
        record(STRANGER).verify(certificate())
    with pytest.raises(IdentityError, match="other-node"):
        record(node_id=bytes(16)).verify(certificate())


def test_record_holds_until_it_expires() -> None:
    assert record().valid_at(NOW + 3600.9)
    assert not record().valid_at(NOW + 3601)
    assert record().valid_at(0)


@pytest.mark.parametrize(("issued", "expires"), [(5, 4), (0, 8 * 86400)])
def test_record_has_a_sensible_lifetime(issued: int, expires: int) -> None:
    with pytest.raises(ValidationError):
        record(issued=issued, expires=expires)


def test_kinds_and_behaviours_of_a_later_version_read_as_unknown() -> None:
    assert unpack_verdict(b"\xff\x63\x2a\x09\x00\x00") == NatVerdict()
    values = msgpack.unpackb(record().encode()[:-64])
    values["a"] = [b"\x63" + bytes.fromhex("c6336407a35c")]
    read = Record.decode(packed(Record, NODE, values))
    assert read.candidates == (Candidate(CandidateKind.OTHER, UdpEndpoint("198.51.100.7", 41820)),)
    assert read.endpoints == (UdpEndpoint("198.51.100.7", 41820),)


@pytest.mark.parametrize("hairpin", [None, False, True])
@pytest.mark.parametrize("lifetime", [None, 1, 300, 65535])
def test_verdict_round_trips(hairpin: bool | None, lifetime: int | None) -> None:
    verdict = NatVerdict(
        Behaviour.ADDRESS_DEPENDENT, Behaviour.NONE, Allocation.SEQUENTIAL, hairpin, lifetime
    )
    assert unpack_verdict(pack_verdict(verdict)) == verdict


@pytest.mark.parametrize(
    "changes",
    [
        {"a": [b"\1" + bytes.fromhex("c6336407a35c")] * 13},
        {"a": [b""]},
        {"a": [b"\1"]},
        {"a": ["text"]},
        {"a": 5},
        {"v": bytes(5)},
        {"v": [1, 2, 3]},
        {"s": bytes(9)},
        {"s": bytes(72)},
        {"k": bytes(31)},
        {"e": 1},
    ],
)
def test_record_with_a_wrong_field_is_a_wire_error(changes: dict[str, object]) -> None:
    values = msgpack.unpackb(record().encode()[:-64])
    with pytest.raises(WireError):
        Record.decode(packed(Record, NODE, {**values, **changes}))
