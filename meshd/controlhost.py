"""What the control side of a mesh tells the mesh it belongs to."""

from __future__ import annotations

from typing import Protocol

from crossedge.meshd import client_events as ce
from crossedge.meshd import directory as dir_
from crossedge.meshd.events import MeshEvent
from crossedge.wire import messages as m
from crossedge.wire.endpoint import DirectEndpoint, Endpoint, RelayEndpoint, UdpEndpoint


class ControlHost(Protocol):
    """What the control side tells the mesh."""

    def member_added(self, member: dir_.Peer, now: float) -> None:
        """Take a member that was not known."""

    def member_changed(self, member: dir_.Peer, previous: dir_.Peer, now: float) -> None:
        """Take a newer record, perhaps under another certificate."""

    def member_removed(self, member: dir_.Peer, reason: str) -> None:
        """Let go of a member."""

    def called(
        self, member: dir_.Peer, body: m.CallBody, relay: RelayEndpoint | None, event: ce.Called, now: float
    ) -> None:
        """Take an authentic, fresh call; of `event` nothing but hints is left to read."""

    def call_answered(self, node_id: bytes, relay: RelayEndpoint, now: float) -> None:
        """Take the channel that a call got."""

    def relay_bound(self, relay: RelayEndpoint, now: float) -> None:
        """Take the news that a channel leads to us again, where we are now."""

    def relay_gone(self, relay: RelayEndpoint, now: float) -> None:
        """Take the news that a rendezvous does not know this channel of ours."""

    def pinged(self, member: dir_.Peer, source: Endpoint, size: int, now: float) -> None:
        """Take an authentic, fresh ping, which had `size` bytes more than its answer."""

    def ponged(self, member: dir_.Peer, endpoint: DirectEndpoint, now: float) -> None:
        """Take the news that the member answered our ping to this endpoint."""

    def scouted(self, local: int, mapped: UdpEndpoint, now: float) -> None:
        """Take the news where a STUN server sees this further socket."""

    def further_sockets(self, count: int) -> tuple[int, ...]:
        """Return numbers for so many further sockets, none for 0; those given before are closed."""

    def reachable(self, server: bytes, now: float, *, anew: bool) -> None:
        """Take the news that a rendezvous has us registered; `anew`: it had forgotten us and all channels."""

    def restated(self, now: float) -> None:
        """Take the news that our own record is another one."""

    def blocklist_wanted(self, node_id: bytes, now: float) -> None:
        """Take the news that a member holds a newer blocklist than we do."""

    def emit(self, event: MeshEvent) -> None:
        """Hand an event to the shell."""
