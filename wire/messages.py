"""The control messages: what is sealed in an envelope, as docs/protocol.md, section 5 has it.

A message is one msgpack map: key "t" is the type of the message, the others are its fields. Endpoints are
packed bytes on the wire and `UdpEndpoint` here; lists of fixed-size values are one run of bytes on the wire.

Every request is padded to `REQUEST_FLOOR`, so that no answer to a source without a cookie is larger than what
was asked; answers that may be larger (`NEEDS_COOKIE`) are given only to a source that showed a cookie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, InstanceOf, model_validator

from crossedge.wire.codec import (
    U16,
    U32,
    U48,
    U64,
    Bytes8,
    Bytes16,
    Fields,
    Key,
    Seconds,
    dump_padded,
    from_map,
    load,
    to_map,
)
from crossedge.wire.endpoint import UdpEndpoint, pack_endpoint, unpack_endpoint
from crossedge.wire.errors import WireError
from crossedge.wire.limits import (
    MAX_CANDIDATES,
    MAX_CERTIFICATE,
    MAX_PLAINTEXT,
    MAX_RECORD,
)

REQUEST_FLOOR: Final = 96
"""Bytes of plaintext that every request has at least: no answer without a cookie is larger."""

MAX_SEALED: Final = 704
"""Bytes of the sealed message that a `Call` carries; with it a `Called` fits one control message."""

MAX_KNOWN: Final = 40
"""Digests in one `PullDigests`."""

MAX_WINDOW: Final = 16
"""Pages that one pull may ask for."""

MAX_PART: Final = 1024
"""Bytes of a blocklist in one `BlocklistPart`."""

TYPE_KEY: Final = "t"


def pack_run(values: Sequence[bytes]) -> bytes:
    """Return fixed-size values as one run of bytes."""
    return b"".join(values)


def unpack_run(size: int) -> Callable[[object], tuple[bytes, ...]]:
    """Return the decoder of an untrusted run of values of `size` bytes; it raises only `WireError`."""

    def unpack(run: object) -> tuple[bytes, ...]:
        if type(run) is not bytes or len(run) % size:
            raise WireError("malformed", f"not a run of {size}-byte values")
        return tuple(run[at : at + size] for at in range(0, len(run), size))

    return unpack


def pack_known(known: Sequence[tuple[bytes, int]]) -> bytes:
    """Return digests, each 16 bytes of node id and 8 of sequence number, as one run of bytes."""
    return b"".join(node + seq.to_bytes(8, "big") for node, seq in known)


def unpack_known(run: object) -> tuple[tuple[bytes, int], ...]:
    """Return the digests in an untrusted run of bytes; raises only `WireError`."""
    return tuple((item[:16], int.from_bytes(item[16:], "big")) for item in unpack_run(24)(run))


def pack_endpoints(endpoints: Sequence[UdpEndpoint]) -> list[bytes]:
    """Return endpoints as an array of packed ones."""
    return [pack_endpoint(endpoint) for endpoint in endpoints]


def unpack_endpoints(items: object) -> tuple[UdpEndpoint, ...]:
    """Return the endpoints in an untrusted array; raises only `WireError`."""
    if type(items) is not tuple or len(items) > MAX_CANDIDATES:
        raise WireError("malformed", "endpoints")
    return tuple(unpack_endpoint(item) for item in items)


def pack_observed_by(observed: Sequence[tuple[bytes, UdpEndpoint]]) -> list[bytes]:
    """Return (key id of a rendezvous, endpoint it saw) pairs as an array."""
    return [server + pack_endpoint(endpoint) for server, endpoint in observed]


def unpack_observed_by(items: object) -> tuple[tuple[bytes, UdpEndpoint], ...]:
    """Return the (key id, endpoint) pairs in an untrusted array; raises only `WireError`."""
    if type(items) is not tuple or any(type(item) is not bytes for item in items):
        raise WireError("malformed", "observed by")
    return tuple((item[:8], unpack_endpoint(item[8:])) for item in items)


Observed = Annotated[InstanceOf[UdpEndpoint], Key("o", pack_endpoint, unpack_endpoint)]
Id = Annotated[U32, Key("i")]
Seq = Annotated[U64, Key("q")]
Epoch = Annotated[U64, Key("e")]
Version = Annotated[U64, Key("v")]
Channel = Annotated[U48, Key("h")]
CertificateBytes = Annotated[bytes, Field(max_length=MAX_CERTIFICATE)]
RecordBytes = Annotated[bytes, Field(max_length=MAX_RECORD)]
SealedBytes = Annotated[bytes, Field(max_length=MAX_SEALED), Key("s")]


class Message(Fields):
    """What can be sealed in an envelope."""

    TYPE: ClassVar[int]
    REQUEST: ClassVar[bool] = False
    """Whether it is answered, and so padded to `REQUEST_FLOOR`."""


class Register(Message):
    """Node to rendezvous: here I am; the first message, answered by `Registered`."""

    TYPE = 1
    REQUEST = True
    id: Id
    seq: Seq
    record: Annotated[RecordBytes, Key("r")]
    certificate: Annotated[CertificateBytes, Key("c")]


class Registered(Message):
    """The lease that a `Register` got, and the endpoint that it was seen from."""

    TYPE = 2
    id: Id
    observed: Observed
    lease: Annotated[U32, Key("l")]
    """Seconds without a keepalive after which the lease is gone."""
    keepalive: Annotated[Seconds, Key("k")]
    """Seconds between keepalives."""
    epoch: Epoch
    version: Version
    unix_time: Annotated[Seconds, Key("u")]
    restarted: Annotated[bool, Key("n")] = False
    """Whether the rendezvous has been up for less than a lease: its directory may not be whole yet."""


class Keepalive(Message):
    """Node to rendezvous: the lease goes on. `epoch` and `version` are the newest directory that is known."""

    TYPE = 3
    REQUEST = True
    id: Id
    seq: Seq
    epoch: Epoch
    version: Version


class KeepaliveReply(Message):
    """The observed endpoint (a change means that the mapping moved) and the directory's version."""

    TYPE = 4
    id: Id
    observed: Observed
    epoch: Epoch
    version: Version
    keepalive: Annotated[Seconds, Key("k")]


