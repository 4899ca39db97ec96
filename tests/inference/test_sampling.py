"""Sampling: the same tokens with and without a cache, alone and in a batch."""

from collections.abc import Iterator

import pytest
import torch

from plmtune.inference.sampling import complete, generate, penalize, release, sample, top_k_top_p
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component

ATTENTIONS = {
    "mla": component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12),
    "gqa": component("attention", "gqa", num_kv_heads=2),
}


def small(attention: Component = ATTENTIONS["mla"], vocab_size: int = 101) -> Decoder:
    torch.manual_seed(0)
    return plm(
        vocab_size,
        attention=attention,
        ffn=component("ffn", "squared_relu", hidden_dim=96),
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        max_seq_len=64,
        init_std=0.15,
    )


def greedy(model: Decoder, prompts: torch.Tensor, n: int, **options: object) -> torch.Tensor:
    return torch.stack(list(generate(model, prompts, max_new_tokens=n, temperature=0, **options)), 1)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
class TestGreedy:
    def test_tokens_are_those_of_full_forwards(self, attention: Component) -> None:
        model = small(attention)
        prompt = torch.randint(101, (2, 9))
        ids = prompt
        with torch.no_grad():
            for _ in range(20):
                ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
        assert torch.equal(greedy(model, prompt, 20), ids[:, 9:])


class TestCache:
    def test_what_it_holds_comes_before_the_prompt(self) -> None:
        model, prompt = small(), torch.randint(101, (2, 9))
        cache = model.new_cache(2, 64)
        model(prompt[:, :4], cache=cache, hidden=True)
        assert torch.equal(greedy(model, prompt[:, 4:], 8, cache=cache), greedy(model, prompt, 8))
        with pytest.raises(ValueError, match=r"62 prompt and 5 new tokens exceed the model's max_seq_len \(64\)"):
            next(generate(model, torch.zeros(2, 46, dtype=torch.long), max_new_tokens=5, cache=cache))


class TestEnd:
    def test_more_than_the_model_takes_is_refused_with_the_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"60 prompt and 5 new tokens exceed the model's max_seq_len \(64\)"):
            next(generate(small(), torch.zeros(1, 60, dtype=torch.long), max_new_tokens=5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -1}, r"temperature \(-1\) must be at least 0"),
            ({"temperature": float("nan")}, r"temperature \(nan\) must be at least 0"),
            ({"temperature": float("inf")}, r"temperature \(inf\) must be at least 0"),
            ({"min_p": -0.1}, r"min_p \(-0.1\) must be at least 0 and at most 1"),
            ({"min_p": float("nan")}, r"min_p \(nan\) must be at least 0 and at most 1"),
            ({"repetition_penalty": 0}, r"repetition_penalty \(0\) must be above 0"),
            ({"repetition_penalty": float("nan")}, r"repetition_penalty \(nan\) must be above 0"),
            ({"top_k": 0}, r"top_k \(0\) must be at least 1"),
            ({"top_p": 1.5}, r"top_p \(1.5\) must be above 0 and at most 1"),
            ({"max_new_tokens": -1}, r"max_new_tokens \(-1\) must be at least 0"),
        ],
    )
    def test_impossible_settings_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            next(generate(small(), torch.zeros(1, 2, dtype=torch.long), **({"max_new_tokens": 2} | options)))

    def test_an_output_that_is_no_number_is_refused(self) -> None:
        model = small()
        with torch.no_grad():
            model.tok_embeddings.weight[7] = float("nan")
        for temperature in (0, 1):
            with pytest.raises(FloatingPointError, match="the model's output after 3 tokens is not a number"):
                next(generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5, temperature=temperature))

    def test_an_empty_prompt_is_refused(self) -> None:
        with pytest.raises(ValueError, match="prompt is empty"):
            next(generate(small(), torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2))


