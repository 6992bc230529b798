"""Namespaces are entered by one thread, nest, and leave nothing behind."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from crossedge.host.namespaces import NAMESPACES, Namespace

pytestmark = pytest.mark.namespaces


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_entering_nests_and_always_returns() -> None:
    before = here()
    one, two = Namespace.anonymous(), Namespace.anonymous()
    assert here() == before
    with one:
        assert here() == one.inode
        with two:
            assert here() == two.inode
        assert here() == one.inode
        with pytest.raises(RuntimeError), one:
            raise RuntimeError
    assert here() == before
    assert one.call(here) == one.inode
    one.close()
    two.close()
    two.close()


def test_only_the_calling_thread_moves() -> None:
    before = here()
    namespace = Namespace.anonymous()
    entered, leave, seen = threading.Event(), threading.Event(), list[int]()

    def work() -> None:
        with namespace:
            seen.append(here())
            entered.set()
            leave.wait(10)
        seen.append(here())

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(10)
    assert here() == before
    leave.set()
    thread.join()
    assert seen == [namespace.inode, before]
    namespace.close()


def test_a_socket_stays_where_it_was_opened() -> None:
    one, two = Namespace.anonymous(), Namespace.anonymous()
    receiver = one.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 5000))
    other = two.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    other.bind(("127.0.0.1", 5000))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 5000))
    receiver.close()
    other.close()
    one.close()
    two.close()


def test_a_named_namespace_is_found_by_name_path_process_and_ip() -> None:
    namespace = Namespace.create("crossedge-test")
    path = NAMESPACES / "crossedge-test"
    for target in ("crossedge-test", path):
        found = Namespace.open(target)
        assert found.inode == namespace.inode
        found.close()
    with pytest.raises(FileExistsError):
        Namespace.create("crossedge-test")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "crossedge-test" in listed
    with namespace:
        child = subprocess.Popen(["sleep", "60"])
    found = Namespace.open(child.pid)
    assert found.inode == namespace.inode
    found.close()
    child.kill()
    child.wait()
    assert namespace.inode != here()
    namespace.delete()
    assert not path.exists()
    namespace.delete()
    with pytest.raises(FileNotFoundError):
        Namespace.open("crossedge-test")


def test_loopback_is_up_unless_not_wanted() -> None:
    def reach() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()[:2], 5).close()

    up, down = Namespace.anonymous(), Namespace.anonymous(loopback=False)
    up.call(reach)
    with pytest.raises(OSError):
        down.call(reach)
    up.close()
    down.close()


def test_what_is_no_namespace_is_refused() -> None:
    with pytest.raises(OSError, match="is not a network namespace"):
        Namespace.open("/proc/self/ns/mnt")
    with pytest.raises(OSError, match="is not a network namespace"):
        Namespace.open("/etc/hosts")
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(ValueError):
            Namespace.create(name)


def test_where_we_are_is_entered_without_the_right_to_move() -> None:
    program = (
        "from crossedge.host.namespaces import Namespace\n"
        "with Namespace.current() as here, here:\n"
        "    here.enter()\n"
        "    print('in')\n"
    )
    # What the service unit leaves its daemon.
    kept = "--bounding-set=-all,+net_admin,+net_raw,+net_bind_service"
    done = subprocess.run(
        ["setpriv", kept, sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
