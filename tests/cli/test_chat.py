"""plmtune chat, through a pipe and at a terminal."""

import io
import json
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import run, save_small

from plmtune.data.conversations import conversations
from plmtune.tokenizers.tokenizer_files import byte

OPTIONS = ("--device", "cpu", "--chat-template", "plain", "--temperature", "1", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("model"), max_seq_len=512, init_std=0.1)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path) -> Command:

    def chat(stdin: str | bytes, *options: object, person: bool = False) -> tuple[int, str, str]:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        return run(monkeypatch, capsys, "chat", checkpoint, *OPTIONS, *options, stdin=raw, person=person)

    return chat


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model reads; it answers each time with its number."""
    prompts: list[str] = []

    def columns(model: object, tokens: torch.Tensor, **options: object) -> object:
        prompts.append(bytes(token for token in tokens[0].tolist() if token < 256).decode())
        yield from (torch.tensor([token]) for token in (*f"No{len(prompts)}".encode(), byte().eos_id))

    monkeypatch.setattr("plmtune.inference.sampling.generate", columns)
    return prompts


class TestPipe:
    def test_stdout_has_the_answers_alone_and_the_seed_decides(self, chat: Command) -> None:
        code, out, err = chat("one\n")
        assert code == 0, err
        assert re.fullmatch(r"6 tokens, [\d.]+ tokens/s after the first; 35 of 512 tokens of context; cut there\n", err)
        assert chat("one\n")[1] == out
        assert chat("one\n", "--seed", 5)[1] != out

    def test_a_message_is_a_line_or_a_block_or_goes_on_after_a_backslash(self, chat: Command, asked: list[str]) -> None:
        code, out, err = chat('one\r\n\n"""two\n  more\n/three"""\nfour\\\nfive\n')
        assert (code, out) == (0, "No1\nNo2\nNo3\n"), err
        ends = [prompt.rpartition("### User:\n")[2].partition("\n### Assistant")[0] for prompt in asked]
        assert ends == ["one", "two\n  more\n/three", "four\nfive"]

    def test_what_cannot_be_used_is_told_and_the_rest_is_answered(self, chat: Command, asked: list[str]) -> None:
        lines = ["one", "<|endoftext|>", "x" * 600, "/sav", "/undo", "/undo", '"""', "never ended"]
        code, out, err = chat("\n".join(lines).encode() + b"\n")
        assert (code, out) == (2, "No1\n")
        assert "The message holds the text of the special token <|endoftext|>" in err
        assert "tokens, the model's max_seq_len is 512. The conversation continues without it." in err
        assert "There is no command /sav. Did you mean /save?" in err
        assert "There is nothing to undo." in err
        assert 'The message that """ opens has no """ at its end.' in err
        assert "plmtune: 5 of the messages and commands on stdin could not be used" in err
        assert "Traceback" not in err

    def test_bytes_that_are_no_text_are_refused(self, chat: Command, asked: list[str]) -> None:
        code, out, err = chat(b"\xff\xfe\ntwo\n")
        assert (code, out) == (2, "No1\n")
        assert "The message is not UTF-8" in err

    def test_a_model_without_a_template_is_refused(self, chat: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("test_chat.OPTIONS", ("--device", "cpu"))
        code, out, err = chat("one\n")
        assert (code, out) == (2, "")
        assert "The tokenizer has no chat template. Name one: --chat-template chatml" in err

    def test_a_broken_model_is_told(self, chat: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        from plmtune.models.adapters import load_model

        def broken(*arguments: object) -> object:
            model = load_model(*arguments)
            for parameter in model.norm.parameters():
                parameter.data.fill_(float("nan"))
            return model

        monkeypatch.setattr("plmtune.models.adapters.load_model", broken)
        code, out, err = chat("one\n")
        assert (code, out) == (2, "")
        assert "the model's output after 29 tokens is not a number" in err


class TestCommands:
    def test_system_undo_and_reset(self, chat: Command, asked: list[str]) -> None:
        code, _, err = chat("/system be kind\none\n/undo\ntwo\n/reset\nthree\n/system\nfour\n", "--system", "be rude")
        assert code == 0, err
        told = "### System:\nbe kind\n"
        assert asked == [
            f"{told}### User:\none\n### Assistant:\n",
            f"{told}### User:\ntwo\n### Assistant:\n",
            f"{told}### User:\nthree\n### Assistant:\n",
            "### User:\nthree\n### Assistant:\nNo3\n### User:\nfour\n### Assistant:\n",
        ]
        assert "dropped with its answer: one" in err

    def test_what_is_saved_can_be_trained_on_and_gone_on_from(
        self, chat: Command, asked: list[str], tmp_path: Path
    ) -> None:
        file = tmp_path / "talk.jsonl"
        code, _, err = chat(f"one\n/save {file}\ntwo é\n/save\n", "--system", "be kind")
        assert code == 0, err
        (held,) = conversations((str(file),)).conversations()
        said = [(message.role, message.content) for message in held.messages]
        assert said == [
            ("system", "be kind"), ("user", "one"), ("assistant", "No1"), ("user", "two é"), ("assistant", "No2"),
        ]  # fmt: skip
        code, out, err = chat(f"/load {file}\nthree\n")
        assert (code, out) == (0, "No3\n"), err
        assert asked[-1].startswith("### System:\nbe kind\n### User:\none\n### Assistant:\nNo1\n")

    def test_no_file_is_lost_or_half_written(self, chat: Command, asked: list[str], tmp_path: Path) -> None:
        other = tmp_path / "other.jsonl"
        other.write_text("mine\n")
        lines = [
            "/save", f"/save {other}", "one", f"/save {other}", f"/save {tmp_path}/x.txt",
            f"/save {tmp_path}/no/x.jsonl", "/load", f"/load {tmp_path}/none.jsonl", f"/load {other}",
        ]  # fmt: skip
        code, _, err = chat("\n".join(lines) + "\n")
        assert code == 2 and "Traceback" not in err
        assert "Name the file: /save talk.jsonl" in err and "There is nothing to save yet" in err
        assert "other.jsonl exists already" in err and "conversations are read from .jsonl files" in err
        assert "no/x.jsonl cannot be written: No such file or directory" in err
        assert "There is no file" in err and "is not JSON" in err
        assert other.read_text() == "mine\n"
        assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


class TestPerson:
    def test_is_prompted_and_asked_for_more_and_ends_with_ctrl_d(self, chat: Command, asked: list[str]) -> None:
        code, out, err = chat('one\n/help\n"""\ntwo\n"""\n', person=True)
        assert (code, out) == (0, "No1\nNo2\n"), err
        assert err.count("> ") == 4 and err.count("... ") == 2  # stdout is no terminal, so prompts go to stderr
        assert (
            "512 tokens of context. /help lists the commands" in err and "/system TEXT  set the system message" in err
        )

    def test_a_mistake_does_not_decide_how_the_program_ends(self, chat: Command, asked: list[str]) -> None:
        code, _, err = chat("/sav\n/quit\nnever read\n", person=True)
        assert code == 0 and "Did you mean /save?" in err and not asked

    def test_ctrl_c_stops_the_answer_and_twice_ends(
        self, chat: Command, asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def write(text: str) -> int:
            if text == "o":  # in the middle of the answer
                raise KeyboardInterrupt
            return len(text)

        stream = io.StringIO()
        monkeypatch.setattr(stream, "write", write)
        monkeypatch.setattr(sys, "stdout", stream)
        code, _, err = chat(f"one\n/save {tmp_path}/talk.jsonl\n", person=True)
        row = json.loads((tmp_path / "talk.jsonl").read_text())
        assert row["messages"][-1] == {"role": "assistant", "content": "No"}
        assert "stopped; what came of the answer is kept, /undo drops it. Ctrl-C again ends" in err
        assert code == 0, err

    def test_two_times_ctrl_c_at_the_prompt_end(
        self, chat: Command, asked: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = iter(["one", KeyboardInterrupt, "two", KeyboardInterrupt, KeyboardInterrupt])

        def type_line(prompt: str = "") -> str:
            line = next(lines)
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return str(line)

        monkeypatch.setattr("builtins.input", type_line)
        code, out, err = chat("", person=True)
        assert (code, out) == (130, "No1\nNo2\n")
        assert err.count("Ctrl-C again ends") == 2


@pytest.mark.slow
class TestTerminal:
    def test_a_person_at_a_terminal_sees_a_conversation(self, checkpoint: Path) -> None:
        child, terminal = pty.fork()
        if child == 0:
            os.execv(sys.executable, [sys.executable, "-m", "plmtune", "chat", str(checkpoint), *OPTIONS])
        seen, read = b"", 0

        def wait_for(mark: bytes) -> None:
            nonlocal seen, read
            end = time.monotonic() + 120
            while mark not in seen[read:]:
                assert time.monotonic() < end, seen
                if select.select([terminal], [], [], 1)[0]:
                    seen += os.read(terminal, 65536)
            read = seen.index(mark, read) + len(mark)

        wait_for(b"\n> ")
        os.write(terminal, "née 😀\n".encode())
        wait_for(b"of 512 tokens of context")
        wait_for(b"> ")
        os.write(terminal, b"\x03")
        wait_for(b"Ctrl-C again ends")
        os.write(terminal, b"\x1b[A\n")  # the line before, out of the history
        wait_for("née 😀".encode())
        wait_for(b"tokens of context")
        wait_for(b"> ")
        os.write(terminal, b"\x04")
        assert os.waitpid(child, 0)[1] == 0
        assert b"\x1b[2m6 tokens" in seen  # dim
