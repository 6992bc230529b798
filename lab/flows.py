"""TCP flows between pods of a lab: each is sent, received whole, and confirmed by its digest."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from crossedge.lab.network import Network

PORT = 7000
FLOW_TIMEOUT = 15.0
TOGETHER = 6
MARK = b"crossedge demo: this text must not be seen on the WAN. "


def payload(size: int) -> bytes:
    """Return that many bytes of the mark, again and again."""
    return (MARK * (size // len(MARK) + 1))[:size]


class _Server:
    """Reads each connection to its end and answers with the digest of what came."""

    def __init__(self) -> None:
        self._open: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._open[task] = writer
        digest = hashlib.blake2s()
        try:
            while data := await reader.read(65_536):
                digest.update(data)
            writer.write(digest.digest())
            await writer.drain()
        except ConnectionError:
            pass  # its client says what was wrong
        finally:
            del self._open[task]
            writer.close()

    async def end(self) -> None:
        """Break off the connections that are still open."""
        tasks = [task for task in self._open if task is not None]
        for writer in self._open.values():
            writer.transport.abort()
        await asyncio.gather(*tasks)


def _listen(family: socket.AddressFamily) -> socket.socket:
    return socket.create_server(("", PORT), family=family, backlog=64)


async def _flow(network: Network, pod: str, address: str, size: int) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    client = network.site(pod).namespace.call(socket.socket, family, socket.SOCK_STREAM)
    client.setblocking(False)
    data = payload(size)
    writer = None
    try:
        async with asyncio.timeout(FLOW_TIMEOUT):
            await asyncio.get_running_loop().sock_connect(client, (address, PORT))
            reader, writer = await asyncio.open_connection(sock=client)
            writer.write(data)
            writer.write_eof()
            answer = await reader.read()
    except (OSError, TimeoutError) as error:
        return str(error) or "time-out"
    finally:
        if writer is not None:
            writer.transport.abort()
        else:
            client.close()
    return "" if answer == hashlib.blake2s(data).digest() else "what arrived is not what was sent"


async def _run(
    network: Network, pods: Sequence[str], wanted: Sequence[tuple[str, str]], size: int
) -> list[str]:
    servers, serving = [], _Server()
    with ExitStack() as stack:
        for pod in pods:
            for family in (socket.AF_INET, socket.AF_INET6):
                listener = network.site(pod).namespace.call(_listen, family)
                stack.callback(listener.close)
                servers.append(await asyncio.start_server(serving.serve, sock=listener))
        turns = asyncio.Semaphore(TOGETHER)

        async def one(pod: str, address: str) -> str:
            async with turns:
                return await _flow(network, pod, address, size)

        results = await asyncio.gather(*(one(pod, address) for pod, address in wanted))
        for server in servers:
            server.close()
        await serving.end()
    return results


def run_flows(
    network: Network, pods: Sequence[str], wanted: Sequence[tuple[str, str]], size: int
) -> list[str]:
    """Send `size` bytes for each (pod, address); return for each what went wrong, "" if nothing."""
    return asyncio.run(_run(network, pods, wanted, size))
