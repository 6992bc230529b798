"""Sizes that more than one format has to keep, in bytes unless they say otherwise."""

from __future__ import annotations

from typing import Final

MAX_CONTROL: Final = 1232
"""UDP payload of the largest control message: what passes a path of 1,280 bytes over IPv6."""

ENVELOPE_OVERHEAD: Final = 108
"""Header (92) and tag (16) of a sealed control message."""

MAX_PLAINTEXT: Final = MAX_CONTROL - ENVELOPE_OVERHEAD
"""Plaintext of the largest sealed control message."""

MAX_CERTIFICATE: Final = 499
"""An encoded certificate with its signature."""

MAX_RECORD: Final = 520
"""An encoded record with its signature: 12 IPv6 candidates fit."""

MAX_CANDIDATES: Final = 12
"""Candidate endpoints in one record or call."""

MAX_BLOCKLIST: Final = 256 * 1024
"""An encoded blocklist with its signature."""

MAX_REVOKED: Final = 4096
"""Names in one blocklist."""
