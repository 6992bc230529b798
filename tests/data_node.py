"""One real data path with a fixed keypair, run by the kernel tests as a process of its own.

    data_node.py '{"namespace": ..., "tun": ..., ...}'

It enters the namespace, opens TUN and socket, says "ready", and on SIGTERM prints its counters as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from ipaddress import ip_network
from typing import Any

import uvloop

from crossedge.host.clock import boottime
from crossedge.host.namespaces import Namespace
from crossedge.host.tun import open_tun
from crossedge.host.udp import open_udp
from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.dataplane import DataPlane
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.tun import TunShell
from crossedge.meshd.udp import UdpShell
from crossedge.meshd.virtio import GSO_TYPES, Offloads
from crossedge.wire.endpoint import UdpEndpoint


class FixedSession:
    """One keypair for ever."""

    def __init__(self, keypair: Keypair) -> None:
        self.current = keypair

    def data_sent(self, now: float, size: int) -> None:
        pass

    def data_received(self, now: float, size: int, keypair: Keypair) -> None:
        pass


async def run(settings: dict[str, Any]) -> None:
    with Namespace.open(settings["namespace"]):
        tun = open_tun(settings["tun"], False, disable=frozenset(settings["disable_tun"]))
        family = 10 if ":" in settings["remote"] else 2
        socket = open_udp(family, 41820, disable=frozenset(settings["disable_udp"]))
    now = boottime()
    first = settings["first"]
    keypair = Keypair(
        local_index=1 if first else 2,
        remote_index=2 if first else 1,
        created=now,
        initiator=first,
        send_key=(b"a" if first else b"b") * 32,
        receive_key=(b"b" if first else b"a") * 32,
    )
    session = FixedSession(keypair)
    link = Link("peer", session, stock=settings["mode"] == "stock")
    link.set_path((UdpEndpoint(settings["remote"], 41820),), settings["size"])
    if settings["mode"] not in ("stock", "transport"):
        keypair.enable_superframes("aes-256-gcm" if settings["mode"] == "grown" else settings["mode"])
        link.allow_superframes(keypair, GSO_TYPES, 65_000)
    if settings["mode"] == "grown":
        link.growth.datagrams = 64  # as after reports of a fast path without loss; nobody reports here
    allowed: AllowedIPs[Link] = AllowedIPs()
    own: AllowedIPs[bool] = AllowedIPs()
    for prefix in settings["peer"]:
        allowed.insert(ip_network(prefix), link)
    for prefix in settings["own"]:
        own.insert(ip_network(prefix), True)
    too_big: list[int] = []
    plane = DataPlane(
        allowed=allowed,
        own=own,
        indices={keypair.local_index: (session, keypair)},
        link_of=lambda _: link,
        transmit=lambda *train: udp.transmit(*train),
        write=lambda frame: shell.write(frame),
        control=lambda *_: None,
        inner=lambda *_: None,
        wanted=lambda _: None,
        moved=lambda *_: None,
        offloads=Offloads.named(tun.offloads),
    )
    shell = TunShell(
        tun.descriptor,
        plane.buffer,
        lone=plane.lone,
        outbound=plane.outbound,
        flush=plane.flush,
        clock=boottime,
        lost=print,
    )
    udp = UdpShell(
        [socket],
        receive=plane.inbound,
        lone=plane.inbound_lone,
        clock=boottime,
        too_big=lambda _, size: too_big.append(size),
        blocked=shell.pause,
    )
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    gc.freeze()
    shell.start(loop)
    udp.start(loop)
    print("ready", flush=True)
    await stopped.wait()
    udp.stop()
    shell.stop()
    print(
        json.dumps(
            {
                "dropped": plane.dropped + udp.dropped + shell.dropped,
                "sent": link.sent.datagrams,
                "received": link.received.datagrams,
                "too_big": len(too_big),
                "offloads": udp.offloads(),
                "tun": sorted(tun.offloads),
                **plane.counters(),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    uvloop.run(run(json.loads(sys.argv[1])))
