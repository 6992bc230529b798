"""Where the tests run: private network and mount namespaces, so that nothing they make can stay behind.

As root that is `unshare -nm`, otherwise `unshare -Urnm`. Tests marked `namespaces` are listed as not run
where neither works, like those that want a program that is missing; with CROSSEDGE_REQUIRE=all both fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = "CROSSEDGE_TEST_NAMESPACE"
ENTER = 'mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"'
CGROUPS = ("/sys/fs/cgroup/pids", "/sys/fs/cgroup/cgroup.procs")
REQUIRE_ALL = os.environ.get("CROSSEDGE_REQUIRE") == "all"

os.environ["PATH"] += ":/usr/sbin:/sbin"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait for each other on a busy machine


def unshare_command() -> list[str]:
    """Return the command prefix that enters fresh namespaces, root or not."""
    flags = ["-nm"] if os.geteuid() == 0 else ["-Urnm"]
    return ["unshare", *flags, "--propagation", "private", "sh", "-c", ENTER, "sh"]


def namespaces_work() -> bool:
    """Tell whether fresh namespaces with a tmpfs on /run can be had here."""
    try:
        return subprocess.run([*unshare_command(), "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(INSIDE):
        return
    if not namespaces_work():
        os.environ[INSIDE] = "none"
        return
    os.environ[INSIDE] = "yes"
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()
    sys.stdout.flush()
    os.execvp("unshare", [*unshare_command(), sys.executable, "-P", "-m", "pytest", *sys.argv[1:]])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        missing = sorted(
            mark.args[0] for mark in item.iter_markers("tool") if shutil.which(mark.args[0]) is None
        )
        tools = {mark.args[0] for mark in item.iter_markers("tool")}
        if "podman" in tools and not any(os.access(path, os.W_OK) for path in CGROUPS):
            missing.append("control groups that may be written (podman wants real root)")
        if item.get_closest_marker("namespaces") and os.environ.get(INSIDE) != "yes":
            missing.append("network namespaces")
        if missing:
            item.user_properties.append(("missing", ", ".join(missing)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, value in item.user_properties:
        if name != "missing":
            continue
        if REQUIRE_ALL:
            pytest.fail(f"required here and missing: {value}", pytrace=False)
        pytest.skip(f"not run, missing: {value}")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the checkout."""
    return Path(__file__).resolve().parent.parent
