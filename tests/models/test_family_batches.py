"""Texts that are computed together have the numbers that each has by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from made_families import make

from plmtune.evaluation.scoring import Item, Scorer
from plmtune.inference.batching import BatchedGenerator
from plmtune.inference.request_queue import Request
from plmtune.inference.sampling import PrefixCache, generate
from plmtune.models.hf import load_model
from plmtune.modules.decoder import Decoder
from plmtune.modules.segments import Segments
from plmtune.preference.comparisons import Comparison, make_batch

# Windows, and RoPE whose frequencies depend on a text's length; then layers, positions and latents of other kinds.
NAMES = [
    "mistral", "gemma2", "gemma3", "phi3", "phi3-longrope", "llama-dynamic", "smollm3", "gpt2", "deepseek_v3",
]  # fmt: skip
LONGEST = 30  # llama-dynamic's max_seq_len is 32


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Decoder]]:
    directory = tmp_path_factory.mktemp("family")
    theirs = make(request.param, directory)
    yield theirs, load_model(directory).eval()


def some_ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def log_prob(model: Any, context: list[int], continuation: list[int], *, last: bool = False) -> float:
    """Of a continuation, by transformers, in a forward of its own.

    Args:
        last: the last token, which predicts nothing here, is a part of the text.
    """
    model(torch.tensor([[1]]))  # a dynamic scaling remembers the longest text until a short one
    text = [*context, *continuation]
    logits = model(torch.tensor([text if last else text[:-1]])).logits[0, len(context) - 1 : len(text) - 1]
    return float(logits.log_softmax(-1)[range(len(continuation)), continuation].sum())


def test_continuations_of_shared_contexts(family: tuple[Any, Decoder]) -> None:
    theirs, ours = family
    first = some_ids(0, 9)
    contexts = [first + some_ids(1, 2), first + some_ids(2, 14), some_ids(3, 5)]
    items = [Item(context, some_ids(4 + size, size)) for context in contexts for size in (3, 5, 6)]
    found = {number: score.log_prob for batch in Scorer(ours).score(items) for number, score in batch}
    for number, item in enumerate(items):
        assert found[number] == pytest.approx(log_prob(theirs, [*item.context], [*item.continuation]), abs=1e-3)


def test_rows_after_a_prefix(family: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = family
    monkeypatch.setattr("plmtune.evaluation.prefixes._SHORTEST_PREFIX", 4)
    monkeypatch.setattr("plmtune.evaluation.scoring._FORWARD_CPU", 1)
    monkeypatch.setattr("plmtune.evaluation.prefixes._BRANCHES", 12)  # so that a context of three is two rows
    first = some_ids(0, 9)
    items = [Item(first + some_ids(seed, 1), some_ids(9 + seed, size)) for seed in (1, 2) for size in (3, 5, 7)]
    found = {number: score.log_prob for batch in Scorer(ours).score(items) for number, score in batch}
    for number, item in enumerate(items):
        assert found[number] == pytest.approx(log_prob(theirs, [*item.context], [*item.continuation]), abs=1e-3)


@pytest.mark.parametrize("sizes", [(8, 5), (5, 15), (15, 5)])  # beyond the original length: neither, either
def test_both_answers_of_a_comparison(sizes: tuple[int, int], family: tuple[Any, Decoder]) -> None:
    theirs, ours = family
    prompt, answers = some_ids(0, 6), (some_ids(1, sizes[0]), some_ids(2, sizes[1]))
    parts = [np.array(ids, dtype=np.int32) for ids in (prompt, *answers)]
    apart = ours.rope_key(6 + sizes[0]) != ours.rope_key(6 + sizes[1])
    made = [Comparison(0, *parts, 0, "", apart=apart), Comparison(0, *parts[:2], None, 1, "")]
    batch = make_batch(made, [[0, 1]])
    with torch.no_grad():
        logits = ours(batch.tokens, mask=batch.mask, input_pos=batch.input_pos).flatten(0, 1)
    log_probs = logits[batch.positions].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    for number, answer in enumerate((*answers, answers[0])):
        found = float(log_probs[batch.completion == number].sum())
        assert found == pytest.approx(log_prob(theirs, prompt, answer, last=True), abs=1e-3)
        end = (batch.tokens.flatten()[batch.ends[number]], batch.input_pos.flatten()[batch.ends[number]])
        assert end == (answer[-1], len(prompt) + len(answer) - 1)


def test_answers_of_a_batch(family: tuple[Any, Decoder]) -> None:
    theirs, ours = family
    first = some_ids(0, 12)
    prompts = [first + some_ids(1, 1), first + some_ids(2, 1), some_ids(3, 4), some_ids(4, 18), some_ids(5, 10)]
    engine = BatchedGenerator(ours, batch_size=4, temperature=0)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(str(number), prompt, 8))
    answers = {answer.key: answer.tokens for answer in engine.run()}
    for number, prompt in enumerate(prompts):
        alone = [int(column) for column in generate(ours, torch.tensor([prompt]), max_new_tokens=8, temperature=0)]
        assert answers[str(number)] == alone
    ids = torch.tensor([prompts[0]])  # grows beyond RoPE's original length
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert answers["0"] == expected[0, len(prompts[0]) :].tolist()


def test_a_conversation_that_grows(family: tuple[Any, Decoder]) -> None:
    theirs, ours = family
    cache, text = PrefixCache(ours), some_ids(0, LONGEST)
    for length in (5, 12, 20, 26, 9):
        held = cache.resume(text[:length], 0)
        with torch.no_grad():
            found = ours(torch.tensor([text[held.length : length]]), cache=held)[0, -1]
            expected = theirs(torch.tensor([text[:length]])).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_texts_that_are_packed_into_a_row(family: tuple[Any, Decoder]) -> None:
    theirs, ours = family
    lengths = [[5, 17, 2], [20, 4]]
    rows = [[some_ids(size, size) for size in row] for row in lengths]
    tokens = torch.tensor([[token for text in texts for token in text] for texts in rows])
    positions = torch.tensor([[place for length in row for place in range(length)] for row in lengths])
    found = ours(tokens, mask=Segments.of(lengths), input_pos=positions)
    for row, texts in enumerate(rows):
        for text, logits in zip(texts, found[row].split(lengths[row]), strict=True):
            theirs(torch.tensor([[1]]))
            torch.testing.assert_close(logits, theirs(torch.tensor([text])).logits[0], atol=2e-4, rtol=0)
