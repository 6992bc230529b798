"""Where the tests run: private network, mount and process namespaces, so that nothing they make stays behind.

As root that is `unshare -nmp`, otherwise `unshare -Urnmp`. Tests marked `namespaces` are listed as not run
where neither works, like those that want a program that is missing; with CROSSEDGE_REQUIRE=all both fail.

Whatever ends the pytest that was called (a signal, even SIGKILL), the kernel ends the one inside with every
process that its tests have started.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossedge.host.device import open_device
from crossedge.host.namespaces import Namespace

INSIDE = "CROSSEDGE_TEST_NAMESPACE"
ENTER = 'mount -t tmpfs tmpfs /run && ip link set lo up && "$@"; exit $?'
"""The shell stays, as the first process: it collects what lost its parent."""
PR_SET_PDEATHSIG = 1
CGROUPS = ("/sys/fs/cgroup/pids", "/sys/fs/cgroup/cgroup.procs")
REQUIRE_ALL = os.environ.get("CROSSEDGE_REQUIRE") == "all"

os.environ["PATH"] += ":/usr/sbin:/sbin"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is there, as in crossedge.sched.onethread


def unshare_command() -> list[str]:
    """Return the command prefix that enters fresh namespaces, root or not."""
    flags = ["-nmp"] if os.geteuid() == 0 else ["-Urnmp"]
    process = ["--fork", "--kill-child", "--mount-proc"]
    return ["unshare", *flags, *process, "--propagation", "private", "sh", "-c", ENTER, "sh"]


def namespaces_work() -> bool:
    """Tell whether fresh namespaces with a tmpfs on /run can be had here."""
    try:
        return subprocess.run([*unshare_command(), "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@functools.cache
def pairs_work() -> bool:
    """Tell whether a daemon's device can be a veth pair here."""
    with Namespace.anonymous() as namespace:
        tun = open_device("probe0")
        tun.close()
    namespace.close()
    return tun.kind == "veth"


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
    libc = ctypes.CDLL(None)
    inside = subprocess.Popen(
        [*unshare_command(), sys.executable, "-P", "-m", "pytest", *sys.argv[1:]],
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the pytest inside, whose end is ours
    os._exit(inside.wait() & 0xFF)


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
        elif item.get_closest_marker("pair") and not pairs_work():
            missing.append("a veth pair as the daemon's device (its buffers want real root)")
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


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """Return a fresh network namespace."""
    made = Namespace.anonymous()
    yield made
    made.close()


@pytest.fixture
def inside(namespace: Namespace) -> Iterator[Namespace]:
    """Run the test in a fresh network namespace."""
    with namespace:
        yield namespace


@pytest.fixture(autouse=True, scope="module")
def host_of_its_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give each file of the plugin's tests a namespace as its host: links of others go at their own pace."""
    if os.environ.get(INSIDE) != "yes" or not request.path.name.startswith("test_cni_"):
        yield
        return
    host = Namespace.anonymous()
    try:
        with host:
            yield
    finally:
        host.close()
