"""The device is a veth pair where the kernel has all it needs, else a TUN; each gives way to the other."""

import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

from crossedge.host import packet, vethpair
from crossedge.host.device import attached_name, open_device, overflowed, remove_device
from crossedge.host.ethtool import features, set_features
from crossedge.host.links import (
    Link,
    VethEnd,
    add_link,
    add_veth,
    delete_link,
    get_link,
    list_links,
    set_link,
)
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.tun import BIG_TCP, OFFLOADS, Tun

pytestmark = [pytest.mark.namespaces, pytest.mark.pair, pytest.mark.usefixtures("inside")]
NO_PAIR = frozenset({BIG_TCP})
HOLD = """
import sys
from crossedge.host.device import open_device
open_device("crossedge0", disable=frozenset(sys.argv[1:]))
print("held", flush=True)
sys.stdin.read()  # until it is killed, or who waits for that is gone
"""


def link(name: str) -> Link | None:
    with Netlink() as netlink:
        return get_link(netlink, name)


def there(name: str) -> Link:
    found = link(name)
    assert found is not None
    return found


def change(do: Callable[[Batch], None]) -> None:
    batch = Batch()
    do(batch)
    with Netlink() as netlink:
        netlink.run(batch)


def ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


def names() -> set[str]:
    with Netlink() as netlink:
        return {each.name for each in list_links(netlink)} - {"lo"}


def up() -> None:
    """Bring the near end up, give it an address, and have its carrier noted."""
    ip("link set crossedge0 up addrgenmode none", "addr add 10.9.0.1/24 dev crossedge0")
    ip("link set crossedge0-far txqueuelen 1001", "link set crossedge0-far txqueuelen 1000")


def drain(tun: Tun) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(os.read(tun.descriptor, 500_000))
        except BlockingIOError:
            return found


def test_a_new_device_is_a_pair_with_its_sizes_and_all_offloads() -> None:
    tun = open_device("crossedge0", mtu=1400)
    near, far = there("crossedge0"), there("crossedge0-far")
    assert (near.kind, near.mtu, near.gso_max_size, near.gso_ipv4_max_size) == ("veth", 1400, 62750, 375000)
    assert (far.kind, far.mtu, far.gso_max_size, far.gso_ipv4_max_size) == ("veth", 65535, 524280, 524280)
    assert (near.up, near.arp, far.up, far.arp) == (False, False, True, False)
    assert (tun.kind, tun.offloads, tun.vnet_header) == ("veth", {*OFFLOADS, "big_tcp"}, 10)
    assert tun.mac.hex(":") == near.mac != far.mac
    assert attached_name(tun.descriptor) == "crossedge0"
    on = {name for name, is_on in features("crossedge0").items() if is_on and name.startswith("tx-")}
    assert on == vethpair.KEPT
    with open("/proc/sys/net/ipv6/conf/crossedge0-far/disable_ipv6") as file:
        assert file.read() == "1\n"
    with pytest.raises(BlockingIOError):
        os.read(tun.descriptor, 100)
    tun.close()


def test_packets_pass_both_ways_behind_a_virtio_and_an_ethernet_header() -> None:
    tun = open_device("crossedge0")
    up()
    drain(tun)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inner:
        inner.bind(("10.9.0.1", 7))
        inner.sendto(b"out", ("10.9.0.2", 9))
        (frame,) = (each for each in drain(tun) if each.endswith(b"out"))
        virtio, ethernet, packed = frame[:10], frame[10:24], bytearray(frame[24:])
        assert ethernet == tun.mac + tun.mac + b"\x08\x00"
        assert virtio[:2] == b"\x01\x00"  # the checksum is left to us
        assert packed[28:] == b"out"
        answer = packed[:12] + packed[16:20] + packed[12:16] + packed[22:24] + packed[20:22] + packed[24:]
        answer[26:28] = b"\0\0"
        os.write(tun.sender, bytes(10) + tun.mac + bytes(6) + b"\x08\x00" + answer)
        inner.settimeout(5)
        assert inner.recv(10) == b"out"
    assert not any(each.endswith(b"out") for each in drain(tun))  # what is written is not read
    tun.close()


