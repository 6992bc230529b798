"""podman with its CNI backend, on one node or on several: an image of busybox, a storage of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from crossedge.cni.node import Paths
from crossedge.host.namespaces import Namespace
from tests.cni_runtime import SYSTEM_PLUGINS

LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000")
"""Which restricted machines do not let podman raise."""
SERVE = ("box", "/bin/sh", "-c", "echo it works > /index.html; exec /bin/httpd -f -p 80 -h /")
"""A web server in a container."""
PROGRAMS = ("sh", "httpd", "ping", "sleep", "wget")


@dataclass
class Podman:
    """podman on one node."""

    directory: Path
    namespace: Namespace | None = None
    """The node's; None: that of the test."""

    def __call__(self, *arguments: str, stdin: bytes = b"") -> str:
        place, name = self.directory, self.directory.name
        command = ["podman", "--root", place / "storage", "--runroot", f"/run/{name}-root"]
        command += [
            "--tmpdir",
            f"/run/{name}-tmp",
            "--runtime",
            "runc",
            "--storage-driver",
            "vfs",
            *arguments,
        ]
        with self.namespace or nullcontext():
            done = subprocess.run(
                [str(each) for each in command],
                input=stdin,
                capture_output=True,
                timeout=120,
                check=False,
                env={**os.environ, "CONTAINERS_CONF": str(place / "containers.conf")},
            )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def run(self, name: str, *arguments: str) -> None:
        """Start a container in the background."""
        self("run", "-d", "--name", name, "--network", "crossedge", *LIMITS, *arguments)

    def addresses(self, name: str) -> list[str]:
        """Return the addresses of a container, IPv4 and IPv6."""
        found = json.loads(self("inspect", name))[0]["NetworkSettings"]["Networks"]["crossedge"]
        return [found["IPAddress"], found["GlobalIPv6Address"]]


@contextmanager
def a_podman(paths: Paths, directory: Path, namespace: Namespace | None = None) -> Iterator[Podman]:
    """Set up podman for a node whose plugin is installed; its containers are removed at the end."""
    made = Podman(directory, namespace)
    image = directory / "image/bin"
    image.mkdir(parents=True)
    busybox = shutil.which("busybox") or ""
    shutil.copy(busybox, image / "busybox")
    linked = subprocess.run(["ldd", busybox], capture_output=True, text=True, check=False).stdout
    for library in re.findall(r"(/\S+) \(0x", linked):  # none where it is the static one
        (image.parent / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, image.parent / library[1:])
    for name in PROGRAMS:
        (image / name).symlink_to("busybox")
    plugins = [str(paths.binary.parent), str(SYSTEM_PLUGINS)]
    (directory / "containers.conf").write_text(
        f"""[network]
network_backend = "cni"
cni_plugin_dirs = {json.dumps(plugins)}
network_config_dir = "{paths.conflist.parent}"
default_network = "crossedge"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
"""
    )
    packed = subprocess.run(["tar", "-C", image.parent, "-c", "."], capture_output=True, check=True).stdout
    made("import", "-", "box", stdin=packed)
    try:
        yield made
    finally:
        made("rm", "-f", "-t", "0", "-a")