class TestSample:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[None].expand(4000, -1)

    def shares(self, **options: float) -> list[float]:
        drawn = sample(self.logits, generator=torch.Generator().manual_seed(0), **options)
        return (drawn.bincount(minlength=4) / 4000).tolist()

    def test_draws_by_probability(self) -> None:
        assert self.shares() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)

    def test_temperature_sharpens(self) -> None:
        squares = torch.tensor([0.5, 0.25, 0.15, 0.1]) ** 2
        assert self.shares(temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)

    def test_top_k_keeps_the_likeliest(self) -> None:
        assert self.shares(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)

    def test_top_p_keeps_the_fewest_that_reach_it(self) -> None:
        assert self.shares(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
        assert self.shares(top_p=1e-6) == [1, 0, 0, 0]

    @pytest.mark.parametrize("scale", [0.01, 1, 3])
    def test_top_p_of_a_large_vocabulary_equals_the_sorted_sum(self, scale: float) -> None:
        logits = scale * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
        probability, ids = logits.softmax(-1).sort(descending=True)
        before = probability.cumsum(-1) - probability
        expected = torch.zeros(3, 5000, dtype=torch.bool).scatter(-1, ids, before < 0.9)
        kept = top_k_top_p(logits, None, 0.9)
        assert ((kept > float("-inf")) == expected).float().mean() > 0.9999  # of near ties either may stay
        assert torch.equal(kept[kept > float("-inf")], logits[kept > float("-inf")])

    def test_min_p_keeps_shares_of_the_likeliest(self) -> None:
        assert self.shares(min_p=0.4) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
        assert self.shares(min_p=1.0) == [1, 0, 0, 0]

    @pytest.mark.parametrize("top", [(None, None), (50, None), (None, 0.8), (50, 0.8)])
    @pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5])
    def test_min_p_keeps_what_transformers_keeps(self, min_p: float, top: tuple[int | None, float | None]) -> None:
        transformers = pytest.importorskip("transformers")
        logits = 2 * torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
        theirs = transformers.MinPLogitsWarper(min_p)(None, top_k_top_p(logits, *top))
        assert torch.equal(top_k_top_p(logits, *top, min_p), theirs)

    @pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
    def test_a_repetition_penalty_is_that_of_transformers(self, penalty: float) -> None:
        transformers = pytest.importorskip("transformers")
        logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
        seen = [[3, 3, 7], [49, 0, 11]]
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), logits.clone())
        assert torch.equal(penalize(logits, seen, penalty), theirs)
        assert torch.equal(penalize(logits, [[*ids, 50] for ids in seen], penalty), theirs)  # an id without text

    @pytest.mark.parametrize("temperature", [1.0, 1e-30])
    def test_a_repetition_penalty_near_0_gives_the_greatest_known_token(self, temperature: float) -> None:
        scores = penalize(torch.tensor([[3.0, 1.0, -2.0, 0.0]]), [[1, 2, 3]], 1e-300)
        assert scores.isfinite().all()
        assert sample(scores, temperature=temperature, generator=torch.Generator().manual_seed(0)).tolist() == [1]

    def test_a_repetition_penalty_counts_the_prompt_what_is_written_and_what_the_cache_holds(self) -> None:
        model, prompt = small().eval(), [1, 2, 3, 4]
        expected = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                logits = model(torch.tensor([expected]))[:, -1]
                expected.append(int(penalize(logits, [expected], 5.0).argmax()))
        greedy = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 5.0}
        found = [int(token) for token in generate(model, torch.tensor([prompt]), **greedy)]
        cache = model.new_cache(1, 20)
        with torch.no_grad():
            model(torch.tensor([prompt[:2]]), cache=cache)
        later = generate(model, torch.tensor([prompt[2:]]), cache=cache, before=prompt[:2], **greedy)
        assert found == [int(token) for token in later] == expected[4:]
        assert len(set(found)) > 8

    @pytest.mark.parametrize("temperature", [0, 1e-40, 1e-7])
    def test_temperature_zero_takes_the_likeliest(self, temperature: float) -> None:
        assert self.shares(temperature=temperature) == [1, 0, 0, 0]

    def test_the_seed_decides(self) -> None:
        model, prompt = small(), torch.tensor([[1, 2, 3]])
        runs = [
            torch.stack(list(generate(model, prompt, max_new_tokens=20, generator=torch.Generator().manual_seed(s))))
            for s in (1, 1, 2)
        ]
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_ids_without_text_are_never_drawn(self) -> None:
        model = small()
        with torch.no_grad():
            model.tok_embeddings.weight[90:] *= 100
        drawn = torch.cat(list(generate(model, torch.tensor([[1, 2]]), max_new_tokens=50, num_tokens=90)))
        assert drawn.max() < 90


class FakeTokenizer:
    """Bytes as ids; 256 ends a text."""

    eos_id, start_ids = 256, (256,)
    end_ids = (256,)
    num_tokens = 257

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        return list(text.encode())

    def with_bos(self, ids: list[int]) -> list[int]:
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256)


