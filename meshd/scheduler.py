"""Where a scheduler listens."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import urlsplit

from crossedge.latency.report import PATH

DEFAULT_PORT: Final = 8478
EXPECTED: Final = "a URL such as http://scheduler:8478 (reports are signed; there is no https)"


class Target(NamedTuple):
    """Where reports go."""

    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Return the target of "http://host[:port][/prefix]"; ValueError says what was expected."""
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORT
        except ValueError:
            raise ValueError(EXPECTED) from None
        wrong = parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment
        if wrong or parts.username or not parts.hostname or not url.isascii() or not url.isprintable():
            raise ValueError(EXPECTED)
        return cls(parts.hostname, port, parts.path.rstrip("/") + PATH)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"
