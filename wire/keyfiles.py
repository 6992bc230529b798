"""Private key files: their text, and that nobody else may read them. Opening them is for the caller.

A key file is the armour of the 32 private bytes under a label that says what the key is for, so that a
signing key cannot be taken for a session key.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from crossedge.wire.armour import armour, dearmour
from crossedge.wire.errors import ConfigError, WireError

MODE: Final = 0o600
"""The permissions of a private key file."""


CA_FILE: Final = "ca.key"
"""The authority's key in its state directory."""

SESSION_FILE: Final = "session.key"
"""The node's WireGuard (X25519) key in its key directory."""

SIGNING_FILE: Final = "signing.key"
"""The node's signing (Ed25519) key in its key directory."""

BUNDLE_FILE: Final = "node.bundle"
REQUEST_FILE: Final = "node.request"


class KeyKind(StrEnum):
    """What a private key is for; the value is the label of its armour."""

    CA = "CA KEY"
    SIGNING = "SIGNING KEY"
    SESSION = "SESSION KEY"
    RENDEZVOUS = "RENDEZVOUS KEY"
    REVOKE = "REVOKE KEY"


def format_key(kind: KeyKind, private: bytes) -> str:
    """Return the text of a key file, to be written with mode 0600."""
    if len(private) != 32:
        raise ValueError(f"{len(private)} private bytes, 32 are needed")
    return armour(kind.value, private)


def parse_key(kind: KeyKind, text: bytes, mode: int = MODE) -> bytes:
    """Return the 32 private bytes in a key file's text; raises only `WireError`.

    `mode` is the file's st_mode: one that others may read is refused ("key-file-open").
    """
    if mode & 0o077:
        raise WireError("key-file-open", f"mode 0600, not {mode & 0o777:04o}: others may read it")
    private = dearmour(kind.value, text, 32)
    if len(private) != 32:
        raise WireError("malformed", f"{len(private)} private bytes, 32 are needed")
    return private


def load_key(file: object, kind: KeyKind, text: bytes, mode: int = MODE) -> bytes:
    """Return the same as `parse_key`; what is wrong becomes a `ConfigError` that names `file`."""
    try:
        return parse_key(kind, text, mode)
    except WireError as error:
        what = f"a CROSSEDGE {kind.value} with mode 0600; {error.detail or error.reason}"
        raise ConfigError(file, "", what) from None
