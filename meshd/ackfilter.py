"""Pure TCP acknowledgements that a later one makes redundant, while both still wait to be sealed.

A receiver of bulk acknowledges every super-packet, and several such acknowledgements of one flow may be read
from the TUN at a time. Each acknowledges what the one before did (RFC 9293, 3.4), so the last will do; the
ack-filter of the CAKE queue discipline rests on that. What says more than its number stays: other flags,
payload, SACK blocks or options other than timestamps, a number that does not grow (a duplicate).
"""

from __future__ import annotations

from typing import Final

ACK: Final = 0x10
PLAIN: Final = 20  # length of a TCP header without options, in bytes
STAMPED: Final = 32  # and with nothing but timestamps (RFC 7323, appendix A)
STAMPS: Final = b"\x01\x01\x08\x0a"
LONGEST: Final = 40 + STAMPED  # bytes of a packet that is a pure acknowledgement
HALF: Final = 1 << 31


def replaces(new: bytes | bytearray | memoryview, old: bytes | bytearray | memoryview) -> bool:
    """Tell whether IP packet `new` makes `old` redundant, as long and to leave just before it."""
    if new[0] == 0x45:
        # version, length and service; protocol, not the checksum; addresses and ports; no fragments
        at = 20
        if new[9] != 6 or old[9] != 6 or new[:4] != old[:4] or (new[6] | old[6]) & 0x3F or new[7] | old[7]:
            return False
        same = new[12:28] == old[12:28]
    elif new[0] >> 4 == 6:
        at = 40
        same = new[6] == 6 and new[:7] == old[:7] and new[8:48] == old[8:48]
    else:
        return False
    header = len(new) - at  # of TCP, if there is no payload
    if not same or header not in (PLAIN, STAMPED) or new[at + 13] != ACK or old[at + 13] != ACK:
        return False
    options = at + PLAIN
    if header == STAMPED and (new[options : options + 4] != STAMPS or old[options : options + 4] != STAMPS):
        return False
    if new[at + 12] != header << 2 or old[at + 12] != header << 2:
        return False
    number = int.from_bytes(new[at + 8 : at + 12], "big") - int.from_bytes(old[at + 8 : at + 12], "big")
    return 0 < number % (1 << 32) < HALF
