"""64 callers at once: ADD, DEL and GC of the installed binary, with kills of callers and of the daemon."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cni_runtime import Node_, Pod, pods
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces

CALLERS = 64
OPERATIONS = 2000
KILLED_CALLS = 0.05
KILLED_DAEMONS = 4


@dataclass
class Hammer:
    """What the callers know, and what must hold after each step."""

    node: Node_
    guard: threading.Lock = field(default_factory=threading.Lock)
    holders: dict[str, str] = field(default_factory=dict)
    """Container by address, from the answer to its ADD to the call of its DEL."""
    wanted: set[str] = field(default_factory=set)
    """Containers that a runtime would list as valid: of every ADD that is under way or has ended well."""
    steps: int = 0
    kills: int = 0
    takes: float = 0.1
    """Seconds that a request takes, on average."""
    failures: list[str] = field(default_factory=list)

    def call(self, command: str, pod: Pod, kill_after: float | None, **extra: Any) -> tuple[int, bytes]:
        """Run one request; `kill_after` is a share of what one takes at present."""
        child = self.started(command, pod)
        begin = time.monotonic()
        config = json.dumps(self.node.plugin.configuration("1.1.0", **extra)).encode()
        if kill_after is not None:
            threading.Timer(kill_after * self.takes, child.kill).start()
            self.kills += 1
        output, _ = child.communicate(config, timeout=300)
        if kill_after is None:
            self.takes += (time.monotonic() - begin - self.takes) / CALLERS
        return child.returncode, output

    def started(self, command: str, pod: Pod) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(self.node.paths.binary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": pod.id,
                "CNI_NETNS": pod.path,
                "CNI_IFNAME": "eth0",
                "PATH": os.environ["PATH"],
            },
        )

    def add(self, pod: Pod, kill_after: float | None) -> bool:
        with self.guard:
            self.wanted.add(pod.id)
        status, output = self.call("ADD", pod, kill_after)
        if status == 0:
            with self.guard:
                for each in json.loads(output)["ips"]:
                    address = each["address"]
                    if self.holders.setdefault(address, pod.id) != pod.id:
                        self.failures.append(f"{address} of {self.holders[address]} given to {pod.id}")
        elif kill_after is None:
            self.failures.append(f"ADD of {pod.id}: {status} {output!r}")
        return status == 0

    def delete(self, pod: Pod, kill_after: float | None) -> bool:
        with self.guard:
            for address in [a for a, holder in self.holders.items() if holder == pod.id]:
                del self.holders[address]
        status, output = self.call("DEL", pod, kill_after)
        if status == 0:
            with self.guard:
                self.wanted.discard(pod.id)
        elif kill_after is None:
            self.failures.append(f"DEL of {pod.id}: {status} {output!r}")
        return status == 0

    def collect(self, pod: Pod) -> None:
        with self.guard:
            # No ADD begins between the list and the start of the plugin.
            listed = [{"containerID": container, "ifname": "eth0"} for container in self.wanted]
            child = self.started("GC", pod)
        config = self.node.plugin.configuration("1.1.0", **{"cni.dev/valid-attachments": listed})
        output, _ = child.communicate(json.dumps(config).encode(), timeout=300)
        if child.returncode:
            self.failures.append(f"GC: {output!r}")

    def consistent(self) -> None:
        """See that what is on disk gives no address to two, and holds all that a caller holds."""
        with self.guard:
            expected = dict(self.holders)
            live: dict[str, str] = {}
            for entry in self.node.live():
                for text in entry["addresses"]:
                    if text in live:
                        self.failures.append(f"{text} is of {live[text]} and {entry['container']}")
                    live[text] = entry["container"]
            for address, holder in expected.items():
                if live.get(address.split("/")[0]) != holder:
                    self.failures.append(f"{address} of {holder} is stored as {live.get(address)}'s")
            self.steps += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("served", "operations"),
    [
        pytest.param(True, OPERATIONS, id="daemon"),
        pytest.param(False, OPERATIONS // 4, id="local"),  # each starts a Python with all of the plugin
    ],
)
def test_hammer(tmp_path: Path, served: bool, operations: int) -> None:
    node = Node_(tmp_path, ("10.160.0.0/23", "fd00:0:0:1::/64"))
    if served:
        node.start()
    hammer = Hammer(node)
    with pods(CALLERS) as made, ExitStack() as finish:
        finish.callback(node.stop)

        def caller(number: int) -> None:
            chance = random.Random(number)
            pod, attached = made[number], False
            for _ in range(operations // CALLERS + 1):
                if hammer.failures:
                    return
                kill_after = chance.uniform(0.0, 1.2) if chance.random() < KILLED_CALLS else None
                if chance.random() < 0.05:
                    hammer.collect(pod)
                elif attached:
                    attached = not hammer.delete(pod, kill_after)
                elif not (attached := hammer.add(pod, kill_after)):
                    attached = not hammer.delete(pod, None)  # as runtimes do after an ADD that failed
                hammer.consistent()

        ended = threading.Event()

        def killer() -> None:
            for _ in range(KILLED_DAEMONS):
                if ended.wait(5.0):
                    return
                node.stop(signal.SIGKILL)
                time.sleep(0.3)  # so long callers find nobody at work, and do it alone
                node.start()

        killing = threading.Thread(target=killer if served else ended.wait)
        killing.start()
        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(caller, range(CALLERS)))
        ended.set()
        killing.join()
        assert not hammer.failures, hammer.failures[:5]
        assert hammer.steps >= operations
        daemons = KILLED_DAEMONS if served else 0
        print(f"{hammer.steps} operations, {hammer.kills} callers and {daemons} daemons killed")
        hammer.wanted.clear()
        for pod in made:
            hammer.delete(pod, None)
        assert eventually(lambda: not node.traces()), node.traces()