def test_tcp_leaves_in_super_packets_beyond_64_kib() -> None:
    """A connection to ourselves, each packet turned back with its ends swapped."""
    tun = open_device("crossedge0")
    up()
    with open("/proc/sys/net/ipv4/conf/crossedge0/accept_local", "w") as file:
        file.write("1")
    sizes, server = [], socket.create_server(("10.9.0.1", 80))
    with server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        client.setblocking(False)
        assert client.connect_ex(("10.9.0.2", 80)) == errno.EINPROGRESS
        sent = 0
        accepted = None
        for _ in range(2000):
            for frame in drain(tun):
                turned = bytearray(frame)
                # 10.9.0.1 -> 10.9.0.2 becomes 10.9.0.2 -> 10.9.0.1: neither checksum changes.
                turned[24 + 12 : 24 + 20] = frame[24 + 16 : 24 + 20] + frame[24 + 12 : 24 + 16]
                sizes.append(len(frame) - 24)
                os.write(tun.sender, turned)
            if accepted is None:
                server.setblocking(False)
                try:
                    accepted, _ = server.accept()
                    accepted.setblocking(False)
                except BlockingIOError:
                    continue
            try:
                sent += client.send(bytes(1 << 20))
            except BlockingIOError:
                with contextlib.suppress(BlockingIOError):
                    accepted.recv(1 << 20)
            if max(sizes) > 374_000 and sent > 4 << 20:
                break
        assert accepted is not None
        accepted.close()
    # Six records of 47 segments, and the headers of IP and TCP.
    assert max(sizes) == 6 * 47 * 1328 + 52 <= vethpair.BIG_TCP_SIZE
    tun.close()


def test_more_addresses_are_sent_to_than_the_kernel_keeps_neighbours() -> None:
    """There is an entry for each, but it needs no answer, and makes room for another."""
    tun = open_device("crossedge0")
    up()
    ip("route add 10.160.0.0/12 dev crossedge0")
    ip("-6 addr add fd00::1/128 dev crossedge0", "-6 route add fd00::/48 dev crossedge0")
    drain(tun)
    for family, prefix in ((socket.AF_INET, "10.160."), (socket.AF_INET6, "fd00::7:")):
        arrived = 0
        with socket.socket(family, socket.SOCK_DGRAM) as inner:
            for number in range(3000):
                high, low = divmod(number, 250)
                host = f"{high}.{low}" if family == socket.AF_INET else f"{high:x}:{low:x}"
                inner.sendto(b"hello", (prefix + host, 9))
                if number % 100 == 99:
                    arrived += sum(frame.endswith(b"hello") for frame in drain(tun))
        assert arrived == 3000
    tun.close()


