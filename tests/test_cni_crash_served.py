"""A kill of the daemon at every step of an ADD, DEL or GC that it serves: nothing is left a second later.

A child serves requests, and kills itself just before its n-th call of anything that the world could see, from
the moment when the request is there: in the thread that serves it, in the one that flushes the store, in the
one that deletes links. Every n is tried, until all is done and the child still lives. Then the caller is dead
too, and what follows is DEL, GC or a new daemon; or it is the installed binary, which takes over.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import signal
import socket
from array import array
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from crossedge.cni import serve
from crossedge.cni.node import Node
from crossedge.cni.serve import ANSWER, HEAD, MAGIC, CniServer
from tests.cni_runtime import PREFIXES, Node_, Pod, our_links, pods
from tests.cni_steps import Steps, request
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces
NODE = Node(tuple(map(ipaddress.ip_network, PREFIXES)))


class Doomed:
    """A daemon's server in a process of its own, that dies before step `fatal` of the first request."""

    def __init__(self, node: Node_, fatal: int) -> None:
        read, write = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                asyncio.run(self._serve(node, fatal, write))
            finally:
                os._exit(1)
        os.close(write)
        assert os.read(read, 1) == b"+"
        os.close(read)

    async def _serve(self, node: Node_, fatal: int, ready: int) -> None:
        steps = Steps(fatal, armed=False)
        steps.watch()
        real = serve.answer

        def answer(*args: Any) -> tuple[int, bytes]:
            steps.armed = True
            steps.step()
            return real(*args)

        pytest.MonkeyPatch().setattr(serve, "answer", answer)  # in this process, which ends so
        server = CniServer(node.paths, NODE, workers=2)
        server.start(asyncio.get_running_loop())
        await asyncio.sleep(0.02)  # the first look at pods is no part of a request
        os.write(ready, b"+")
        await asyncio.Event().wait()

    def ended(self, done: Callable[[], bool]) -> bool:
        """Wait until it was killed, or all is done, and end it; return whether it was killed by itself."""

        def died() -> bool:
            return os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

        eventually(lambda: died() or done(), 10)
        alone = died()
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        return alone


def ask(node: Node_, command: str, pod: Pod, keep: list[Pod] | None = None) -> int | None:
    """Say to the server what the binary would; return the exit status, None where no answer came."""
    variables = {"CNI_COMMAND": command, "CNI_CONTAINERID": pod.id, "CNI_NETNS": pod.path}
    packed = b"".join(f"{k}={v}\0".encode() for k, v in {**variables, "CNI_IFNAME": "eth0"}.items())
    config = node.plugin.configuration("1.1.0")
    if command == "GC":
        config["cni.dev/valid-attachments"] = [{"containerID": p.id, "ifname": "eth0"} for p in keep or []]
    stdin = json.dumps(config).encode()
    rights = array("i", [pod.namespace.fileno()])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(node.paths.socket))
        head = HEAD.pack(MAGIC, os.urandom(8).hex().encode(), len(packed), len(stdin))
        sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        try:
            sock.sendall(packed + stdin)
            answer = sock.recv(ANSWER.size)
        except (BrokenPipeError, ConnectionResetError):
            return None
    return answer[0] if answer else None


Recovery = Callable[[Node_, Pod, list[Pod]], None]
"""What follows the death, for a node, a container that ended and those that live on."""


def by_del(node: Node_, pod: Pod, keep: list[Pod]) -> None:
    assert request(node, "DEL", pod)[0] == 0


def by_gc(node: Node_, pod: Pod, keep: list[Pod]) -> None:
    assert request(node, "GC", pod, keep)[0] == 0


def by_restart(node: Node_, pod: Pod, keep: list[Pod]) -> None:
    """Start and stop a daemon; then, as runtimes do, say DEL of what is there still."""

    async def live() -> None:
        server = CniServer(node.paths, NODE, workers=2)
        server.start(asyncio.get_running_loop())
        await asyncio.sleep(0)
        server.stop()

    asyncio.run(live())
    if [entry for entry in node.live() if entry["container"] == pod.id]:
        assert pod.links() == {"eth0"}
        by_del(node, pod, keep)


def in_turn() -> Recovery:
    """Return a recovery that is another one at each step."""
    ways = cycle([by_del, by_gc, by_restart])
    return lambda node, pod, keep: next(ways)(node, pod, keep)


RECOVERIES = [
    pytest.param(in_turn, id="in-turn"),
    *(
        pytest.param(lambda way=way: way, id=way.__name__, marks=pytest.mark.slow)
        for way in (by_del, by_gc, by_restart)
    ),
]


def clean(node: Node_, pod: Pod, keep: list[Pod]) -> bool:
    """Tell whether nothing is left but what lives on, at the latest after a second."""

    def only_kept() -> bool:
        live = {entry["container"] for entry in node.live()}
        return live == {p.id for p in keep} and len(our_links()) == len(keep) and not pod.links()

    return bool(eventually(only_kept)) and len(node.traces()) == 4 * len(keep)


def add(node: Node_, pod: Pod) -> set[str]:
    """Add a container without the daemon; return its addresses."""
    status, output = request(node, "ADD", pod)
    assert status == 0, output
    return {each["address"].split("/")[0] for each in json.loads(output)["ips"]}


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_daemon_killed_at_every_step_of_add_leaves_nothing(
    tmp_path: Path, recovery: Callable[[], Recovery]
) -> None:
    node, recover, fatal = Node_(tmp_path), recovery(), 0
    with pods(2) as (pod, other):
        killed = True
        while killed:
            server = Doomed(node, fatal)
            status = ask(node, "ADD", pod)
            assert status in (0, None)
            killed = server.ended(lambda status=status: status == 0)
            given = add(node, other)
            assert not pod.links() or not pod.addresses() & given
            recover(node, pod, [other])
            assert clean(node, pod, [other]), (fatal, node.traces(), pod.links(), our_links())
            assert other.addresses() == given
            by_del(node, other, [])
            fatal += 1
        assert fatal > 40


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_daemon_killed_at_every_step_of_del_and_gc_leaves_nothing(
    tmp_path: Path, command: str, recovery: Callable[[], Recovery]
) -> None:
    node, recover, fatal = Node_(tmp_path), recovery(), 0
    with pods(2) as (pod, other):
        given = add(node, other)
        killed = True
        while killed:
            assert not add(node, pod) & given
            server = Doomed(node, fatal)
            status = ask(node, command, pod, [other])
            assert status in (0, None)
            killed = server.ended(lambda status=status: status == 0 and len(our_links()) == 1)
            recover(node, pod, [other])
            assert clean(node, pod, [other]), (fatal, node.traces(), pod.links(), our_links())
            assert other.addresses() == given
            fatal += 1
        assert fatal > 15
        by_del(node, other, [])


@pytest.mark.slow
def test_binary_takes_over_at_every_step_of_an_add(tmp_path: Path) -> None:
    node, fatal = Node_(tmp_path), 0
    with pods() as (pod,):
        killed = True
        while killed:
            server = Doomed(node, fatal)
            result = node.plugin.add(pod, "1.1.0").ok().json
            given = {each["address"].split("/")[0] for each in result["ips"]}
            killed = server.ended(lambda: True)
            assert pod.addresses() == given
            (entry,) = node.live()
            assert (set(entry["addresses"]), entry["state"]) == (given, "added")
            by_del(node, pod, [])
            assert clean(node, pod, []), (fatal, node.traces(), pod.links(), our_links())
            fatal += 1
        assert fatal > 40
