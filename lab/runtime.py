"""A container runtime in small: namespaces for pods, networked by the node's installed CNI plugins alone.

It does what containerd and podman do by libcni: it reads the configuration list below the node's root, runs
each plugin of the chain in the node's namespace, hands results on, and keeps the last one for DEL.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crossedge.cni.node import Paths
from crossedge.host.namespaces import NAMESPACES, Namespace
from crossedge.lab.launch import LabError
from crossedge.lab.sites import Site

INTERFACE: Final = "eth0"
TIMEOUT: Final = 60.0
FURTHER: Final = Path("/usr/lib/cni")
"""Where distributions put the plugins of others."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A namespace with an interface, and what ADD said of it."""

    site: Site
    result: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the namespace."""
        return self.site.name

    def address(self, version: int) -> str:
        """Return its address of an IP version; "" where it has none."""
        found = (ipaddress.ip_interface(each["address"]).ip for each in self.result.get("ips", ()))
        return next((str(address) for address in found if address.version == version), "")


class Runtime:
    """The pods of one node."""

    def __init__(self, node: Site, root: Path, numbers: Iterator[bytes]) -> None:
        """`root` is the node's, with binary and conflist; `numbers` are MACs for a lab's interfaces."""
        self._node = node
        self._paths = Paths(root)
        self._numbers = numbers
        self.pods: dict[str, Pod] = {}
        self._stacks: dict[str, ExitStack] = {}

    def add(self, name: str) -> Pod:
        """Make a namespace of this name and attach it; `LabError` has what a plugin complains of."""
        with ExitStack() as stack:
            site = Site(name, Namespace.create(name), self._numbers)
            stack.callback(site.close)
            pod = self.pods[name] = Pod(site, self._chain("ADD", name))
            self._stacks[name] = stack.pop_all()
        return pod

    def delete(self, name: str) -> None:
        """Detach a pod and delete its namespace."""
        pod = self.pods[name]
        self._chain("DEL", name, pod.result)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Delete a pod's namespace and tell no plugin, as a power failure does."""
        del self.pods[name]
        self._stacks.pop(name).close()

    def close(self) -> None:
        """Delete every namespace and tell no plugin."""
        for name in list(self.pods):
            self.forget(name)

    def status(self) -> dict[str, Any]:
        """Return the error that the first plugin's STATUS gives; {} where all is well."""
        config, plugin, _ = self._configuration()
        text = {"cniVersion": "1.1.0", "name": config["name"], **plugin}
        done = self._run("STATUS", plugin["type"], text, {})
        return dict(json.loads(done.stdout)) if done.returncode else {}

    def _configuration(self) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Return the list, its first plugin, and the version that all talk in."""
        try:
            config = json.loads(self._paths.conflist.read_bytes())
        except FileNotFoundError:
            raise LabError(f"{self._node.name}: {self._paths.conflist} is not there (yet)") from None
        plugins = config["plugins"]
        version = config["cniVersion"] if len(plugins) > 1 else config["cniVersions"][-1]
        return config, plugins[0], version

    def _chain(self, command: str, name: str, result: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run a command through all plugins, DEL backwards; return the last result."""
        config, _, version = self._configuration()
        plugins = config["plugins"] if command == "ADD" else reversed(config["plugins"])
        variables = {
            "CNI_CONTAINERID": name,
            "CNI_NETNS": str(NAMESPACES / name),
            "CNI_IFNAME": INTERFACE,
        }
        for plugin in plugins:
            text = {**plugin, "name": config["name"], "cniVersion": version}
            if result is not None:
                text["prevResult"] = result
            done = self._run(command, plugin["type"], text, variables)
            if done.returncode:
                complaint = done.stdout.strip() or done.stderr.strip()
                raise LabError(f"{self._node.name}: {plugin['type']} {command} of {name}: {complaint}")
            if command == "ADD":
                result = json.loads(done.stdout)
        return result or {}

    def _run(
        self, command: str, kind: str, config: dict[str, Any], variables: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        places = (self._paths.binary.parent, FURTHER)
        binary = next((place / kind for place in places if (place / kind).exists()), None)
        if binary is None:
            raise LabError(f"{self._node.name}: no CNI plugin {kind} in {' or '.join(map(str, places))}")
        variables = {
            **variables,
            "CNI_COMMAND": command,
            "CNI_PATH": ":".join(map(str, places)),
            "PATH": os.environ.get("PATH", os.defpath),
        }
        with self._node.namespace:
            return subprocess.run(
                [binary],
                input=json.dumps(config),
                env=variables,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
