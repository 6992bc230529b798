"""Puts the binary and the conflist where runtimes look for them, and takes them away."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from crossedge.cni import shim
from crossedge.cni.node import Paths
from crossedge.cni.spec import IMPAIRED
from crossedge.host.files import write_atomic

NETWORK: Final = "crossedge"
SYSTEM_PYTHON: Final = Path("/usr/bin/python3")
VERSIONS: Final = ("0.4.0", "1.0.0", "1.1.0")
STATUS_TIMEOUT: Final = 20.0
"""Seconds for meshd to say whether it is ready."""


COMPILE: Final = (
    "import marshal, sys, _frozen_importlib_external as loader\n"
    "code = compile(sys.stdin.buffer.read(), 'crossedge', 'exec', dont_inherit=True, optimize=2)\n"
    "sys.stdout.buffer.write(loader.MAGIC_NUMBER + marshal.dumps(code))\n"
)
MAGIC_LENGTH: Final = 4


def interpreter() -> str:
    """Return the Python that runs the shim: the system's, which starts sooner than one in an environment."""
    return str(SYSTEM_PYTHON) if SYSTEM_PYTHON.exists() else sys.executable


def source(paths: Paths) -> str:
    """Return the shim with its settings filled in."""
    text = Path(shim.__file__).read_text()
    settings = {"SOCKET": str(paths.socket), "PYTHON": sys.executable, "ROOT": str(paths.root)}
    for name, value in settings.items():
        line = f"{name} = {value!r}".replace("\\", r"\\")
        text, count = re.subn(rf"^{name} = .*$", line, text, flags=re.M)
        if count != 1:
            raise RuntimeError(f"the shim has no setting {name}")
    return text


def binary_text(paths: Paths) -> bytes:
    """Return the plugin: the shim's source, and what its interpreter makes of it.

    Compiling it at each start would take a tenth of the time that an ADD takes. Another version of Python
    than the one that is installed now runs the source. Raises `OSError`.
    """
    text = source(paths)
    done = subprocess.run(
        [interpreter(), "-IS", "-c", COMPILE], input=text.encode(), capture_output=True, check=False
    )
    if done.returncode:
        raise OSError(f"{interpreter()} cannot compile the plugin: {done.stderr.decode(errors='replace')}")
    magic, code = done.stdout[:MAGIC_LENGTH], done.stdout[MAGIC_LENGTH:]
    return (
        f"#!{interpreter()} -IS\n"
        "# The CNI plugin of crossedge, made by crossedge-cni install: cni/shim.py, and the same compiled.\n"
        "import marshal\n"
        "import _frozen_importlib_external as loader\n"
        f"SOURCE = {text!r}\n"
        f"CODE = {code!r}\n"
        f"exec(marshal.loads(CODE) if loader.MAGIC_NUMBER == {magic!r} else SOURCE)\n"
    ).encode()


def is_current(paths: Paths) -> bool:
    """Tell whether the installed plugin is of this version; raises `OSError`."""
    return f"SOURCE = {source(paths)!r}\n".encode() in paths.binary.read_bytes()


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


def install(paths: Paths, *, portmap: bool = True, ready: bool = True) -> list[Path]:
    """Install binary and conflist, each by one rename; return what was written. Raises `OSError`.

    The binary comes first: a conflist makes runtimes believe that the network is ready. So where the node is
    not `ready`, and has no conflist yet, it is prepared only, and `publish` brings it to its place.
    """
    listed = conflist()
    if not portmap:
        listed["plugins"] = listed["plugins"][:1]
    text = (json.dumps(listed, indent=2) + "\n").encode()
    written = [_put(paths.binary, binary_text(paths), 0o755), _put(paths.prepared, text, 0o644)]
    if ready or paths.conflist.exists():
        publish(paths)
    written[1] = paths.prepared if paths.prepared.exists() else paths.conflist
    return written


def _put(path: Path, data: bytes, mode: int) -> Path:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_atomic(path, data, mode)
    return path


def publish(paths: Paths) -> bool:
    """Bring a prepared conflist to its place; tell whether there was one. Raises `OSError`."""
    try:
        text = paths.prepared.read_bytes()
    except FileNotFoundError:
        return False
    _put(paths.conflist, text, 0o644)
    paths.prepared.unlink(missing_ok=True)
    return True


def is_ready(paths: Paths) -> bool:
    """Tell whether meshd says that this node serves pods: the installed binary asks for its STATUS."""
    if not paths.socket.exists():
        return False
    config = json.dumps({"cniVersion": VERSIONS[-1], "name": NETWORK, "type": "crossedge"}).encode()
    try:
        done = subprocess.run(
            [paths.binary],
            input=config,
            env={"CNI_COMMAND": "STATUS"},
            capture_output=True,
            timeout=STATUS_TIMEOUT,
            check=False,
        )
        return done.returncode == 0 or json.loads(done.stdout)["code"] == IMPAIRED
    except (OSError, subprocess.TimeoutExpired, ValueError, TypeError, KeyError):
        return False


def uninstall(paths: Paths, *, state: bool = False) -> list[Path]:
    """Remove conflist and binary, in this order, and with `state` the store; return what was there.

    Raises `OSError`.
    """
    removed = []
    for path in (paths.prepared, paths.conflist, paths.binary):
        if path.exists():
            path.unlink()
            removed.append(path)
    if state and paths.state.exists():
        shutil.rmtree(paths.state)
        removed.append(paths.state)
    return removed
