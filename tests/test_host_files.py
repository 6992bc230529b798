"""Files are replaced as a whole, and private ones are read only when they are private."""

import os
from pathlib import Path

import pytest

from crossedge.host.files import PRIVATE_LIMIT, PrivateFileError, read_private, write_atomic


def test_what_is_written_is_read_back_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "state"
    previous = os.umask(0o077)
    try:
        write_atomic(path, b"public", mode=0o644)
    finally:
        os.umask(previous)
    assert path.read_bytes() == b"public"
    assert path.stat().st_mode & 0o777 == 0o644
    write_atomic(path, b"private")
    assert read_private(path) == b"private"


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_private_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_atomic(path, b"secret", mode=mode)
    with pytest.raises(PrivateFileError, match=r"can be used by others .* chmod 600") as caught:
        read_private(path)
    assert caught.value.path == path
    assert "secret" not in str(caught.value)


def test_what_is_no_readable_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(PrivateFileError, match="No such file"):
        read_private(tmp_path / "missing")
    with pytest.raises(PrivateFileError, match="not a regular file"):
        read_private(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(PrivateFileError, match="not a regular file"):
        read_private(tmp_path / "fifo")
    write_atomic(tmp_path / "large", bytes(PRIVATE_LIMIT + 1))
    with pytest.raises(PrivateFileError, match="larger than"):
        read_private(tmp_path / "large")
    write_atomic(tmp_path / "full", bytes(PRIVATE_LIMIT))
    assert len(read_private(tmp_path / "full")) == PRIVATE_LIMIT
