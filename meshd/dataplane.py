"""The data path of one daemon: TUN frames in, trains of datagrams out, and back.

    TUN --> policy --> stage --> superframes or transport data --> train --> UDP
    TUN <-- sink <-- coalesce <-- delivery (policy, checks) <-- open <-- batches <-- UDP

No I/O and no clock: the shells read into `buffer` and call `outbound` per frame and `flush` per drain, and
call `inbound` with all that one wake-up received. Whatever is dropped is counted in `dropped` by its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.delivery import Delivery
from crossedge.meshd.inbound import Inbound
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.lone import Lone
from crossedge.meshd.outbound import Outbound
from crossedge.meshd.policy import Policy
from crossedge.meshd.sink import Join, Sink, Write
from crossedge.meshd.train import Send, Transmit
from crossedge.meshd.virtio import ALL_OFFLOADS, Offloads
from crossedge.wire.endpoint import Endpoint

MTU: Final = 1380  # bytes: the inner MTU everywhere


class DataPlane:
    """All links of one TUN."""

    def __init__(
        self,
        *,
        allowed: AllowedIPs[Link],
        own: AllowedIPs[bool],
        indices: Mapping[int, tuple[object, Keypair]],
        link_of: Callable[[Any], Link | None],
        transmit: Transmit,
        way: Callable[[Endpoint], Send] | None = None,
        write: Write,
        control: Callable[[bytes, Endpoint, float], None],
        inner: Callable[[Link, bytes, Endpoint, float], None],
        wanted: Callable[[Link], None],
        moved: Callable[[Link, Endpoint, int], None],
        report: Callable[[Link, Keypair], None] = lambda *_: None,
        unknown: Callable[[bytes], None] = lambda _: None,
        written: Callable[[], None] = lambda: None,
        offloads: Offloads = ALL_OFFLOADS,
        mtu: int = MTU,
    ) -> None:
        """Wire the data path up.

        - `allowed`: the links' networks; `own`: our pod prefixes and overlay addresses, each with True;
        - `indices`: receiver index -> (session, keypair), as `Device` keeps it; `link_of(session)`: its link;
        - `transmit(endpoint, train, segment)` and `write(frame)`: the shells; both must be done with the
          memory when they return;
        - `way(endpoint)`: what sends one datagram there by the fewest steps; None: `transmit` does it;
        - `control(datagram, source, stamp)`: what is neither superframe nor transport data;
        - `inner(link, plaintext, source, stamp)`: an in-session message, with WireGuard's padding;
        - `wanted(link)`: a packet waits in the link's queue, because there is no session or no endpoint; once
          per drain;
        - `moved(link, source, size)`: something genuine and new came from where the link does not send to, in
          datagrams of so many bytes, in-session messages not counted; once per batch;
        - `report(link, keypair)`: the link's peer is due a word on what was received under this keypair;
        - `unknown(address)`: nobody known has the destination of a packet of ours, which waits for `claim` a
          while and is counted as dropped until then; per packet;
        - `written()`: what came alone was written to the TUN, where the answer may wait already, which is for
          `lone` first then;
        - `offloads`: what the TUN takes; `mtu`: its MTU in bytes.
        """
        self.dropped: Counter[str] = Counter()
        policy = Policy(allowed, own)
        self._sink = Sink(write, offloads)
        self._delivery = Delivery(self._sink, policy, mtu, self.dropped)
        self._outbound = Outbound(policy, self._sink, transmit, wanted, unknown, self.dropped)
        self._inbound = Inbound(self._delivery, indices, link_of, control, inner, moved, report, self.dropped)

        def usual(endpoint: Endpoint) -> Send:
            return lambda datagram: transmit(endpoint, [datagram], len(datagram))

        self._lone = Lone(
            self._outbound,
            self._delivery,
            self._inbound.frames,
            indices,
            link_of,
            way or usual,
            report,
            written,
        )
        self.buffer = self._outbound.buffer
        """The TUN is read into this, virtio header first. `outbound` overwrites it."""
        self.outbound = self._outbound.take
        """Take the frame in the first `length` bytes of the buffer: `outbound(length, now)`."""
        self.lone = self._lone.leave
        """Take that frame and send it at once; False where it must go the usual way: `lone(length, now)`."""
        self.flush = self._outbound.flush
        """End a drain of the TUN: `flush(now)`."""
        self.claim = self._outbound.claim
        """Send what waited for somebody to have its address: `claim(now)`, after `allowed` has changed."""
        self.flush_queue = self._outbound.flush_queue
        """Send what waits in a link's queue, as far as it can leave now: `flush_queue(link, now)`."""
        self.inbound = self._inbound.receive
        """Take what was received into a buffer, free again on return: `inbound(buffer, arrivals, now)`."""
        self.inbound_lone = self._lone.arrive
        """Take one datagram that came alone, at a buffer's start: `inbound_lone(buffer, size, source, now)`;
        False: nothing has been done, it is for `inbound`."""
        self.whole = self._inbound.whole
        """Take a train that was taken apart while it was read: `whole(buffer, start, end, source, now)`;
        False: nothing has been done, it is for `inbound`."""
        self.end_wholes = self._inbound.end_wholes
        """End a row of those: `end_wholes(now)`."""
        self.expire = self._inbound.expire
        """Forget chunks that have waited too long: `expire(now)`. New chunks do that too."""

    def write_to(self, write: Write, join: Join, offloads: Offloads) -> None:
        """Write frames to another TUN from now on, and super-packets beyond 64 KiB by `join(parts)`."""
        self._sink.write_to(write, join, offloads)
        self._delivery.forget()

    @property
    def offloads(self) -> Offloads:
        """What the TUN takes."""
        return self._sink.offloads

    def counters(self) -> dict[str, int]:
        """Return what was written to the TUN: frames, bytes, and packets joined to super-packets here."""
        return {
            "tun_frames": self._sink.packets,
            "tun_bytes": self._sink.size,
            "joined_packets": self._delivery.joined,
        }
