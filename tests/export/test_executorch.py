"""Programs for ExecuTorch: the step that is lowered is the decoder, and what runs is the step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_plm
from torch import Tensor, nn

from plmtune.errors import UserError
from plmtune.export.contents import Contents
from plmtune.export.executorch import check_scheme, executorch_formats, export_pte, make_step
from plmtune.export.verify import _quantized_like
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized, QuantizedLinear
from plmtune.quantization.quantize import quantize
from plmtune.registry import load
from plmtune.tokenizers.tokenizer_files import byte, load_tokenizer

CONTEXT = 32
DYNAMIC = "int8_dynamic_int8"


def small_plm(tied: bool = True) -> Decoder:
    return tiny_plm(byte().vocab_size, mla={"v_head_dim": 16}, tie_embeddings=tied).eval()


def small_llama() -> Decoder:
    return tiny_llama(byte().vocab_size, gqa={"bias": True}).eval()


def quantized(make: Callable[[], Decoder], scheme: str, **settings: object) -> Decoder:
    model = make()
    quantize(model, load("quantization", scheme)(model=model, **({"embedding": DYNAMIC} | settings)))
    return model


def some_ids(length: int = CONTEXT, seed: int = 1) -> Tensor:
    return torch.randint(byte().vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def token_by_token(model: Decoder, ids: Tensor) -> Tensor:
    """Logits, [s, v], of a decoder that is given one token at a time."""
    cache = model.new_cache(1, CONTEXT)
    return torch.cat([model(ids[:, i : i + 1], cache=cache)[0] for i in range(ids.shape[1])])


@torch.no_grad()
def of_step(step: Any, ids: Tensor) -> Tensor:
    return torch.cat([step(ids[:, i : i + 1].contiguous(), torch.tensor([i])) for i in range(ids.shape[1])])


@torch.no_grad()
def near_ties(model: Decoder, ids: Tensor, *, within: float = 4e-5) -> Tensor:
    """Say where a quantized model's numbers are not determined by its weights alone.

    A dynamic format rounds each layer's inputs to 256 steps. Where one lies halfway between two, sums in another order
    (another runtime, another number of threads) round it the other way, and all that follows differs by such a step.
    So two right implementations agree to 1e-4 in logits up to the first tie of a text, and not after it.

    Args:
        model: not prepared for kernels; of floating-point numbers there are no ties.
        ids (Tensor): [1, s], as many as the model's cache takes.
        within: of a step: nearer to half is near. Sums of fp32 differ by 1e-7 to 1e-6 of a row's largest number, which
            is 255 steps.

    Returns:
        Tensor: bool [s]: a near tie at this token or one before it.
    """
    near: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].float()
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
        places = torch.cat((x.flatten(), low[None])) / step
        near.append(((places - places.floor() - 0.5).abs() < within).any())

    linears = [part for part in model.modules() if isinstance(part, QuantizedLinear) and part.format.dynamic]
    hooks = [part.register_forward_pre_hook(watch) for part in linears]
    embedding = model.tok_embeddings
    tied = model.tied and isinstance(embedding, Quantized) and embedding.format.dynamic
    found = torch.zeros(ids.shape[1], dtype=torch.bool)
    try:
        cache = model.new_cache(1, ids.shape[1])
        for i in range(ids.shape[1]):
            hidden = model(ids[:, i : i + 1], cache=cache, hidden=True)
            if tied:
                watch(embedding, (hidden,))
            elif not model.tied:
                model.output(hidden)
            found[i] = bool(near) and bool(torch.stack(near).any())
    finally:
        for hook in hooks:
            hook.remove()
    return found


class TestStep:
    @pytest.mark.parametrize("make", [small_plm, lambda: small_plm(tied=False), small_llama])
    def test_is_the_decoder(self, make: Callable[[], Decoder]) -> None:
        model, ids = make(), some_ids()
        logits = of_step(make_step(model, None, CONTEXT), ids)
        assert logits.std() > 0.3
        torch.testing.assert_close(logits, token_by_token(model, ids), atol=1e-5, rtol=0)

    def test_goes_back_to_an_earlier_position(self) -> None:
        step = make_step(small_plm(), None, CONTEXT)
        first, second = some_ids(), some_ids(seed=2)
        of_step(step, first)
        torch.testing.assert_close(of_step(step, second), token_by_token(small_plm(), second), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(("make", "scheme"), [(small_plm, "int8_dynamic"), (small_llama, "int8_dynamic_int4")])
    def test_of_integers_is_the_quantized_decoder(self, make: Callable[[], Decoder], scheme: str) -> None:
        model = quantized(make, scheme)
        step = make_step(model, None, CONTEXT)
        compared = 0
        for seed in range(5):
            ids = some_ids(3, seed)
            sure = ~near_ties(model, ids)
            difference = (of_step(step, ids) - token_by_token(model, ids)).abs().amax(-1)
            assert (difference[sure] < 1e-4).all()
            compared += int(sure.sum())
        assert compared > 5  # of 15 positions

    def test_leaves_the_model_as_it_is(self) -> None:
        model = small_plm()
        make_step(model, "int8_dynamic", CONTEXT)
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())

    def test_rows_that_xnnpack_has_no_groups_for_are_of_8_bits_by_the_plan_itself(self) -> None:
        model = small_plm()
        model.layers[0].ffn.down_proj = nn.Linear(80, 64, bias=False)  # type: ignore[union-attr]
        plan = executorch_formats(model, "int8_dynamic_int4")
        assert plan["layers.0.ffn.down_proj"].name == DYNAMIC
        assert plan["layers.1.ffn.down_proj"].name == "int8_dynamic_int4_g32"
        # the program and the reference of its proof alike
        step = make_step(model, "int8_dynamic_int4", CONTEXT)
        assert step.layers[0].down_proj.format.name == DYNAMIC  # type: ignore[union-attr]
        assert step.layers[1].down_proj.format.name == "int8_dynamic_int4_g32"  # type: ignore[union-attr]
        rounded, _ = _quantized_like(model, Contents("int8_dynamic_int4_g32"))
        held = {name: part.format for name, part in rounded.named_modules() if isinstance(part, Quantized)}
        assert held == plan

    def test_looks_up_the_rows_of_any_embedding(self) -> None:
        for name in ("int8", "int4_g32", "int8_dynamic_int4_g32"):
            model = quantized(small_plm, "int8_dynamic", embedding=name)
            rows = make_step(model, None, CONTEXT).embedding(torch.arange(9))
            assert torch.equal(rows, model.tok_embeddings(torch.arange(9)))

    @pytest.mark.parametrize("embedding", ["int8", "int4_g32"])
    def test_a_head_of_weights_alone_is_multiplied_by_its_numbers(self, embedding: str) -> None:
        # the default of int8_dynamic; XNNPACK would compute nonsense from the integers
        for tied in (True, False):
            model = quantized(lambda: small_plm(tied), "int8_dynamic", embedding=embedding)  # noqa: B023
            assert type(make_step(model, None, CONTEXT).head) is torch.nn.Linear


class TestRefused:
    @pytest.mark.parametrize("scheme", ["int8", "int4"])
    def test_weight_only_integers(self, scheme: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="computes weight-only integers wrongly"):
            export_pte(quantized(small_plm, scheme), byte(), tmp_path / "x.pte")
        assert not list(tmp_path.iterdir())

    def test_another_scheme_than_the_models(self) -> None:
        with pytest.raises(UserError, match="quantized already"):
            check_scheme(quantized(small_plm, "int8_dynamic"), "int8_dynamic_int4")

    def test_groups_that_xnnpack_has_not(self) -> None:
        model = small_plm()
        quantize(model, {"layers.0.ffn.up_proj": Format(4, 16, dynamic=True)})
        with pytest.raises(UserError, match="groups of 32"):
            check_scheme(model, None)

    def test_a_cache_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"max_seq_len \(65\)"):
            export_pte(small_plm(), byte(), tmp_path / "y.pte", max_seq_len=65)


@pytest.mark.slow  # lowering takes 20 seconds
class TestProgram:
    @pytest.mark.parametrize("make", [small_plm, small_llama])
    @pytest.mark.parametrize("scheme", ["fp32", "int8_dynamic", "int8_dynamic_int4"])
    def test_runs_as_the_model_in_pytorch(self, make: Callable[[], Decoder], scheme: str, tmp_path: Path) -> None:
        pytest.importorskip("executorch")
        from executorch.runtime import Runtime

        model = make() if scheme == "fp32" else quantized(make, scheme)
        path = tmp_path / "x.pte"
        assert export_pte(model, byte(), path, max_seq_len=CONTEXT) == []
        program = Runtime.get().load_program(path)
        method = program.load_method("forward")

        def run(tokens: Tensor, position: Tensor) -> Tensor:
            return method.execute((tokens, position))[0].clone()

        compared = 0
        for seed in range(30):
            ids = some_ids(3, seed)
            sure = ~near_ties(model, ids)
            difference = (of_step(run, ids) - token_by_token(model, ids)).abs().amax(-1)
            assert (difference[sure] < 1e-4).all(), (seed, sure, difference)
            compared += int(sure.sum())
        assert compared > 30  # of 90
        facts = json.loads((tmp_path / "x.pte.json").read_text())
        assert facts["max_seq_len"] == CONTEXT == program.load_method("get_max_seq_len").execute(())[0]
        assert facts["eos_ids"] == program.load_method("get_eos_ids").execute(())
        assert load_tokenizer(tmp_path / "x.pte.tokenizer").fingerprint == byte().fingerprint
