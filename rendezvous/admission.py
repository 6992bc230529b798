"""What a node must show before it is listed: every refusal has a name."""

from __future__ import annotations

from collections.abc import Mapping

from crossedge.rendezvous.registry import Directory
from crossedge.wire.certificate import Certificate
from crossedge.wire.errors import WireError
from crossedge.wire.record import Record


def examine(
    encoded_certificate: bytes,
    encoded_record: bytes,
    sender: bytes,
    directories: Mapping[bytes, Directory],
    unix: float,
) -> tuple[Directory, Certificate, Record]:
    """Verify the untrusted statements of a `Register`.

    A signature that was verified before (the same bytes are listed) is not verified again. Whether the record
    has ended is not asked: a node whose clock is wrong learns the time from the answer.

    Args:
        encoded_certificate: from the message.
        encoded_record: from the message.
        sender: the control key that sealed the message.
        directories: the networks that are served, by id.
        unix: Unix time in seconds.

    Raises:
        WireError: "foreign-network", "revoked", "expired", "not-yet-valid", "bad-signature",
            "other-certificate", "other-node", "other-control-key", or what the decoders say.
    """
    certificate = Certificate.decode(encoded_certificate)
    directory = directories.get(certificate.network)
    if directory is None:
        raise WireError("foreign-network", "this rendezvous does not serve the network of the certificate")
    if directory.blocklist is not None and directory.blocklist.revokes(certificate):
        raise WireError("revoked", f"certificate {certificate.serial} of {certificate.name}")
    if not certificate.valid_at(unix):
        early = unix < certificate.not_before
        raise WireError("not-yet-valid" if early else "expired", f"certificate of {certificate.name}")
    record = Record.decode(encoded_record)
    if record.control_key != sender:
        raise WireError("other-control-key", "the record names another control key than the sender's")
    listed = directory.nodes.get(record.node_id)
    if listed is None or listed.certificate != encoded_certificate:
        certificate.verify(directory.ca_public)
    if listed is None or listed.record != encoded_record or listed.certificate != encoded_certificate:
        record.verify(certificate)
    return directory, certificate, record
