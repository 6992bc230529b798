"""Pure TCP acknowledgements that wait to be sealed or written: which are redundant, which are to part.

A receiver of bulk acknowledges every super-packet, and several such acknowledgements of one flow may be read
from the TUN, or come from a stock peer, at a time. Each acknowledges what the one before did (RFC 9293, 3.4),
so the last will do; the ack-filter of the CAKE queue discipline rests on that. What says more than its number
stays: other flags, payload, SACK blocks or options other than timestamps, a number that does not grow (a
duplicate).

SACK blocks name what came behind a hole (RFC 2018). With timestamps an acknowledgement has room for three,
and a receiver repeats a block in the two that follow, so that one may be lost. Where several of them share a
datagram, its loss is the loss of what they say, and their sender sends again what is there already.

One that is lost alone does harm too. What it said is learned with the next one, some milliseconds later, and
by then RACK (RFC 8985, 6.2) may have taken the named segments for lost: what was sent after them is
acknowledged already. The second copy comes back as a duplicate (RFC 2883), Linux concludes that this path
reorders, by hundreds of packets, and is slow to repair losses for as long as the connection lasts. So each
carries the one before it along (`Repeats`): it is small, and there are some only while packets are lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

from crossedge.meshd.checksum import ones_sum, transport_is_right
from crossedge.meshd.packet import IPV4_HEADER, IPV6_HEADER, TCP, addresses, claimed_length

ACK: Final = 0x10
PLAIN: Final = 20  # length of a TCP header without options, in bytes
STAMPED: Final = 32  # and with nothing but timestamps (RFC 7323, appendix A)
STAMPS: Final = b"\x01\x01\x08\x0a"
LONGEST: Final = 40 + STAMPED  # bytes of a packet that is a pure acknowledgement
LONGEST_SELECTIVE: Final = 40 + 60  # and of one with more options
NOT_ALONE: Final = 0x07  # FIN, SYN, RST: what is no acknowledgement alone
HALF: Final = 1 << 31
WORD: Final = (1 << 32) - 1
SACK: Final = 5  # the kind of the option; two that do nothing come before it (RFC 2018, RFC 7323 appendix A)
FLOWS_REPEATED: Final = 64
STALE: Final = 1 << 16
"""Bytes acknowledged since: what is older could lie outside of the sender's window (RFC 5961, 5)."""
_SACK_HEAD: Final = Struct(">xxBB")
_TWO_BLOCKS: Final = Struct(">IIII")
_BLOCK: Final = Struct(">II")
_NUMBER: Final = Struct(">I")


class Form(NamedTuple):
    """Which bits of a packet, read as one number, say what; the packet's length is known."""

    alike: int
    """Those that are the same in both packets."""
    fixed: int
    """Those of them that are the same in every acknowledgement,"""
    value: int
    """and what they are then."""
    number: int
    """By how many bits the acknowledgement number is shifted."""


def _form(version: int, header: int) -> Form:
    """Return the form with so long a TCP header."""
    at = 20 if version == 4 else 40
    size = at + header
    alike, fixed, value = bytearray(size), bytearray(size), bytearray(size)

    def must(start: int, wanted: bytes, mask: bytes = b"") -> None:
        fixed[start : start + len(wanted)] = mask or b"\xff" * len(wanted)
        value[start : start + len(wanted)] = wanted

    if version == 4:
        alike[:4] = b"\xff" * 4  # version, service, length
        alike[12:20] = b"\xff" * 8  # addresses
        must(0, b"\x45")
        must(6, bytes(2), b"\xbf\xff")  # no fragment; whether it may become one does not matter
        must(9, b"\x06")
    else:
        alike[:7] = b"\xff" * 7  # all but the hop limit
        alike[8:40] = b"\xff" * 32
        must(0, b"\x60", b"\xf0")
        must(6, b"\x06")
    alike[at : at + 8] = b"\xff" * 8  # ports and, since neither has a payload, the sequence number
    must(at + 12, bytes((header << 2, ACK)))
    if header == STAMPED:
        must(at + PLAIN, STAMPS)
    whole = [int.from_bytes(each, "big") for each in (alike, fixed, value)]
    return Form(whole[0] | whole[1], whole[1], whole[2], 8 * (size - at - 12))


_FORMS: Final = {
    (version, (20 if version == 4 else 40) + header): _form(version, header)
    for version in (4, 6)
    for header in (PLAIN, STAMPED)
}


def form_of(packet: memoryview) -> Form | None:
    """Return the form of a packet that is a pure acknowledgement; None where it is something else."""
    form = _FORMS.get((packet[0] >> 4, len(packet)))
    return form if form is not None and int.from_bytes(packet, "big") & form.fixed == form.value else None


