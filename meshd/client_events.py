"""What a rendezvous client reports. Each event names the rendezvous by its 8-byte key id, `server`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from crossedge.wire import messages as m
from crossedge.wire.endpoint import UdpEndpoint


class ClientState(Enum):
    """Where a client stands with its rendezvous."""

    CONNECTING = "connecting"
    REGISTERED = "registered"
    LOST = "lost"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class StateChanged:
    """`why` is for people; a refusal's is its code."""

    server: bytes
    old: ClientState
    new: ClientState
    why: str


@dataclass(frozen=True, slots=True)
class Registered:
    """The rendezvous lists us, now or still."""

    server: bytes
    observed: UdpEndpoint
    epoch: int
    unix_time: float
    """What the rendezvous takes for the time, in Unix seconds: a hint."""
    restarted: bool
    """Whether it has not been up for long: peers may not be back yet."""

    @classmethod
    def of(cls, server: bytes, said: m.Registered) -> Registered:
        """Return what the rendezvous said."""
        return cls(server, said.observed, said.epoch, said.unix_time, said.restarted)


@dataclass(frozen=True, slots=True)
class Observed:
    """The rendezvous sees our socket here; told at first and whenever it changes."""

    server: bytes
    host: str
    """Address of the rendezvous, the observer."""
    endpoint: UdpEndpoint


@dataclass(frozen=True, slots=True)
class RecordsArrived:
    """Untrusted (record, certificate or b"") pairs, and node ids that are no longer registered there."""

    server: bytes
    items: tuple[tuple[bytes, bytes], ...]
    gone: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Synced:
    """All that the rendezvous listed has arrived."""

    server: bytes
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to `find_node` or `find_address`; both are b"" where there is no such node."""

    server: bytes
    id: int
    subject: bytes
    """What was asked for."""
    record: bytes
    certificate: bytes

    @classmethod
    def of(cls, server: bytes, identity: int, subject: bytes, said: m.Found) -> Found:
        """Return what the rendezvous said to request `identity`."""
        return cls(server, identity, subject, said.record, said.certificate)


@dataclass(frozen=True, slots=True)
class Called:
    """A member wants a path to us. `sealed` is what it says itself; nothing else here is more than a hint."""

    server: bytes
    caller: bytes
    caller_seq: int
    channel: int
    observed: UdpEndpoint
    sealed: bytes
    record: bytes
    """The caller's newest record, or b""."""

    @classmethod
    def of(cls, server: bytes, said: m.Called) -> Called:
        """Return what the rendezvous said."""
        return cls(
            server, said.caller, said.caller_seq, said.channel, said.observed, said.sealed, said.record
        )


@dataclass(frozen=True, slots=True)
class CallAnswered:
    """The rendezvous handed our call over and named the relay channel ("ok"), or did not."""

    server: bytes
    id: int
    target: bytes
    status: m.CallStatus
    channel: int

    @classmethod
    def of(cls, server: bytes, identity: int, target: bytes, said: m.CallReply) -> CallAnswered:
        """Return what the rendezvous said to request `identity`."""
        return cls(server, identity, target, said.status, said.channel)


@dataclass(frozen=True, slots=True)
class Bound:
    """Our side of a relay channel is where we are now."""

    server: bytes
    id: int
    channel: int
    observed: UdpEndpoint
    peer_bound: bool

    @classmethod
    def of(cls, server: bytes, identity: int, said: m.Bound) -> Bound:
        """Return what the rendezvous said to request `identity`."""
        return cls(server, identity, said.channel, said.observed, said.peer_bound)


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A `call`, `find` or `bind` came to nothing: "timeout", or the code of the refusal."""

    server: bytes
    id: int
    kind: str
    """ "Call", "Find", "Bind"."""
    code: str
    subject: bytes
    """The node id or address that it was about; a channel as 6 bytes, big-endian."""


@dataclass(frozen=True, slots=True)
class StaleSequence:
    """Our numbers were behind our own newest record; the floor has been raised and we register again."""

    server: bytes
    seq: int


@dataclass(frozen=True, slots=True)
class BlocklistArrived:
    """An untrusted blocklist, newer than what was held when it was asked for."""

    server: bytes
    encoded: bytes


ClientEvent: TypeAlias = (
    StateChanged
    | Registered
    | Observed
    | RecordsArrived
    | Synced
    | Found
    | Called
    | CallAnswered
    | Bound
    | RequestFailed
    | StaleSequence
    | BlocklistArrived
)
