"""Names to addresses: resolved at start, again while that fails, and now and then because they move."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Final

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


async def resolve(
    host: str, port: int, families: Collection[int], *, prefer: int | None = None
) -> UdpEndpoint | None:
    """Return the first endpoint that a name has in one of these IP versions, None where it has none now.

    First is what the system says, or what it says of the version that is preferred, if there is a way to it.
    """
    try:
        found = await _look_up(host, port)
    except (OSError, ValueError):  # the latter for what can be no name
        return None
    wanted = {FAMILIES[version] for version in families}
    addresses = [(family, str(address[0])) for family, _, _, _, address in found if family in wanted]
    if prefer is not None:
        first = [each for each in addresses if each[0] == FAMILIES[prefer] and _has_way(*each, port)]
        addresses = first or addresses
    return UdpEndpoint(addresses[0][1], port) if addresses else None


async def _look_up(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    """Return what `socket.getaddrinfo` does.

    A thread of our own, as those of the loop are waited for at its end: a name server that does not answer
    would hold up a restart by ten seconds.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Sequence[tuple[Any, ...]]] = loop.create_future()

    def tell(found: Sequence[tuple[Any, ...]], fault: Exception | None) -> None:
        if done.cancelled():
            return
        if fault is None:
            done.set_result(found)
        else:
            done.set_exception(fault)

    def work() -> None:
        found: Sequence[tuple[Any, ...]] = ()
        fault: Exception | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except (OSError, ValueError) as error:
            fault = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, found, fault)

    threading.Thread(target=work, name="resolve", daemon=True).start()
    return await done


def _has_way(family: int, host: str, port: int) -> bool:
    """Tell whether the kernel has a route there; nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
    except OSError:
        return False
    return True


async def keep_resolved(
    host: str, port: int, families: Collection[int], tell: Callable[[UdpEndpoint], None]
) -> None:
    """Tell each endpoint of a rendezvous that its name comes to have, until cancelled.

    An address is told once. IPv4 comes first: it is where a NAT is, and what is behind one is seen only by
    who is asked over it; an address of ours in IPv6 needs nobody to see it.
    """
    known: UdpEndpoint | None = None
    delay = RETRY_FIRST
    while True:
        found = await resolve(host, port, families, prefer=4 if 4 in families else None)
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
