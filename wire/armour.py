"""Text armour for what is kept in files: base64 between a BEGIN and an END line.

    -----BEGIN CROSSEDGE BUNDLE-----
    (base64, 64 characters a line)
    -----END CROSSEDGE BUNDLE-----

Text before and after is ignored, so that a file may carry a comment, or blocks of several labels; of one
label the first counts.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from typing import Final

from crossedge.wire.errors import WireError

LINE: Final = 64
_BEGIN: Final = re.compile(rb"^-----BEGIN CROSSEDGE ([A-Z0-9 ]{1,40})-----[ \t]*\r?$", re.MULTILINE)


def armour(label: str, data: bytes) -> str:
    """Return `data` as text under a label such as "BUNDLE"."""
    encoded = b64encode(data).decode()
    lines = [encoded[at : at + LINE] for at in range(0, len(encoded), LINE)]
    return "\n".join([f"-----BEGIN CROSSEDGE {label}-----", *lines, f"-----END CROSSEDGE {label}-----", ""])


def dearmour(label: str, text: bytes, limit: int) -> bytes:
    """Return the data in untrusted text; at most `limit` bytes of data. Raises only `WireError`."""
    if len(text) > limit * 2 + 4096:
        raise WireError("too-long", f"{len(text)} bytes of text")
    blocks = list(_BEGIN.finditer(text))
    begin = next((block for block in blocks if block[1].decode() == label), None)
    if begin is None and blocks:
        raise WireError("other-label", f"it is a CROSSEDGE {blocks[0][1].decode()}, not a CROSSEDGE {label}")
    if begin is None:
        raise WireError("not-armoured", f"no BEGIN CROSSEDGE {label} line")
    inner, end, _ = text[begin.end() :].partition(f"-----END CROSSEDGE {label}-----".encode())
    if not end:
        raise WireError("not-armoured", f"no END CROSSEDGE {label} line")
    try:
        data = b64decode(b"".join(inner.split()), validate=True)
    except ValueError:
        raise WireError("not-armoured", f"no base64 in the CROSSEDGE {label}") from None
    if len(data) > limit:
        raise WireError("too-long", f"{len(data)} bytes, {limit} allowed")
    return data
