"""The units: systemd understands them, and the walls around meshd leave what pods need."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cni_runtime import Node_, Pod, pods
from tests.waiting import eventually

UNITS = ("meshd.service", "crossedge-rendezvous.service")
WALLS = """
mount --bind "$1" "$1"
mount -o remount,bind,ro /
shift
exec "$@"
"""


def setting(repository: Path, name: str) -> str:
    lines = (repository / "systemd/meshd.service").read_text().splitlines()
    (found,) = [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]
    return found


@pytest.mark.tool("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_understood(repository: Path, tmp_path: Path, unit: str) -> None:
    text = (repository / "systemd" / unit).read_text()
    for program in ("/usr/bin/meshd", "/usr/bin/crossedge-rendezvous"):
        text = text.replace(program, "/bin/true")  # which is installed
    copy = tmp_path / unit
    copy.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


KEEPS_OUT = (
    *("PrivateMounts", "MountFlags", "PrivateNetwork", "PrivateUsers", "RestrictNamespaces", "ProtectProc"),
    *("ProtectKernelTunables", "ProcSubset"),
    "ProtectClock",  # forbids adjtimex(2) too, by which meshd reads whether the clock is synchronised
)


@pytest.mark.parametrize("name", KEEPS_OUT)
def test_wall_that_would_be_in_the_way_is_not_built(repository: Path, name: str) -> None:
    assert f"\n{name}=" not in (repository / "systemd/meshd.service").read_text()


def test_a_daemon_that_cannot_start_is_tried_for_ever(repository: Path) -> None:
    """A host whose daemon was given up after a few failures could not be reached to start it again."""
    assert setting(repository, "Restart") == "always"
    assert setting(repository, "StartLimitIntervalSec") == "0"


@pytest.mark.namespaces
@pytest.mark.tool("setpriv")
def test_pods_are_served_and_kept_within_the_walls(repository: Path, tmp_path: Path) -> None:
    """With the unit's capabilities alone, a read-only file system, and mounts that come from the host."""
    node = Node_(tmp_path)
    capabilities = setting(repository, "CapabilityBoundingSet").lower().replace("cap_", "+").split()
    with pods() as (before,):
        node.start(
            *("unshare", "-m", "--propagation", "slave", "sh", "-ec", WALLS, "sh", str(tmp_path)),
            *("setpriv", "--bounding-set", ",".join(["-all", *capabilities]), "--no-new-privs"),
        )
        try:
            with pods() as (after,):  # whose mount reaches the daemon later
                for pod in (before, after):
                    served_and_kept(node, pod)
        finally:
            node.stop()


def served_and_kept(node: Node_, pod: Pod) -> None:
    result = node.plugin.add(pod, "1.1.0").ok().json
    node.plugin.call("STATUS", node.plugin.configuration("1.1.0")).ok()  # only the daemon says so
    for harm in ("route del default", "link set eth0 down", "link del eth0"):
        assert pod.run("ip", *harm.split()).returncode == 0
        assert eventually(lambda: node.plugin.check(pod, result, "1.1.0").status == 0), harm
    node.plugin.delete(pod, "1.1.0").ok()
    assert eventually(lambda: not node.traces())


@pytest.mark.namespaces
@pytest.mark.tool("setpriv")
def test_test_of_the_walls_can_fail(repository: Path, tmp_path: Path) -> None:
    """Without CAP_SYS_ADMIN no pod's namespace can be entered."""
    node = Node_(tmp_path)
    with pods() as (pod,):
        node.start("setpriv", "--bounding-set", "-all,+net_admin,+net_broadcast", "--no-new-privs")
        try:
            assert node.plugin.add(pod, "1.1.0").code == 5
        finally:
            node.stop()
