"""The hello of one keypair: what each side can take, and when both know it.

    A                                    B
    Hello(heard=no, answer=yes)  ------>       B may open superframes now
          <------  Hello(heard=yes, answer=yes)
    A may send superframes now
    Hello(heard=yes, answer=no)  ------>       B may send superframes now

Each side sends until it is heard. A keypair belongs to one life of each daemon, so a peer that comes back
without superframes has a keypair without them.
"""

from __future__ import annotations

from typing import Final

from crossedge.meshd.inner import VERSION, Aeads, Gso, Hello
from crossedge.meshd.keypair import AeadName, Keypair
from crossedge.meshd.virtio import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4

RETRY: Final = (0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 2.0, 5.0, 10.0)
"""Seconds between hellos that are not heard; the last repeats. A packet too long for one datagram waits."""
GSO_NUMBERS: Final = {Gso.TCPV4: GSO_TCPV4, Gso.TCPV6: GSO_TCPV6, Gso.UDP_L4: GSO_UDP_L4}


def gso_types(gso: Gso) -> frozenset[int]:
    """Return the virtio GSO types of a hello."""
    return frozenset(number for bit, number in GSO_NUMBERS.items() if gso & bit)


def gso_bits(types: frozenset[int]) -> Gso:
    """Return what a hello says of these virtio GSO types."""
    bits = Gso(0)
    for bit, number in GSO_NUMBERS.items():
        if number in types:
            bits |= bit
    return bits


def agree(ours: Aeads, theirs: Aeads) -> AeadName | None:
    """Return the AEAD that both want, AES where both have it in hardware; None where there is none."""
    both = ours & theirs
    if both & Aeads.AES_256_GCM:
        return "aes-256-gcm"
    return "chacha20-poly1305" if both & Aeads.CHACHA20_POLY1305 else None


class HelloExchange:
    """Our hello and the peer's under one keypair."""

    __slots__ = ("_aeads", "_gso", "_largest", "_tries", "due", "heard", "keypair", "peer")

    def __init__(self, keypair: Keypair, aeads: Aeads, gso: Gso, largest_chunk: int, now: float) -> None:
        """Take what we can; the first hello is due at once. No AEAD at all: superframes are off here."""
        self.keypair = keypair
        self.peer: Hello | None = None
        self.heard = False
        """Whether the peer has our hello."""
        self.due: float | None = now
        """When to send ours, in seconds of `now`."""
        self._aeads = aeads
        self._gso = gso
        self._largest = largest_chunk
        self._tries = 0

    def message(self, now: float) -> Hello:
        """Return the hello to send now."""
        step = RETRY[min(self._tries, len(RETRY) - 1)]
        self._tries += 1
        self.due = None if self.heard else now + step
        return Hello(
            self.keypair.remote_index,
            self.peer is not None,
            not self.heard,
            self._aeads,
            self._gso,
            self._largest,
        )

    def receive(self, hello: Hello, now: float) -> AeadName | None:
        """Take the peer's hello; return the AEAD under which superframes may come and, once heard, go."""
        self.peer = hello
        if hello.heard:
            self.heard = True
            self.due = None
        if hello.answer:
            self.due = now
        if hello.version < VERSION:
            return None
        return agree(self._aeads, hello.aeads)
