"""The numbers of the WireGuard protocol, each with the section of the paper that names it.

"The paper" is J. Donenfeld, "WireGuard: Next Generation Kernel Network Tunnel" (NDSS 2017, revised 2020).
Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from enum import IntEnum

# --- Cryptography (paper, 5.4) ------------------------------------------------------------------------

CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"  # Noise protocol name (paper, 5.4)
IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"  # mixed into the hash as the prologue (paper, 5.4)
LABEL_MAC1 = b"mac1----"  # paper, 5.4
LABEL_COOKIE = b"cookie--"  # paper, 5.4

KEY_SIZE = 32
TAG_SIZE = 16
MAC_SIZE = 16  # mac1, mac2 and a cookie (paper, 5.4.4 and 5.4.7)

# --- Messages (paper, 5.4.2 to 5.4.7) -----------------------------------------------------------------


class MessageType(IntEnum):
    """The first byte of a WireGuard message; three zero bytes follow it (paper, 5.4)."""

    INITIATION = 1
    RESPONSE = 2
    COOKIE = 3
    TRANSPORT = 4


INITIATION_SIZE = 148  # paper, 5.4.2
RESPONSE_SIZE = 92  # paper, 5.4.3
COOKIE_SIZE = 64  # paper, 5.4.7
TRANSPORT_HEADER = 16  # type, receiver index, counter (paper, 5.4.6)
TRANSPORT_OVERHEAD = TRANSPORT_HEADER + TAG_SIZE
SUPERFRAME_HEADER = 16  # ours, as long as that of transport data
SUPERFRAME_OVERHEAD = SUPERFRAME_HEADER + TAG_SIZE
PADDING = 16  # plaintext is padded to a multiple of this (paper, 5.4.6)

# --- Limits and timers (paper, 6.1) -------------------------------------------------------------------

REKEY_AFTER_MESSAGES = 2**60  # paper, 6.1
REJECT_AFTER_MESSAGES = 2**64 - 2**13 - 1  # paper, 6.1
REKEY_AFTER_TIME = 120.0  # paper, 6.1
REJECT_AFTER_TIME = 180.0  # paper, 6.1
REKEY_ATTEMPT_TIME = 90.0  # paper, 6.1: give up a handshake after this long
REKEY_TIMEOUT = 5.0  # paper, 6.1: retry a handshake that was not answered
KEEPALIVE_TIMEOUT = 10.0  # paper, 6.1

REKEY_TIMEOUT_JITTER = 0.334  # most that is added to REKEY_TIMEOUT at random (paper, 6.4 asks for jitter)
REKEY_ON_RECEIVE_TIME = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT  # paper, 6.2
NEW_HANDSHAKE_TIME = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT  # sent data, heard nothing (paper, 6.5)
ZERO_KEYS_TIME = 3 * REJECT_AFTER_TIME  # keys are erased when no new ones came (paper, 6.3)

# --- Denial of service (paper, 5.4.7, 5.3) ------------------------------------------------------------

COOKIE_SECRET_TIME = (
    120.0  # a responder changes its cookie secret, an initiator forgets a cookie (paper, 5.4.7)
)
COOKIE_SECRET_LATENCY = 5.0  # a cookie this close to its end is not used any more: it may expire on its way

LOAD_RATE = 200.0  # handshake messages per second with a valid mac1 that are no load yet (implementation)
LOAD_BURST = 200.0  # of them at once (implementation)
LOAD_TIME = 1.0  # seconds that under-load lasts after the last excess (implementation)
SOURCE_RATE = 20.0  # handshake messages per second and source that are read under load (implementation)
SOURCE_BURST = 5.0  # of them at once (implementation)
SOURCES_MAX = 4096  # sources that are remembered under load (implementation)
INITIATION_INTERVAL = 0.02  # least seconds between two initiations of one peer that are read (implementation)
INDICES_MAX = 2**17  # handshakes and keypairs of one daemon (implementation)

# --- Replay (paper, 5.4.6; RFC 6479) ------------------------------------------------------------------

REPLAY_WORD = 64  # bits of one word of the ring
REPLAY_WORDS = 128  # words of the ring, a power of two
REPLAY_WINDOW = (
    REPLAY_WORDS - 1
) * REPLAY_WORD  # 8,128: counters this far behind the newest are still judged

# --- The mesh's own ------------------------------------------------------------------------------------

MESH_RETRY_TIMES = (0.25, 0.5, 1.0, 2.0, 5.0)  # between initiations of two meshds; the last one repeats
MESH_RETRY_JITTER = 0.1  # share of the wait that is added at most, at random
MESH_TIE_TIME = 0.75  # seconds: so long the lower key's handshake may refuse the other's
MESH_RIVAL_TIME = 1.0  # seconds that a handshake which we answered is given before ours goes on
SUPERFRAME_LABEL = b"crossedge/superframe/v1/"  # an AEAD's name follows
