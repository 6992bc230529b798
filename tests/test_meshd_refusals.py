"""What is forged, replayed, reflected, revoked or foreign is refused and counted under a name of its own.

`crossedge status` shows what `Mesh.all_dropped` counts, and the data path's counters, which the kernel
guard's tests are about; the server's own refusals are in `crossedge-rendezvous status`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crossedge.wire.certificate import Certificate
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey, PairKeys, seal
from crossedge.wire.identity import SigningKey, key_id, network_id
from crossedge.wire.messages import CallBody, Ping, encode
from crossedge.wire.record import Record
from tests.simworld import PORT, TODAY, SimNode, SimWorld

SERVER = b"\x07" * 8


@pytest.fixture(scope="module")
def met() -> tuple[SimWorld, SimNode, SimNode]:
    """Two nodes on the public internet that talk."""
    world = SimWorld()
    alice, bob = world.node("alice", None), world.node("bob", None)
    world.settle()
    world.run(2.0)
    assert world.ping(alice, bob, count=50).lost == []
    return world, alice, bob


Met = tuple[SimWorld, SimNode, SimNode]


def statements(met: Met, **changes: object) -> tuple[bytes, bytes]:
    """Return record and certificate of a member that nobody knows yet, with changes to the certificate."""
    world, _, _ = met
    signing = SigningKey.generate(world.net.random)
    ca = changes.pop("ca", world.ca)
    assert isinstance(ca, SigningKey)
    values: dict[str, object] = {
        "network": network_id(ca.public),
        "serial": 70,
        "name": "newcomer",
        "x25519": world.net.random(32),
        "ed25519": signing.public,
        "not_before": int(TODAY) - 86_400,
        "not_after": int(TODAY) + 86_400,
        "issuer": key_id(ca.public),
    }
    certificate = Certificate(**{**values, **changes}).sign(ca)  # type: ignore[arg-type]  # changed by name
    return of(met, certificate, signing), certificate.encode()


def of(met: Met, certificate: Certificate, signing: SigningKey) -> bytes:
    """Return a record under a certificate, signed by a key."""
    world = met[0]
    return (
        Record(
            node_id=certificate.node_id,
            certificate=certificate.fingerprint,
            control_key=world.net.random(32),
            seq=int(TODAY * 1e6),
            issued=int(TODAY),
            expires=int(TODAY) + 3600,
        )
        .sign(signing)
        .encode()
    )


def forged_certificate(met: Met) -> tuple[bytes, bytes]:
    _, certificate = statements(met)
    forged = Certificate.decode(certificate[:-1] + bytes([certificate[-1] ^ 1]))
    return of(met, forged, SigningKey.generate(met[0].net.random)), forged.encode()


def record_of_another_key(met: Met) -> tuple[bytes, bytes]:
    _, certificate = statements(met)
    other = SigningKey.generate(met[0].net.random)
    return of(met, Certificate.decode(certificate), other), certificate


def foreign_certificate(met: Met) -> tuple[bytes, bytes]:
    return statements(met, ca=SigningKey.generate(met[0].net.random))


def expired_certificate(met: Met) -> tuple[bytes, bytes]:
    return statements(met, not_after=int(TODAY) - 1)


def revoked_certificate(met: Met) -> tuple[bytes, bytes]:
    return statements(met, name="gone", serial=3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (forged_certificate, "bad-signature"),
        (record_of_another_key, "bad-signature"),
        (foreign_certificate, "other-network"),
        (expired_certificate, "certificate-expired"),
        (revoked_certificate, "certificate-revoked"),
    ],
)
def test_statement_that_does_not_hold_makes_no_member(
    met: Met, make: Callable[[Met], tuple[bytes, bytes]], reason: str
) -> None:
    world, _, bob = met
    if make is revoked_certificate:
        now = bob.mesh.control.directory.blocklist
        newer = replace_serial(world, now.serial + 1)
        assert bob.mesh.control.directory.offer_blocklist(newer, world.net.now)
    members, before = dict(bob.mesh.members), bob.mesh.all_dropped()[reason]
    assert not bob.mesh.control.directory.offer(*make(met), SERVER, world.net.now)
    assert bob.mesh.all_dropped()[reason] == before + 1
    assert bob.mesh.members == members


def replace_serial(world: SimWorld, serial: int) -> bytes:
    """Return a blocklist of that serial which revokes somebody."""
    changed = world.blocklist.model_copy(update={"serial": serial, "revoked": {"gone": 9}})
    return changed.sign(world.ca).encode()


def test_call_from_outside_the_network_is_dropped_unread(met: Met) -> None:
    world, _, bob = met
    stranger = ControlKey.generate(world.net.random)
    pair = PairKeys.derive(stranger, bob.mesh.control.node.key.public)
    for message in (CallBody(seq=1, attempt=1), Ping(id=1, seq=1)):
        before = bob.mesh.all_dropped()["unknown-sender"]
        bob.receive(
            seal(encode(message), pair, world.net.random(24)), UdpEndpoint("192.0.2.9", 9), world.net.now
        )
        assert bob.mesh.all_dropped()["unknown-sender"] == before + 1
        assert bob.poll_transmit() is None


def test_control_message_that_comes_back_or_comes_twice_is_dropped(met: Met) -> None:
    world, alice, bob = met
    source = UdpEndpoint(alice.host.addresses[0], PORT)
    ping = alice.mesh.control.node.seal(
        Ping(id=1, seq=alice.mesh.control._numbers.next(world.net.now)), bob.mesh.control.node.key.public
    )
    assert ping is not None
    for node, reason, counted in (
        (alice, "mac1", 1),
        (bob, "replayed-control", 0),
        (bob, "replayed-control", 1),
    ):
        before = node.mesh.all_dropped()[reason]
        node.receive(ping, source, world.net.now)
        assert node.mesh.all_dropped()[reason] == before + counted


def test_chunk_that_is_forged_or_comes_twice_is_dropped(met: Met) -> None:
    world, alice, bob = met
    seen: list[bytes] = []
    world.net.watchers.append(
        lambda packet, _: (
            seen.append(packet.datagram)
            if packet.origin is alice.host and classify(packet.datagram) is Kind.CHUNK
            else None
        )
    )
    assert world.ping(alice, bob, count=3).lost == []
    chunk = seen[-1]
    source = UdpEndpoint(alice.host.addresses[0], PORT)
    received = len(bob.received)
    for datagram, reason in ((chunk, "replay"), (chunk[:-1] + bytes([chunk[-1] ^ 1]), "replay")):
        before = bob.dropped[reason]
        bob.receive(datagram, source, world.net.now)
        assert bob.dropped[reason] == before + 1
    fresh = bytearray(chunk)
    fresh[-1] ^= 1
    fresh[15] ^= 0x40  # another counter: no replay, and not what was sealed
    before = bob.dropped["bad-tag"]
    bob.receive(bytes(fresh), source, world.net.now)
    assert bob.dropped["bad-tag"] == before + 1
    assert len(bob.received) == received
