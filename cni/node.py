"""What the plugin knows of its node: paths below a root, prefixes, the boot it lives in."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crossedge.cni.spec import BAD_CONFIG, TRY_LATER, CniError
from crossedge.host.files import write_atomic
from crossedge.host.netlink import Network

MTU: Final = 1380
"""Of every pod, in bytes, whatever the path."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things are, below a root, so that many nodes can share one file system."""

    root: Path = Path("/")

    @property
    def state(self) -> Path:
        """Directory of the store."""
        return self.root / "var/lib/crossedge/cni"

    @property
    def node(self) -> Path:
        """What the daemon, or the installation, last said of the node."""
        return self.state / "node.json"

    @property
    def socket(self) -> Path:
        """Where the daemon serves the shim."""
        return self.root / "run/crossedge/cni.sock"

    @property
    def binary(self) -> Path:
        """The installed plugin."""
        return self.root / "opt/cni/bin/crossedge"

    @property
    def conflist(self) -> Path:
        """The installed network configuration."""
        return self.root / "etc/cni/net.d/10-crossedge.conflist"

    @property
    def prepared(self) -> Path:
        """The network configuration while it waits for the node to be ready."""
        return self.state / "prepared.conflist"


@dataclass(frozen=True, slots=True)
class Node:
    """What pods get here."""

    prefixes: tuple[Network, ...]
    """Pod prefixes, as the certificate has them."""
    mtu: int = MTU
    big_tcp: bool = False
    """Whether the daemon's device takes and gives IPv4 super-packets beyond 64 KiB, so that pods may, too."""


def read_node(paths: Paths) -> Node:
    """Return what is known of the node without asking the daemon.

    Raises:
        CniError: code 11 (nothing is known yet), 7 (what is there cannot be used; the file is named).
    """
    try:
        text = paths.node.read_bytes()
    except FileNotFoundError:
        raise CniError(
            TRY_LATER,
            "this node has no pod prefix yet",
            f"{paths.node} is missing: meshd writes it when it first starts, or crossedge-cni install",
        ) from None
    except OSError as error:
        raise CniError(BAD_CONFIG, f"cannot read {paths.node}: {error.strerror}") from error
    try:
        data = json.loads(text)
        prefixes = tuple(ipaddress.ip_network(each) for each in data["prefixes"])
        return Node(prefixes, int(data.get("mtu", MTU)), data.get("big_tcp") is True)
    except (ValueError, TypeError, KeyError) as error:
        raise CniError(BAD_CONFIG, f"bad prefix in {paths.node}: {error}") from None


def write_node(paths: Paths, node: Node) -> None:
    """Keep what is known of the node, for when the daemon is down; raises `OSError`."""
    paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = {
        "prefixes": [str(prefix) for prefix in node.prefixes],
        "mtu": node.mtu,
        "big_tcp": node.big_tcp,
    }
    text = json.dumps(data).encode() + b"\n"
    try:
        if paths.node.read_bytes() == text:
            return
    except OSError:
        pass
    write_atomic(paths.node, text, 0o644)


def boot_id() -> str:
    """Return the id that the kernel has from boot to boot."""
    return BOOT_ID.read_text().strip()