@pytest.mark.parametrize("disable", [{"big_tcp"}, {"uso4", "uso6"}, {"csum"}])
def test_where_an_offload_is_disabled_it_is_a_tun(
    disable: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    tun = open_device("crossedge0", disable=frozenset(disable))
    assert (there("crossedge0").kind, tun.kind, tun.sender) == ("tun", "tun", -1)
    assert tun.offloads == (frozenset() if "csum" in disable else OFFLOADS.keys() - disable)
    assert attached_name(tun.descriptor) == "crossedge0"
    assert overflowed(tun.descriptor) == 0
    assert caplog.messages == []
    tun.close()
    with pytest.raises(ValueError, match="unknown offloads: lro"):
        open_device("crossedge0", disable=frozenset({"lro"}))


@pytest.mark.parametrize(
    ("what", "broken", "why"),
    [
        ("add_veth", OSError(errno.EOPNOTSUPP, "Unknown device type"), "Unknown device type"),
        ("open_reader", PermissionError(errno.EPERM, "Operation not permitted"), "not permitted"),
        ("hold", OSError(errno.EAFNOSUPPORT, "Address family not supported"), "family not supported"),
        ("set_features", OSError(errno.EOPNOTSUPP, "Operation not supported"), "not supported"),
        ("BIG_TCP_SIZE", 0, "no super-packets of IPv4 beyond 64 KiB"),
    ],
)
@pytest.mark.parametrize("before", ["none", "tun", "pair"])
def test_where_the_kernel_has_not_all_it_is_a_tun_and_the_log_says_why(
    what: str,
    broken: OSError | int,
    why: str,
    before: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if before != "none":
        open_device("crossedge0", disable=NO_PAIR if before == "tun" else frozenset()).close()
    index = there("crossedge0").index if before == "tun" else 0
    if before == "pair" and what in ("add_veth", "set_features"):
        change(lambda batch: delete_link(batch, "crossedge0"))

    def fail(*_: object, **__: object) -> None:
        assert isinstance(broken, OSError)
        raise broken

    monkeypatch.setattr(vethpair, what, fail if isinstance(broken, OSError) else 60_000)
    if what == "BIG_TCP_SIZE":  # as a kernel that has not heard of the size
        monkeypatch.setattr(vethpair, "near_fits", lambda *_: False)
    caplog.set_level(logging.INFO)
    tun = open_device("crossedge0")
    assert (tun.kind, tun.offloads) == ("tun", frozenset(OFFLOADS))
    (message,) = caplog.messages
    assert "crossedge0 is a TUN" in message
    assert why in message
    assert names() == {"crossedge0"}
    assert index in (0, there("crossedge0").index)  # a TUN that was there was left alone
    tun.close()


def test_a_pair_survives_and_is_adopted_with_what_it_has() -> None:
    open_device("crossedge0").close()
    up()
    first = there("crossedge0")
    ip("route add 10.77.0.0/16 dev crossedge0")
    again = open_device("crossedge0")
    assert there("crossedge0").index == first.index
    assert there("crossedge0").up
    shown = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    assert "10.77.0.0/16" in shown
    again.close()


def test_an_adopted_pair_is_set_right() -> None:
    open_device("crossedge0").close()
    ip(
        "link set crossedge0 address 02:00:00:00:00:99 arp on mtu 1300 gso_max_size 20000",
        "link set crossedge0-far down",
        "link set crossedge0-far name other address 02:00:00:00:00:98 arp on mtu 1300 gso_max_size 20000",
    )
    # With neither address left it would be anybody's.
    ip("link set crossedge0 address 02:ce:5e:00:00:01")
    set_features("crossedge0", {"tx-tcp-ecn-segmentation": True, "tx-tcp-segmentation": False})
    tun = open_device("crossedge0")
    near, far = there("crossedge0"), there("crossedge0-far")
    assert vethpair.near_fits(near, "crossedge0", 1380)
    assert vethpair.far_fits(far, "crossedge0-far")
    found = features("crossedge0")
    assert (found["tx-tcp-ecn-segmentation"], found["tx-tcp-segmentation"]) == (False, True)
    tun.close()


@pytest.mark.parametrize("first", [frozenset(), NO_PAIR], ids=["pair", "tun"])
@pytest.mark.parametrize("second", [frozenset(), NO_PAIR], ids=["pair", "tun"])
def test_another_process_is_refused_until_it_is_killed(first: frozenset[str], second: frozenset[str]) -> None:
    words = [sys.executable, "-c", HOLD, *first]
    held = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdin is not None
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    index = there("crossedge0").index
    with pytest.raises(OSError, match="another process holds it") as caught:
        open_device("crossedge0", disable=second)
    assert caught.value.errno == errno.EBUSY
    assert there("crossedge0").index == index
    held.send_signal(signal.SIGKILL)
    held.wait()
    held.stdin.close()
    held.stdout.close()
    tun = open_device("crossedge0", disable=second)
    assert tun.kind == ("tun" if second else "veth")
    assert names() == ({"crossedge0"} if second else {"crossedge0", "crossedge0-far"})
    assert (there("crossedge0").index == index) == (first == second)
    tun.close()


def test_the_same_name_in_another_namespace_is_another_device() -> None:
    here = open_device("crossedge0")
    with Namespace.anonymous() as other:
        elsewhere = open_device("crossedge0")
        assert elsewhere.kind == "veth"
        with pytest.raises(OSError, match="another process holds it"):
            open_device("crossedge0")
    assert attached_name(elsewhere.descriptor) == "crossedge0"
    elsewhere.close()
    other.close()
    here.close()


def test_two_devices_of_one_namespace_do_not_hold_each_other() -> None:
    one, two = open_device("crossedge0"), open_device("crossedge1")
    assert (one.kind, two.kind) == ("veth", "veth")
    assert attached_name(two.descriptor) == "crossedge1"
    one.close()
    two.close()


def test_an_inherited_reader_is_taken_over_with_what_waits_in_it() -> None:
    tun = open_device("crossedge0")
    up()
    drain(tun)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inner:
        inner.sendto(b"waits", ("10.9.0.2", 9))
    inherited = os.dup(tun.descriptor)
    tun.close()
    os.set_blocking(inherited, True)
    ip("link set crossedge0-far down")
    adopted = open_device("crossedge0", inherited)
    assert adopted.descriptor == inherited
    assert any(each.endswith(b"waits") for each in drain(adopted))
    adopted.close()


def test_an_inherited_descriptor_that_does_not_fit_is_closed() -> None:
    first = open_device("crossedge0")
    for wrong in (
        os.open("/dev/null", os.O_RDWR),
        packet.open_writer("crossedge0-far"),
        packet.open_reader("crossedge0"),
        open_device("crossedge1").descriptor,
        open_device("crossedge2", disable=NO_PAIR).descriptor,
        socket.socket().detach(),
    ):
        first.close()
        first = open_device("crossedge0", wrong)
        assert first.descriptor != wrong or attached_name(wrong) == "crossedge0"
        assert attached_name(first.descriptor) == "crossedge0"
    first.close()


@pytest.mark.parametrize("first", [frozenset(), NO_PAIR], ids=["pair", "tun"])
def test_the_other_kind_takes_the_place_of_one_whose_descriptor_is_inherited(first: frozenset[str]) -> None:
    second = NO_PAIR - first
    before = open_device("crossedge0", disable=first)
    kept = os.dup(before.descriptor)  # as the service manager keeps it
    before.close()
    after = open_device("crossedge0", os.dup(kept), disable=second)
    assert after.kind != before.kind
    assert attached_name(after.descriptor) == "crossedge0"
    assert attached_name(kept) is None
    assert names() == ({"crossedge0"} if second else {"crossedge0", "crossedge0-far"})
    after.close()
    os.close(kept)


def test_a_link_of_the_name_that_is_not_ours_is_refused_and_left_alone() -> None:
    change(lambda batch: add_link(batch, "crossedge0", "bridge"))
    change(lambda batch: add_veth(batch, VethEnd("crossedge1"), VethEnd("theirs1")))
    with Namespace.anonymous() as other:
        pass
    change(lambda batch: add_veth(batch, VethEnd("crossedge2"), VethEnd("t2", other.fileno())))
    ip("tuntap add crossedge3 mode tap")
    before = names()
    for number in range(4):
        for disable in (frozenset[str](), NO_PAIR):
            with pytest.raises(OSError, match="ours") as caught:
                open_device(f"crossedge{number}", disable=disable)
            assert caught.value.errno == errno.EINVAL
        assert not (number < 3 and remove_device(f"crossedge{number}"))
    assert names() == before
    other.close()
    with pytest.raises(ValueError, match="cannot name a link"):
        open_device("a name too long to be one")


def test_where_the_far_ends_name_is_taken_it_is_a_tun(caplog: pytest.LogCaptureFixture) -> None:
    change(lambda batch: add_link(batch, "crossedge0-far", "bridge"))
    tun = open_device("crossedge0")
    assert tun.kind == "tun"
    assert "crossedge0-far" in caplog.text
    tun.close()


def test_a_pair_that_has_lost_an_end_to_another_namespace_is_made_anew() -> None:
    with Namespace.anonymous() as other:
        pass
    for end in ("crossedge0-far", "crossedge0"):
        tun = open_device("crossedge0")
        index = there("crossedge0").index
        change(partial(set_link, link=end, namespace=other.fileno()))
        assert attached_name(tun.descriptor) is None
        tun.close()
        again = open_device("crossedge0")
        assert there("crossedge0").index != index
        assert names() == {"crossedge0", "crossedge0-far"}
        with other:
            assert names() == set()
        again.close()
        change(lambda batch: delete_link(batch, "crossedge0"))
    other.close()


def test_what_was_left_of_a_change_from_tun_to_pair_is_removed() -> None:
    """The process ended between making the pair, under another name, and removing the TUN."""
    open_device("crossedge0", disable=NO_PAIR).close()
    with Netlink() as netlink:
        vethpair._make(netlink, "crossedge0", 1380, "crossedge0-new")
    tun = open_device("crossedge0")
    assert tun.kind == "veth"
    assert names() == {"crossedge0", "crossedge0-far"}
    tun.close()


def test_the_name_of_what_a_descriptor_belongs_to_follows_the_link() -> None:
    tun = open_device("crossedge0")
    ip("link set crossedge0 name renamed0")
    assert attached_name(tun.descriptor) == "renamed0"
    with Namespace.anonymous() as other:
        assert attached_name(tun.descriptor) == "renamed0"
    other.close()
    change(lambda batch: delete_link(batch, "renamed0"))
    assert attached_name(tun.descriptor) is None
    tun.close()


def test_what_overflows_the_reader_is_counted_once() -> None:
    tun = open_device("crossedge0")
    up()
    assert overflowed(tun.descriptor) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inner:
        inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with socket.socket(fileno=os.dup(tun.descriptor)) as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(100):
            inner.sendto(bytes(1000), ("10.9.0.2", 9))
    lost = overflowed(tun.descriptor)
    assert lost + len(drain(tun)) >= 100
    assert lost > 50
    assert overflowed(tun.descriptor) == 0
    tun.close()


def test_nothing_of_the_far_end_has_an_address() -> None:
    tun = open_device("crossedge0")
    up()
    shown = subprocess.run(
        ["ip", "-o", "addr", "show", "dev", "crossedge0-far"], capture_output=True, check=True
    )
    assert shown.stdout == b""
    tun.close()


def test_a_device_is_removed_whatever_its_kind_and_whoever_holds_it() -> None:
    assert not remove_device("crossedge0")
    for disable in (frozenset[str](), NO_PAIR):
        tun = open_device("crossedge0", disable=disable)
        assert remove_device("crossedge0")
        assert names() == set()
        tun.close()
    open_device("crossedge0").close()
    ip("link set crossedge0 name stray0")
    assert remove_device("crossedge0")  # by its far end
    assert names() == set()


def test_long_names_are_cut_for_the_far_end() -> None:
    tun = open_device("crossedge-pods0")
    assert names() == {"crossedge-pods0", "crossedge-p-far"}
    assert attached_name(tun.descriptor) == "crossedge-pods0"
    tun.close()
