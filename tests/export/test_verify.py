"""A right export passes; one that is broken in a usual way fails, and its cause is named."""

import copy
import importlib
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama, tiny_plm
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export import gguf_writer, probe_texts, verify_text
from plmtune.export import verify as verifying
from plmtune.export.arithmetic import with_rounded_inputs
from plmtune.export.contents import Contents, read_contents, settings_of
from plmtune.export.diagnosis import divergence, find_cause, log_probs
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.huggingface import export_hf
from plmtune.export.lint import WRITTEN
from plmtune.export.runtimes import InferenceRuntime
from plmtune.export.stored import BOUNDS, bound_of, suspect_tensors, wrong_type
from plmtune.export.verify import Check, Report, verify
from plmtune.export.verify_text import compare_ids, compare_prompts
from plmtune.models.gguf_layout import to_halves
from plmtune.models.hf import load_model, save_model
from plmtune.modules.decoder import Decoder
from plmtune.modules.norm import RMSNorm
from plmtune.modules.quantized import Format
from plmtune.quantization.quantize import quantize, quantize_module
from plmtune.registry import load
from plmtune.tokenizers import tokenizer_files
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer import Tokenizer

bundled = cache(tokenizer_files.bundled)
IDS = bundled().encode("def read(path):\n    with open(path) as file:\n        return file.read()\n")


def make_plm(**settings: Any) -> Decoder:
    mla = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 16, "rope_theta": 100000.0} | settings
    return tiny_plm(bundled().vocab_size, mla=mla, hidden_dim=64, embed_dim=32, num_heads=2, max_seq_len=128).eval()


def make_llama(*, tie_embeddings: bool = True, **settings: Any) -> Decoder:
    sizes = {"embed_dim": 32, "max_seq_len": 128, "tie_embeddings": tie_embeddings}
    return tiny_llama(bundled().vocab_size, gqa={"head_dim": 16} | settings, hidden_dim=64, **sizes).eval()


MAKE = {"plm": make_plm, "llama": make_llama}