class Pull(Message):
    """Node to rendezvous: what changed in epoch `epoch` after version `since`? At most `window` pages."""

    TYPE = 5
    REQUEST = True
    id: Id
    epoch: Epoch
    since: Annotated[U64, Key("v")]
    window: Annotated[int, Field(ge=1, le=MAX_WINDOW), Key("w")] = 1


class PullDigests(Message):
    """The same without a shared history: what differs between node ids `first` and `last`, both included?"""

    TYPE = 6
    REQUEST = True
    id: Id
    first: Annotated[Bytes16, Key("a")]
    last: Annotated[Bytes16, Key("z")]
    known: Annotated[
        tuple[tuple[Bytes16, U64], ...], Field(max_length=MAX_KNOWN), Key("k", pack_known, unpack_known)
    ] = ()
    """(node id, sequence number of the record that is held)."""
    window: Annotated[int, Field(ge=1, le=MAX_WINDOW), Key("w")] = 1


class Page(Message):
    """Records of the directory up to `version`; the certificate is b"" where the asker should have it."""

    TYPE = 7
    id: Id
    epoch: Epoch
    version: Version
    """The version that the asker holds once it has this page and those before it."""
    items: Annotated[tuple[tuple[RecordBytes, CertificateBytes], ...], Field(max_length=16), Key("r")] = ()
    gone: Annotated[tuple[Bytes16, ...], Field(max_length=64), Key("g", pack_run, unpack_run(16))] = ()
    """Node ids that are no longer registered."""
    more: Annotated[bool, Key("m")] = False
    """Whether pages follow this one, in this window or for another pull."""
    index: Annotated[U16, Key("x")] = 0
    """The place of this page in its window, from 0."""
    next: Annotated[bytes, Field(max_length=16), Key("z")] = b""
    """Answering digests: the first node id that was not covered; b"" once all of the range was."""


class Find(Message):
    """Node to rendezvous: who is this node, or whose prefix has this address? Exactly one is given."""

    TYPE = 8
    REQUEST = True
    id: Id
    node: Annotated[bytes, Field(max_length=16), Key("n")] = b""
    """Node id."""
    address: Annotated[bytes, Field(max_length=16), Key("a")] = b""
    """4 or 16 bytes, in network order."""

    @model_validator(mode="after")
    def _one(self) -> Find:
        if (len(self.node), len(self.address)) not in {(16, 0), (0, 4), (0, 16)}:
            raise ValueError("a node id or an address")
        return self


class Found(Message):
    """The answer to `Find`; both b"" where there is none."""

    TYPE = 9
    id: Id
    record: Annotated[RecordBytes, Key("r")] = b""
    certificate: Annotated[CertificateBytes, Key("c")] = b""


class Notify(Message):
    """Rendezvous to node: the directory is at `version` of `epoch`; a new epoch means that it restarted."""

    TYPE = 10
    epoch: Epoch
    version: Version


class Call(Message):
    """Node to rendezvous: hand `sealed` (a `CallBody` sealed for the target) over, and give us a channel."""

    TYPE = 11
    REQUEST = True
    id: Id
    seq: Seq
    target: Annotated[Bytes16, Key("n")]
    """Node id."""
    sealed: SealedBytes


CallStatus = Literal["ok", "unknown", "busy"]


class CallReply(Message):
    """The relay channel of the pair, or why there is none (then the channel is 0)."""

    TYPE = 12
    id: Id
    status: Annotated[CallStatus, Key("s")]
    channel: Channel = 0


class Called(Message):
    """Rendezvous to node: `caller` wants a path. What the caller says itself is in `sealed`."""

    TYPE = 13
    caller: Annotated[Bytes16, Key("n")]
    """Node id."""
    caller_seq: Seq
    """Sequence number of the caller's newest record, so that the called knows whether its copy is old."""
    channel: Channel
    observed: Observed
    sealed: SealedBytes
    record: Annotated[RecordBytes, Key("r")] = b""
    """The caller's newest record where it fits; it saves the called a `Find`."""