class TestStops:
    @pytest.mark.parametrize(
        "stops", [["ab"], ["ab", "b"], ["aab", "c"], ["é"], ["\n\n"], ["aaa"], ["never"], ["ba", "abc"]]
    )
    @pytest.mark.parametrize("text", ["xabaabcé\n\naaa", "aaaab", "ééé", "ababab", "\n\n", "c", "plain"])
    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_cut_a_text_exactly_wherever_tokens_begin_and_end(self, stops: list[str], text: str, size: int) -> None:
        data, until = text.encode(), [stop.encode() for stop in stops]
        shown, held, stopped = b"", b"", False
        for at in range(0, len(data), size):
            new, held, stopped = release(held + data[at : at + size], until)
            shown += new
            if stopped:
                break
        # The stop that is whole first ends it, as it does where tokens are looked at one by one.
        whole = min((at + len(stop) for stop in until if (at := data.find(stop)) >= 0), default=None)
        assert stopped == (whole is not None)
        if not stopped:
            assert shown + held == data
        elif size == 1:
            assert shown in [data[: whole - len(stop)] for stop in until if data[:whole].endswith(stop)]
        assert not any(stop in shown for stop in until)

    def test_end_a_completion_and_are_not_given_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = [torch.tensor([byte]) for byte in b"one ## two ###END three"]
        monkeypatch.setattr("plmtune.inference.sampling.generate", lambda *args, **options: iter(columns))
        options = {"max_new_tokens": 30, "until": ["###", "four"]}
        pieces = list(complete(small(vocab_size=260), FakeTokenizer(), "a", **options))
        assert "".join(pieces) == "one ## two "
        assert pieces[4:7] == ["", "", "## "]  # held back until it is known to be no stop

    def test_that_begin_and_never_end_are_given_out_at_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = [torch.tensor([byte]) for byte in (*b"one ##", 256)]
        monkeypatch.setattr("plmtune.inference.sampling.generate", lambda *args, **options: iter(columns))
        assert (
            "".join(complete(small(vocab_size=260), FakeTokenizer(), "a", max_new_tokens=9, until=["###"])) == "one ##"
        )

    def test_an_empty_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a stop string is empty"):
            next(complete(small(vocab_size=260), FakeTokenizer(), "a", max_new_tokens=1, until=["a", ""]))


class TestComplete:
    def test_characters_come_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = [torch.tensor([byte]) for byte in "é😀".encode()] + [torch.tensor([0xE4])]
        monkeypatch.setattr("plmtune.inference.sampling.generate", lambda *args, **options: iter(columns))
        pieces = list(complete(small(vocab_size=260), FakeTokenizer(), "a", max_new_tokens=9))
        assert pieces == ["", "é", "", "", "", "😀", "", "\ufffd"]

    def test_stops_at_the_end_of_the_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = [torch.tensor([byte]) for byte in (65, 66, 256, 67)]
        monkeypatch.setattr("plmtune.inference.sampling.generate", lambda *args, **options: iter(columns))
        assert "".join(complete(small(vocab_size=260), FakeTokenizer(), "a", max_new_tokens=9)) == "AB"

    def test_ids_go_in_as_they_are_and_other_ends_stop_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        def columns(model: Decoder, tokens: torch.Tensor, **options: object) -> Iterator[torch.Tensor]:
            seen.append(tokens.tolist())
            yield from (torch.tensor([byte]) for byte in (65, 66, 258, 67))

        monkeypatch.setattr("plmtune.inference.sampling.generate", columns)
        pieces = complete(small(vocab_size=260), FakeTokenizer(), [7, 257], max_new_tokens=9, end_ids=[258])
        assert "".join(pieces) == "AB"
        assert seen == [[[7, 257]]]

    def test_goes_no_further_than_the_model(self) -> None:
        pieces = list(complete(small(vocab_size=260), FakeTokenizer(), "a" * 60, max_new_tokens=100))
        assert len(pieces) <= 5
        with pytest.raises(ValueError, match="the prompt has 64 tokens, the model's max_seq_len is 64"):
            next(complete(small(vocab_size=260), FakeTokenizer(), "a" * 64, max_new_tokens=1))

    def test_an_empty_prompt_starts_a_new_document(self) -> None:
        assert list(complete(small(vocab_size=260), FakeTokenizer(), "", max_new_tokens=3))
