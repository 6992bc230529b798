"""A forged handshake that names a member, made of public keys alone, leaves nothing behind."""

from __future__ import annotations

import struct
from hashlib import blake2s
from typing import cast

from crossedge.meshd.noise import Initiator, PrivateKey
from crossedge.wire.endpoint import UdpEndpoint
from tests.simworld import SimWorld


class Stranger:
    """Has a member's public key and no private one: every exchange gives zeros."""

    def __init__(self, public: bytes) -> None:
        self.public = public

    def exchange(self, _: bytes) -> bytes:
        return bytes(32)


def forged_initiation(target: bytes, member: bytes) -> bytes:
    """Return an initiation to `target` that claims to be from `member`; its mac1 is right."""
    static = cast(PrivateKey, Stranger(member))  # does what an initiator asks of one, without a secret
    noise = Initiator(static, target, bytes(32))
    body = b"\1\0\0\0" + struct.pack("<I", 7) + noise.write(bytes(range(32)), bytes(12))
    mac1 = blake2s(body, key=blake2s(b"mac1----" + target).digest(), digest_size=16).digest()
    return body + mac1 + bytes(16)


def test_forged_initiation_leaves_no_session_and_the_pair_still_meets() -> None:
    world = SimWorld()
    alice, bob = world.node("alice", None), world.node("bob", None)
    world.settle()
    world.run(2.0)
    peer = bob.peer(alice)
    datagram = forged_initiation(bob.mesh.device.static.public, peer.member.certificate.x25519)
    bob.mesh.receive(datagram, UdpEndpoint("203.0.113.99", 5), world.net.now)
    assert bob.mesh.all_dropped()["forged-initiation"] == 1
    assert peer.session is None
    assert not bob.mesh.device.indices
    assert world.ping(bob, alice, count=20).lost == []
    assert bob.is_direct(alice)
