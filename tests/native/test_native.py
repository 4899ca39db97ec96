"""One token in one native call: what eager torch says, in each format, and whatever becomes of the model."""

import copy
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plmtune import native
from plmtune.inference.kernel_choice import prepack
from plmtune.inference.quantized_kernels import KERNELS, example
from plmtune.inference.sampling import generate
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.cache import Cache
from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU
from plmtune.modules.quantized import Format, Quantized, install, reference, round_inputs
from plmtune.native import availability, library, structs
from plmtune.registry import component

# For a test that forbids it, it would be None for all.
REASON = native.unavailable_reason()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"decoding is eager here: {REASON}")

FORMATS = [None, "int8", "int8_g32", "int4_g32", "int8_dynamic_int8", "int8_dynamic_int4_g32"]


def fill(module: Quantized, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = module.format.bits
    module.weight.random_(*((-128, 128) if bits == 8 else (0, 256)), generator=generator)
    scales = torch.rand(module.scales.shape, generator=generator).add_(0.5)
    module.scales = (scales / module.width**0.5 / (80 if bits == 8 else 6)).to(torch.bfloat16).float()
    if not module.format.symmetric:
        module.zeros.random_(6, 11, generator=generator)


def build(
    kind: str, format: str | None = None, *, tied: bool = True, bias: bool = False, dtype: torch.dtype = torch.float32
) -> Decoder:
    torch.manual_seed(0)
    if kind == "plm":
        # Without integers also widths that fill no vector.
        rank, hidden = (40, 100) if format is None else (32, 96)
        mla = component("attention", "mla", kv_lora_rank=rank, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
        ffn = component("ffn", "squared_relu", hidden_dim=hidden)
        model = plm(
            96, attention=mla, ffn=ffn, embed_dim=64, num_layers=2, num_heads=6, max_seq_len=640, tie_embeddings=tied
        )
    else:
        width = 20 if format is None else 32
        gqa = component("attention", "gqa", num_kv_heads=2, head_dim=width, bias=bias, rope_interleaved=bias)
        ffn = component("ffn", "swiglu", hidden_dim=96)
        model = llama(
            96, attention=gqa, ffn=ffn, embed_dim=64, num_layers=2, num_heads=6, max_seq_len=640, tie_embeddings=tied
        )
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    if format is not None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
        install(model, dict.fromkeys(names, Format.parse(format)))
        for seed, module in enumerate(module for module in model.modules() if isinstance(module, Quantized)):
            fill(module, seed)
    prepack(model.to(dtype))
    return model


def filled(model: Decoder, length: int) -> Cache:
    torch.manual_seed(1)
    cache = model.new_cache(1, 640)
    for layer in cache.layers:
        for buffer in layer:
            buffer.normal_()
    cache.length = length
    return cache


@torch.no_grad()
def says(model: Decoder, length: int, *, eager: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of three tokens after a cache of random numbers, and what it holds of them."""
    cache = filled(model, length)
    decoder, model.native = model.native, None if eager else model.native
    logits = []
    for token in (3, 95, 41):
        if not eager:
            assert model.native.step(model, torch.tensor([[token]]), filled(model, length)) is not None
        logits.append(model(torch.tensor([[token]]), cache=cache))
    model.native = decoder
    kept = [buffer[:, :, length : cache.length].float().flatten() for layer in cache.layers for buffer in layer]
    return torch.cat(logits).flatten(), torch.cat(kept)


def agree(model: Decoder, length: int = 21, bound: float = 2e-5) -> None:
    for found, expected in zip(says(model, length), says(model, length, eager=True), strict=True):
        assert (found - expected).abs().max() <= bound * expected.abs().max()


@needs_native
class TestStep:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", ["plm", "llama"])
    def test_says_what_eager_says(self, kind: str, format: str | None) -> None:
        agree(build(kind, format))

    @pytest.mark.parametrize("format", [None, "int4_g32"])
    @pytest.mark.parametrize("kind", ["plm", "llama"])
    def test_bf16_is_its_fp32_up_to_rounding(self, kind: str, format: str | None) -> None:
        agree(build(kind, format, dtype=torch.bfloat16), bound=4e-2)

    @pytest.mark.parametrize("kind", ["plm", "llama"])
    def test_an_own_head_and_biases(self, kind: str) -> None:
        agree(build(kind, tied=False, bias=True))

    @pytest.mark.parametrize("length", [0, 15, 16, 600])
    @pytest.mark.parametrize("kind", ["plm", "llama"])
    def test_any_length_and_any_number_of_threads(self, kind: str, length: int) -> None:
        model, before = build(kind), torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                agree(model, length)
        finally:
            torch.set_num_threads(before)

    def test_zeros_are_skipped_where_that_is_switched_on_later(self) -> None:
        model = build("plm")
        before = says(model, 9)
        for module in model.modules():
            if isinstance(module, SquaredReLU):
                module.sparse = True
        for found, expected in zip(says(model, 9), before, strict=True):
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()

    @pytest.mark.parametrize("kind", ["plm", "llama"])
    def test_greedy_tokens_are_eager_ones_also_after_a_part_is_forgotten(self, kind: str) -> None:
        model = build(kind)
        written = []
        for decoder in (model.native, None):
            model.native = decoder
            cache = model.new_cache(1, 128)
            first = list(generate(model, torch.arange(30)[None], max_new_tokens=20, temperature=0.0, cache=cache))
            cache.truncate(25)
            more = list(generate(model, torch.tensor([[7]]), max_new_tokens=20, temperature=0.0, cache=cache))
            written.append(torch.cat([*first, *more]))
        assert torch.equal(*written)

    def test_what_is_no_number_stays_none(self) -> None:
        for format in (None, "int8_dynamic_int8"):
            model = build("plm", format)
            model.norm.weight[3] = float("nan")
            assert says(model, 4)[0].isnan().any()


@needs_native
class TestMultiply:
    @pytest.mark.parametrize("rows", [0, 1, 5, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("format", [format for format in FORMATS if format])
    def test_any_rows_are_as_the_reference_has_them(self, format: str, dtype: torch.dtype, rows: int) -> None:
        module = example(Format.parse(format), dtype, (100, 96))
        x = torch.randn(rows, 96).to(dtype)
        expected = reference(module, x)
        for name in ("native", "parts", "wide"):
            found = KERNELS[name].multiply(module, x)
            assert found.dtype == dtype
            bound = (1e-5 if dtype == torch.float32 else 2e-2) * float(expected.abs().max()) if rows else 0.0
            torch.testing.assert_close(found, expected, atol=bound, rtol=0.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("format", [format for format in FORMATS if format])
    def test_numbers_written_out_are_torchs_to_the_last_bit(self, format: str, dtype: torch.dtype) -> None:
        module = example(Format.parse(format), dtype, (130, 96))
        module.scales[3] = float("nan")
        for rows in (slice(None), slice(64, 128)):
            torch.testing.assert_close(
                native.dequantize(module, rows, dtype), module.dequantize(rows), atol=0, rtol=0, equal_nan=True
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rounded_inputs_are_torchs_to_the_last_bit(self, dtype: torch.dtype) -> None:
        x = torch.randn(50, 96).mul(torch.logspace(-9, 9, 50)[:, None]).to(dtype)
        x[3], x[4], x[5] = 0, x[5].abs(), -x[5].abs()
        x[6] = (torch.arange(96) - 0.5).to(dtype)  # many in the middle of two steps
        assert torch.equal(native.round_inputs(x), round_inputs(x))
        x[1, 2], x[7, 5] = float("inf"), float("nan")
        assert native.round_inputs(x)[[1, 7]].isnan().all()

    @pytest.mark.parametrize("groups", [15, 16, 24, 40])
    def test_rows_of_any_number_of_groups(self, groups: int) -> None:
        for format in (Format(4, 32), Format(8, 32)):
            module = example(format, torch.float32, (10, 32 * groups))
            x = torch.randn(1, 32 * groups)
            found, expected = native.multiply(module, x), module.multiply(x)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_native
class TestBinding:
    def test_a_model_that_is_moved_or_changed_is_looked_at_anew(self) -> None:
        model = build("plm")
        agree(model)
        agree(model.to(torch.bfloat16), bound=4e-2)
        agree(model.float())
        layers: Any = model.layers
        layers[1].ffn.up_proj.weight.mul_(2)
        agree(model)
        layers[0].ffn.up_proj = nn.Linear(64, 100, bias=False).requires_grad_(False)
        agree(model)
        model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}, assign=True)
        agree(model.requires_grad_(False))

    def test_a_copy_decodes_its_own_weights(self) -> None:
        model = build("plm")
        before = says(model, 5)
        other = copy.deepcopy(model)
        other.tok_embeddings.weight.mul_(3)
        agree(other)
        assert torch.equal(says(model, 5)[0], before[0])

    @torch.no_grad()
    def test_what_only_modules_can_do_is_left_to_them(self) -> None:
        model, token = build("plm"), torch.tensor([[3]])
        step, cache = model.native.step, filled(model, 5)
        assert step(model, torch.tensor([[3, 4]]), cache) is None
        assert step(model, token, model.new_cache(2, 8)) is None
        assert step(model, torch.tensor([[96]]), cache) is None
        with pytest.raises(IndexError):
            model(torch.tensor([[96]]), cache=cache)
        with torch.enable_grad():
            assert step(model, token, cache) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert step(model, token, cache) is None
        model.train()
        assert step(model, token, cache) is None
        model.eval()
        seen: list[object] = []
        hook = model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        model(token, cache=cache)
        assert seen == [1]
        hook.remove()
        layers: Any = model.layers
        layers[0].ffn.record_sparsity = True
        assert step(model, token, cache) is None
        assert cache.length == 6

    def test_a_model_of_other_parts_stays_eager_and_says_so_once(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(availability, "_logged", set())
        model = plm(64, norm=component("norm", "layer_norm"), embed_dim=64, num_layers=1, num_heads=2, max_seq_len=8)
        assert not native.attach(model.eval()) and model.native is None
        assert not native.attach(build("plm").half())
        (sentence,) = caplog.messages
        assert sentence.startswith("tokens are decoded by eager PyTorch") and "does not support" in sentence


class TestLibrary:
    @pytest.fixture
    def compiled(self) -> Path | None:
        """The library that the other tests use."""
        return None if REASON else library._path(shlex.split(os.environ.get("CC") or "cc"))

    @pytest.fixture(autouse=True)
    def fresh(self, compiled: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(library, "_open", library._open.__wrapped__)

    def test_without_a_compiler_decoding_is_eager(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "no-such-compiler")
        assert "no-such-compiler" in (native.unavailable_reason() or "")
        assert build("plm").native is None

    def test_a_compiler_that_fails_is_quoted(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        compiler = tmp_path / "cc"
        compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho sorry >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert "sorry" in (native.unavailable_reason() or "")
        assert not list((tmp_path / "plmtune").glob("*"))

    @pytest.mark.parametrize(("name", "value"), [("PLMTUNE_NATIVE", "0"), ("PLMTUNE_KERNELS", "reference")])
    def test_it_can_be_left_out(self, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, value)
        assert name in (native.unavailable_reason() or "")

    @needs_native
    def test_a_compiler_may_have_arguments(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(library, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in library._FLAGS))
        monkeypatch.setenv("CC", f"{shutil.which('cc')} -m64 -O1")
        assert library.unavailable() is None
        assert len(list((tmp_path / "plmtune").glob("native-*.so"))) == 1

    def test_a_compiler_that_cannot_be_read_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "'cc")
        assert "CC='cc" in (native.unavailable_reason() or "")

    @needs_native
    def test_structures_of_another_size_are_refused(self, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Wider(ctypes.Structure):
            _fields_ = (("model", structs.Model), ("added", ctypes.c_int64))

        monkeypatch.setattr(library, "Model", Wider)

        def copied(compiler: list[str], path: Path) -> None:  # compiling takes seconds
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # what is there is open
            shutil.copy(compiled, path)

        monkeypatch.setattr(library, "_compile", copied)
        assert "its structures have" in (library.unavailable() or "")

    @needs_native
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("right", "wrong", "found"),
        [
            ("return (V){rest};", "return (V){rest * 1.01f};", "int4_g32"),
            ("signed_bytes(w[r] + c), V) * in", "bytes(w[r] + c), V) * in", "int8"),
            ("total[h] *= by;", "total[h] *= 1;", "MLA, squared ReLU"),
            ("(power(-in) + 1.0f)", "(power(in) + 1.0f)", "GQA, SwiGLU"),
            ("count += hidden[i] != 0;", "count += hidden[i] > 0.01f;", "skipped zeros"),
            ("if (f != f) return 0x7fc0;", "if (f == f) return 0x7fc0;", "bf16"),
            ("zero = zero < -128.0f ? -128.0f", "zero = zero < 128.0f ? -128.0f", "int8_dynamic_int8"),
        ],
    )
    def test_a_fault_in_the_code_is_found_by_the_self_check(
        self, right: str, wrong: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        source = library.SOURCE.read_text()
        assert right in source
        (tmp_path / "decode.c").write_text(source.replace(right, wrong))
        monkeypatch.setattr(library, "SOURCE", tmp_path / "decode.c")
        opened = library._open()
        monkeypatch.setattr(library, "_open", lambda: opened)
        assert availability._failed_check.__wrapped__() == found

    @needs_native
    @pytest.mark.slow
    def test_sanitizers_find_nothing(self, tmp_path: Path) -> None:
        compiler = "cc -fsanitize=address,undefined -fno-sanitize-recover=undefined"
        preloaded = [
            subprocess.run(["cc", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True).stdout
            for name in ("libasan", "libubsan")
        ]
        environment = {**os.environ, "CC": compiler, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
        environment |= {
            "LD_PRELOAD": " ".join("".join(preloaded).split()),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        }
        program = [sys.executable, "-c", "import torch; print('works')"]
        if "works" not in subprocess.run(program, capture_output=True, text=True, env=environment, check=False).stdout:
            pytest.skip("PyTorch cannot be run with this compiler's sanitizers")
        program[-1] = "from plmtune import native; print(native.unavailable_reason())"
        done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
        assert (done.stdout.strip(), done.returncode) == ("None", 0), done.stdout + done.stderr[-3000:]

    @needs_native
    def test_a_damaged_library_is_made_anew(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(library, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in library._FLAGS))
        path = library._path(["cc"])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x7fELF and nothing more")
        assert native.unavailable_reason() is None
        assert path.stat().st_size > 1000
