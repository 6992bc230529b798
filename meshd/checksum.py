"""The Internet checksum (RFC 1071), by whole integers.

The ones' complement sum of 16-bit words is the number modulo 65,535, and Python's integers take that
remainder of a whole packet in one go. A sum here is such a remainder: 0 and 65,535 are the same number.

A partial checksum is what a kernel leaves to an offloading device: the field holds the sum of the pseudo
header, the device adds everything from the transport header on and writes the complement.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

Buffer = bytes | bytearray | memoryview

_WORD = Struct("!H")
# Bits, multiples of 16; of 1,440 bytes, the longest usual packet.
_HALF, _QUARTER, _EIGHTH, _SIXTEENTH = 5760, 2880, 1440, 720
_HALF_MASK, _QUARTER_MASK, _EIGHTH_MASK, _SIXTEENTH_MASK = (
    (1 << bits) - 1 for bits in (_HALF, _QUARTER, _EIGHTH, _SIXTEENTH)
)
_FOLDED = 600, 1440  # bytes between which folding pays
_CHUNK = 8192  # bytes that are made one number at a time
_LADDER = tuple((bits, (1 << bits) - 1) for bits in (32_768, 16_384, 8192, 4096, 2048))


def ones_sum(data: Buffer) -> int:
    """Return the sum of the big-endian 16-bit words of `data` modulo 65,535; an odd end is padded.

    What a packet has is folded first: a sum of its parts leaves the same remainder, and adding them takes
    less than dividing the whole.
    """
    number, size = int.from_bytes(data, "big"), len(data)
    if _FOLDED[0] < size <= _FOLDED[1]:
        number = (number >> _HALF) + (number & _HALF_MASK)
        number = (number >> _QUARTER) + (number & _QUARTER_MASK)
        number = (number >> _EIGHTH) + (number & _EIGHTH_MASK)
    remainder = number % 65535
    return remainder * 256 % 65535 if size & 1 else remainder


def quarter_sums(quarters: Sequence[bytes]) -> list[int]:
    """Return the sums of pieces of data, each of which is four parts; only the last may be of odd length.

    Their numbers are added, which is what folding would have to do.
    """
    sums, parts, number_of = [], iter(quarters), int.from_bytes
    odd = 8 * (len(quarters[3]) & 1)
    for one, two, three, four in zip(parts, parts, parts, parts, strict=True):
        number = number_of(one, "big") + number_of(two, "big") + number_of(three, "big")
        number += number_of(four, "big") << odd if odd else number_of(four, "big")
        number = (number >> _EIGHTH) + (number & _EIGHTH_MASK)
        number = (number >> _SIXTEENTH) + (number & _SIXTEENTH_MASK)
        sums.append(number % 65535)
    return sums


def long_sum(data: bytes) -> int:
    """Return a number with the same remainder as `ones_sum` for much data: an even number of bytes."""
    view = memoryview(data)
    parts = [int.from_bytes(view[at : at + _CHUNK], "big") for at in range(0, len(data), _CHUNK)]
    return folded(sum(parts))


def folded(number: int) -> int:
    """Return a number of a few hundred bytes with the same remainder as one of up to some 8 KiB."""
    for bits, mask in _LADDER:
        number = (number >> bits) + (number & mask)
    return number


def complement(total: int) -> int:
    """Return the checksum field for a sum: 0 to 65,534."""
    return -total % 65535


def pseudo_sum(addresses: Buffer, protocol: int, size: int) -> int:
    """Return the sum of the pseudo header; `addresses` are both, packed, `size` is the transport's length."""
    return (int.from_bytes(addresses, "big") + protocol + size) % 65535


def transport_is_right(packet: Buffer, addresses: Buffer, protocol: int) -> bool:
    """Tell whether the TCP or UDP checksum is right in `packet`, which begins with the transport header."""
    return (pseudo_sum(addresses, protocol, len(packet)) + ones_sum(packet)) % 65535 == 0


def complete(packet: memoryview, start: int, field: int, *, udp: bool) -> None:
    """Turn the partial checksum at `packet[field]` into the full one of everything from `start`, in place."""
    checksum = complement(ones_sum(packet[start:]))
    if udp and not checksum:
        checksum = 0xFFFF  # RFC 768: a computed zero is sent as ones
    _WORD.pack_into(packet, field, checksum)
