"""plmtune generate, as a person types it."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from in_process import run, save_small

from plmtune.tokenizers.tokenizer_files import byte


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("model"))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plmtune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return functools.partial(run, monkeypatch, capsys, "generate")


class TestGenerate:
    def test_writes_text_to_stdout_and_speed_to_stderr_and_the_seed_decides(
        self, checkpoint: Path, plmtune: Command
    ) -> None:
        options = (
            "--device",
            "cpu",
            "--max-new-tokens",
            20,
            "--temperature",
            1,
            "--top-k",
            200,
            "--top-p",
            0.99,
        )
        code, out, err = plmtune(checkpoint, "--prompt", "héllo", *options, "--seed", 3)
        assert code == 0, err
        assert len(out) > 1
        assert "tokens/s" in err
        assert plmtune(checkpoint, "--prompt", "-", *options, "--seed", 3, stdin="héllo".encode())[1] == out
        assert plmtune(checkpoint, "--prompt", "héllo", *options, "--seed", 4)[1] != out

    def test_stops_before_each_stop_string(
        self, checkpoint: Path, plmtune: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[dict] = []

        def columns(model: object, tokens: torch.Tensor, **options: object) -> Iterator[torch.Tensor]:
            seen.append(options)
            yield from (torch.tensor([token]) for token in b"one\n\ntwo")

        monkeypatch.setattr("plmtune.inference.sampling.generate", columns)
        options = ("--min-p", "0.1", "--repetition-penalty", "1.5", "--stop", "wo", "--stop", "\\n\\n")
        assert plmtune(checkpoint, "--prompt", "a", *options)[:2] == (0, "one\n")
        assert (seen[0]["min_p"], seen[0]["repetition_penalty"]) == (0.1, 1.5)

    @pytest.mark.parametrize(("asked", "said"), [(100_000, True), (55, True), (54, False)])
    def test_says_where_the_context_holds_fewer_tokens_than_are_asked_for(
        self, checkpoint: Path, plmtune: Command, asked: int, said: bool
    ) -> None:
        code, _, err = plmtune(checkpoint, "--prompt", "a" * 10, "--max-new-tokens", asked)
        wanted = f"--max-new-tokens {asked:,}: at most 54 are written, as the context of 64 tokens holds the 10 of"
        assert (code, wanted in " ".join(err.split())) == (0, said)

    @pytest.mark.parametrize(
        ("arguments", "stdin", "message"),
        [
            (
                ("{checkpoint}", "--prompt", "a" * 64),
                b"",
                "the prompt has 64 tokens, the model's max_seq_len is 64",
            ),
            (("{checkpoint}", "--prompt", "-"), b"\xff", "The prompt on stdin is not UTF-8"),
            (
                ("{checkpoint}", "--prompt", "a", "--device", "warp"),
                b"",
                "--device warp: unknown. Known: cpu, ",
            ),
            (
                ("{checkpoint}", "--prompt", "a", "--chat"),
                b"",
                "Name one: --chat-template chatml",
            ),
            (
                ("{checkpoint}", "--prompt", "a", "--system", "b"),
                b"",
                "--system says how a message is put to the model",
            ),
            (
                ("{checkpoint}", "--prompt", "<|endoftext|>", "--chat", "--chat-template", "plain"),
                b"",
                "The message holds the text of the special token <|endoftext|> in turn 1 (user)",
            ),
            (("{checkpoint}/nothing", "--prompt", "a"), b"", "/nothing (seen from "),
            (("{checkpoint}", "--prompt", "a", "--temperature", "nan"), b"", "nan is no finite number"),
            (("{checkpoint}", "--prompt", "a", "--repetition-penalty", "0"), b"", "above 0 and at most 100, not 0"),
            (("{checkpoint}", "--prompt", "a", "--min-p", "1.5"), b"", "must be at least 0 and at most 1, not 1.5"),
            (("{checkpoint}", "--prompt", "a", "--stop", ""), b"", "a stop string is empty"),
        ],
    )
    def test_mistakes_are_one_sentence_and_exit_code_2(
        self, checkpoint: Path, plmtune: Command, arguments: tuple[str, ...], stdin: bytes, message: str
    ) -> None:
        code, out, err = plmtune(*(a.format(checkpoint=checkpoint) for a in arguments), stdin=stdin)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err


class TestChat:
    def test_answers_the_message_as_the_template_puts_it_and_stops_at_its_end(
        self, checkpoint: Path, plmtune: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        template = checkpoint / "short.jinja"
        template.write_text(
            "{% for m in messages %}{{ m.role[0] + m.content }}"
            "{{ eos_token if m.role == 'assistant' else '!' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
        )
        seen = []

        def columns(model: object, tokens: torch.Tensor, **options: object) -> Iterator[torch.Tensor]:
            seen.append(bytes(tokens[0].tolist()))
            yield from (torch.tensor([token]) for token in (*b"yes", byte().eos_id, *b"no"))

        monkeypatch.setattr("plmtune.inference.sampling.generate", columns)
        options = ("--chat", "--chat-template", template, "--system", "be kind", "--device", "cpu")
        code, out, err = plmtune(checkpoint, "--prompt", "go?", *options)
        assert code == 0, err
        assert seen == [b"sbe kind!ugo?!a"]
        assert out == "yes\n"


class TestModelsThatWereOnlyPretrained:
    @pytest.mark.parametrize(("recipe", "told"), [("pretrain", True), ("sft", False)])
    def test_are_told_from_those_taught_to_answer(
        self, recipe: str, told: bool, checkpoint: Path, plmtune: Command, tmp_path: Path
    ) -> None:
        inside = tmp_path / "run" / "checkpoints" / "step-00000001"
        shutil.copytree(checkpoint, inside)
        (tmp_path / "run" / "config.yaml").write_text(f"recipe: {recipe}\nname: x\n")
        for where in (tmp_path / "run", inside):
            options = ("--device", "cpu", "--prompt", "Hi", "--chat", "--chat-template", "plain", "--max-new-tokens", 1)
            code, _, err = plmtune(where, *options)
            assert code == 0, err
            assert ("pretrained, not taught to answer: plmtune run sft init_from=" in err) == told
