"""The routers whose NAT is the model of `lab/nat.py`: one process for all of a lab.

Each router's namespace has a TUN. What comes from the LAN is routed into it, and so is the router's outer
address, which the kernel does not have. The process reads a packet, translates it and writes it back; the
kernel routes it on.

The parent writes one JSON object per line to stdin and reads answers from stdout; the end of stdin ends the
process:  {"boxes": [...]}  {"reboot": NAME}  {"stats": true}
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from typing import Any

from crossedge.host.links import set_link
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.tun import Tun, open_tun
from crossedge.lab.chance import Chance
from crossedge.lab.delayline import answer
from crossedge.lab.natkinds import kind
from crossedge.lab.rewrite import UDP, Translator

TUN_NAME = "nat0"
PACKETS_PER_TURN = 64
BUFFER = 1 << 17


class NatBox:
    """One router: its TUN and its translator."""

    def __init__(self, box: dict[str, Any], seed: int) -> None:
        self.name: str = box["name"]
        chance = Chance(seed).fork(f"natbox {self.name}")
        self.translator = Translator(kind(box["nat"]), box["addresses"], box["lan"], chance.below)
        self.tun = Namespace(box["namespace"]).call(open_nat_tun)
        self.packets = 0
        self.refused: dict[str, int] = {}

    def turn(self, scratch: bytearray, now: float) -> None:
        """Translate what waits in the TUN, up to a bound."""
        descriptor = self.tun.descriptor
        view = memoryview(scratch)
        for _ in range(PACKETS_PER_TURN):
            try:
                size = os.readv(descriptor, [scratch])
            except BlockingIOError:
                return
            self.packets += 1
            if self.translator.translate(scratch, size, now):
                try:
                    os.write(descriptor, view[:size])
                except OSError as error:
                    name = f"write: {os.strerror(error.errno or 0)}"
                    self.refused[name] = self.refused.get(name, 0) + 1

    def stats(self, now: float) -> dict[str, Any]:
        """Return what was carried, what is mapped and what was dropped, by reason."""
        nats = self.translator.nats
        return {
            "packets": self.packets,
            "sessions": sum(nat.sessions(now) for nat in nats.values()),
            "dropped": {**self.translator.dropped, **self.refused},
            "udp": dict(nats[UDP].dropped),
        }


def open_nat_tun() -> Tun:
    """Make the TUN in this thread's namespace and bring it up."""
    tun = open_tun(TUN_NAME, persistent=False, mtu=1500)
    batch = Batch()
    set_link(batch, TUN_NAME, up=True, link_local=False)
    with Netlink() as netlink:
        netlink.run(batch)
    return tun


def run(boxes: list[NatBox], control: int) -> None:
    """Carry packets until the control descriptor ends; obey what is written to it."""
    by_descriptor = {box.tun.descriptor: box for box in boxes}
    scratch = bytearray(BUFFER)
    pending = b""
    while True:
        ready, _, _ = select.select([control, *by_descriptor], (), ())
        now = time.monotonic()
        for descriptor in ready:
            if descriptor != control:
                by_descriptor[descriptor].turn(scratch, now)
                continue
            data = os.read(control, 65_536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                answer(obey(boxes, json.loads(line), now))


def obey(boxes: list[NatBox], order: dict[str, Any], now: float) -> dict[str, Any]:
    """Do what the parent asks; return the answer."""
    if "stats" in order:
        return {"ok": True, "boxes": {box.name: box.stats(now) for box in boxes}}
    if "reboot" in order:
        for box in boxes:
            if box.name == order["reboot"]:
                for nat in box.translator.nats.values():
                    nat.reboot()
                return {"ok": True}
        return {"error": f"no modelled router {order['reboot']!r}"}
    return {"error": "not understood"}


def main() -> None:
    """Run as `python -m crossedge.lab.natbox`, with orders on stdin."""
    control = sys.stdin.fileno()
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(control, 65_536) or b"\n"
    if not text.strip():
        return  # who started it has ended already
    first = json.loads(text)
    boxes = [NatBox(box, first.get("seed", 1)) for box in first["boxes"]]
    answer({"ok": True})
    with contextlib.suppress(KeyboardInterrupt):
        run(boxes, control)


if __name__ == "__main__":
    main()
