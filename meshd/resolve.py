"""Names to addresses: resolved at start, again while that fails, and now and then because they move."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection
from typing import Final

from crossedge.wire.endpoint import UdpEndpoint

RETRY_FIRST: Final = 1.0  # seconds after the first failure; it doubles
RETRY_MAX: Final = 60.0
AGAIN: Final = 300.0  # seconds between looks at a name that resolves
FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}

log = logging.getLogger(__name__)


def split(text: str) -> tuple[str, int]:
    """Return host and port of a checked "host:port" or "[IPv6]:port"."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def resolve(host: str, port: int, families: Collection[int]) -> UdpEndpoint | None:
    """Return the first endpoint that a name has in one of these IP versions, None where it has none now."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # the latter for what can be no name
        return None
    wanted = {FAMILIES[version] for version in families}
    for family, _, _, _, address in found:
        if family in wanted:
            return UdpEndpoint(str(address[0]), port)
    return None


async def keep_resolved(
    host: str, port: int, families: Collection[int], tell: Callable[[UdpEndpoint], None]
) -> None:
    """Tell each endpoint that a name comes to have, until cancelled. An address is told once."""
    known: UdpEndpoint | None = None
    delay = RETRY_FIRST
    while True:
        found = await resolve(host, port, families)
        if found is None:
            if delay == RETRY_FIRST and known is None:
                versions = " or ".join(f"IPv{version}" for version in sorted(families))
                log.warning("%s has no %s address now; trying again", host, versions)
            await asyncio.sleep(delay)
            delay = min(delay * 2, RETRY_MAX)
            continue
        delay = RETRY_FIRST
        if found != known:
            known = found
            tell(found)
        if found.host == host:
            return  # it is an address already
        await asyncio.sleep(AGAIN)
