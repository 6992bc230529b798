"""The steps of a program as the world sees them, a kill before a chosen one, requests without the daemon."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from crossedge.cni import local
from crossedge.host import namespaces, sysctl
from tests.cni_runtime import Node_, Pod

WATCHED: list[tuple[Any, tuple[str, ...]]] = [
    (
        os,
        ("open", "write", "fsync", "fdatasync", "replace", "unlink", "mkdir", "ftruncate", "fchmod", "pread"),
    ),
    (os, ("stat", "fstat")),
    (fcntl, ("flock",)),
    (socket.socket, ("send", "recv", "bind", "sendall", "recvmsg")),
    (namespaces, ("setns",)),
    (sysctl, ("write",)),
]


class Steps:
    """Counts the calls of what is watched, and kills this process before the one that was chosen."""

    def __init__(self, fatal: int, armed: bool = True) -> None:
        self.fatal = fatal
        self.armed = armed
        """Whether steps count yet."""
        self.count = 0
        self._guard = threading.Lock()

    def watch(self) -> None:
        for module, names in WATCHED:
            for name in names:
                setattr(module, name, self._counted(getattr(module, name)))

    def step(self) -> None:
        if not self.armed:
            return
        with self._guard:
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        return counted


def request(node: Node_, command: str, pod: Pod, keep: Sequence[Pod] = ()) -> tuple[int, bytes]:
    """Do what the binary does when the daemon is down, in this process."""
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod.id,
        "CNI_NETNS": pod.path,
        "CNI_IFNAME": "eth0",
    }
    config = node.plugin.configuration("1.1.0")
    if command == "GC":
        config["cni.dev/valid-attachments"] = [{"containerID": p.id, "ifname": "eth0"} for p in keep]
    return local.run(node.paths, variables, json.dumps(config).encode())
