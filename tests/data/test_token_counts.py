"""Counts of tokens in text, rows, conversations and shards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmtune.data import prepare, token_counts
from plmtune.data.text_files import files
from plmtune.data.token_counts import count_tokens, find_data
from plmtune.errors import UserError
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer_files import bundled

TOKENIZER = bundled()
TEXTS = [f"def f{n}(x):\n    return x + {n}\n\nYou are {n} cats, 你好 and a naïve café.\n" * 7 for n in range(20)]
CHATS = [[("user", f"What is {n}?"), ("assistant", f"It is the number {n}.")] for n in range(30)]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks, of which some are parts of documents."""
    monkeypatch.setattr(prepare, "GROUP", 600)
    monkeypatch.setattr(token_counts, "_CONVERSATIONS", 7)


def naive(texts: Sequence[str], specials: bool = False) -> Any:
    ids = [identity for text in texts for identity in TOKENIZER.encode(text, specials=specials)]
    return np.bincount(ids, minlength=TOKENIZER.vocab_size)


def naive_chats() -> Any:
    template = find_template(None, TOKENIZER)
    return naive([template.render([Message(*turn) for turn in chat]) for chat in CHATS], specials=True)


def count(*paths: Path, **how: Any) -> Any:
    reading = {name: how.pop(name) for name in ("text_key", "separator", "format") if name in how}
    data = find_data([str(path) for path in paths], TOKENIZER, **reading)
    return count_tokens(data, **how).counts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts" / "a.txt"
    path.parent.mkdir()
    path.write_text("".join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": role, "content": said} for role, said in chat]} for chat in CHATS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestCounts:
    def test_equal_those_of_whole_documents(self, texts: Path, small_groups: None) -> None:
        assert (count(texts) == naive(["".join(TEXTS)])).all()

    def test_of_a_folder_and_of_rows_add_up(self, texts: Path, tmp_path: Path, small_groups: None) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
        found = count(texts.parent, rows, text_key="body")
        assert (found == naive(["".join(TEXTS)]) + naive(TEXTS)).all()

    def test_of_conversations_are_those_of_the_rendered_text(self, chats: Path, small_groups: None) -> None:
        found = count(chats)
        assert (found == naive_chats()).all()
        assert found[TOKENIZER.specials["<|im_end|>"]] >= 2 * len(CHATS)

    def test_of_text_and_conversations_together(self, texts: Path, chats: Path) -> None:
        assert (count(texts, chats) == naive(["".join(TEXTS)]) + naive_chats()).all()

    def test_of_shards_are_those_of_their_tokens(self, texts: Path, tmp_path: Path) -> None:
        made = prepare.prepare(files((str(texts),)), TOKENIZER, tmp_path / "shards", holdout=0, progress=False)
        expected = naive(["".join(TEXTS)])
        expected[TOKENIZER.eos_id] += 1  # which ends the document
        assert (count(made) == expected).all()


class TestMistakes:
    def test_no_data_is_said(self) -> None:
        with pytest.raises(UserError, match="Name the data to count"):
            count()

    def test_rows_that_are_neither_text_nor_conversations_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
        with pytest.raises(UserError, match=r"line 1 has no key text .* as a conversation it is a preference pair"):
            count(path)

    def test_bad_rows_are_refused_or_left_out(self, chats: Path, texts: Path) -> None:
        with chats.open("a") as file:
            file.write('{"messages": [{"role": "user", "content": "alone"}]}\n')
        with pytest.raises(UserError, match=r"line 31 has no assistant turn\n.*--skip-bad"):
            count(chats)
        assert (count(chats, skip_bad=True) == naive_chats()).all()
        data = find_data([str(chats)], TOKENIZER)
        assert count_tokens(data, skip_bad=True).notes == ["1 bad row left out"]
