"""What the host should look like for a configuration, an identity and the mesh's routes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from crossedge.host.tun import BIG_TCP
from crossedge.meshd.config import MeshdConfig
from crossedge.meshd.desired import Desired, InboundRule, PeerRoute
from crossedge.meshd.hoststate import HostState
from crossedge.meshd.identity import Identity, under
from crossedge.meshd.snapshots import MeshRoute
from crossedge.meshd.state import StateStore
from crossedge.meshd.train import whole_mtu
from crossedge.wire.endpoint import Network

HOST_RECORD: Final = "meshd.sysctls"  # in the directory of the control socket


def tun_offloads_off(config: MeshdConfig) -> frozenset[str]:
    """Return the names that `open_device` knows for the offloads which the configuration switches off."""
    families = {"tso": ("tso4", "tso6"), "uso": ("uso4", "uso6"), "big_tcp": (BIG_TCP,)}
    return frozenset(name for key in config.disable_offloads for name in families.get(key, ()))


def plan(config: MeshdConfig, identity: Identity, port: int, routes: Iterable[MeshRoute]) -> Desired:
    """Return what the host should look like with these routes to peers."""
    certificate = identity.bundle.certificate
    rules = tuple(
        InboundRule(rule.group, rule.to, rule.protocol, InboundRule.ranges(rule.ports))
        for rule in config.inbound
    )
    members: dict[str, set[Network]] = {rule.group: set() for rule in rules}
    peers: set[PeerRoute] = set()
    stock: set[PeerRoute] = set()
    for route in routes:
        if route.stock:
            stock.add(PeerRoute(route.prefix, whole_mtu(min(route.mtu, config.tun.mtu))))
        else:
            peers.add(PeerRoute(route.prefix, route.mtu))
        for group in members.keys() & set(route.groups):
            members[group].add(route.prefix)
    return Desired(
        tun=config.tun.name,
        mtu=config.tun.mtu,
        port=port,
        overlay=tuple(each for each in (certificate.overlay4, certificate.overlay6) if each is not None),
        pods=certificate.prefixes,
        mesh=identity.bundle.supernets,
        peers=frozenset(peers),
        stock=frozenset(stock),
        inbound=rules,
        members={group: frozenset(prefixes) for group, prefixes in members.items()},
    )


def remove_traces(config: MeshdConfig, root: Path) -> list[str]:
    """Remove what a daemon left on the host and return what went; needs neither its bundle nor its keys.

    Raises:
        ConfigError: the daemon runs, and would put everything back.
        OSError: something of it could not be removed; all that could be is.
    """
    directory = under(root, config.state)
    with contextlib.ExitStack() as stack:
        if directory.is_dir():
            stack.enter_context(StateStore(directory))
        record = under(root, config.run) / HOST_RECORD
        state = HostState(Desired(tun=config.tun.name), record=record)
        stack.callback(state.close)
        return state.cleanup()
