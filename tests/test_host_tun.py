"""TUN devices keep their sizes and offloads, live on without us, and are adopted."""

import errno
import os

import pytest

from crossedge.host.links import Link, add_link, get_link
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.tun import OFFLOADS, open_tun

pytestmark = [pytest.mark.namespaces, pytest.mark.usefixtures("inside")]


def link(name: str) -> Link | None:
    with Netlink() as netlink:
        return get_link(netlink, name)


def test_a_new_tun_has_its_sizes_and_all_offloads() -> None:
    tun = open_tun("crossedge0")
    found = link("crossedge0")
    assert found is not None
    assert (found.kind, found.mtu, found.gso_max_size, found.up) == ("tun", 1380, 62750, False)
    assert tun.offloads == frozenset(OFFLOADS)
    assert tun.vnet_header == 10
    with pytest.raises(BlockingIOError):
        os.read(tun.descriptor, 100)
    tun.close()


@pytest.mark.parametrize(
    ("disable", "left"),
    [
        ({"uso4", "uso6"}, {"csum", "tso4", "tso6"}),
        ({"csum"}, set()),
        (set(OFFLOADS), set()),
    ],
)
def test_missing_offloads_are_done_without(disable: set[str], left: set[str]) -> None:
    tun = open_tun("crossedge0", disable=frozenset(disable))
    assert tun.offloads == left
    tun.close()


def test_a_persistent_tun_survives_and_is_adopted_and_another_ends_with_us() -> None:
    open_tun("crossedge0").close()
    first = link("crossedge0")
    assert first is not None
    again = open_tun("crossedge0")
    second = link("crossedge0")
    assert second is not None
    assert second.index == first.index
    with pytest.raises(OSError, match="another process holds it") as caught:
        open_tun("crossedge0")
    assert caught.value.errno == errno.EBUSY
    again.close()
    open_tun("crossedge1", persistent=False).close()
    assert link("crossedge1") is None


def test_an_inherited_descriptor_is_taken_over() -> None:
    tun = open_tun("crossedge0")
    inherited = os.dup(tun.descriptor)
    tun.close()
    adopted = open_tun("crossedge0", descriptor=inherited)
    assert adopted.descriptor == inherited
    assert adopted.offloads == frozenset(OFFLOADS)
    other = os.dup(adopted.descriptor)
    with pytest.raises(OSError, match="is not the TUN"):
        open_tun("crossedge1", descriptor=other)
    with pytest.raises(OSError, match="is no open TUN"):
        open_tun("crossedge0", descriptor=os.open("/dev/null", os.O_RDWR))
    adopted.close()


def test_a_name_that_is_something_else_is_refused() -> None:
    batch = Batch()
    add_link(batch, "crossedge0", "bridge")
    with Netlink() as netlink:
        netlink.run(batch)
    with pytest.raises(OSError, match="no TUN of ours"):
        open_tun("crossedge0")
    with pytest.raises(ValueError, match="cannot name a link"):
        open_tun("a name too long to be one")
