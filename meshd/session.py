"""One WireGuard peer: its handshakes, its three keypairs, its timers. No I/O, no clock.

A session holds up to three keypairs (paper, 6.3): `current` is sent with; `previous` still opens what was on
its way when the keys changed; `next` was made by answering an initiation and becomes current when the first
message sealed with it arrives, because only then the peer surely has it.

    initiator   response arrives:            previous <- current, current <- new
    responder   initiation is answered:      next <- new
                message under next arrives:  previous <- current, current <- next

So whoever starts it, a rekey loses nothing: each side goes on opening what the other still sends. (Stock
implementations erase more when initiations cross, and lose what is on its way then.)

Between two meshds (`mesh`) initiations are retried sooner, and of two that cross the one of the lower static
key wins: its sender does not answer the other one, for as long as its own can be expected to arrive. Where
both were answered all the same, both sides settle on the keypair that the lower key started. Where messages
overtook each other as well, each side may end on the keypair that the other one left: then the higher key
follows the lower one (`follow`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from crossedge.meshd.constants import (
    INITIATION_INTERVAL,
    KEY_SIZE,
    MESH_RETRY_TIMES,
    MESH_TIE_TIME,
    REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME,
    REKEY_ATTEMPT_TIME,
    REKEY_ON_RECEIVE_TIME,
    REKEY_TIMEOUT,
)
from crossedge.meshd.device import Device
from crossedge.meshd.keypair import Keypair, seal_transport
from crossedge.meshd.noise import Initiator, NoiseError, Responder
from crossedge.meshd.timers import Timer, Timers
from crossedge.meshd.wireguard import (
    RESPONSE_NOISE,
    MacMaker,
    pack_initiation,
    pack_response,
    sender_index,
)

OUTBOX_MAX = 16
EVENTS_MAX = 64
NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class SessionUp:
    """There was no usable keypair; now there is."""

    keypair: Keypair


@dataclass(frozen=True, slots=True)
class KeypairRotated:
    """A newer keypair took the place of one that was still good."""

    keypair: Keypair


@dataclass(frozen=True, slots=True)
class SessionExpired:
    """The current keypair became too old and no newer one came: nothing can be sent."""


@dataclass(frozen=True, slots=True)
class HandshakeFailed:
    """A handshake was given up after 90 s without an answer."""


Event = SessionUp | KeypairRotated | SessionExpired | HandshakeFailed


class Session:
    """The session with one peer.

    Feed it through `Handshakes`; tell it of transport data by `data_sent` and `data_received`; afterwards
    drain `poll_transmit` and `poll_event`, and wake it by `handle_timeout` at `next_deadline`.
    """

    __slots__ = (
        "_attempt_started",
        "_confirm",
        "_device",
        "_events",
        "_greatest_timestamp",
        "_last_initiation",
        "_last_initiation_read",
        "_last_minute",
        "_macs",
        "_outbox",
        "_psk",
        "_static_static",
        "_timers",
        "_waiting",
        "_waiting_index",
        "_wanted",
        "current",
        "handshake_at",
        "initiation",
        "mesh",
        "next",
        "owner",
        "previous",
        "remote",
    )

    def __init__(
        self,
        device: Device,
        remote: bytes,
        *,
        now: float,
        psk: bytes = bytes(KEY_SIZE),
        mesh: bool = False,
        persistent_keepalive: float = 0.0,
        owner: object = None,
    ) -> None:
        """Make a session with the peer whose static public key is `remote`.

        `persistent_keepalive` is in seconds, 0 for none. `owner` is the caller's own. NoiseError: a weak key.
        """
        self._device = device
        self._psk = psk
        self._static_static = device.static.exchange(remote)
        self._macs = MacMaker(remote)
        self._timers = Timers(device.random, mesh=mesh)
        self._outbox: deque[bytes] = deque(maxlen=OUTBOX_MAX)
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._waiting: Initiator | None = None
        self._waiting_index = 0
        self._attempt_started = NEVER
        self._last_initiation = NEVER
        self._last_initiation_read = NEVER
        self._wanted = NEVER
        self._greatest_timestamp = b""
        self._last_minute = False
        self._confirm = False
        self.remote = remote
        self.mesh = mesh
        self.owner = owner
        self.current: Keypair | None = None
        self.previous: Keypair | None = None
        self.next: Keypair | None = None
        self.initiation: bytes | None = None  # the datagram that waits for its response
        self.handshake_at: float | None = None  # `now` of the last completed handshake
        self.set_persistent_keepalive(persistent_keepalive, now)

    # --- What the caller asks and tells ------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether ours is the lower of both static keys, which has its way where both sides began at once."""
        return self._device.static.public < self.remote

    def usable(self, now: float) -> bool:
        """Tell whether `current` may be sent with."""
        return self.current is not None and self.current.can_send(now)

    def initiate(self, now: float, *, urgent: bool = False) -> None:
        """Want new keys: start a handshake, or let the one that is going on live for another 90 s.

        `urgent` (mesh only) restarts the retries from the shortest, because the way to the peer changed.
        """
        self._wanted = now
        least = MESH_RETRY_TIMES[0] if self.mesh else REKEY_TIMEOUT
        if now - self._last_initiation < least:
            return
        if self._timers.pending(Timer.RETRY):
            if not (urgent and self.mesh):
                return
            self._timers.tries = 0
        self._send_initiation(now)

    def keepalive(self, now: float) -> None:
        """Send an empty message, or start a handshake where there is no usable keypair."""
        if self.current is None or not self.current.can_send(now):
            self.initiate(now)
            return
        self._outbox.append(seal_transport(self.current, b""))
        self.data_sent(now, 0)

    def set_persistent_keepalive(self, interval: float, now: float) -> None:
        """Send something at least every `interval` seconds, 0 for never; the first goes out at once."""
        self._timers.persistent_keepalive = interval
        self._timers.on_persistent_keepalive_set(now)

    def data_sent(self, now: float, size: int) -> None:
        """Follow the sending of transport data or superframes with `current`.

        `size` counts plaintext bytes, several messages at once if need be; 0 means keepalives only.
        """
        self._confirm = False
        self._timers.on_sent(now, size)
        current = self.current
        if current is None:
            return
        if (
            current.initiator and now - current.created >= REKEY_AFTER_TIME
        ) or max(current.send_counter, current.chunk_counter) > REKEY_AFTER_MESSAGES:  # fmt: skip
            self.initiate(now)

    def data_received(self, now: float, size: int, keypair: Keypair) -> None:
        """Follow the arrival of messages that `keypair` opened and whose counters were new.

        Must be called before anything is sent in reply: `keypair` may become the current one by it. `size`
        counts plaintext bytes, several messages at once if need be; 0 means keepalives only.
        """
        if keypair is self.next:
            self._rotate_to_next(keypair, now)
        elif size and self.current is None and keypair is self.previous and keypair.can_send(now):
            self.previous = None  # the peer goes on with what was retired
            self._become_current(keypair, False, now)
        current = self.current
        if (
            current is not None
            and current.initiator
            and not self._last_minute
            and now - current.created >= REKEY_ON_RECEIVE_TIME
        ):
            self._last_minute = True
            self.initiate(now)
        self._timers.on_received(now, size)

    def follow(self, index: int, now: float) -> bool:
        """Take the peer's word that it sends with the keypair that is `index` here.

        Returns whether that is `current` now. The higher key of two meshds goes back to `previous` for it,
        the lower one to nothing: so two sides whose initiations crossed, and whose messages overtook each
        other, come to the same keypair again.
        """
        current, previous = self.current, self.previous
        if current is not None and current.local_index == index:
            return True
        if (
            not self.mesh
            or self.leads
            or current is None
            or previous is None
            or previous.local_index != index
            or not previous.can_send(now)
        ):
            return False
        was_up = self.usable(now)
        self.previous = current
        self._become_current(previous, was_up, now)
        return True

    def retire(self) -> None:
        """Send nothing more with the current keypair, but open what arrives: data makes it current again."""
        if self.current is not None:
            self._forget(self.previous)
            self.previous, self.current = self.current, None
            self._confirm = False

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        for timer in self._timers.pop_due(now):
            match timer:
                case Timer.RETRY:
                    self._retry(now)
                case Timer.NEW_HANDSHAKE:
                    self.initiate(now)
                case Timer.KEEPALIVE:
                    self.keepalive(now)
                    self._timers.on_keepalive_due(now)
                case Timer.PERSISTENT:
                    self._timers.on_persistent_due(now)
                    self.keepalive(now)
                case Timer.EXPIRE:
                    self._events.append(SessionExpired())
                case Timer.ZERO_KEYS:
                    self._erase()

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` wants to be called, or None."""
        return self._timers.next_deadline()

    def poll_transmit(self) -> bytes | None:
        """Return the next initiation or keepalive to send to the peer, or None."""
        if self._outbox:
            return self._outbox.popleft()
        if self._confirm and self.current is not None:
            self._confirm = False
            return seal_transport(self.current, b"")
        return None

    def poll_event(self) -> Event | None:
        """Return the next event, or None."""
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        """Erase all keys and give the indices back; the session sends and accepts nothing any more."""
        self._erase()
        self._timers.clear()
        self._timers.persistent_keepalive = 0.0
        self._outbox.clear()

    # --- What Handshakes hands on -------------------------------------------------------------------------

    @property
    def static_static(self) -> bytes:
        """The DH of both static keys, worked out once."""
        return self._static_static

    def answer(self, responder: Responder, timestamp: bytes, sender: int, now: float) -> bytes | None:
        """Return the response to an authentic initiation, or None (counted) where it deserves none."""
        dropped = self._device.dropped
        if timestamp <= self._greatest_timestamp:
            dropped["replayed-initiation"] += 1
            return None
        if now - self._last_initiation_read < INITIATION_INTERVAL:
            dropped["initiation-flood"] += 1
            return None
        if (
            self.mesh
            and self._waiting is not None
            and self.leads
            and now - self._attempt_started < MESH_TIE_TIME
        ):
            dropped["crossed-initiation"] += 1
            return None
        index = self._device.new_index()
        if index is None:
            return None
        noise, send, receive = responder.write(self._device.random(KEY_SIZE), self._psk)
        self._greatest_timestamp = timestamp
        self._last_initiation_read = now
        keypair = Keypair(
            local_index=index,
            remote_index=sender,
            created=now,
            initiator=False,
            send_key=send,
            receive_key=receive,
        )
        self._device.indices[index] = (self, keypair)
        self._forget(self.next)
        self.next = keypair
        self._timers.on_received(now)
        self._timers.on_keys_derived(now)
        self._timers.on_sent(now)
        if self.mesh:
            self._timers.on_rival_answered(now)
        return self._macs.finish(pack_response(index, sender, noise), now)

    def take_response(self, datagram: bytes, now: float) -> bool:
        """End our handshake with its response; False (counted) where that is forged."""
        if self._waiting is None:
            return False
        try:
            _, send, receive = self._waiting.read(datagram[RESPONSE_NOISE])
        except NoiseError:
            self._device.dropped["forged-response"] += 1
            return False
        was_up = self.usable(now)
        index = self._waiting_index
        keypair = Keypair(
            local_index=index,
            remote_index=sender_index(datagram),
            created=now,
            initiator=True,
            send_key=send,
            receive_key=receive,
        )
        self._forget_waiting()
        self._device.indices[index] = (self, keypair)
        self._forget(self.previous)
        self.previous = self.current
        self._timers.on_received(now)
        self._timers.on_keys_derived(now)
        self._become_current(keypair, was_up, now)
        self._timers.on_sent(now)
        self._confirm = True
        return True

    def take_cookie(self, reply: bytes, now: float) -> bool:
        """Keep a cookie for the next try; False (counted) where it is forged."""
        if self._macs.take_cookie(reply, now):
            return True
        self._device.dropped["forged-cookie"] += 1
        return False

    # --- Inside -------------------------------------------------------------------------------------------

    def _send_initiation(self, now: float) -> None:
        index = self._device.new_index()
        if index is None:
            return
        self._forget_waiting()
        if not self._timers.tries:
            self._attempt_started = now
        handshake = Initiator(self._device.static, self.remote, self._psk, static_static=self._static_static)
        noise = handshake.write(self._device.random(KEY_SIZE), self._device.timestamp(now))
        self._waiting = handshake
        self._waiting_index = index
        self._device.waiting[index] = self
        self._last_initiation = now
        self.initiation = self._macs.finish(pack_initiation(index, noise), now)
        self._outbox.append(self.initiation)
        self._timers.on_sent(now)
        self._timers.on_initiation_sent(now)

    def _retry(self, now: float) -> None:
        if now - self._wanted < REKEY_ATTEMPT_TIME:
            self._send_initiation(now)
            return
        self._forget_waiting()
        self._timers.on_given_up(now)
        self._events.append(HandshakeFailed())

    def _rotate_to_next(self, keypair: Keypair, now: float) -> None:
        was_up = self.usable(now)
        self._forget(self.previous)
        self.next = None
        if self.current is not None and self.current.created >= keypair.created and self.leads:
            self.previous = keypair
            return
        self.previous = self.current
        self._become_current(keypair, was_up, now)

    def _become_current(self, keypair: Keypair, was_up: bool, now: float) -> None:
        """End the handshake on both sides: the one place where `current` changes to something."""
        self.current = keypair
        self.handshake_at = now
        self._last_minute = False
        self._forget_waiting()
        self._timers.on_handshake_complete()
        self._timers.on_current_changed(keypair.created)
        self._events.append(KeypairRotated(keypair) if was_up else SessionUp(keypair))

    def _forget(self, keypair: Keypair | None) -> None:
        if keypair is not None:
            self._device.indices.pop(keypair.local_index, None)
            keypair.erase()

    def _forget_waiting(self) -> None:
        if self._waiting is not None:
            del self._device.waiting[self._waiting_index]
            self._waiting = None
            self.initiation = None

    def _erase(self) -> None:
        """Erase every key that exists, of handshakes too (paper, 6.3)."""
        for keypair in (self.previous, self.current, self.next):
            self._forget(keypair)
        self.previous = self.current = self.next = None
        self._confirm = False
        self._forget_waiting()
