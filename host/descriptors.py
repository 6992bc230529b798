"""Open descriptors from, and words to, the service manager (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import MutableMapping, Sequence

FIRST = 3
"""Number of the first inherited descriptor."""
LIMIT = 64
"""Most descriptors that are taken over."""


def inherited(environment: MutableMapping[str, str] | None = None) -> dict[str, list[int]]:
    """Take over the descriptors that the service manager left for this process, by name, in order.

    They are ours from then on: closed in programs that we start, and no longer announced in the environment.
    Descriptors meant for another process are left alone. Names that are missing are "unknown".
    """
    found = os.environ if environment is None else environment
    process, count = found.pop("LISTEN_PID", ""), found.pop("LISTEN_FDS", "")
    names = found.pop("LISTEN_FDNAMES", "")
    if process != str(os.getpid()) or not count.isascii() or not count.isdigit():
        return {}
    given: dict[str, list[int]] = {}
    labels = names.split(":") if names else []
    for position in range(min(int(count), LIMIT)):
        descriptor = FIRST + position
        os.set_inheritable(descriptor, False)
        name = labels[position] if position < len(labels) and labels[position] else "unknown"
        given.setdefault(name, []).append(descriptor)
    return given


def notify(state: str, descriptors: Sequence[int] = ()) -> bool:
    """Tell the service manager lines such as "READY=1"; return whether there is one that heard it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    ancillary = []
    if descriptors:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as opened:
        try:
            opened.sendmsg([state.encode()], ancillary, 0, address)
        except OSError:
            return False
    return True


def ready(status: str = "") -> bool:
    """Say that the service is up; `status` is a line for `systemctl status`."""
    return notify("READY=1" + (f"\nSTATUS={status}" if status else ""))


def stopping() -> bool:
    """Say that the service is about to end."""
    return notify("STOPPING=1")


def store(name: str, descriptor: int) -> bool:
    """Keep a descriptor with the service manager, to be inherited under `name` after a restart."""
    return notify(f"FDSTORE=1\nFDNAME={_checked(name)}\nFDPOLL=0", [descriptor])


def unstore(name: str) -> bool:
    """Let the service manager close what it keeps under `name`."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={_checked(name)}")


def _checked(name: str) -> str:
    if not name or len(name) > 255 or ":" in name or not name.isprintable():
        raise ValueError(f"{name!r} cannot name a stored descriptor")
    return name
