"""The files of chains: readable, and read back as they were."""

import json
from pathlib import Path

import pytest
from rule_engine import prompt

from plmtune.errors import UserError
from plmtune.preference.rounds.chains import Chain, Turn, read_chains, save_chains, save_prompts

PROMPTS = [prompt("a" * (n + 1), gold="g", tests=["x\u2028y"]) for n in range(7)]


class TestFiles:
    def test_chains_and_prompts_come_back_as_they_were(self, tmp_path: Path) -> None:
        chains = [
            Chain(PROMPTS[0].messages, (Turn("a\u2028b\r\n", True, 0.5), Turn("", False)), "x, row 1", {"k": [1]}, "g"),
            Chain(PROMPTS[1].messages, (), "x, row 2", short="has no room"),
        ]
        save_chains(tmp_path / "chains.jsonl", chains)
        assert read_chains(tmp_path / "chains.jsonl") == chains
        save_prompts(tmp_path, PROMPTS)
        rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().split("\n")[:-1]]
        assert [row["messages"][0]["content"] for row in rows] == [p.messages[0].content for p in PROMPTS]
        assert (rows[0]["gold"], rows[0]["extra"]) == (PROMPTS[0].gold, PROMPTS[0].extra)

    def test_a_person_can_read_them(self, tmp_path: Path) -> None:
        save_chains(tmp_path / "c", [Chain(prompt("为什么?").messages, (Turn("Because.", True, 1.0),), "x, row 1")])
        assert json.loads((tmp_path / "c").read_text()) == {
            "prompt": [{"role": "user", "content": "为什么?"}],
            "answers": [{"text": "Because.", "ended": True, "reward": 1.0}],
            "place": "x, row 1",
            "extra": {},
        }
        assert "为什么" in (tmp_path / "c").read_text()

    @pytest.mark.parametrize("line", ["{", "[]", '{"prompt": []}', '{"prompt": [{}], "answers": []}'])
    def test_a_damaged_row_is_named(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "chains.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"chains.jsonl, row 1: damaged"):
            read_chains(tmp_path / "chains.jsonl")
