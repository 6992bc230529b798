"""Which sysctls the host needs for what is desired, and the record of what they were."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from crossedge.host import sysctl
from crossedge.host.files import write_atomic
from crossedge.host.links import list_links
from crossedge.host.netlink import Netlink
from crossedge.host.routes import list_routes
from crossedge.host.sysctl import Change
from crossedge.meshd.desired import Desired

RTPROT_RA = 9
FORWARD4 = "net/ipv4/ip_forward"
FORWARD6 = "net/ipv6/conf/all/forwarding"

log = logging.getLogger(__name__)


def needed_sysctls(
    desired: Desired, versions: frozenset[int], changes: Mapping[str, Change]
) -> Iterator[tuple[str, str]]:
    """Yield (name, value), in the order in which they must be set, for the calling thread's namespace.

    `changes` are those that we made already. Pods need forwarding. With IPv6 forwarding the kernel stops
    listening to routers on interfaces that did, and the host would lose its way out when the last
    advertisement expires: those are told to listen all the same.
    """
    if any(prefix.version == 4 for prefix in desired.pods):
        yield FORWARD4, "1"
    if 6 in versions and any(prefix.version == 6 for prefix in desired.pods):
        for name in _listening_to_routers(desired.tun, FORWARD6 in changes):
            yield f"net/ipv6/conf/{name}/accept_ra", "2"
        yield FORWARD6, "1"
    # Each source in the TUN is checked against its certificate; that it is routed there, the kernel checks.
    yield f"net/ipv4/conf/{desired.tun}/rp_filter", "1"
    if 6 in versions:
        yield f"net/ipv6/conf/{desired.tun}/disable_ipv6", "0"
        yield f"net/ipv6/conf/{desired.tun}/accept_ra", "0"
    if any(peer.prefix.version == 4 for peer in desired.stock):
        # Prefixes of stock peers may cover addresses of the underlay: a strict check of the reverse path must
        # see the mark that our table gives to arriving datagrams. Candidates in mesh prefixes are refused.
        yield "net/ipv4/conf/all/src_valid_mark", "1"


def _listening_to_routers(tun: str, we_forward: bool) -> list[str]:
    """Return the interfaces that would listen to routers but for us: hardware, or known by their routes."""
    with Netlink() as netlink:
        links = list_links(netlink)
        advertised = {
            each.device for each in list_routes(netlink, family=socket.AF_INET6, protocol=RTPROT_RA)
        }
    return [
        link.name
        for link in links
        if link.name not in (tun, "lo")
        and (link.index in advertised or not link.kind)
        and sysctl.read(f"net/ipv6/conf/{link.name}/accept_ra") == "1"
        and (we_forward or sysctl.read(f"net/ipv6/conf/{link.name}/forwarding") == "0")
    ]


class Record(NamedTuple):
    """What a life leaves for the next, or for the cleanup."""

    tun: str = ""
    """Name of its TUN."""
    changes: Mapping[str, Change] = MappingProxyType({})
    """Sysctls that were changed."""


def load_record(path: Path | None) -> Record:
    """Return the record of an earlier life since this boot; an empty one if there is none or it is broken."""
    if path is None:
        return Record()
    try:
        found = json.loads(path.read_text())
        if found["boot"] != _boot():
            return Record()
        changes = {str(name): Change(str(was), str(ours)) for name, (was, ours) in found["sysctls"].items()}
        return Record(str(found["tun"]), changes)
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s cannot be read: what an earlier life changed will not be undone", path)
        return Record()


def save_record(path: Path | None, record: Record) -> None:
    """Write the record; a failure is logged, for a sysctl that cannot be undone is better than none."""
    if path is None:
        return
    changes = {name: list(change) for name, change in record.changes.items()}
    document = {"boot": _boot(), "tun": record.tun, "sysctls": changes}
    try:
        write_atomic(path, json.dumps(document, indent=1).encode(), mode=0o644)
    except OSError as error:
        log.warning("%s cannot be written (%s): our changes will not be undone", path, error.strerror)


def _boot() -> str:
    return sysctl.read("kernel/random/boot_id") or ""