def supersedes(form: Form, later: int, earlier: int) -> bool:
    """Tell whether a packet makes another one redundant; each as a number, the earlier one of this form."""
    if (later ^ earlier) & form.alike or later & form.fixed != form.value:
        return False
    return 0 < ((later >> form.number) - (earlier >> form.number) & WORD) < HALF


def replaces(new: bytes | bytearray | memoryview, old: bytes | bytearray | memoryview) -> bool:
    """Tell whether IP packet `new` makes `old` redundant, as long and to leave just before it."""
    form = _FORMS.get((new[0] >> 4, len(new)))
    return form is not None and supersedes(form, int.from_bytes(new, "big"), int.from_bytes(old, "big"))


def selective(packet: bytes | bytearray | memoryview) -> bool:
    """Tell whether an IP packet is an acknowledgement without payload that has more options than timestamps.

    On an established connection these are SACK blocks.
    """
    version = packet[0] >> 4
    at = 20 if packet[0] == 0x45 else 40 if version == 6 else len(packet)
    header = len(packet) - at
    return (
        header >= STAMPED
        and packet[9 if version == 4 else 6] == 0x06
        and packet[at + 12] == header << 2
        and not packet[at + 13] & NOT_ALONE
        and (header > STAMPED or packet[at + PLAIN : at + PLAIN + 4] != STAMPS)
    )


class Repeats:
    """The last acknowledgement with SACK blocks of each flow, at most of 64 flows."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[bytes, tuple[int, bytes]] = {}

    def before(self, packet: memoryview, frame: memoryview) -> bytes:
        """Return the frame to send again just before that of `packet`, which is `selective`; empty: none.

        It is the flow's last one, unless much was acknowledged since. None that reports a duplicate is sent
        again: its receiver counts them.
        """
        at = 20 if packet[0] >> 4 == 4 else 40
        flow = bytes(packet[12:24] if at == 20 else packet[8:44])
        (number,) = _NUMBER.unpack_from(packet, at + 8)
        then, last = self._last.pop(flow, (0, b""))
        if _tells_news(packet, at, number):
            if len(self._last) >= FLOWS_REPEATED:
                del self._last[next(iter(self._last))]
            self._last[flow] = number, bytes(frame)
        return last if number - then & WORD < STALE else b""


def _tells_news(packet: memoryview, at: int, number: int) -> bool:
    """Tell whether the options are those of an acknowledgement whose first block is no duplicate's."""
    stamped = bytes(packet[at + PLAIN : at + PLAIN + 4]) == STAMPS
    place = at + (STAMPED if stamped else PLAIN)
    if len(packet) < place + 12:
        return False
    kind, size = _SACK_HEAD.unpack_from(packet, place)
    if kind != SACK or len(packet) < place + 2 + size:
        return False
    if size < 18:
        left, right = _BLOCK.unpack_from(packet, place + 4)
        return bool(0 < right - number & WORD < HALF)
    left, right, begin, end = _TWO_BLOCKS.unpack_from(packet, place + 4)
    inside = left - begin & WORD < HALF and end - right & WORD < HALF
    return 0 < right - number & WORD < HALF and not inside


class Staged:
    """A pure acknowledgement that was staged last: the next one of its flow takes its place in few steps."""

    __slots__ = ("earlier", "form", "header", "source", "target")

    def __init__(self, form: Form, header: bytes, source: memoryview, target: memoryview) -> None:
        """Take its form, the virtio header that it had, where it was read to, and where it is staged."""
        self.form = form
        self.header = header
        self.source = source
        self.target = target
        self.earlier = int.from_bytes(source, "big")


def last_of(packets: Sequence[memoryview], index: int, after: int) -> int:
    """Return which of received packets, before `after`, makes those from `index` on redundant; maybe itself.

    Packets may be padded. What makes one redundant has right checksums: else both would be lost.
    """
    while index + 1 < after:
        old, new = packets[index], packets[index + 1]
        length = claimed_length(old) if len(old) >= IPV6_HEADER else 0
        if not IPV6_HEADER <= length <= min(len(old), len(new), LONGEST):
            break
        new = new[:length]
        if not replaces(new, old[:length]) or not _is_right(new):
            break
        index += 1
    return index


def _is_right(packet: memoryview) -> bool:
    """Tell whether the checksums are right in a packet that `replaces` another."""
    start = IPV4_HEADER if packet[0] >> 4 == 4 else IPV6_HEADER
    if start == IPV4_HEADER and ones_sum(packet[:start]) % 65535:
        return False
    return transport_is_right(packet[start:], addresses(packet), TCP)