class Bind(Message):
    """Node to rendezvous: my side of this channel is where this message comes from."""

    TYPE = 14
    REQUEST = True
    id: Id
    seq: Seq
    channel: Channel


class Bound(Message):
    """The answer to `Bind`."""

    TYPE = 15
    id: Id
    channel: Channel
    observed: Observed
    peer_bound: Annotated[bool, Key("b")] = False


class Error(Message):
    """A request was refused. `record` is the newest signed record of the asker, for "stale-sequence"."""

    TYPE = 16
    id: Id
    code: Annotated[str, Field(max_length=32, pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$"), Key("s")]
    detail: Annotated[str, Field(max_length=120), Key("d")] = ""
    record: Annotated[RecordBytes, Key("r")] = b""


class GetBlocklist(Message):
    """To a rendezvous or a node: the blocklist with this serial (0: the newest), from this offset on."""

    TYPE = 17
    REQUEST = True
    id: Id
    serial: Annotated[U64, Key("n")] = 0
    offset: Annotated[U32, Key("x")] = 0


class BlocklistPart(Message):
    """`total` is the size of the whole encoded blocklist; the asker puts the parts of one serial together."""

    TYPE = 18
    id: Id
    serial: Annotated[U64, Key("n")]
    total: Annotated[U32, Key("l")]
    offset: Annotated[U32, Key("x")]
    data: Annotated[bytes, Field(max_length=MAX_PART), Key("d")]


class Ping(Message):
    """Node to node, outside a session: does this path work? `attempt` counts the tries of one punch."""

    TYPE = 32
    REQUEST = True
    id: Annotated[U64, Key("i")]
    seq: Seq
    attempt: Annotated[int, Field(ge=0, le=255), Key("a")] = 0


class Pong(Message):
    """The echoed challenge of a `Ping`, and where the ping was seen to come from."""

    TYPE = 33
    id: Annotated[U64, Key("i")]
    seq: Seq
    observed: Observed


class CallBody(Message):
    """What a caller tells the called: the plaintext of `Call.sealed`, accepted nowhere else."""

    TYPE = 34
    seq: Seq
    attempt: Annotated[int, Field(ge=0, le=255), Key("a")] = 0
    candidates: Annotated[
        tuple[InstanceOf[UdpEndpoint], ...],
        Field(max_length=MAX_CANDIDATES),
        Key("c", pack_endpoints, unpack_endpoints),
    ] = ()
    observed_by: Annotated[
        tuple[tuple[Bytes8, InstanceOf[UdpEndpoint]], ...],
        Field(max_length=4),
        Key("o", pack_observed_by, unpack_observed_by),
    ] = ()
    """(key id of a rendezvous, the endpoint it saw the caller at)."""
    rtt: Annotated[Seconds, Key("d")] = 0.0
    """Seconds there and back through the relay, as far as the caller knows; 0 if it does not."""
    initiation: Annotated[bytes, Field(max_length=148), Key("w")] = b""
    """A WireGuard handshake initiation, so that the first answer already brings the session."""
    measure: Annotated[bool, Key("m")] = False
    """The caller has no traffic; it measures the pair and lets go of the session."""


TYPES: Final[dict[int, type[Message]]] = {
    model.TYPE: model
    for model in (
        Register,
        Registered,
        Keepalive,
        KeepaliveReply,
        Pull,
        PullDigests,
        Page,
        Find,
        Found,
        Notify,
        Call,
        CallReply,
        Called,
        Bind,
        Bound,
        Error,
        GetBlocklist,
        BlocklistPart,
        Ping,
        Pong,
        CallBody,
    )
}

NEEDS_COOKIE: Final[frozenset[type[Message]]] = frozenset({Pull, PullDigests, Find, GetBlocklist})
"""Requests whose answer may be larger than they are: answered only with a valid mac2."""


def encode(message: Message) -> bytes:
    """Return the plaintext of a message, a request padded to `REQUEST_FLOOR`.

    `ValueError` if it is larger than one control message carries.
    """
    return padded(message, REQUEST_FLOOR if message.REQUEST else 0)


def padded(message: Message, size: int) -> bytes:
    """Return the plaintext of a message, padded to at least `size` bytes (at most 4 more)."""
    packed = dump_padded({TYPE_KEY: message.TYPE, **to_map(message)}, size, MAX_PLAINTEXT)
    if len(packed) > MAX_PLAINTEXT:
        raise ValueError(f"{type(message).__name__} takes {len(packed)} bytes, {MAX_PLAINTEXT} fit")
    return packed


def decode(plaintext: bytes) -> Message:
    """Return the message in untrusted bytes; raises only `WireError`."""
    values = load(plaintext, MAX_PLAINTEXT)
    kind = values.get(TYPE_KEY)
    model = TYPES.get(kind) if type(kind) is int else None
    if model is None:
        raise WireError("unknown-message")
    return from_map(model, values)
