"""Answers as text: cut where their stop begins, whatever tokens it is made of, and written whatever memory there is."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_eval.models.utils import postprocess_generated_text

from plmtune.errors import LogitsNotFinite, UserError
from plmtune.evaluation import writing
from plmtune.evaluation.writing import Prompt, Writer, Written
from plmtune.inference.batching import BatchedGenerator
from plmtune.inference.request_queue import Request
from plmtune.inference.sampling import generate
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bundled()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    torch.manual_seed(0)
    return plm(
        tokenizer.vocab_size,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=64),
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        max_seq_len=64,
        init_std=0.3,
    ).eval()


@pytest.fixture
def says(model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the model write given ids after any prompt, whatever it computes; then its end."""

    def set_answer(ids: Sequence[int]) -> None:
        whole = [*ids, tokenizer.eos_id]

        def draw(self: BatchedGenerator, states: torch.Tensor, draws: list[tuple[Request, list[int]]]) -> list[int]:
            return [whole[len(written)] for _, written in draws]

        monkeypatch.setattr(BatchedGenerator, "_draw", draw)

    return set_answer


def write(writer: Writer, prompts: Sequence[Prompt], known: Sequence[int] = ()) -> dict[int, Written]:
    return dict(writer.write(prompts, known))


def greedy(model: Decoder, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
    columns = generate(model, torch.tensor([tokens]), max_new_tokens=max_new_tokens, temperature=0)
    return [int(column) for column in columns]


PROMPTS = [[1 + i, 300 + i, *range(20 + i, 20 + 3 * i)] for i in range(10)]


class TestText:
    @pytest.mark.parametrize(
        ("spoken", "until", "text"),
        [
            ("The answer is 4.\n\nQuestion: why", ("Question:",), "The answer is 4.\n\n"),
            ("The answer is 4.\n\nQuestion: why", ("estion", "\n\n"), "The answer is 4."),
            ("café 你好。再见", ("。",), "café 你好"),
            ("café 你好。再见", ("é",), "caf"),
            ("nothing of it", ("Question:", "\n\n"), "nothing of it"),
            ("nothing of it", ("", "no such"), "nothing of it"),
            ("at once", ("at",), ""),
            ("", ("a",), ""),
        ],
    )
    def test_ends_before_the_first_stop_as_in_lm_eval(
        self, model: Decoder, tokenizer: Tokenizer, says: Any, spoken: str, until: tuple[str, ...], text: str
    ) -> None:
        ids = tokenizer.encode(spoken)
        says(ids)
        (found,) = write(Writer(model, tokenizer), [Prompt([1, 2], 40, until)]).values()
        assert found.text == text == postprocess_generated_text(spoken, list(until), None)
        assert found.finish_reason == ("stop" if text != spoken else "end")
        # Nothing is written past the token that completes the stop.
        written = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        ends = [n for n, said in enumerate(written) if any(stop and stop in said for stop in until)]
        assert found.tokens == ids[: ends[0] if ends else None]

    def test_special_tokens_are_no_part_of_it_but_end_it(self, model: Decoder, tokenizer: Tokenizer, says: Any) -> None:
        said = tokenizer.encode("good<|im_start|>bye<|im_end|>more", specials=True)
        says(said)
        writer = Writer(model, tokenizer)
        assert write(writer, [Prompt([1], 30)])[0] == Written("goodbyemore", said, "end")
        end = said.index(tokenizer.specials["<|im_end|>"])
        assert write(writer, [Prompt([1], 30, ("<|im_end|>",))])[0] == Written("goodbye", said[: end + 1], "stop")
        also_ends = Writer(model, tokenizer, end_ids=[tokenizer.specials["<|im_end|>"]])
        assert write(also_ends, [Prompt([1], 30)])[0] == Written("goodbye", said[:end], "end")

    def test_half_a_character_is_the_sign_for_it(self, model: Decoder, tokenizer: Tokenizer, says: Any) -> None:
        says(tokenizer.encode("a你"))
        whole = tokenizer.encode("a你")
        cut = write(Writer(model, tokenizer), [Prompt([1], len(whole) - 1)])[0]
        assert cut.finish_reason == "length"
        assert cut.text == "a\ufffd"


class TestWrite:
    def test_each_is_the_greedy_answer_whatever_the_batch(self, model: Decoder, tokenizer: Tokenizer) -> None:
        expected = {i: greedy(model, tokens, 5 + i) for i, tokens in enumerate(PROMPTS)}
        prompts = [Prompt(tokens, 5 + i) for i, tokens in enumerate(PROMPTS)]
        for batch_size in (1, 4, None):
            found = write(Writer(model, tokenizer, batch_size=batch_size), prompts)
            assert {i: written.tokens for i, written in found.items()} == expected

    def test_settings_may_differ_from_prompt_to_prompt(self, model: Decoder, tokenizer: Tokenizer) -> None:
        drawn = [Prompt(PROMPTS[4], 10, temperature=1.0, seed=seed) for seed in (1, 2, 1)]
        mixed = [Prompt(PROMPTS[3], 5), drawn[0], Prompt(PROMPTS[5], 5), *drawn[1:]]
        found = write(Writer(model, tokenizer, batch_size=2), mixed)
        assert found[0].tokens == greedy(model, PROMPTS[3], 5)
        assert found[2].tokens == greedy(model, PROMPTS[5], 5)
        assert found[1] == found[4] != found[3]
        assert write(Writer(model, tokenizer), drawn[:1])[0] == found[1]

    def test_what_is_known_is_left_out(self, model: Decoder, tokenizer: Tokenizer) -> None:
        prompts = [Prompt(tokens, 3) for tokens in PROMPTS]
        writer = Writer(model, tokenizer, batch_size=3)
        found = write(writer, prompts, known=[0, 4, 9])
        assert sorted(found) == [1, 2, 3, 5, 6, 7, 8]
        assert write(writer, prompts, known=range(10)) == {}
        assert write(writer, []) == {}
        assert found[5].tokens == greedy(model, PROMPTS[5], 3)

    def test_a_prompt_that_is_too_long_loses_its_beginning(self, model: Decoder, tokenizer: Tokenizer) -> None:
        long = [i % 200 for i in range(100)]
        found = write(Writer(model, tokenizer), [Prompt(long, 10), Prompt(long[-54:], 10), Prompt(long[:30], 10)])
        assert found[0] == found[1]
        assert found[0].tokens == greedy(model, long[-54:], 10)


class TestMemory:
    def test_where_it_runs_out_fewer_go_on_and_what_is_done_stays(
        self, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forward = Decoder.forward
        rows: list[int] = []

        def small(decoder: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            # Room for three rows, and for more only where they read prompts: some are done before it fails.
            rows.append(tokens.shape[0])
            if len(rows) > 4 and tokens.shape[0] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(decoder, tokens, **options)

        prompts = [Prompt(tokens, 1 + i) for i, tokens in enumerate(PROMPTS)]
        expected = {i: greedy(model, prompt.tokens, prompt.max_new_tokens) for i, prompt in enumerate(prompts)}
        monkeypatch.setattr(Decoder, "forward", small)
        found: dict[int, Written] = {}
        for index, written in Writer(model, tokenizer, batch_size=8).write(prompts):
            assert index not in found
            found[index] = written
        assert {index: written.tokens for index, written in found.items()} == expected
        assert max(rows) > 3
        assert max(rows[-5:]) <= 3

    def test_a_prompt_that_does_not_fit_alone_is_an_error_of_the_user(
        self, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none(decoder: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(Decoder, "forward", none)
        with pytest.raises(UserError, match=r"Memory does not suffice for one prompt of 11 tokens on cpu\. End other"):
            write(Writer(model, tokenizer, batch_size=4), [Prompt(range(11), 4)] * 3)

    def test_other_errors_are_no_reason_to_try_again(
        self, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(decoder: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        monkeypatch.setattr(Decoder, "forward", broken)
        with pytest.raises(RuntimeError, match="shapes"):
            write(Writer(model, tokenizer), [Prompt([1], 4)])

    def test_how_many_go_together_follows_from_what_is_free(
        self, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Two layers of 24 numbers of four bytes a token, 20 tokens, and half of memory for the cache.
        monkeypatch.setattr(writing, "available_memory", lambda device: 2 * 5 * (2 * 24 * 4 * 20))
        sizes: list[int] = []
        new_cache = Decoder.new_cache

        def counted(decoder: Decoder, batch_size: int, max_seq_len: int) -> Any:
            sizes.append(batch_size)
            return new_cache(decoder, batch_size, max_seq_len)

        monkeypatch.setattr(Decoder, "new_cache", counted)
        found = write(Writer(model, tokenizer), [Prompt([i, *range(11)], 8) for i in range(50, 62)])
        assert len(found) == 12
        assert max(sizes) == 5


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            (Prompt([1], 64), r"prompt 1: max_new_tokens \(64\) leaves no room .* max_seq_len \(64\)"),
            (Prompt([], 4), "prompt 1 is empty"),
            (Prompt([1], 4, temperature=-1), r"prompt 1: temperature \(-1\) must be at least 0"),
        ],
    )
    def test_a_prompt_that_cannot_be_continued_is_refused_before_any_is_read(
        self, model: Decoder, tokenizer: Tokenizer, prompt: Prompt, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            Writer(model, tokenizer).write([Prompt([1], 4), prompt])

    def test_a_batch_of_none_is_refused(self, model: Decoder, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
            Writer(model, tokenizer, batch_size=0)

    def test_numbers_that_are_none_name_the_prompt_and_keep_what_is_done(
        self, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forward = Decoder.forward

        def wrong(decoder: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            states = forward(decoder, tokens, **options)
            states[(tokens == 77).any(1)] = float("nan")
            return states

        monkeypatch.setattr(Decoder, "forward", wrong)
        found = []
        with pytest.raises(LogitsNotFinite) as caught:
            for index, _ in Writer(model, tokenizer, batch_size=1).write(
                [Prompt([1], 2), Prompt([5, 77], 2), Prompt([1, 2, 3], 2)]
            ):
                found.append(index)
        assert caught.value.item == 1
        assert found == [2]
