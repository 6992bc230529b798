"""Every number of docs/protocol.md is the code's: the table of constants, and the sentences that name one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from crossedge.latency import feed, prober, report
from crossedge.meshd import (
    budget,
    farewell,
    handshaking,
    latertries,
    liveness,
    measuring,
    natplan,
    nodecontrol,
    path,
    pathmtu,
    peer,
    punch,
    seqwindow,
    talk,
)
from crossedge.meshd import constants as wg
from crossedge.meshd.blocklistpeer import TRIES as FETCH_TRIES
from crossedge.meshd.blocklistpeer import TRY_TIME
from crossedge.meshd.challenges import ANSWER_TIME
from crossedge.meshd.client import CONTACT_MIN, CONTACT_TRIES, RETRY_MIN
from crossedge.meshd.client import TRIES as QUESTION_TRIES
from crossedge.meshd.client_channel import COOKIE_TIME
from crossedge.meshd.client_requests import RTO_FIRST, RTO_MAX, RTO_MIN
from crossedge.meshd.config import Listen, Reports, Tun
from crossedge.meshd.hello import RETRY as HELLO_RETRY
from crossedge.meshd.inner import PROBE_MIN, REPLY_MIN, VERSION
from crossedge.meshd.link import SAFE_DATAGRAM
from crossedge.meshd.natplan import Method
from crossedge.meshd.ownrecord import LIFETIME
from crossedge.meshd.peerservices import LIFETIME_SHARE, SPRAY_SPACING
from crossedge.meshd.reassembly import LIFETIME as REASSEMBLY_TIME
from crossedge.meshd.reassembly import SESSION_BYTES, SMALLEST_CHUNK, TOTAL_BYTES
from crossedge.meshd.superframe import FRAME_SIZE, HEADER_SIZE, POSITIONS, RECORD_DATAGRAMS
from crossedge.meshd.train import TRAIN_BYTES, TRAIN_SEGMENTS
from crossedge.meshd.virtio import GSO_TYPES, SMALLEST_SEGMENT
from crossedge.rendezvous.config import DEFAULT_PORT
from crossedge.rendezvous.cookies import COOKIE_SECRET_TIME
from crossedge.rendezvous.notify import NOTIFY_INTERVAL
from crossedge.rendezvous.requests import KEEPALIVE_MAX, KEEPALIVE_MIN, NODES_PER_KEEPALIVE_SECOND
from crossedge.rendezvous.settings import RelayLimits, SourceLimits
from crossedge.wire import limits, messages, relay, stun
from crossedge.wire.codec import MAX_DEPTH, Fields
from crossedge.wire.envelope import COOKIE_REPLY_SIZE
from crossedge.wire.record import MAX_LIFETIME
from tests.test_wire_protocol_text import SIGNED, table_after

SOURCE, RELAY = SourceLimits(), RelayLimits()
LEASE = SourceLimits.model_fields["lease"].metadata
GOLDEN_STUN = (56, 92)  # `test_amplification` and `test_rendezvous_stun` measure them


def shown(value: float) -> str:
    """Return a number as the text has it."""
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def listed(values: Iterable[float]) -> str:
    return ", ".join(shown(value) for value in values)


def spoken(values: Iterable[float]) -> str:
    """Return numbers as in a sentence."""
    *first, last = [shown(value) for value in values]
    return f"{', '.join(first)} and {last}"


TABLE: dict[str, list[float]] = {
    "default ports, *wire*": [DEFAULT_PORT, DEFAULT_PORT + 1, Listen().port],
    "control datagram, *wire*": [limits.MAX_CONTROL, limits.ENVELOPE_OVERHEAD],
    "request plaintext, *wire*": [messages.REQUEST_FLOOR],
    "plaintext of a Ping": [nodecontrol.PING_LONG, nodecontrol.PING_SHORT],
    "sealed body of a call, *wire*": [messages.MAX_SEALED],
    "certificate, record, *wire*": [limits.MAX_CERTIFICATE, limits.MAX_RECORD],
    "candidates, *wire*": [limits.MAX_CANDIDATES],
    "blocklist, *wire*": [limits.MAX_REVOKED, limits.MAX_BLOCKLIST, messages.MAX_PART],
    "record life": [LIFETIME, MAX_LIFETIME],
    "control key life": [nodecontrol.KEY_LIFE, nodecontrol.OLD_KEY_LIFE],
    "control sequence window": [seqwindow.REMEMBERED, seqwindow.OLDEST],
    "cookie secret, cookie use": [COOKIE_SECRET_TIME, COOKIE_TIME],
    "lease": [SOURCE.lease, LEASE[0].ge, LEASE[1].le],
    "keepalive interval": [NODES_PER_KEEPALIVE_SECOND, KEEPALIVE_MIN, KEEPALIVE_MAX],
    "keepalive without answer": [CONTACT_MIN, RTO_MAX, CONTACT_TRIES, RETRY_MIN, 2 * RETRY_MIN],
    "other questions without answer": [RTO_MIN, RTO_MAX, QUESTION_TRIES],
    "notify interval": [NOTIFY_INTERVAL],
    "relay header, *wire*": [relay.HEADER],
    "relay channel idle time": [RELAY.idle],
    "STUN answer, *wire*": [GOLDEN_STUN[0], 4, GOLDEN_STUN[1], 6, stun.REQUEST_SIZE],
    "STUN answers without padding": [SOURCE.stun_rate, 24, 56],
    "answer to a Ping": [ANSWER_TIME],
    "packets to named addresses that have not answered": [
        budget.ADDRESS_BURST,
        budget.ADDRESS_RATE,
        budget.DAEMON_BURST,
        budget.DAEMON_RATE,
    ],
    "packets to a reflexive candidate of one observer": [
        budget.SINGLE_OBSERVER_PACKETS,
        budget.SINGLE_OBSERVER_TIME,
    ],
    "handshake messages, *wire*": [wg.INITIATION_SIZE, wg.RESPONSE_SIZE, wg.COOKIE_SIZE],
    "rekey, *wire*": [
        wg.REKEY_AFTER_TIME,
        wg.REKEY_ON_RECEIVE_TIME,
        wg.REJECT_AFTER_TIME,
        wg.ZERO_KEYS_TIME,
    ],
    "handshake retry with stock peers, *wire*": [
        wg.REKEY_TIMEOUT,
        wg.REKEY_TIMEOUT_JITTER,
        wg.REKEY_ATTEMPT_TIME,
    ],
    "handshake retry between nodes": [*wg.MESH_RETRY_TIMES],
    "crossed handshakes, *wire*": [wg.MESH_TIE_TIME, wg.MESH_RIVAL_TIME],
    "keepalive, new handshake, *wire*": [wg.KEEPALIVE_TIMEOUT, wg.NEW_HANDSHAKE_TIME],
    "transport replay window, *wire*": [wg.REPLAY_WINDOW],
    "handshake load": [wg.LOAD_RATE, wg.LOAD_TIME, wg.SOURCE_RATE, wg.SOURCE_BURST],
    "hello": [VERSION, *HELLO_RETRY],
    "small probe, *wire*": [PROBE_MIN],
    "heartbeat": [
        path.HEARTBEAT_SIZE,
        path.HEARTBEAT,
        path.STANDBY_INTERVAL,
        path.KEEPALIVE_INTERVAL,
        path.KEEPALIVE_MAX,
    ],
    "full size, *wire*": [pathmtu.BASE, pathmtu.BASE - relay.HEADER],
    "probe without answer": [path.OVERDUE_MIN, path.RETRY, path.MISSES],
    "trust of a path, giving up": [path.TRUST, path.GIVE_UP],
    "path MTU": [*pathmtu.LADDER, pathmtu.TRIES],
    "statements after a move": [*talk.STATEMENTS],
    "response sent again": [handshaking.RESPONSE_TIME],
    "idle pair, session closed": [peer.ACTIVE_TIME, peer.SESSION_IDLE],
    "first try": [
        *punch.FIRST_TRY,
        *punch.PRIVATE_TRY,
        natplan.FIRST_TRY_TIME,
        natplan.HOPELESS_TRY_TIME,
    ],
    "synchronised try": [*punch.SYNCHRONISED_TRY, punch.LATER_TRY_TIME],
    "later tries": [punch.OPENING_TTL, punch.OPENING_LEAD, *punch.OPENING_TRY, *latertries.CALL_AGAIN],
    "prediction": [
        latertries.PREDICT_SOCKETS,
        *latertries.PREDICT_PLACES,
        latertries.LEADER_SOCKETS,
        latertries.LEADER_PLACE,
        latertries.FOLLOWER_SOCKETS,
        latertries.FOLLOWER_PLACE,
    ],
    "birthday": [
        latertries.SPRAY_SOCKETS,
        latertries.SPRAY_PROBES,
        *latertries.SPRAY_PORTS,
        latertries.SPRAY_BATCH,
        latertries.SPRAY_INTERVAL,
        SPRAY_SPACING,
    ],
    "pauses": [
        *natplan.PAUSES[Method.FRESH],
        *natplan.PAUSES[Method.PREDICT],
        natplan.PAUSES[Method.SPRAY][0],
        punch.FOLLOWER_EXTRA,
    ],
    "packets of sprays": [budget.SPRAY_BURST, budget.SPRAY_RATE],
    "Pings after the first receive": [*punch.HEARD],
    "members of which all are measured; else drawn, nearest, named by a scheduler": [
        prober.ALL_PAIRS,
        prober.CHOSEN,
        prober.NEAR,
        prober.MEDOIDS,
    ],
    "measuring interval": [
        prober.INTERVAL_PER_PAIR,
        prober.INTERVAL_MIN,
        prober.ALL_PAIRS + 1,
        prober.INTERVAL_CHOSEN,
    ],
    "measurements at a time": [prober.IN_FLIGHT],
    "burst": [measuring.BURST, measuring.DIRECT_TIME, measuring.ANSWER_TIME, measuring.LINGER],
    "report, *wire*": [
        report.MAX_REPORT,
        report.MAX_PAIRS,
        len(report.pack_pairs([report.Pair(bytes(16), report.PairState.UNREACHABLE)])),
    ],
    "report interval, clock": [Reports().interval, feed.MAX_SKEW],
    "superframe header, frame header, tag, *wire*": [HEADER_SIZE, FRAME_SIZE, wg.TAG_SIZE],
    "superframe counts, *wire*": [RECORD_DATAGRAMS, POSITIONS, SMALLEST_CHUNK],
    "GSO types, *wire*": [*sorted(GSO_TYPES)],
    "reassembly": [SESSION_BYTES, TOTAL_BYTES, REASSEMBLY_TIME],
    "train": [TRAIN_SEGMENTS, TRAIN_BYTES],
    "inner MTU": [Tun().mtu],
}

SENTENCES: list[tuple[str, str]] = [
    ("2", f"replaced after {nodecontrol.KEY_LIFE / 3600:g} h"),
    ("3.3", f"at most {MAX_LIFETIME // 86_400} days after i"),
    (
        "4",
        f"at most {shown(limits.MAX_CONTROL)} bytes ({shown(limits.MAX_PLAINTEXT)} of plaintext) "
        f"and at least {limits.ENVELOPE_OVERHEAD}",
    ),
    ("4", f"**Cookie reply**, {COOKIE_REPLY_SIZE} bytes"),
    ("5.1", f"nesting deeper than {MAX_DEPTH}"),
    ("5.2", f"a multiple of {shown(messages.MAX_PART)}"),
    ("9.2", f"at most {shown(messages.MAX_PART)} bytes of it"),
    ("4", f"turns over every {shown(COOKIE_SECRET_TIME)} s"),
    ("4", f"an asker uses it for {shown(COOKIE_TIME)} s"),
    ("6.1", f"A node's records hold for {LIFETIME / 3600:g} h"),
    (
        "6.2",
        f"clamp(nodes / {NODES_PER_KEEPALIVE_SECOND:g}, {KEEPALIVE_MIN:g} s, {KEEPALIVE_MAX:g} s), "
        f"the lease {SOURCE.lease} s by default",
    ),
    ("6.2", f"after {CONTACT_MIN:g} to {RTO_MAX:g} s (by the round trip, {RTO_FIRST:g} s where none"),
    ("6.2", f"takes the rendezvous for lost after {CONTACT_TRIES} of them"),
    ("6.2", f"goes on every {RETRY_MIN:g} to {2 * RETRY_MIN:g} s"),
    ("6.2", f"repeated after {RTO_MIN:g} to {RTO_MAX:g} s, and given up after {QUESTION_TRIES}"),
    ("6.3", f"at most every {NOTIFY_INTERVAL * 1000:g} ms"),
    (
        "6.8",
        f"{seqwindow.OLDEST // 1_000_000} s ({shown(seqwindow.OLDEST)}) behind the newest or below the last "
        f"{seqwindow.REMEMBERED}",
    ),
    ("6.8", f"counts once and for {shown(ANSWER_TIME)} s"),
    (
        "6.8",
        f"{budget.ADDRESS_BURST} packets at once and {shown(budget.ADDRESS_RATE)} a second for an address, "
        f"{shown(budget.DAEMON_BURST)} and {shown(budget.DAEMON_RATE)} a second in all",
    ),
    (
        "6.8",
        f"no more than {budget.SINGLE_OBSERVER_PACKETS} packets in {shown(budget.SINGLE_OBSERVER_TIME)} s",
    ),
    (
        "6.8",
        f"a Ping that opens has {nodecontrol.PING_LONG} bytes of plaintext, which pay for its Pong and for "
        f"one Ping of {nodecontrol.PING_SHORT} bytes back",
    ),
    ("7", f"A channel ends after {shown(RELAY.idle)} s"),
    ("8", f"at most {GOLDEN_STUN[0]} bytes over IPv4 and {GOLDEN_STUN[1]} over IPv6"),
    ("8", f"at most {shown(SOURCE.stun_rate)} times a second per source /24 or /56"),
    ("8", f"pads its requests to {stun.REQUEST_SIZE} bytes with SOFTWARE"),
    ("9.1", f"Initiation, {wg.INITIATION_SIZE} bytes"),
    ("9.1", f"Response, {wg.RESPONSE_SIZE} bytes"),
    ("9.1", f"Cookie reply, {wg.COOKIE_SIZE} bytes"),
    ("9.1", f"Transport data, {wg.TRANSPORT_OVERHEAD} bytes and more"),
    ("9.1", f"within {wg.INITIATION_INTERVAL * 1000:g} ms of the one before"),
    ("9.1", f"a secret that changes every {shown(wg.COOKIE_SECRET_TIME)} s"),
    ("9.1", f"used for at most {shown(wg.COOKIE_SECRET_TIME - wg.COOKIE_SECRET_LATENCY)} s"),
    ("9.1", f"more than {shown(wg.LOAD_RATE)} initiations and expected responses per second"),
    ("9.1", f"limited to {shown(wg.SOURCE_RATE)} per second, five at once"),
    ("9.1", f"to a multiple of {wg.PADDING}"),
    ("9.1", f"not more than {shown(wg.REPLAY_WINDOW)} below the greatest accepted one"),
    ("9.1", f"REKEY_AFTER_TIME {shown(wg.REKEY_AFTER_TIME)} |"),
    ("9.1", f"| {shown(wg.REKEY_ON_RECEIVE_TIME)} |"),
    ("9.1", f"REJECT_AFTER_TIME {shown(wg.REJECT_AFTER_TIME)}, "),
    ("9.1", f"REKEY_TIMEOUT {shown(wg.REKEY_TIMEOUT)} and up to {wg.REKEY_TIMEOUT_JITTER:g} at random"),
    ("9.1", f"REKEY_ATTEMPT_TIME {shown(wg.REKEY_ATTEMPT_TIME)} |"),
    ("9.1", f"KEEPALIVE_TIMEOUT {shown(wg.KEEPALIVE_TIMEOUT)} |"),
    ("9.1", f"| {shown(wg.NEW_HANDSHAKE_TIME)} and up to {wg.REKEY_TIMEOUT_JITTER:g} |"),
    ("9.1", f"| {shown(wg.ZERO_KEYS_TIME)} | since the last new keypair"),
    ("9.1", f"retried after {listed(wg.MESH_RETRY_TIMES[:-1])} and then every"),
    ("9.1", f"and then every {wg.MESH_RETRY_TIMES[-1]:g} seconds"),
    ("9.1", f"within {wg.MESH_TIE_TIME:g} s of the start of its own handshake"),
    ("9.2", f"Version is {VERSION}."),
    ("9.2", f"again after {listed(HELLO_RETRY)} s (the last repeats)"),
    ("9.2", f"as short as it can be ({REPLY_MIN} bytes)"),
    ("9.2", f"again after {TRY_TIME:g} s, five times at most"),
    ("9.2", f"at {spoken(talk.STATEMENTS)} s after an address of the sender changed"),
    ("9.2", f"has {shown(pathmtu.BASE)} bytes (through a relay {shown(pathmtu.BASE - relay.HEADER)})"),
    ("9.2", f"gets probes of {PROBE_MIN} bytes until it answers"),
    ("9.2", f"keep or watch a path have {path.HEARTBEAT_SIZE} bytes"),
    ("9.2", f"probed every {path.HEARTBEAT:g} s, others that are kept every {path.STANDBY_INTERVAL:g} s"),
    (
        "9.2",
        f"every {path.KEEPALIVE_INTERVAL:g} s, or (direct ones) at "
        f"{LIFETIME_SHARE:g} of the shorter lifetime",
    ),
    ("9.2", f"where both NATs' were measured, never more than {path.KEEPALIVE_MAX:g} s"),
    ("9.2", f"at least {path.OVERDUE_MIN:g} s) is repeated after {path.RETRY:g} s"),
    ("9.2", f"Trust ends {path.TRUST:g} s after the last answer"),
    ("9.2", f"silent for {path.GIVE_UP:g} s is given up"),
    ("9.2", f"answered by the same response for {handshaking.RESPONSE_TIME:g} s"),
    ("9.2", f"After {peer.ACTIVE_TIME:g} s without a packet a pair counts as idle."),
    ("9.2", f"After {peer.SESSION_IDLE:g} s the session is closed with a Bye"),
    ("9.2", f"comes for {farewell.PARTING_TIME:g} s: packets among it keep the session"),
    ("9.2", f"comes within {farewell.PARTING_TIME:g} s of an initiation that was answered"),
    ("9.2", f"a Ping after {spoken(punch.FIRST_TRY)} s"),
    ("9.2", f"private prefix after {spoken(punch.PRIVATE_TRY)} s"),
    (
        "9.2",
        f"fails after {natplan.FIRST_TRY_TIME:g} s, or {natplan.HOPELESS_TRY_TIME:g} s where the verdicts",
    ),
    ("9.2", f"not within {liveness.DOUBT_AGAIN:g} s of the last time"),
    ("9.2", f"Pings go after {spoken(punch.SYNCHRONISED_TRY)} s"),
    ("9.2", f"TTL {punch.OPENING_TTL} as above and go after {spoken(punch.OPENING_TRY)} s"),
    ("9.2", f"Such a try fails after {punch.LATER_TRY_TIME:g} s"),
    (
        "9.2",
        f"Pings follow {punch.OPENING_LEAD:g} s after the opening (at the follower later by half of the RTT "
        f"through the relay), and again after {latertries.SHOTS[1]:g} and {latertries.SHOTS[2]:g} s",
    ),
    ("9.2", f"opens from {latertries.PREDICT_SOCKETS} more to the prober's"),
    ("9.2", f"the {latertries.PREDICT_PLACES[0]}th and the {latertries.PREDICT_PLACES[1]}th should have"),
    (
        "9.2",
        f"the leader has {latertries.LEADER_SOCKETS} sockets and names the port of the "
        f"{latertries.LEADER_PLACE}th, the follower {latertries.FOLLOWER_SOCKETS} and the "
        f"{latertries.FOLLOWER_PLACE}th,",
    ),
    ("9.2", f"opens from {latertries.SPRAY_SOCKETS} sockets to the prober's first public endpoint"),
    (
        "9.2",
        f"each of {shown(latertries.SPRAY_PROBES)} random ports of {shown(latertries.SPRAY_PORTS[0])} to "
        f"{shown(latertries.SPRAY_PORTS[1])}, {latertries.SPRAY_BATCH} every {latertries.SPRAY_INTERVAL:g} s",
    ),
    ("9.2", f"after {spoken(latertries.CALL_AGAIN)} s while nothing comes"),
    (
        "9.2",
        f"for fresh ports {listed(natplan.PAUSES[Method.FRESH])} s (the last repeats), for prediction "
        f"{listed(natplan.PAUSES[Method.PREDICT])} s; a birthday is tried twice, "
        f"{natplan.PAUSES[Method.SPRAY][0]:g} s apart. Who does not begin waits {punch.FOLLOWER_EXTRA:g} s",
    ),
    ("6.8", f"{shown(budget.SPRAY_BURST)} packets at once and {budget.SPRAY_RATE:g} a second, to each"),
    ("9.2", f"three Pings to it as well, after {spoken(punch.HEARD)} s"),
    ("9.3", f"fills `count` datagrams, 1 to {RECORD_DATAGRAMS}, of equal size"),
    ("9.3", f"at least {SMALLEST_CHUNK} bytes"),
    ("9.3", f"the piece's position, 0 to {POSITIONS - 1}, as `index`"),
    ("9.3", f"(TCP: below {SMALLEST_SEGMENT})"),
    ("9.3", f"{SESSION_BYTES // 1024} KiB per keypair, {TOTAL_BYTES // 2**20} MiB in all,"),
    ("9.3", f"in all, {REASSEMBLY_TIME:g} s, two candidates a record"),
    ("9.3", f"proven to pass, {shown(SAFE_DATAGRAM)} bytes until then"),
    ("9.3", f"at most {TRAIN_SEGMENTS} datagrams and {shown(TRAIN_BYTES)} bytes"),
    ("9.3", f"The inner MTU is {shown(Tun().mtu)} bytes"),
]


@pytest.fixture(scope="module")
def sections(repository: Path) -> dict[str, str]:
    """Return the text of each section by its number, white space made even."""
    text = (repository / "docs" / "protocol.md").read_text()
    parts = re.split(r"^#+ ([0-9.]+?)\.? ", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)]


def test_table_of_constants_is_the_codes(sections: dict[str, str]) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in sections["10"].splitlines()
        if line.startswith("|")
    ]
    table = {name: value for name, value, _ in rows[2:]}
    assert set(table) == set(TABLE)
    for name, value in table.items():
        said = re.sub(r"IPv[46]", lambda found: found[0][-1], value)
        assert numbers(said) == [float(number) for number in TABLE[name]], name


def test_rows_of_the_table_name_sections_that_there_are(sections: dict[str, str]) -> None:
    for line in sections["10"].splitlines()[3:]:
        if line.startswith("| ") and not line.startswith("| constant"):
            for where in filter(None, line.strip("|").split("|")[2].strip().split(", ")):
                assert where in sections, line


@pytest.mark.parametrize(("number", "sentence"), SENTENCES, ids=[f"{n} {s[:40]}" for n, s in SENTENCES])
def test_sentence_says_what_the_code_does(sections: dict[str, str], number: str, sentence: str) -> None:
    assert " ".join(sentence.split()) in " ".join(sections[number].split())


def test_words_for_numbers_are_right() -> None:
    """The few numbers that the text spells out."""
    assert wg.SOURCE_BURST == 5
    assert FETCH_TRIES == 5
    assert len(pathmtu.LADDER) == 9
    assert pathmtu.TRIES == path.MISSES == len(punch.HEARD) == 3
    assert pathmtu.CHECK_EVERY == 4


MODELS = [*messages.TYPES.values(), *SIGNED]
ITEM_SIZES = {"known": 24, "gone": 16, "servers": 8}  # bytes of what is packed into one bin


def bounds(model: type[Fields], name: str) -> set[float]:
    """Return every bound that a model puts on a field, in bytes for what is packed."""
    found: set[float] = set()
    for each in model.model_fields[name].metadata:
        for kind in ("max_length", "min_length", "ge", "le"):
            if (bound := getattr(each, kind, None)) is not None:
                found |= {bound, bound * ITEM_SIZES.get(name, 1)}
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_bounds_of_fields_are_the_models(repository: Path, model: type[Fields]) -> None:
    text = (repository / "docs" / "protocol.md").read_text()
    number = getattr(model, "TYPE", None)
    mark = f"**{number} {model.__name__}**" if number else f"{model.__name__}\n\n| key"
    for row, column in zip(table_after(text, mark), model.COLUMNS, strict=True):
        stated = re.search(r"up to ([\d,]+)|(\d+) to (\d+)", row[1])
        for number in numbers(stated[0]) if stated else []:
            assert number in bounds(model, column.name), (row, bounds(model, column.name))
