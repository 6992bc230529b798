"""nftables scripts take effect as a whole or not at all, and what is wrong is said in one line."""

import pytest

from crossedge.host import nft

pytestmark = [pytest.mark.namespaces, pytest.mark.usefixtures("inside")]
TABLE = """
table inet crossedge {
  set s { type ipv4_addr; flags interval; elements = { 10.160.0.0/24, 10.160.1.0/24 }; }
  chain forward { type filter hook forward priority filter; policy drop; ip saddr @s accept comment "one"; }
  chain plain { }
}
"""


def test_a_script_is_applied_and_listed() -> None:
    assert nft.list_table("inet", "crossedge") is None
    assert nft.list_chains() == []
    assert nft.apply(TABLE) > 0
    listed = nft.list_table("inet", "crossedge")
    assert listed is not None
    assert [kind for kind, _ in listed] == ["table", "set", "chain", "chain", "rule"]
    assert listed[-1][1]["comment"] == "one"
    chain = next(chain for chain in nft.list_chains() if chain["name"] == "forward")
    assert (chain["hook"], chain["policy"], chain["table"]) == ("forward", "drop", "crossedge")
    rules = nft.list_chain("inet", "crossedge", "forward")
    assert rules is not None
    assert [kind for kind, _ in rules] == ["chain", "rule"]
    assert nft.list_chain("inet", "crossedge", "none") is None


def test_a_bad_line_undoes_the_whole_script_and_is_named() -> None:
    with pytest.raises(nft.NftError, match=r"nft refused our rules: .*error.* in: .*nonsense"):
        nft.apply(TABLE + "add rule inet crossedge plain nonsense\n")
    with pytest.raises(nft.NftError, match="No such file or directory"):
        nft.apply(TABLE + "add element inet crossedge no_such_set { 10.0.0.1 }\n")
    assert nft.list_table("inet", "crossedge") is None


def test_a_missing_program_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(nft, "SEARCH", "/nowhere")
    with pytest.raises(nft.NftMissingError, match=r"not installed .*nftables"):
        nft.apply(TABLE)
