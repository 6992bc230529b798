"""Puts the binary and the conflist where runtimes look for them, and takes them away."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

from crossedge.cni import shim
from crossedge.cni.node import Paths
from crossedge.host.files import write_atomic

NETWORK: Final = "crossedge"
SYSTEM_PYTHON: Final = Path("/usr/bin/python3")
VERSIONS: Final = ("0.4.0", "1.0.0", "1.1.0")


def binary_text(paths: Paths) -> bytes:
    """Return the shim with its settings filled in."""
    text = Path(shim.__file__).read_text()
    settings = {"SOCKET": str(paths.socket), "PYTHON": sys.executable, "ROOT": str(paths.root)}
    for name, value in settings.items():
        line = f"{name} = {value!r}".replace("\\", r"\\")
        text, count = re.subn(rf"^{name} = .*$", line, text, flags=re.M)
        if count != 1:
            raise RuntimeError(f"the shim has no setting {name}")
    if not SYSTEM_PYTHON.exists():
        text = text.replace(f"#!{SYSTEM_PYTHON} ", f"#!{sys.executable} ", 1)
    return text.encode()


def conflist() -> dict[str, Any]:
    """Return the network configuration list.

    Old libcni reads `cniVersion` and ignores `cniVersions`, new libcni takes the highest that it knows.
    """
    return {
        "cniVersion": "1.0.0",
        "cniVersions": list(VERSIONS),
        "name": NETWORK,
        "plugins": [
            {"type": "crossedge", "capabilities": {"ips": True, "mac": True, "dns": True}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def install(paths: Paths, *, portmap: bool = True) -> list[Path]:
    """Install binary and conflist, each by one rename; return what was written. Raises `OSError`.

    The binary comes first: a conflist makes runtimes believe that the network is ready.
    """
    listed = conflist()
    if not portmap:
        listed["plugins"] = listed["plugins"][:1]
    written = []
    for path, data, mode in (
        (paths.binary, binary_text(paths), 0o755),
        (paths.conflist, (json.dumps(listed, indent=2) + "\n").encode(), 0o644),
    ):
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(path, data, mode)
        written.append(path)
    return written


def uninstall(paths: Paths) -> list[Path]:
    """Remove conflist and binary, in this order; return what was there. Raises `OSError`."""
    removed = []
    for path in (paths.conflist, paths.binary):
        if path.exists():
            path.unlink()
            removed.append(path)
    return removed
