"""NATs that follow connections: Linux's connection tracking with masquerade, and a firewall without NAT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from crossedge.lab.natkinds import Address, Allocation, Behaviour, Conntrack, NatKind

DRAWS = 128  # Linux nf_nat_core.c: attempts for a unique tuple
STREAM_AFTER = (
    2.0  # Linux nf_conntrack_proto_udp.c: a flow this old that was answered lives for the long time
)


class _Flow:
    """A conntrack entry: both tuples, as (source, destination) seen before translation."""

    __slots__ = ("expires", "local", "original", "replied", "reply", "stream_at")

    def __init__(
        self, original: tuple[Address, Address], reply: tuple[Address, Address], local: bool
    ) -> None:
        self.original = original
        self.reply = reply
        self.local = local
        self.replied = False
        self.stream_at = 0.0
        self.expires = 0.0


class ConntrackNat:
    """A Linux router: netfilter's connection tracking under nftables `masquerade`.

    A connection keeps its source port unless the tuple of its replies is taken by another connection; then it
    gets a random one. With `Conntrack.ACCEPT` an unsolicited packet from outside becomes a connection of the
    router itself, and takes the tuple that a later punch towards its sender needs.
    """

    def __init__(self, kind: NatKind, addresses: Sequence[str], below: Callable[[int], int]) -> None:
        if not addresses:
            raise ValueError(f"NAT {kind.name}: needs an outer address")
        self.kind = kind
        self.dropped: Counter[str] = Counter()
        self._addresses = tuple(addresses[:1])  # masquerade takes the interface's first address
        self._below = below
        self._tuples: dict[tuple[Address, Address], _Flow] = {}
        self._by_source: dict[Address, dict[Address, int]] = {}
        self._swept = 0.0

    @property
    def addresses(self) -> Sequence[str]:
        """The outer address."""
        return self._addresses

    def translate_out(self, src: Address, dst: Address, now: float) -> Address | None:
        """Translate the source of a packet from inside, making a connection where there is none."""
        self._sweep(now)
        flow = self._live((src, dst), now)
        if flow is None:
            if len(self._tuples) >= 2 * self.kind.sessions:
                self.dropped["sessions"] += 1
                return None
            outer = self._choose(src, dst, now)
            if outer is None:
                self.dropped["no-port"] += 1
                return None
            flow = self._confirm((src, dst), (dst, outer), local=False, now=now)
            sources = self._by_source.setdefault(src, {})
            sources[outer] = sources.get(outer, 0) + 1
        flow.expires = now + self._lifetime(flow, now)
        return flow.reply[1]

    def translate_in(self, src: Address, dst: Address, now: float) -> Address | None:
        """Translate the destination of a packet that answers a connection; refuse or swallow any other."""
        flow = self._live((src, dst), now)
        if flow is None:
            if self.kind.conntrack is Conntrack.ACCEPT and len(self._tuples) < 2 * self.kind.sessions:
                flow = self._confirm((src, dst), (dst, src), local=True, now=now)
                flow.expires = now + self._lifetime(flow, now)
            self.dropped["unsolicited"] += 1
            return None
        if flow.local:
            flow.expires = now + self._lifetime(flow, now)
            self.dropped["wrong-conntrack-entry"] += 1
            return None
        flow.replied = True
        flow.expires = now + self._lifetime(flow, now)
        return flow.original[0]

    def hairpin(self, src: Address, dst: Address, now: float) -> tuple[Address, Address] | None:  # noqa: ARG002 - the interface
        """Refuse: a packet from inside to the WAN address is input to the router itself."""
        self.dropped["hairpin"] += 1
        return None

    def inner_of(self, outer: Address, remote: Address, now: float) -> Address | None:
        """Return who sends from `outer` to `remote`, without refreshing anything."""
        flow = self._live((remote, outer), now)
        return None if flow is None or flow.local else flow.original[0]

    def sessions(self, now: float) -> int:
        """Return how many connections are tracked, wrong ones included."""
        return sum(flow.expires > now for flow in self._tuples.values()) // 2

    def reboot(self) -> None:
        """Forget every connection."""
        self._tuples.clear()
        self._by_source.clear()

    def readdress(self, addresses: Sequence[str]) -> None:
        """Take another outer address; as nf_nat_masquerade does, connections from the old one are dropped."""
        self._addresses = tuple(addresses[:1])
        self.reboot()

    def _lifetime(self, flow: _Flow, now: float) -> float:
        long_lived = flow.replied and now >= flow.stream_at
        return self.kind.lifetime if long_lived else self.kind.lifetime_unreplied or self.kind.lifetime

    def _live(self, key: tuple[Address, Address], now: float) -> _Flow | None:
        flow = self._tuples.get(key)
        if flow is not None and flow.expires <= now:
            self._forget(flow)
            return None
        return flow

    def _confirm(
        self, original: tuple[Address, Address], reply: tuple[Address, Address], local: bool, now: float
    ) -> _Flow:
        flow = _Flow(original, reply, local)
        flow.stream_at = now + STREAM_AFTER
        self._tuples[original] = self._tuples[reply] = flow
        return flow

    def _forget(self, flow: _Flow) -> None:
        del self._tuples[flow.original], self._tuples[flow.reply]
        sources = self._by_source.get(flow.original[0])
        if sources is not None and not flow.local:
            sources[flow.reply[1]] -= 1
            if not sources[flow.reply[1]]:
                del sources[flow.reply[1]]
            if not sources:
                del self._by_source[flow.original[0]]

    def _sweep(self, now: float) -> None:
        if now - self._swept < self.kind.lifetime:
            return
        self._swept = now
        for flow in {id(flow): flow for flow in self._tuples.values() if flow.expires <= now}.values():
            self._forget(flow)

    def _choose(self, src: Address, dst: Address, now: float) -> Address | None:
        address = self._addresses[0]
        if self.kind.allocation is not Allocation.RANDOM:
            wanted: list[Address] = [*self._by_source.get(src, {}), (address, src[1])]
            for outer in wanted:
                if self._live((dst, outer), now) is None:
                    return outer
        if src[1] < 512:
            low, high = 1, 511
        elif src[1] < 1024:
            low, high = 600, 1023
        else:
            low, high = self.kind.ports
        start = self._below(high - low + 1)
        for index in range(min(DRAWS, high - low + 1)):
            outer = (address, low + (start + index) % (high - low + 1))
            if self._live((dst, outer), now) is None:
                return outer
        return None


class Firewall:
    """No translation: a stateful filter in front of real addresses, or nothing at all (`open`)."""

    def __init__(self, kind: NatKind) -> None:
        self.kind = kind
        self.dropped: Counter[str] = Counter()
        self._flows: dict[tuple[Address, Address], tuple[float, bool]] = {}
        self._swept = 0.0

    @property
    def addresses(self) -> Sequence[str]:
        """None of its own."""
        return ()

    def translate_out(self, src: Address, dst: Address, now: float) -> Address | None:
        """Remember that `src` sent to `dst`; return `src`."""
        if self.kind.filtering is Behaviour.ENDPOINT_INDEPENDENT:
            return src
        if now - self._swept >= self.kind.lifetime or len(self._flows) >= self.kind.sessions:
            self._swept = now
            self._flows = {key: flow for key, flow in self._flows.items() if flow[0] > now}
        expires, replied = self._flows.get((src, dst), (now, False))
        if expires <= now and len(self._flows) >= self.kind.sessions:
            self.dropped["sessions"] += 1
            return None
        self._flows[src, dst] = (now + self._lifetime(replied), replied)
        return src

    def translate_in(self, src: Address, dst: Address, now: float) -> Address | None:
        """Return `dst` where the filter lets `src` in."""
        if self.kind.filtering is Behaviour.ENDPOINT_INDEPENDENT:
            return dst
        flow = self._flows.get((dst, src))
        if flow is not None and flow[0] > now:
            expires = now + self._lifetime(True) if self.kind.refresh_inbound else flow[0]
            self._flows[dst, src] = (expires, True)
            return dst
        if self.kind.filtering is Behaviour.ADDRESS_DEPENDENT and any(
            inner == dst and remote[0] == src[0] and expires > now
            for (inner, remote), (expires, _) in self._flows.items()
        ):
            return dst
        self.dropped["filtered"] += 1
        return None

    def hairpin(self, src: Address, dst: Address, now: float) -> tuple[Address, Address] | None:  # noqa: ARG002 - the interface
        """Return both unchanged: without translation there is nothing to turn round."""
        return src, dst

    def inner_of(self, outer: Address, remote: Address, now: float) -> Address | None:  # noqa: ARG002 - the interface
        """Return `outer`: it is the inner endpoint."""
        return outer

    def sessions(self, now: float) -> int:
        """Return how many flows are alive."""
        return sum(expires > now for expires, _ in self._flows.values())

    def reboot(self) -> None:
        """Forget every flow."""
        self._flows.clear()

    def readdress(self, addresses: Sequence[str]) -> None:  # noqa: ARG002 - the interface
        """Forget every flow: the prefix behind has changed."""
        self.reboot()

    def _lifetime(self, replied: bool) -> float:
        short = self.kind.lifetime_unreplied
        return self.kind.lifetime if replied or short is None else short
