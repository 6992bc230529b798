"""Into the lab's own namespaces and back: a process tree that ends as one, whoever is killed.

`launch` runs the same command again in fresh user (unless root), mount, network and process namespaces. The
first process inside is the lab: when it dies the kernel kills all others there, and with the last of them go
the namespaces, links, routes and rules. When the one who launched it dies, by whatever signal, it is killed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from crossedge.host.namespaces import mount, set_loopback_up
from crossedge.wire.errors import CrossedgeError

INSIDE = "CROSSEDGE_LAB_INSIDE"
SOCKET = "CROSSEDGE_LAB_SOCKET"
ROOTS = Path("/run/lab")
"""Where each node's --root is, inside; a tmpfs that goes with the lab."""
PR_SET_PDEATHSIG = 1
AGAIN = "from crossedge.cli.main import main; main()"
_FLAGS = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")


class LabError(CrossedgeError):
    """The lab cannot be had here, or there is none; one line that says why."""


def inside() -> bool:
    """Tell whether this process is the lab."""
    return bool(os.environ.get(INSIDE))


def _variants() -> list[list[str]]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [["unshare", *user, *_FLAGS, *proc] for proc in (["--mount-proc"], [])]


def _prefix() -> list[str]:
    """Return the first command prefix that works here: with a /proc of its own, or without."""
    problem = ""
    for variant in _variants():
        try:
            tried = subprocess.run(
                [*variant, "mount", "-t", "tmpfs", "tmpfs", "/run"],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise LabError("the lab needs unshare and mount (Debian: apt-get install util-linux)") from None
        if tried.returncode == 0:
            return variant
        problem = tried.stderr.strip().splitlines()[-1] if tried.stderr.strip() else "no reason given"
    raise LabError(
        f"the lab cannot make namespaces here ({problem}): run it as root, "
        "or allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
    )


def launch(arguments: Sequence[str], listener: socket.socket | None = None) -> int:
    """Run `crossedge ARGUMENTS` again inside; return its exit status.

    SIGINT and SIGTERM are handed on, so that it can end in order. `listener` is inherited.
    """
    environment = {**os.environ, INSIDE: "1", "PYTHONSAFEPATH": "1"}
    environment["PATH"] = os.pathsep.join(
        (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")
    )
    descriptors = []
    if listener is not None:
        descriptors.append(listener.fileno())
        environment[SOCKET] = str(listener.fileno())
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        [*_prefix(), "--", sys.executable, "-c", AGAIN, *arguments],
        env=environment,
        pass_fds=descriptors,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        start_new_session=True,  # a Ctrl-C reaches it once, by `hand_on`
    )

    def hand_on(number: int, frame: FrameType | None) -> None:
        del frame
        for target in _children(child.pid):
            with suppress(ProcessLookupError):
                os.kill(target, number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def settle(nodes: Sequence[str]) -> None:
    """Make the inside ready: a tmpfs on /run, `lo` up, a root directory for each node, signals in order.

    SIGTERM ends like Ctrl-C from now on: by one `KeyboardInterrupt`; what comes later is ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    set_loopback_up()
    for name in nodes:
        (ROOTS / name).mkdir(parents=True)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


def reap(known: set[int]) -> None:
    """Collect what died inside and has no parent but us; `known` are children that somebody waits for."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in known:
            return
        os.waitpid(found.si_pid, 0)


def socket_name(directory: Path) -> bytes:
    """Return the abstract socket address of the lab of a directory: it leaves no file behind."""
    digest = hashlib.blake2s(os.fsencode(directory.resolve()), digest_size=16).hexdigest()
    return f"\0crossedge-lab-{os.getuid()}-{digest}".encode()


def bind(directory: Path) -> socket.socket:
    """Return the socket of a directory's lab, bound; `LabError` where one is up already."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(socket_name(directory))
    except OSError:
        listener.close()
        raise LabError(f"a lab is up in {directory.resolve()} already (crossedge lab down ends it)") from None
    return listener


def connect(directory: Path) -> tuple[socket.socket, int]:
    """Return a connection to a directory's lab, and the id of its first process."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(socket_name(directory))
    except OSError:
        connection.close()
        raise LabError(f"no lab is up in {directory.resolve()} (start one: crossedge lab up)") from None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process = int.from_bytes(credentials[:4], sys.byteorder)
    if int.from_bytes(credentials[4:8], sys.byteorder) != os.getuid():
        connection.close()
        raise LabError(f"the lab in {directory.resolve()} belongs to somebody else")
    return connection, process


def enter_command(process: int, node: str, command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` in a node of the lab whose first process is given."""
    proc = Path(f"/proc/{process}")
    namespace = proc / "root/run/netns" / node
    if not namespace.exists():
        raise LabError(f"the lab has no node {node!r}")
    flags = ["--mount", "--pid", f"--net={namespace}", "--wd=."]
    if (proc / "ns/user").readlink() != Path("/proc/self/ns/user").readlink():
        flags = ["--user", "--preserve-credentials", *flags]
    return ["nsenter", f"--target={process}", *flags, "--", *command]
