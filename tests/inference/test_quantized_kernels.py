"""Kernels of integers: each says what the reference says; which one is taken is measured once and kept."""

import json
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plmtune.inference import kernel_choice, quantized_kernels
from plmtune.inference.kernel_choice import choose, prepack
from plmtune.inference.quantized_kernels import KERNELS
from plmtune.inference.sampling import generate
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import ROWS, Format, Quantized, QuantizedEmbedding, QuantizedLinear, install, reference
from plmtune.registry import component

NAMES = ["int8", "int8_g32", "int4_g32", "int4_g128", "int8_dynamic_int8", "int8_dynamic_int4_g32"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PLMTUNE_KERNELS", raising=False)
    monkeypatch.setenv("PLMTUNE_NATIVE", "0")  # tests/native has models that decode natively
    return tmp_path / "plmtune" / "kernels.json"


def fill(module: Quantized, dtype: torch.dtype, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    module.weight.random_(*((-128, 128) if module.format.bits == 8 else (0, 256)), generator=generator)
    scales = torch.rand(module.scales.shape, generator=generator).add_(0.5) / module.width**0.5 / 50
    module.scales = scales.to(torch.bfloat16).to(dtype)
    if not module.format.symmetric:
        module.zeros.random_(0, 16, generator=generator)


def linear(name: str, dtype: torch.dtype, out: int = 96, width: int = 256) -> QuantizedLinear:
    module = QuantizedLinear(width, out, Format.parse(name))
    fill(module, dtype)
    return module


def chosen(format: Format, dtype: torch.dtype, device: str, shape: tuple[int, int], rows: int) -> str:
    return choose(format, dtype, torch.device(device), shape)[bisect_left(ROWS, rows)]


def use_kernel(module: Quantized, kernel: str) -> Quantized:
    """As `prepack` leaves it where this kernel was the fastest."""
    return quantized_kernels.use_kernel(module, kernel)


def pairs() -> list[tuple[str, str, torch.dtype]]:
    """Every format with every kernel that takes it here."""
    return [
        (name, kernel, dtype)
        for name in NAMES
        for dtype in (torch.float32, torch.bfloat16)
        for kernel in KERNELS
        if kernel != "reference" and KERNELS[kernel].supports(Format.parse(name), dtype, 256)
    ]


class TestKernels:
    @pytest.mark.parametrize(("name", "kernel", "dtype"), pairs())
    def test_say_what_the_reference_says(self, name: str, kernel: str, dtype: torch.dtype) -> None:
        if not quantized_kernels.matches_reference(kernel, Format.parse(name), dtype):
            pytest.skip(f"this processor's {kernel} is not taken")
        for out, width in ((96, 256), (64, 128), (200, 384)):
            plain = linear(name, dtype, out, width)
            found = use_kernel(linear(name, dtype, out, width), kernel)
            for rows in (1, 3, 64):
                x = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
                expected, y = reference(plain, x), found.multiply(x)
                assert y.shape == expected.shape and y.dtype == dtype
                bound = 1e-5 if dtype == torch.float32 else 2e-2
                assert (y - expected).abs().max() <= bound * expected.abs().max()

    @pytest.mark.parametrize("out", [64, 96, 200])
    @pytest.mark.parametrize("name", ["int4_g32", "int8_dynamic_int4_g64"])
    def test_integers_in_tiles_are_read_back_as_they_were(self, name: str, out: int) -> None:
        plain, tiled = linear(name, torch.bfloat16, out), linear(name, torch.bfloat16, out)
        plain.scales[3] = tiled.scales[3] = 0  # a row of zeros
        assert quantized_kernels.to_tiles(tiled)
        assert torch.equal(tiled.dequantize(), plain.dequantize())
        assert torch.equal(tiled.dequantize(slice(64, 128)), plain.dequantize()[64:128])
        ids = torch.tensor([[0, 33, out - 1], [63, 31, 32]])
        assert torch.equal(tiled.dequantize(ids), plain.dequantize()[ids])

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_no_number_stays_none(self, name: str) -> None:
        module = linear(name, torch.bfloat16)
        prepack(module)
        assert module(torch.full((1, 256), float("nan"), dtype=torch.bfloat16)).isnan().all()

    def test_a_bias_is_added_and_no_rows_give_none(self) -> None:
        module = QuantizedLinear(64, 32, Format(8, None, True), bias=True)
        fill(module, torch.float32)
        torch.nn.init.ones_(module.bias)  # type: ignore[arg-type]
        prepack(module)
        assert torch.equal(module(torch.zeros(2, 1, 64)), torch.ones(2, 1, 32))
        assert module(torch.zeros(0, 64)).shape == (0, 32)


class TestChoose:
    def test_is_measured_once_and_kept(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = (1024, 256)
        first = chosen(Format(4, 32), torch.bfloat16, "cpu", shape, 1)
        assert len(json.loads(cache.read_text())["kernels"]) == 1

        def never(*_: object) -> list[str]:
            raise AssertionError("measured again")

        monkeypatch.setattr(kernel_choice, "_measure", never)
        assert chosen(Format(4, 32), torch.bfloat16, "cpu", shape, 1) == first

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", '{"version": 2, "kernels": {"a": ["rm", "-rf", "/", "*"]}}', "\x00"]
    )
    def test_a_damaged_file_is_measured_anew(self, cache: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_choice, "_measure", lambda names, *_: [names[0]] * 4)
        cache.parent.mkdir()
        cache.write_text(text)
        chosen(Format(8), torch.bfloat16, "cpu", (1024, 256), 1)
        assert list(json.loads(cache.read_text())["kernels"].values()) == [["int8"] * 4]

    def test_a_file_that_names_a_kernel_for_another_format_is_not_believed(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernel_choice, "_measure", lambda names, *_: [names[0]] * 4)
        chosen(Format(8), torch.bfloat16, "cpu", (1024, 256), 1)
        kept = json.loads(cache.read_text())
        kept["kernels"] = dict.fromkeys(kept["kernels"], ["int4_tiles"] * 4)
        cache.write_text(json.dumps(kept))
        assert chosen(Format(8), torch.bfloat16, "cpu", (1024, 256), 1) == "int8"

    def test_a_folder_that_cannot_be_written_is_no_error(self, cache: Path) -> None:
        cache.parent.write_text("a file where a folder would be")
        assert chosen(Format(8), torch.bfloat16, "cpu", (512, 512), 1) in KERNELS

    def test_the_reference_can_be_forced(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PLMTUNE_KERNELS", "reference")
        assert chosen(Format(8), torch.bfloat16, "cpu", (1024, 256), 1) == "reference"
        assert not cache.exists()

    def test_each_number_of_rows_has_the_kernel_that_is_fastest_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]

        def taking(seconds: Callable[[int], float]) -> quantized_kernels.Kernel:
            def multiply(module: Quantized, x: Tensor) -> Tensor:
                now[0] += seconds(len(x))
                return reference(module, x)

            return quantized_kernels.Kernel(multiply, lambda *_: True, tiled=None)

        kernels = {"by_row": taking(lambda rows: rows), "by_matrix": taking(lambda rows: 30 + rows / 100)}
        for module in (quantized_kernels, kernel_choice):
            monkeypatch.setattr(module, "KERNELS", kernels)
        monkeypatch.setattr(kernel_choice.time, "perf_counter", lambda: now[0])
        found = [chosen(Format(8), torch.float32, "cpu", (512, 512), rows) for rows in (1, 2, 16, 17, 128, 129, 4096)]
        assert found == ["by_row"] * 3 + ["by_matrix"] * 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", NAMES)
    def test_every_format_may_multiply_many_rows_in_the_dtype_of_the_model(self, name: str, dtype: torch.dtype) -> None:
        assert KERNELS["parts"].supports(Format.parse(name), dtype, 256)
        # Nothing is measured for a small matrix, whose prompts can be long all the same.
        assert chosen(Format.parse(name), dtype, "cpu", (96, 256), 2048) == "parts"

    def test_other_devices_have_the_reference(self) -> None:
        assert chosen(Format(4, 32), torch.bfloat16, "cuda", (1024, 256), 1) == "reference"


def small(name: str, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    mla = component("attention", "mla", kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    model = plm(
        256,
        attention=mla,
        ffn=component("ffn", "squared_relu", hidden_dim=192),
        embed_dim=128,
        num_layers=2,
        num_heads=4,
        max_seq_len=64,
        init_std=0.15,
    ).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    install(model, dict.fromkeys(names, Format.parse(name)))
    for seed, module in enumerate(module for module in model.modules() if isinstance(module, Quantized)):
        fill(module, dtype, seed)
        module.scales *= 64 if module.format.bits == 4 else 8  # a deviation near 0.15, so that the model says something
    return model.to(dtype)


def greedy(model: Decoder) -> Tensor:
    return torch.cat(list(generate(model, torch.tensor([[5, 77, 200]]), max_new_tokens=12, temperature=0.0)))


class TestPrepare:
    @pytest.mark.parametrize("name", ["int8", "int4_g32", "int8_dynamic_int8", "int8_dynamic_int4_g32"])
    def test_greedy_tokens_are_the_references_in_fp32(self, name: str) -> None:
        expected = greedy(small(name, torch.float32))
        model = small(name, torch.float32)
        prepack(model)
        assert all(module.prepacked for module in model.modules() if isinstance(module, Quantized))
        assert torch.equal(greedy(model), expected)

    def test_takes_no_more_memory_than_the_file_and_the_matrix_of_mla(self) -> None:
        model = small("int4_g32", torch.bfloat16)
        before = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
        sizes = {name: sum(buffer.nbytes for buffer in module.buffers()) for name, module in before.items()}
        prepack(model)
        for name, module in before.items():
            after = sum(buffer.nbytes for buffer in module.buffers())
            if name.endswith("kv_b_proj"):
                assert module.dense is not None and after < sizes[name] / 2
            else:
                # Zeros of 2 bytes instead of 1, and tiles of 64 rows that are filled up.
                assert after <= sizes[name] * 20 / 19 * (-module.num_rows % 64 + module.num_rows) / module.num_rows

    def test_a_tied_embedding_is_looked_up_and_projects_from_one_set_of_integers(self) -> None:
        model = small("int4_g32", torch.bfloat16)
        embedding = model.tok_embeddings
        assert isinstance(embedding, QuantizedEmbedding)
        ids, hidden = torch.arange(256)[None], torch.randn(1, 5, 128).to(torch.bfloat16)
        rows, logits = embedding(ids), embedding.project(hidden)
        prepack(model)
        assert embedding.tile and torch.equal(embedding(ids), rows)
        assert (embedding.project(hidden) - logits).abs().max() <= 2e-2 * logits.abs().max()

    def test_twice_is_once(self) -> None:
        model = small("int4_g32", torch.bfloat16)
        prepack(model)
        logits = model(torch.arange(9)[None])
        prepack(model)
        assert torch.equal(model(torch.arange(9)[None]), logits)


class TestSeveralRowsOfAView:
    @pytest.mark.parametrize(("format", "kernel"), [("int8", "int8"), ("int4_g32", "int4_tiles")])
    def test_inputs_that_are_not_contiguous_are_multiplied_as_their_copies(self, format: str, kernel: str) -> None:
        module = quantized_kernels.example(Format.parse(format), torch.bfloat16, (128, 64))
        try:
            quantized_kernels.use_kernel(module, kernel)
        except RuntimeError as error:
            pytest.skip(str(error))
        x = torch.randn(64, 3, dtype=torch.bfloat16).t()  # [3, 64], by columns
        assert torch.equal(module(x), module(x.contiguous()))


@pytest.mark.parametrize("width", [14, 60, 72])
def test_rows_that_torchs_kernel_reads_beyond_are_not_given_to_it(width: int) -> None:
    assert not KERNELS["int8"].supports(Format.parse("int8"), torch.bfloat16, width)
