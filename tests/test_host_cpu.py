"""AES instructions are found where the kernel lists them, on x86 and on ARM."""

from pathlib import Path

import pytest

from crossedge.host.cpu import has_aes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu vme aes avx\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd aes pmull\n", True),
        ("processor\t: 0\nflags\t\t: fpu vaes_like\n", False),
        ("Features\t: half thumb\n", False),
        ("", False),
    ],
)
def test_aes_is_found_where_it_is_listed(tmp_path: Path, text: str, found: bool) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert has_aes(file) is found


def test_unreadable_list_means_no_aes(tmp_path: Path) -> None:
    assert not has_aes(tmp_path / "none")