@pytest.fixture(scope="module", params=["plm", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / request.param
    save_model(MAKE[request.param](), None, directory)
    bundled().save(directory)
    return directory


def parts(model: Decoder) -> list[Any]:
    return list(model.layers)


def halves(rows: Tensor, groups: int, turned: int) -> Tensor:
    """Rows whose last `turned` of each group go from neighbours to halves."""
    kept, last = rows.unflatten(0, (groups, -1)).split((len(rows) // groups - turned, turned), dim=1)
    return torch.cat((kept, to_halves(last.flatten(0, 1), groups).unflatten(0, (groups, -1))), dim=1).flatten(0, 1)


def with_rope_rows_of_q_and_k_permuted(model: Decoder) -> None:
    for layer in parts(model):
        attention: Any = layer.attention
        if hasattr(attention, "kv_a_proj"):
            attention.q_proj.weight.data = halves(attention.q_proj.weight.data, 2, 16)
            attention.kv_a_proj.weight.data = halves(attention.kv_a_proj.weight.data, 1, 16)
        else:
            attention.q_proj.weight.data = halves(attention.q_proj.weight.data, 4, 16)
            attention.k_proj.weight.data = halves(attention.k_proj.weight.data, 2, 16)


def with_rows_of_q_permuted(model: Decoder) -> None:
    for layer in parts(model):
        q: Any = layer.attention.q_proj
        q.weight.data = halves(q.weight.data, layer.attention.num_heads, 16)


def with_another_eps(model: Decoder) -> None:
    model.config["norm"]["eps"] = 1e-3
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-3


def with_another_theta(model: Decoder) -> None:
    model.config["attention"]["rope_theta"] = 10000.0
    for layer in parts(model):
        width, positions, _, interleaved = layer.attention.rope.settings
        layer.attention.rope.settings = (width, positions, 10000.0, interleaved)


def with_a_tensor_of_zeros(model: Decoder) -> None:
    parts(model)[1].ffn.up_proj.weight.data.zero_()


def with_noise_in_a_tensor(model: Decoder) -> None:
    weight = parts(model)[0].attention.o_proj.weight.data
    weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def with_a_norm_doubled(model: Decoder) -> None:
    parts(model)[0].ffn_norm.weight.data *= 2


def with_columns_permuted(model: Decoder) -> None:
    weight = parts(model)[0].ffn.down_proj.weight
    weight.data = weight.data.roll(1, dims=1)


def with_tensors_swapped(model: Decoder) -> None:
    one, other = (layer.ffn.down_proj.weight for layer in parts(model))
    one.data, other.data = other.data, one.data


def with_a_transposed_matrix(model: Decoder) -> None:
    projection = parts(model)[0].attention.o_proj
    projection.weight.data = projection.weight.data.T.contiguous()


def with_heads_of_a_layer_swapped(model: Decoder) -> None:
    weight = parts(model)[1].attention.q_proj.weight
    weight.data = weight.data.roll(len(weight) // parts(model)[1].attention.num_heads, dims=0)


def with_a_row_of_a_rare_token(model: Decoder) -> None:
    weight = model.tok_embeddings.weight.data
    weight[3777] = weight[12]


BROKEN: dict[Callable[[Decoder], None], str] = {
    with_another_eps: "norm.eps is 0.001 in the export, 1e-06 here",
    with_another_theta: "attention.rope_theta is 10000 in the export, 100000 here",
    with_a_tensor_of_zeros: "layers.1.ffn.up_proj.weight: all its numbers are zero",
    with_noise_in_a_tensor: r"layers.0.attention.o_proj.weight: .* numbers are not the checkpoint's in F32",
    with_rope_rows_of_q_and_k_permuted: "layers.0.attention.q_proj.weight .and 3 more.: its rows are in another order",
    with_rows_of_q_permuted: "layers.0.attention.q_proj.weight .and 1 more.: its rows are in another order",
    with_columns_permuted: "layers.0.ffn.down_proj.weight: its columns are in another order .column 0 is .*63",
    with_tensors_swapped: "layers.0.ffn.down_proj.weight: it holds layers.1.ffn.down_proj.weight",
    with_a_norm_doubled: "layers.0.ffn_norm.weight: it is 2 times the checkpoint's",
    with_a_transposed_matrix: "layers.0.attention.o_proj.weight: it is transposed",
    with_heads_of_a_layer_swapped: "layers.1.attention.q_proj.weight: its rows .* .row 0 is the checkpoint's",
    with_a_row_of_a_rare_token: "tok_embeddings.weight: 32 of its .* numbers are not the checkpoint's in F32",
}
EPS = {"plm": "1e-06", "llama": "1e-05"}


def broken(name: str, breaking: Callable[[Decoder], None]) -> Decoder:
    model = MAKE[name]()
    model.config = copy.deepcopy(model.config)
    breaking(model)
    return model


class Holding(dict[str, Tensor]):
    """What a file of a model holds, without the file."""

    def __init__(self, model: Decoder) -> None:
        super().__init__({name: tensor.clone() for name, tensor in model.state_dict().items()})


def found_in(model: Decoder, contents: Contents) -> Report:
    report = Report("a", "b", "none", contents.kind, 0)
    verifying._compare_contents(report, model, contents, "a", None)
    return report


class TestCauses:
    """What is wrong is seen in what the export holds, where it can be read, else in what a runtime says."""

    @pytest.mark.parametrize(
        ("name", "breaking"),
        # the llama's o_proj is not square
        [(name, how) for how in BROKEN for name in MAKE if (name, how) != ("llama", with_a_transposed_matrix)],
    )
    def test_a_mistake_is_named_once(self, name: str, breaking: Callable[[Decoder], None]) -> None:
        theirs, model = broken(name, breaking), MAKE[name]()
        report = found_in(model, Contents("F32", settings_of(theirs), Holding(theirs)))
        assert re.search(BROKEN[breaking].replace("1e-06", EPS[name]), report.cause), report.cause
        assert len(report.failed) == 1

    def test_our_model_with_the_exports_numbers_and_settings_is_what_the_runtime_says(self) -> None:
        for breaking in BROKEN:
            if breaking is with_a_transposed_matrix:
                continue
            theirs, model = broken("llama", breaking), make_llama()
            before = copy.deepcopy(model.state_dict())
            contents = Contents("F32", settings_of(theirs), Holding(theirs))
            with verifying.as_exported(model, contents):
                assert divergence(log_probs(theirs, IDS, 12), log_probs(model, IDS, 12)) < 1e-12, breaking
            # and the checkpoint's model is what it was
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
            assert torch.equal(log_probs(model, IDS, 12), log_probs(make_llama(), IDS, 12))

    @pytest.mark.parametrize(
        ("name", "breaking", "words"),
        [
            ("plm", with_rope_rows_of_q_and_k_permuted, "the rows of Q and K were reordered as if halves were turned"),
            ("plm", with_rows_of_q_permuted, "the rows of Q alone were reordered as if halves were turned"),
            (
                "llama",
                with_rope_rows_of_q_and_k_permuted,
                "halves are turned in the checkpoint, and the rows of Q and K were not permuted",
            ),
            ("llama", with_rows_of_q_permuted, "the rows of Q alone were not permuted"),
        ],
    )
    def test_rows_in_another_order_are_named_by_their_order(
        self, name: str, breaking: Callable[[Decoder], None], words: str
    ) -> None:
        # As of a .pte, whose tensors cannot be read.
        theirs, model = log_probs(broken(name, breaking), IDS, 12), MAKE[name]()
        assert words in find_cause(model, IDS, theirs)
        # and where a runtime tells of the likeliest alone
        rare = theirs < theirs.topk(64).values[:, -1:]
        assert words in find_cause(model, IDS, theirs.masked_fill(rare, -torch.inf))
        assert torch.equal(log_probs(model, IDS, 12), log_probs(MAKE[name](), IDS, 12))

    def test_halves_turned_in_place_of_neighbours_are_named(self) -> None:
        theirs = make_llama()
        model = make_llama(rope_interleaved=True)
        model.load_state_dict(theirs.state_dict())
        cause = find_cause(model, IDS, log_probs(theirs, IDS, 12))
        assert "neighbours are turned in the checkpoint, halves in the export" in cause

    def test_a_setting_that_the_runtime_does_not_take_is_named(self) -> None:
        theirs = broken("plm", with_another_theta)
        cause = find_cause(make_plm(), IDS, log_probs(theirs, IDS, 12))
        assert "the runtime takes 10000 for attention.rope_theta, which is 100000" in cause

    def test_what_nothing_explains_is_said_to_be_unexplained(self) -> None:
        model = make_plm()
        theirs = log_probs(model, IDS, 12).roll(1, dims=1)
        assert "No single mistake explains it" in find_cause(model, IDS, theirs)


class TestNames:
    def test_tensors_that_are_missing_or_too_many_are_named(self, tmp_path: Path) -> None:
        for has, lacks in ((True, False), (False, True)):
            theirs, model = make_llama(bias=has), make_llama(bias=lacks)
            theirs.load_state_dict(model.state_dict(), strict=False)
            write_gguf(theirs, bundled(), tmp_path / "a.gguf", kind="F32")
            report = found_in(model, read_contents(tmp_path / "a.gguf", model))
            words = "holds blk.0.attn_k.bias and 7 more" if has else "lacks blk.0.attn_k.bias and 7 more"
            assert f"the export {words}" in report.cause and len(report.failed) == 1

    def test_another_head_is_not_taken_for_the_embedding(self, tmp_path: Path) -> None:
        write_gguf(make_llama(), bundled(), tmp_path / "a.gguf", kind="F32")
        model = make_llama(tie_embeddings=False)
        cause = found_in(model, read_contents(tmp_path / "a.gguf", model)).cause
        assert "the export lacks output.weight, so the embedding is taken for the head" in cause

    @pytest.mark.parametrize("form", [None, "deepseek"])
    def test_of_a_directory_are_the_checkpoints(self, form: Any, tmp_path: Path) -> None:
        export_hf(make_plm(), bundled(), tmp_path / "a", as_=form, dtype=torch.bfloat16)
        contents = read_contents(tmp_path / "a", make_plm())
        assert found_in(make_plm(), contents).failed == []
        assert "layers.1.ffn.up_proj.weight" in contents.tensors


class TestTypes:
    @pytest.mark.parametrize(
        ("kind", "name", "asked", "words"),
        [
            ("Q8_0", "a-Q8_0.gguf", None, None),
            ("Q8_0", "a-q8_0.gguf.unverified", None, None),
            ("Q8_0", "a.gguf", "q8_0", None),
            ("Q8_0", "a.gguf", None, None),
            ("F16", "a-Q4_0.gguf", None, "it is called Q4_0, and says of itself that it is F16"),
            ("F16", ".tmp-1.gguf", "q4_0", "it is called Q4_0, and says of itself that it is F16"),
        ],
    )
    def test_a_file_is_of_the_type_that_it_is_called(
        self, kind: str, name: str, asked: str | None, words: str | None, tmp_path: Path
    ) -> None:
        write_gguf(make_plm(), bundled(), tmp_path / name, kind=kind)
        said = wrong_type(read_contents(tmp_path / name, make_plm()), name, asked, make_plm())
        assert said == words if words is None else words in (said or "")

    def test_what_a_file_says_of_itself_is_not_believed(self, tmp_path: Path) -> None:
        write_gguf(make_plm(), bundled(), tmp_path / "a.gguf", kind="F16")
        contents = replace(read_contents(tmp_path / "a.gguf", make_plm()), declared="Q4_0")
        said = wrong_type(contents, "a.gguf", None, make_plm())
        assert said == "it is called Q4_0, and 100% of its numbers are of other types, most of them F16"

    def test_a_directory_has_the_numbers_that_were_asked_for(self, tmp_path: Path) -> None:
        export_hf(make_plm(), bundled(), tmp_path / "a", dtype=torch.float16)
        contents = read_contents(tmp_path / "a", make_plm())
        assert wrong_type(contents, "a", "fp16", make_plm()) is None
        assert wrong_type(contents, "a", "bf16", make_plm()) == "bf16 was asked for, and most of its numbers are F16"


def drawn(shape: str, generator: torch.Generator) -> Tensor:
    """A matrix whose numbers lie as a name says."""
    g = torch.randn(64, 256, generator=generator)
    return {
        "normal": g,
        "heavy": g * g.abs() ** 3,
        "uniform": torch.rand(64, 256, generator=generator) - 0.5,
        "sparse": g * (torch.rand(64, 256, generator=generator) < 0.1),
        "outliers": g * torch.ones(256).index_fill(0, torch.arange(0, 256, 37), 50),
        "tiny": g * 1e-6,
        "offset": g + 3,
        "ternary": g.sign() * (g.abs() > 0.5),
    }[shape]


SHAPES = ["normal", "heavy", "uniform", "sparse", "outliers", "tiny", "offset", "ternary"]
STORED = [kind for kind in WRITTEN if kind not in ("F32", "F16", "BF16")]


class TestStored:
    """What a type can hold passes, however the numbers lie; what it would not have made of them does not."""

    def suspects(self, theirs: Tensor, ours: Tensor, kind: str) -> dict[str, str]:
        model = torch.nn.Module()
        model.x = torch.nn.Linear(1, 1)
        model.x.weight.data = ours
        return suspect_tensors(cast("Any", model), Contents(kind, tensors={"x.weight": theirs}))

    @given(st.sampled_from(STORED), st.sampled_from(SHAPES), st.integers(0, 2**16), st.sampled_from([1e-3, 1.0, 100.0]))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_what_a_type_makes_of_any_numbers_passes(self, kind: str, shape: str, seed: int, scale: float) -> None:
        ours = drawn(shape, torch.Generator().manual_seed(seed)) * scale
        for source in (ours, ours.bfloat16().float()):  # a file of fewer bits is often made of one of 16
            held = GGMLQuantizationType[kind]
            theirs = torch.from_numpy(dequantize(gguf_quantize(source.numpy(), held), held))
            assert self.suspects(theirs, ours, kind) == {}

    @given(st.sampled_from(["int8", "int4_g32", "int8_dynamic_int4_g32"]), st.sampled_from(SHAPES), st.booleans())
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_so_does_what_our_formats_make(self, format: str, shape: str, fitted: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        ours = drawn(shape, generator)
        model = torch.nn.ModuleDict({"x": torch.nn.Linear(256, 64, bias=False)})
        cast("Any", model["x"]).weight.data = ours
        moments = torch.rand(256, generator=generator) ** 4 if fitted else None
        theirs = quantize_module(model, "x", Format.parse(format), moments).dequantize().detach()
        assert self.suspects(theirs, ours, format) == {}

    @pytest.mark.parametrize("kind", ["F16", "BF16"])
    def test_rounding_to_16_bits_is_exact(self, kind: str) -> None:
        ours = drawn("heavy", torch.Generator().manual_seed(0))
        dtype = torch.float16 if kind == "F16" else torch.bfloat16
        assert self.suspects(ours.to(dtype).float(), ours, kind) == {}
        other = torch.bfloat16 if kind == "F16" else torch.float16
        assert self.suspects(ours.to(other).float(), ours, kind) == {
            "x.weight": f"its numbers were rounded to {str(other).removeprefix('torch.')}"
        }

    @pytest.mark.parametrize("kind", STORED)
    def test_one_block_of_another_row_does_not(self, kind: str) -> None:
        ours = drawn("normal", torch.Generator().manual_seed(0))
        held = GGMLQuantizationType[kind]
        theirs = torch.from_numpy(dequantize(gguf_quantize(ours.numpy(), held), held)).clone()
        theirs[3, 32:64] = theirs[4, 32:64]
        found = self.suspects(theirs, ours, kind)
        assert found == {"x.weight": f"1 of its 512 blocks of 32 are further off than {kind} rounds"}

    def test_a_norm_without_its_one_is_named(self) -> None:
        ours = 1 + drawn("normal", torch.Generator().manual_seed(0))[0]
        assert self.suspects(ours - 1, ours, "F32") == {"x.weight": "its numbers are the checkpoint's -1"}

    def test_fewer_bits_than_the_types_do_not(self) -> None:
        ours = drawn("normal", torch.Generator().manual_seed(0))
        for coarse, fine in itertools.pairwise(["Q4_0", "Q5_0", "Q8_0"]):
            held = GGMLQuantizationType[coarse]
            theirs = torch.from_numpy(dequantize(gguf_quantize(ours.numpy(), held), held))
            assert self.suspects(theirs, ours, fine)

    def test_bounds_follow_bits(self) -> None:
        for kinds in (["Q4_0", "Q5_0", "Q8_0"], ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]):
            assert [BOUNDS[kind].rms for kind in kinds] == sorted((BOUNDS[kind].rms for kind in kinds), reverse=True)
        assert bound_of("int8_dynamic_int4_g32") == BOUNDS["int4"]
        assert bound_of("Q9_X") is None


def quantized(scheme: str) -> Decoder:
    model = make_plm()
    quantize(model, load("quantization", scheme)(model=model))
    return model


class TestQuantized:
    """Coarse rounding hides no mistake."""

    @pytest.mark.parametrize("scheme", ["int8", "int4", "int8_dynamic_int4"])
    def test_the_tensors_of_a_quantized_directory_are_the_numbers_it_stands_for(
        self, scheme: str, tmp_path: Path
    ) -> None:
        model = quantized(scheme)
        save_model(model, None, tmp_path / "a")
        contents = read_contents(tmp_path / "a", make_plm())
        assert set(contents.tensors) == set(make_plm().state_dict())
        name = "layers.1.ffn.down_proj"
        module: Any = model.get_submodule(name)
        assert torch.equal(contents.tensors[f"{name}.weight"], module.dequantize())
        assert contents.kinds[f"{name}.weight"] == module.format.name
        assert contents.kinds["norm.weight"] == "F32"
        assert suspect_tensors(make_plm(), contents) == {}
        assert suspect_tensors(model, contents) == {}

    def test_scales_of_zero_are_found(self, tmp_path: Path) -> None:
        model = quantized("int4")
        cast("Any", model.get_submodule("layers.1.ffn.down_proj")).scales.zero_()
        save_model(model, None, tmp_path / "a")
        found = suspect_tensors(make_plm(), read_contents(tmp_path / "a", make_plm()))
        assert found == {"layers.1.ffn.down_proj.weight": "all its numbers are zero"}

    @pytest.mark.parametrize("factor", [0.7, 0.8, 1.2, 1.3])
    def test_a_factor_is_named(self, factor: float, tmp_path: Path) -> None:
        model = make_plm()
        parts(model)[1].attention.o_proj.weight.data *= factor
        write_gguf(model, bundled(), tmp_path / "a.gguf", kind="Q4_0")
        found = suspect_tensors(make_plm(), read_contents(tmp_path / "a.gguf", make_plm()))
        assert list(found) == ["layers.1.attention.o_proj.weight"]
        said = re.fullmatch(r"it is about ([\d.]+) times the checkpoint's", found["layers.1.attention.o_proj.weight"])
        assert said is not None
        assert float(said[1]) == pytest.approx(factor, abs=0.01)

    def test_clipped_outliers_are_no_factor(self) -> None:
        model, name = make_plm(), "layers.0.ffn.up_proj.weight"
        weight = parts(model)[0].ffn.up_proj.weight.data
        weight.clamp_(-2 * float(weight.std()), 2 * float(weight.std()))
        contents = Contents("int4_g32", tensors={name: Holding(model)[name]})
        assert suspect_tensors(make_plm(), contents) == {}

    @pytest.mark.parametrize("kind", ["F32", "Q4_0"])
    @pytest.mark.parametrize("top_k", [None, 64])
    def test_a_runtime_that_computes_something_else_is_found_however_coarse_the_type(
        self, kind: str, top_k: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(make_plm(), None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        write_gguf(make_plm(), bundled(), tmp_path / "a.gguf", kind=kind)
        contents = read_contents(tmp_path / "a.gguf", make_plm())

        def compared(eps: float) -> Report:
            runs = make_plm()
            runs.load_state_dict(dict(contents.tensors))
            for module in runs.modules():
                if isinstance(module, RMSNorm):
                    module.eps = eps
            runtime = Fake(runs, ids=lambda text: bundled().encode(text, specials=True))
            runtime.rounds_inputs, runtime.top_k = True, top_k
            monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: runtime)
            return verify(tmp_path / "a.gguf", tmp_path / "plm", positions=16)

        right, wrong = compared(1e-6), compared(1e-5 if kind == "F32" else 0.1)
        name = "KL from the export's own numbers"
        assert next(check for check in right.checks if check.name == name).value < 1e-12
        assert [check.name for check in right.failed] == ["chat prompts that differ"]  # Fake has no template
        assert name in [check.name for check in wrong.failed]
        assert wrong.cause.startswith("the runtime takes 1e-05 for norm.eps") == (kind == "F32")

    @pytest.mark.parametrize("scheme", ["int4", "int8_dynamic_int4", "int8_dynamic"])
    def test_where_inputs_are_rounded_too_the_runtime_must_round_them(
        self, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(quantized(scheme), None, tmp_path / "a")
        save_model(make_plm(), None, tmp_path / "plm")
        for name in ("a", "plm"):
            bundled().save(tmp_path / name)
        runtime = Fake(quantized(scheme), ids=lambda text: bundled().encode(text, specials=True))
        monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: runtime)
        report = verify(tmp_path / "a", tmp_path / "plm", positions=16)
        found = next(check for check in report.checks if check.name.startswith("KL"))
        assert found.passed and found.value < 1e-6
        assert report.warnings == [] or scheme != "int8_dynamic"

    @pytest.mark.parametrize(
        ("kind", "least", "most"),
        [("F32", 1e-16, 1e-9), ("F16", 1e-9, 1e-5), ("BF16", 1e-6, 1e-3), ("Q6_K", 1e-5, 0.1)],
    )
    def test_the_limit_follows_from_what_rounding_inputs_does_to_the_model(
        self, kind: str, least: float, most: float
    ) -> None:
        model = make_llama()
        before = log_probs(model, IDS, 12)
        with with_rounded_inputs(model, dict.fromkeys(model.state_dict(), kind)):
            after = log_probs(model, IDS, 12)
        assert least < divergence(before, after) < most
        assert torch.equal(log_probs(model, IDS, 12), before)


class TestContents:
    def test_of_a_gguf_file_are_the_checkpoints_in_its_own_layout(self, checkpoint: Path, tmp_path: Path) -> None:
        model = load_model(checkpoint)
        write_gguf(model, bundled(), tmp_path / "a.gguf", kind="F32")
        contents = read_contents(tmp_path / "a.gguf", model)
        assert contents.kind == "F32"
        assert contents.settings == pytest.approx(contents.settings | settings_of(model))
        assert contents.template == bundled().chat_template
        assert set(contents.tensors) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(contents.tensors[name], tensor), name

    def test_the_kind_of_a_file_is_what_its_matrices_are_mostly(self, tmp_path: Path) -> None:
        model = make_plm()
        write_gguf(model, bundled(), tmp_path / "a.gguf", kind="Q8_0")
        assert read_contents(tmp_path / "a.gguf", model).kind == "Q8_0"


def with_merges_swapped() -> Tokenizer:
    tokenizer = bundled()
    held = tokenizer.vocabulary
    merges, tokens, ids = list(held.merges), list(held.tokens), list(held.ids)
    first = len(tokens) - len(merges)
    at = 40
    merges[at], merges[at + 1] = merges[at + 1], merges[at]
    tokens[first + at], tokens[first + at + 1] = tokens[first + at + 1], tokens[first + at]
    vocabulary = replace(held, merges=merges, tokens=tokens, ids=ids)
    return Tokenizer(
        vocabulary, eos=tokenizer.eos, vocab_size=tokenizer.vocab_size, chat_template=tokenizer.chat_template
    )


def swapped(values: list[Any]) -> list[Any]:
    return [*values[:1500], values[1501], values[1500], *values[1502:]]


# A key of a GGUF file: (what becomes of its value, None for no key; words of the cause).
KEYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tokens": (swapped, "token 1500 is '.*' in the export, 'gis' in the checkpoint"),
    "merges": (lambda merges: [*merges[:-1], "x y"], "merge .* is 'x y' in the export"),
    "token_type": (lambda kinds: [*kinds[:1500], 3, *kinds[1501:]], "token 1500, 'gis', is special in the export"),
    "eos_token_id": (lambda value: 77, "the export ends a text at token 77"),
    "eos_token_id ": (lambda value: None, "the export ends a text at token 11"),  # llama.cpp's own
    "eot_token_id": (lambda value: 99, "the export ends a turn at token 99, which is ordinary text"),
    "rope.scaling.factor": (lambda value: 4, "attention.rope_scaling is 4 in the export, 1 here"),
    "pre": (lambda value: value, ""),
}


class TestKeys:
    """Keys of a file that no text shows."""

    @pytest.mark.parametrize("key", KEYS)
    def test_what_differs_is_named(self, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        right, (change, words), model = gguf_writer.vocabulary_keys, KEYS[key], make_llama()

        def spoilt(*args: Any) -> Any:
            keys, notes = right(*args)
            name = key.strip() if key.startswith("rope") else f"tokenizer.ggml.{key.strip()}"
            name = f"llama.{name}" if key.startswith("rope") else name
            value = change(keys.pop(name, None))
            return keys | ({} if value is None else {name: value}), notes

        monkeypatch.setattr(gguf_writer, "vocabulary_keys", spoilt)
        write_gguf(model, bundled(), tmp_path / "a.gguf", kind="F16")
        contents = read_contents(tmp_path / "a.gguf", model)
        report = found_in(model, contents)
        runtime = Fake(model, ids=lambda text: bundled().encode(text, specials=True))
        compare_ids(report, runtime, bundled(), contents)
        assert re.search(words, report.cause) and bool(report.failed) == bool(words)


class TestGguf:
    """Through llama.cpp itself."""

    def test_a_right_file_passes_each_check(self, checkpoint: Path, tmp_path: Path) -> None:
        write_gguf(load_model(checkpoint), bundled(), tmp_path / "a.gguf", kind="F32")
        report = verify(tmp_path / "a.gguf", checkpoint, positions=8, prefer="xllamacpp", threads=1)
        assert report.failed == []
        assert (report.kind, report.positions, report.passed, report.cause) == ("F32", 8, True, "")
        values = {check.name: check.value for check in report.checks}
        assert values["KL from the export's own numbers"] < 1e-9
        assert values["cost: KL from the checkpoint"] < 1e-9
        assert values["token ids: texts that differ"] == values["chat prompts that differ"] == 0

    def test_merges_in_another_order_and_other_faults_are_each_named(self, tmp_path: Path) -> None:
        save_model(make_plm(), None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        model = broken("plm", with_rope_rows_of_q_and_k_permuted)
        with_another_eps(model)
        write_gguf(model, with_merges_swapped(), tmp_path / "a.gguf", kind="F32")
        report = verify(tmp_path / "a.gguf", tmp_path / "plm", positions=4, prefer="xllamacpp", threads=1)
        causes = {check.name: check.cause or "" for check in report.failed}
        assert causes["settings: that differ"] == "norm.eps is 0.001 in the export, 1e-06 here"
        assert "its rows are in another order" in causes["tensors: that differ"]
        assert causes["token ids: texts that differ"].startswith("token ")
        assert len(causes) == 3

    @pytest.mark.parametrize("form, kind", [(None, "F16"), ("deepseek2", "F16"), ("deepseek2", "Q8_0")])
    def test_numbers_beyond_f16_fail_with_their_reason(self, form: Any, kind: str, tmp_path: Path) -> None:
        model = make_plm()
        with torch.no_grad():  # squared, they are beyond 65,504
            for name, weight in model.named_parameters():
                weight.mul_(3000 if "up_proj" in name else 1)
        save_model(model, None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        write_gguf(model, bundled(), tmp_path / "a.gguf", kind=kind, as_=form)
        report = verify(tmp_path / "a.gguf", tmp_path / "plm", positions=4, prefer="xllamacpp", threads=1)
        (failed,) = report.failed
        assert failed.value == 4 and "log-probabilities are NaN" in failed.name and "65,504" in report.cause

    def test_a_file_that_the_runtime_does_not_open_fails_with_its_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(make_plm(), None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        write_gguf(make_plm(), bundled(), tmp_path / "a.gguf", kind="F32")

        def refuse(*args: Any, **options: Any) -> InferenceRuntime:
            raise UserError("llama.cpp cannot load it: its tokens are too few")

        monkeypatch.setattr(verifying, "open_runtime", refuse)
        report = verify(tmp_path / "a.gguf", tmp_path / "plm")
        assert report.verdict == ("opened by the runtime: failures. llama.cpp cannot load it: its tokens are too few.")


@pytest.fixture(scope="module")
def benchmark() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        return importlib.import_module("verification")
    finally:
        sys.path.pop(0)


class TestMatrix:
    """The cheap part of benchmarks/verification.py, through llama.cpp itself."""

    OPTIONS: ClassVar[dict[str, Any]] = {"positions": 24, "prefer": "xllamacpp", "threads": 1}

    @pytest.fixture(scope="class")
    def first(self, benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
        pytest.importorskip("xllamacpp")
        return self.saved(benchmark, next(iter(benchmark.RANDOM)), tmp_path_factory.mktemp("first") / "llama")

    def saved(self, benchmark: Any, name: str, directory: Path) -> tuple[Decoder, Path]:
        torch.manual_seed(0)
        model = benchmark.RANDOM[name]()
        save_model(model, None, directory)
        bundled().save(directory)
        return model, directory

    @pytest.mark.parametrize(("number", "kind"), [(0, "f32"), (1, "q8_0"), (2, "q5_1"), (3, "bf16"), (4, "q4_0")])
    def test_a_right_file_of_an_odd_model_passes(self, number: int, kind: str, benchmark: Any, tmp_path: Path) -> None:
        pytest.importorskip("xllamacpp")
        model, source = self.saved(benchmark, list(benchmark.RANDOM)[number], tmp_path / "model")
        write_gguf(model, bundled(), tmp_path / f"a-{kind.upper()}.gguf", kind=kind)
        report = verify(tmp_path / f"a-{kind.upper()}.gguf", source, **self.OPTIONS)
        assert report.passed, report.verdict
        found = next(check for check in report.checks if check.name.startswith("KL"))
        assert found.threshold is not None and found.value < found.threshold / 2

    @pytest.mark.parametrize("number", range(10))
    def test_a_wrong_file_fails_and_its_cause_is_named_once(
        self, number: int, benchmark: Any, first: tuple[Decoder, Path], tmp_path: Path
    ) -> None:
        name, (*_, kind, words) = list(benchmark.WRONG.items())[number]
        path = tmp_path / f"model-{'Q4_0' if kind == 'F16' else kind}.gguf"
        benchmark.write_wrong(name, first[0], bundled(), path)
        report = verify(path, first[1], **self.OPTIONS)
        assert words in report.cause
        assert len([check for check in report.failed if check.cause]) == 1


class Fake(InferenceRuntime):
    """A runtime that is our model, but for what is put in its place."""

    name, vocab_size, context = "fake", bundled().vocab_size, 128
    top_k: int | None = None

    def __init__(self, model: Decoder, *, ids: Callable[[str], list[int]], writes: Sequence[int] | None = None) -> None:
        self.model, self.ids, self.writes = model, ids, writes
        self.path = Path("fake")

    def clear(self) -> None:
        self.held: list[int] = []

    def read(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        self.held += ids
        rows = log_probs(self.model, self.held, last)
        return rows if self.top_k is None else rows.masked_fill(rows < rows.topk(self.top_k).values[:, -1:], -torch.inf)

    def encode(self, text: str) -> list[int] | None:
        return self.ids(text)

    def render(self, messages: Sequence[Message]) -> str | None:
        return None

    def close(self) -> None:
        pass


class TestOfAProgram:
    @pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.5, False)])
    def test_of_integers_is_held_to_the_quantized_checkpoint_it_was_made_from(
        self, factor: float, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = quantized("int8_dynamic")
        save_model(model, None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        (tmp_path / "a.pte").touch()
        facts = {"vocab_size": model.vocab_size, "max_seq_len": 128, "formats": ["int8_dynamic_int8"]}
        (tmp_path / "a.pte.json").write_text(json.dumps(facts))
        cast("Any", model.norm).weight.data *= factor
        runtime = Fake(model, ids=lambda text: bundled().encode(text, specials=True))
        monkeypatch.setattr(verifying, "choose_runtime", lambda *args: "executorch")
        monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: runtime)
        report = verify(tmp_path / "a.pte", tmp_path / "plm", positions=16)
        check = next(check for check in report.checks if check.name == "KL from the export's own numbers")
        assert check.passed == passes


class TestPrompts:
    def fake(self) -> Fake:
        runtime = Fake(make_plm(), ids=lambda text: [])
        runtime.name = "llama.cpp (llama_cpp)"
        return runtime

    def compared(self, runtime: InferenceRuntime) -> Check:
        report = Report("a", "b", runtime.name, "F32", 4)
        compare_prompts(report, runtime, bundled(), Contents("F32"))
        return report.checks[-1]

    def test_are_rendered_by_llama_cpps_own_engine_where_it_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        other = self.fake()
        other.name = "llama.cpp (xllamacpp)"
        monkeypatch.setattr(other, "render", lambda messages: "otherwise")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(verify_text, "open_runtime", lambda path, **options: other)
        assert "llama.cpp (xllamacpp) renders the same template otherwise" in (self.compared(self.fake()).cause or "")

    def test_say_what_rendered_them_where_it_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = self.fake()
        template = ChatTemplate(bundled().chat_template or "", bundled(), "a")
        monkeypatch.setattr(runtime, "render", lambda messages: template.render(messages, add_generation_prompt=True))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        check = self.compared(runtime)
        assert check.passed
        assert "by Python's Jinja" in (check.remark or "")


class TestOfATokenizer:
    @pytest.mark.parametrize(
        ("ids", "words"),
        [
            (lambda text: [7, *bundled().encode(text, specials=True)], "puts 7 before each text"),
            (lambda text: [*bundled().encode(text, specials=True), 7], "puts 7 behind each text"),
            (lambda text: bundled().encode(text), "special tokens is not taken for the tokens"),
            (lambda text: bundled().encode(text, specials=True)[::-1], "so text is cut otherwise"),
        ],
    )
    def test_ids_that_differ_have_their_reason(
        self, ids: Callable[[str], list[int]], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(make_plm(), None, tmp_path / "a")
        bundled().save(tmp_path / "a")
        monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: Fake(make_plm(), ids=ids))
        report = verify(tmp_path / "a", tmp_path / "a", positions=4)
        causes = {check.name: check.cause or "" for check in report.failed}
        assert words in causes["token ids: texts that differ"]
        assert causes["chat prompts that differ"] == "the export has no chat template"
        assert not any(name.startswith("KL") for name in causes)

    def test_text_that_is_not_normalized_is_a_fault_where_the_runtime_could(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(make_plm(), None, tmp_path / "a")
        bundled().save(tmp_path / "a")
        raw = Tokenizer(replace(bundled().vocabulary, normalization=None), eos=bundled().eos)
        runtime = Fake(make_plm(), ids=lambda text: raw.encode(text, specials=True))
        monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: runtime)
        causes = {check.name: check.cause or "" for check in verify(tmp_path / "a", tmp_path / "a", positions=4).failed}
        assert "does not normalize to NFC" in causes["token ids: texts not in NFC that differ"]
        assert "token ids: texts that differ" not in causes


class TestReport:
    def test_goes_to_json_and_a_table_even_with_what_is_no_number(self) -> None:
        report = Report("a.gguf", "b", "llama.cpp", "F32", 8)
        report.add("one", float("nan"), 0.1, cause="it broke")
        report.add("two", 0.5, None)
        assert [check.name for check in report.failed] == ["one"]
        data = json.loads(report.as_json())
        assert (data["passed"], data["checks"][0]["value"]) == (False, None)
        assert len(report.table().rows) == 2
        assert report.checks[1] == Check("two", 0.5, None, True)

    def test_names_each_cause_once_and_shows_figures_without_a_verdict(self) -> None:
        report = Report("a.gguf", "b", "llama.cpp", "Q4_0", 8)
        report.add("one", 1, 0, "seen", "norm.eps is off.")
        report.add("two", 2, 0, None, "norm.eps is off")
        report.add("three", 3, 5, None, "not this")
        report.add("cost", 9, None)
        assert report.verdict == "one, two. norm.eps is off."
        assert [line.split()[3] for line in report.table().lines(100)[2:]] == ["FAILED", "FAILED", "ok", "-"]

    def test_its_checks_are_legible_in_a_narrow_terminal(self) -> None:
        report = Report("exports/a-model-of-some-name-20261121-154047-Q8_0.gguf", "b", "llama.cpp", "Q8_0", 64)
        long = "a remark of many words that has to go over several lines of what is left of the terminal's width"
        names = ["KL from the export's own numbers", "token ids: texts not in NFC that differ"]
        for name in names:
            report.add(name, 1.25e-10, 5e-3, long)
        shown = "\n".join(report.table().lines(100))
        assert all(re.search(rf"{name[:30]}.* +1\.25e-10 +0\.005 +ok +a remark", shown) for name in names), shown

    def test_a_text_too_short_to_prove_anything_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(make_plm(), None, tmp_path / "a")
        bundled().save(tmp_path / "a")
        for text, count in (("", 0), ("Hello world", 3)):
            with pytest.raises(UserError, match=f"a text of {count} tokens is too short"):
                verify(tmp_path / "a", tmp_path / "a", text=text)
        ids = bundled().encode(probe_texts.PAGE)
        for most, held in ((100, 100), (32, 32), (16, 16)):
            ((piece, last),) = verifying._windows(ids[:held], most, 256)
            assert (len(piece), last) == (held, held - 1)
        with pytest.raises(UserError, match="15 tokens are all that it reads"):
            verifying._windows(ids, 15, 256)
        assert [len(piece) for piece, _ in verifying._windows(ids, 128, 256)] == [128] * 3
        assert sum(last for _, last in verifying._windows(ids, 128, 256)) >= 256
        assert [last for _, last in verifying._windows(ids, 257, 256)] == [256]
        assert [last for _, last in verifying._windows(ids, 257, 8)] == [8]
        with pytest.raises(ValueError, match=r"positions \(0\) must be at least 1"):
            verify(tmp_path / "a", tmp_path / "a", positions=0)
