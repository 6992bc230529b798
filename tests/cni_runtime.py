"""A runtime in small: namespaces, requests to an installed binary, and what is left behind."""

from __future__ import annotations

import ipaddress
import json
import os
import select
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from crossedge.cni import install
from crossedge.cni.device import GROUP, LEAVING
from crossedge.cni.node import Node, Paths, write_node
from crossedge.host.links import list_links
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Netlink
from crossedge.host.routes import list_routes

PREFIXES = ("10.160.1.0/24", "fd00:0:0:1::/64")
SYSTEM_PLUGINS = Path("/usr/lib/cni")
_numbers = count(1)


@dataclass
class Answer:
    status: int
    stdout: bytes
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout))

    @property
    def code(self) -> int:
        """The error code; 0 for success."""
        return int(self.json["code"]) if self.status else 0

    def ok(self) -> Answer:
        assert self.status == 0, (self.stdout, self.stderr)
        return self


@dataclass
class Pod:
    """A container's namespace."""

    id: str
    namespace: Namespace
    path: str

    def ip(self, *arguments: str) -> Any:
        with self.namespace:
            shown = subprocess.run(["ip", "-j", *arguments], capture_output=True, check=True).stdout
        return json.loads(shown or b"[]")

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        with self.namespace:
            return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    def links(self) -> set[str]:
        return {link["ifname"] for link in self.ip("link")} - {"lo"}

    def addresses(self, interface: str = "eth0") -> set[str]:
        found = self.ip("addr", "show", "dev", interface)
        return {each["local"] for link in found for each in link["addr_info"] if each["scope"] == "global"}


@dataclass
class Plugin:
    """A plugin under test, and how its configuration looks."""

    binary: Path
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    is_control: bool = False

    def configuration(self, version: str | None, **extra: Any) -> dict[str, Any]:
        found = {"name": "net", "type": self.kind, **self.config, **extra}
        if version is not None:
            found["cniVersion"] = version
        return found

    def call(
        self,
        command: str | None,
        config: Any = None,
        *,
        container: str | None = None,
        netns: str | None = None,
        interface: str | None = None,
        arguments: str | None = None,
        stdin: bytes | None = None,
        timeout: float = 60.0,
        **variables: str,
    ) -> Answer:
        values = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns,
            "CNI_IFNAME": interface,
            "CNI_ARGS": arguments,
            "CNI_PATH": f"{self.binary.parent}:{SYSTEM_PLUGINS}",
            "PATH": os.environ["PATH"],
            **variables,
        }
        environment = {key: value for key, value in values.items() if value is not None}
        data = stdin if stdin is not None else json.dumps(config).encode()
        done = subprocess.run(
            [str(self.binary)], input=data, env=environment, capture_output=True, timeout=timeout, check=False
        )
        return Answer(done.returncode, done.stdout, done.stderr.decode())

    def add(self, pod: Pod, version: str = "1.0.0", interface: str = "eth0", **kw: Any) -> Answer:
        config = self.configuration(version, **kw.pop("extra", {}))
        return self.call("ADD", config, container=pod.id, netns=pod.path, interface=interface, **kw)

    def delete(self, pod: Pod, version: str = "1.0.0", interface: str = "eth0", **kw: Any) -> Answer:
        config = self.configuration(version, **kw.pop("extra", {}))
        kw.setdefault("netns", pod.path)
        return self.call("DEL", config, container=pod.id, interface=interface, **kw)

    def check(self, pod: Pod, previous: Any, version: str = "1.0.0", **kw: Any) -> Answer:
        config = self.configuration(version, prevResult=previous, **kw.pop("extra", {}))
        return self.call("CHECK", config, container=pod.id, netns=pod.path, interface="eth0", **kw)

    def gc(self, keep: list[tuple[str, str]], key: str = "cni.dev/valid-attachments") -> Answer:
        listed = [{"containerID": container, "ifname": name} for container, name in keep]
        return self.call("GC", self.configuration("1.1.0", **{key: listed}))


class Node_:
    """A node of crossedge: root directory, installed binary, with or without the daemon."""

    def __init__(self, root: Path, prefixes: tuple[str, ...] = PREFIXES, *, big_tcp: bool = False) -> None:
        self.root = root
        self.prefixes = prefixes
        self.paths = Paths(root)
        self.takes_big_tcp(big_tcp)
        install.install(self.paths)
        self.plugin = Plugin(self.paths.binary, "crossedge")
        self.daemon: subprocess.Popen[str] | None = None

    def takes_big_tcp(self, yes: bool) -> None:
        """Have it known, as the daemon would, whether its device takes super-packets beyond 64 KiB."""
        write_node(self.paths, Node(tuple(map(ipaddress.ip_network, self.prefixes)), big_tcp=yes))

    def start(self, *through: str) -> None:
        """Start the daemon; `through` is a command that starts it."""
        self.daemon = subprocess.Popen(
            [
                *through,
                sys.executable,
                str(Path(__file__).with_name("cni_daemon.py")),
                str(self.root),
                *self.prefixes,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        with suppress(PermissionError):  # or a crowd of callers that work locally would starve it
            os.setpriority(os.PRIO_PROCESS, self.daemon.pid, -10)
        assert self.daemon.stdout is not None
        ready, _, _ = select.select([self.daemon.stdout], [], [], 60)
        assert ready
        assert self.daemon.stdout.readline() == "ready\n"

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(number)
            self.daemon.wait(20)
            assert self.daemon.stdout is not None
            self.daemon.stdout.close()
            self.daemon = None

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries as they stand on disk, read without our code's ledger and without its lock.

        A line without its end is one that is just being written (a write over the end of a page is seen in
        part) or whose writer was killed; every line that has its end must be whole.
        """
        found: dict[int, dict[str, Any]] = {}
        log = self.paths.state / "attachments.log"
        data = log.read_bytes() if log.exists() else b""
        for line in filter(None, data[: data.rfind(b"\n") + 1].splitlines()):  # empty ones fill a page
            assert int(line[:8], 16) == zlib.crc32(line[9:])
            entry = json.loads(line[9:])
            found[entry["serial"]] = entry
        return list(found.values())

    def live(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries() if entry["state"] != "gone"]

    def traces(self) -> list[str]:
        """Return what there is of pods: live entries, links, routes."""
        with Netlink() as netlink:
            links = [link.name for link in list_links(netlink) if link.name.startswith("ce")]
            routes = [str(route.destination) for route in list_routes(netlink, table=254, protocol=206)]
        return [f"{e['container']}/{e['interface']}" for e in self.live()] + links + routes


@contextmanager
def pods(number: int = 1) -> Iterator[list[Pod]]:
    """Make namespaces for containers, and remove them."""
    made: list[Pod] = []
    try:
        for _ in range(number):
            name = f"pod{next(_numbers)}-{os.getpid()}"
            namespace = Namespace.create(name)
            made.append(Pod(name, namespace, f"/run/netns/{name}"))
        yield made
    finally:
        for pod in made:
            pod.namespace.delete()


def our_links() -> list[str]:
    with Netlink() as netlink:
        return [link.name for link in list_links(netlink) if link.group in (GROUP, LEAVING)]
