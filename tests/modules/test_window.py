"""Sliding windows, soft caps and positions by layer, against naive attention, in every way that a model is called."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.losses.log_probs import log_probs
from plmtune.models.gemma import gemma2, gemma3
from plmtune.models.gpt2 import gpt2
from plmtune.models.smollm3 import smollm3
from plmtune.modules.attention_kernels import attend
from plmtune.modules.cache import SharedPrefix, Slots
from plmtune.modules.decoder import Decoder
from plmtune.modules.segments import Segments
from plmtune.registry import component


def gqa(**settings: object) -> object:
    return component("attention", "gqa", num_kv_heads=2, head_dim=8, **settings)


def model(name: str) -> Decoder:
    """A small model of a family, with weights far from an initial model's."""
    sizes = {"embed_dim": 24, "num_layers": 3, "num_heads": 4, "max_seq_len": 64, "init_std": 0.3}
    torch.manual_seed(0)
    if name == "gemma2":
        made = gemma2(50, attention=gqa(window=5, soft_cap=2.0), ffn=component("ffn", "geglu", hidden_dim=40),
                      layers=["local", "global", "nope"], logit_soft_cap=3.0, **sizes)  # fmt: skip
    elif name == "gemma3":
        made = gemma3(50, attention=gqa(window=5, qk_norm=True), ffn=component("ffn", "geglu", hidden_dim=40),
                      layers=["local", "global"], **sizes)  # fmt: skip
    elif name == "smollm3":
        made = smollm3(50, attention=gqa(), ffn=component("ffn", "swiglu", hidden_dim=40), **sizes)
    else:
        made = gpt2(50, attention=gqa(rope=False, bias=True), ffn=component("ffn", "gelu", hidden_dim=40), **sizes)
    return made.eval()


NAMES = ("gemma2", "gemma3", "smollm3", "gpt2")


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, soft_cap: float | None) -> Tensor:
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    out = torch.zeros(*q.shape[:3], v.shape[3])
    before = k.shape[2] - q.shape[2]
    for at in range(q.shape[2]):
        last = before + at
        first = max(0, last - window + 1)
        scores = torch.einsum("bhn,bhtn->bht", q[:, :, at], k[:, :, first : last + 1]) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        out[:, :, at] = torch.einsum("bht,bhtv->bhv", scores.softmax(-1), v[:, :, first : last + 1])
    return out


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("queries", [1, 6, 9])
def test_attention_equals_the_naive_sum(queries: int, window: int, soft_cap: float | None) -> None:
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    found = attend(q, k, v, None, 0.5, window=window, soft_cap=soft_cap)
    torch.testing.assert_close(found, naive(q, k, v, 0.5, window, soft_cap))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_gradients")
class TestDecoder:
    def test_packed_texts_equal_texts_alone(self, name: str) -> None:
        made, lengths = model(name), (11, 7, 14)
        ids = torch.randint(0, 50, (1, sum(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        packed = made(ids, mask=Segments.of([lengths]), input_pos=positions)
        dense = made(ids, mask=Segments.of([lengths]).dense, input_pos=positions)
        alone = torch.cat([made(part) for part in ids.split(lengths, dim=1)], 1)
        torch.testing.assert_close(packed, alone)
        torch.testing.assert_close(dense, alone)

    def test_rows_of_other_lengths_decode_as_each_alone(self, name: str) -> None:
        made, lengths = model(name), torch.tensor([12, 7, 3])
        slots = Slots(made.new_cache(3, 32).layers)
        texts = [torch.randint(0, 50, (1, int(length) + 4)) for length in lengths]
        for row, text in enumerate(texts):
            made(text[:, : lengths[row]], cache=slots.prefill(torch.tensor([row])))
        for step in range(4):
            at = lengths + step
            longest = int(at.max())
            mask = torch.arange(longest + 1) <= at[:, None, None]
            new = torch.stack([text[0, at[row]] for row, text in enumerate(texts)])[:, None]
            found = made(new, mask=mask, input_pos=at[:, None], cache=slots.decode(at, longest))
            for row, text in enumerate(texts):
                torch.testing.assert_close(found[row, 0], made(text[:, : at[row] + 1])[0, -1])

    def test_a_row_under_a_shared_prefix_equals_the_whole(self, name: str) -> None:
        made, ids = model(name), torch.randint(0, 50, (1, 20))
        cache = made.new_cache(1, 9)
        made(ids[:, :9], cache=cache)
        rows = ids[:, 9:].repeat(2, 1)
        positions = torch.arange(9, 20).expand(2, -1)
        found = made(rows, input_pos=positions, cache=SharedPrefix(cache))
        torch.testing.assert_close(found, made(ids)[:, 9:].repeat(2, 1, 1))


class TestLosses:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_capped_logits_have_the_gradients_of_autograd(self, dtype: torch.dtype) -> None:
        hidden, weight = torch.randn(9, 8), torch.randn(50, 8)
        targets = torch.randint(0, 50, (9,)).index_fill(0, torch.tensor([3]), -100)
        settings = {"soft_cap": 2.5}
        ours = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        loss = cross_entropy(chunk_rows=4)(*ours, targets, **settings)
        loss.backward()
        exact = [tensor.detach().float().requires_grad_() for tensor in ours]
        logits = 2.5 * torch.tanh(exact[0] @ exact[1].T / 2.5)
        expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        expected.backward()
        tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
        torch.testing.assert_close(loss, expected, **tolerance)
        for mine, theirs in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad.to(dtype), **tolerance)  # type: ignore[union-attr]

    @pytest.mark.parametrize("frozen", [True, False])
    def test_log_probs_of_capped_logits_have_the_gradients_of_autograd(self, frozen: bool) -> None:
        hidden, weight = torch.randn(9, 8), torch.randn(50, 8)
        targets, rows = torch.randint(0, 50, (9,)), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
        factors = torch.tensor([1.0, -2.0, 0.5])
        ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        (log_probs(*ours, targets, rows, 3, chunk_rows=4, soft_cap=2.5) * factors).sum().backward()
        exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        logits = 2.5 * torch.tanh(exact[0] @ exact[1].T / 2.5)
        tokens = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (torch.zeros(3).index_add(0, rows, tokens) * factors).sum().backward()
        torch.testing.assert_close(ours[0].grad, exact[0].grad)
        torch.testing.assert_close(ours[1].grad, exact[1].grad)

    @pytest.mark.parametrize("name", NAMES)
    def test_over_hidden_states_equal_those_over_logits(self, name: str) -> None:
        made = model(name)
        ids = torch.randint(0, 50, (2, 12))
        hidden = made(ids, hidden=True).flatten(0, 1)
        targets = torch.randint(0, 50, (24,))
        found = cross_entropy()(hidden, made.head_weight, targets, **made.loss_settings)
        expected = torch.nn.functional.cross_entropy(made(ids).flatten(0, 1), targets, reduction="sum")
        torch.testing.assert_close(found, expected)


def test_weights_of_norms_with_an_offset_start_at_zero() -> None:
    made = copy.deepcopy(model("gemma3"))
    made.init_weights(torch.Generator().manual_seed(0))
    assert float(made.norm.weight.detach().abs().max()) == 0  # type: ignore[union-attr,operator]
    assert float(made.layers[0].attention.q_norm.weight.detach().abs().max()) == 0  # type: ignore[union-attr]
