"""The plugin without the daemon: the same operations, in a process of their own.

The shim execs it when meshd is down: `python -I -m crossedge.cni.local --root DIR`.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from crossedge.cni import spec
from crossedge.cni.commands import Host, answer, open_netns
from crossedge.cni.device import reap
from crossedge.cni.node import Paths, boot_id, read_node
from crossedge.cni.spec import CniError
from crossedge.cni.store import Store
from crossedge.host.clock import boottime, process_start
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Netlink

TOKEN = "CROSSEDGE_CNI_TOKEN"  # noqa: S105 - the name of a variable
"""Variable in which the shim hands over what tells its request from others."""


def _no_daemon() -> CniError:
    return CniError(spec.UNAVAILABLE, "meshd does not run", "pods of this node reach no other node")


def make_host(stack: ExitStack, paths: Paths) -> Host:
    """Return where to work in this process, until the stack is unwound."""
    netlink = stack.enter_context(Netlink())
    own = Namespace.current()
    stack.callback(own.close)
    boot = boot_id()
    store = Store(paths.state, boot, boottime)
    stack.callback(store.close)
    return Host(
        store=store,
        node=lambda: read_node(paths),
        boot=boot,
        netlink=lambda: netlink,
        own=own.inode,
        reap=lambda: reap(netlink),
        health=_no_daemon,
    )


def run(
    paths: Paths, variables: dict[str, str], stdin: bytes, token: str = "", since: float | None = None
) -> tuple[int, bytes]:
    """Return exit status and output of one request."""
    with ExitStack() as stack:
        netns = open_netns(variables.get("CNI_NETNS", ""))
        if netns is not None:
            stack.callback(netns.close)
        return answer(make_host(stack, paths), variables, stdin, netns, token, since)


def main() -> int:
    """Serve one request from the environment and stdin; return the exit status."""
    root = sys.argv[2] if len(sys.argv) == 3 and sys.argv[1] == "--root" else "/"
    variables = {key: value for key, value in os.environ.items() if key.startswith("CNI_")}
    try:
        stdin = sys.stdin.buffer.read(spec.CONFIG_LIMIT)
    except OSError as error:
        status, output = 1, CniError(spec.IO_FAILURE, f"error reading from stdin: {error}").encode()
    else:
        status, output = run(Paths(Path(root)), variables, stdin, os.environ.get(TOKEN, ""), process_start())
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
