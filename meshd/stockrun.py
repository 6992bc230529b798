"""Opening consecutive packets of one TCP stream straight into the super-packet that they become.

Transport data carries whole packets, so what lies between two payloads is the headers of the second. Each
datagram is opened with its payload where it belongs, right behind the one before; its headers then fall on
the end of that, which is kept aside meanwhile. They are compared as one number with what must come, and go.
Padding falls where the next payload comes. Whatever is not exactly as expected ends the run, and is dealt
with as a packet by itself.

Nothing has happened until the whole run is found right: no counter is consumed, the super-packet ends where
it did.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag

from crossedge.meshd.coalesce import Coalescer
from crossedge.meshd.constants import TRANSPORT_HEADER, TRANSPORT_OVERHEAD
from crossedge.meshd.keypair import NONCE, Keypair

Datagram = tuple[int, int, int, float]
"""A transport datagram in the receive buffer: counter, start, end, when it arrived. They sort by counter."""

MOST: Final = 128  # datagrams that are tried at a time


class Run(NamedTuple):
    """How far a run came."""

    taken: int = 0
    """Datagrams that were opened and belong to the super-packet now."""
    tried: int = 0
    """Datagrams that were opened, or would not, and none was taken: it should not be tried again at once."""
    opened: bool = False
    """The datagram after those that were taken is opened already, and is something else."""


NOTHING: Final = Run()


def open_run(
    coalescer: Coalescer,
    owner: object,
    keypair: Keypair,
    received: memoryview,
    datagrams: list[Datagram],
    index: int,
    out: memoryview,
) -> Run:
    """Open datagrams from `index` on, as far as they continue what `owner` sent last.

    A datagram that opens and does not continue it is left, decrypted, at the start of `out`.
    """
    awaited = coalescer.awaited(owner)
    if awaited is None:
        return NOTHING
    view, place, header, payload, transport, count, mask, expected, step = awaited
    counter, start, end, _ = datagrams[index]
    distance = end - start
    size, length = distance - TRANSPORT_OVERHEAD, header + payload
    at = place - header
    count = min(count, (len(view) - at - size) // payload + 1, len(datagrams) - index, MOST)
    if size < length or count <= 0:
        return NOTHING
    fresh = keypair.replay.check_range(counter, count)
    count = (fresh ^ (fresh + 1)).bit_length() - 1  # up to the first that is not
    open_into, nonce, number = keypair.receive.decrypt_into, NONCE.pack, int.from_bytes
    total = taken = 0
    opened = False
    for own, start, end, _ in datagrams[index : index + count]:
        if own != counter + taken or end - start != distance:
            break
        seam = view[at : at + header]
        kept = bytes(seam)
        try:
            open_into(nonce(own), received[start + TRANSPORT_HEADER : end], None, view[at : at + size])
        except InvalidTag:
            seam[:] = kept
            break
        if number(seam, "big") & mask != expected:
            out[:size] = view[at : at + size]
            seam[:] = kept
            opened = True
            break
        total += number(view[at + transport : at + length], "big")
        seam[:] = kept
        expected += step
        at += payload
        taken += 1
    if taken and not coalescer.grow(taken, total):
        return Run(tried=taken)
    if taken:
        keypair.replay.commit_range(counter, taken)
    return Run(taken, 0 if taken else 1, opened)
