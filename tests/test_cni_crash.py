"""A kill at every step of ADD and DEL, then DEL, GC or a start of the daemon: nothing is left a second later.

A child runs the operation, and kills itself just before its n-th call of anything that the world could see:
files, locks, netlink, namespaces, sysctls. Every n is tried.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crossedge.cni.node import Node
from crossedge.cni.serve import CniServer
from tests.cni_runtime import PREFIXES, Node_, Pod, pods
from tests.cni_steps import Steps, request
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces


def killed(node: Node_, command: str, pod: Pod, fatal: int) -> int | None:
    """Run an operation in a child that dies before step `fatal`; return the number of steps if it did not."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            steps = Steps(fatal)
            reply = os.write
            steps.watch()
            status, _ = request(node, command, pod)
            count = steps.count
            steps.step()  # the last boundary: all is done, and nobody was told
            reply(write, f"{count} {status}".encode())
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 100).decode()
    os.close(read)
    _, how = os.waitpid(child, 0)
    if os.WIFSIGNALED(how):
        return None
    count, status = said.split()
    assert status == "0"
    return int(count)


def by_del(node: Node_, pod: Pod) -> None:
    assert request(node, "DEL", pod)[0] == 0


def by_gc(node: Node_, pod: Pod) -> None:
    assert request(node, "GC", pod)[0] == 0


def by_daemon(node: Node_, pod: Pod) -> None:
    """Start and stop the daemon's part; then, as runtimes do, say DEL of what is not there any more."""

    async def serve() -> None:
        server = CniServer(node.paths, Node(tuple(map(ipaddress.ip_network, PREFIXES))))
        server.start(asyncio.get_running_loop())
        await asyncio.sleep(0)
        server.stop()

    asyncio.run(serve())


def clean(node: Node_, pod: Pod) -> bool:
    return bool(eventually(lambda: not node.traces() and not pod.links()))


@pytest.mark.parametrize("recover", [by_del, by_gc, by_daemon])
def test_kill_at_every_step_of_add_leaves_nothing(tmp_path: Path, recover: Callable[..., None]) -> None:
    node = Node_(tmp_path)
    with pods(2) as (pod, other):
        assert request(node, "ADD", pod)[0] == 0  # makes the files that the first request makes
        assert request(node, "DEL", pod)[0] == 0
        fatal = 0
        while killed(node, "ADD", pod, fatal) is None:
            status, output = request(node, "ADD", other)
            assert status == 0
            held = pod.addresses() if pod.links() else set()
            assert not held & {each["address"].split("/")[0] for each in json.loads(output)["ips"]}
            by_del(node, other)
            finished = [entry for entry in node.live() if entry["state"] == "added"]
            recover(node, pod)
            if recover is by_daemon and finished:  # whose answer got lost: its runtime says DEL
                assert pod.links()
                by_del(node, pod)
            assert clean(node, pod), (fatal, node.traces(), pod.links())
            fatal += 1
        assert fatal > 50
        by_del(node, pod)


@pytest.mark.parametrize("recover", [by_del, by_gc, by_daemon])
def test_kill_at_every_step_of_del_leaves_nothing(tmp_path: Path, recover: Callable[..., None]) -> None:
    node = Node_(tmp_path)
    with pods() as (pod,):
        fatal = 0
        done = False
        while not done:
            assert request(node, "ADD", pod)[0] == 0, fatal
            done = killed(node, "DEL", pod, fatal) is not None
            undone = node.live()
            recover(node, pod)
            if recover is by_daemon and undone:  # no DEL took place yet; its runtime repeats it
                assert pod.links()
                by_del(node, pod)
            assert clean(node, pod), (fatal, node.traces(), pod.links())
            fatal += 1
        assert fatal > 15


def test_repeated_add_after_a_kill_succeeds_at_every_step(tmp_path: Path) -> None:
    """A runtime that retries without a DEL between: what the killed ADD left is replaced."""
    node = Node_(tmp_path)
    with pods() as (pod,):
        fatal = 0
        while killed(node, "ADD", pod, fatal) is None:
            finished = [entry for entry in node.live() if entry["state"] == "added"]
            status, output = request(node, "ADD", pod)
            assert (status == 0) == (not finished), (fatal, output)
            assert len(node.live()) == 1
            by_del(node, pod)
            assert clean(node, pod)
            fatal += 1
        by_del(node, pod)
