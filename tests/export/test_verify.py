"""A right export passes; one that is broken in a usual way fails, and its cause is named."""

import copy
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from plmtune.data import tokenizers
from plmtune.data.chat_template import ChatTemplate
from plmtune.data.rows import Message
from plmtune.data.tokenizers import Tokenizer
from plmtune.errors import UserError
from plmtune.export import hard_texts
from plmtune.export import verify as verifying
from plmtune.export.contents import Contents, read_contents, settings_of
from plmtune.export.diagnosis import find_cause, log_probs, suspect_tensors
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.runtimes import Runtime
from plmtune.export.verify import Check, Report, limits_of, verify
from plmtune.models.gguf import to_halves
from plmtune.models.hf import load_model, save_model
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.norm import RMSNorm
from plmtune.quantization.quantize import quantize
from plmtune.registry import component, load

bundled = cache(tokenizers.bundled)
IDS = bundled().encode("def read(path):\n    with open(path) as file:\n        return file.read()\n")


def make_plm(**settings: Any) -> Decoder:
    torch.manual_seed(0)
    options = {"rope_theta": 100000.0} | settings
    return plm(
        bundled().vocab_size,
        attention=component(
            "attention", "mla", kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=16, **options
        ),
        ffn=component("ffn", "squared_relu", hidden_dim=64),
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        max_seq_len=128,
        init_std=0.15,
    ).eval()


def make_llama(**settings: Any) -> Decoder:
    torch.manual_seed(0)
    return llama(
        bundled().vocab_size,
        attention=component("attention", "gqa", num_kv_heads=2, head_dim=16, **settings),
        ffn=component("ffn", "swiglu", hidden_dim=64),
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        max_seq_len=128,
        init_std=0.15,
    ).eval()


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


def with_a_transposed_matrix(model: Decoder) -> None:
    projection = parts(model)[0].attention.o_proj
    projection.weight.data = projection.weight.data.T.contiguous()


BROKEN: dict[Callable[[Decoder], None], str] = {
    with_another_eps: "norm.eps is 0.001 in the export, 1e-06 here",
    with_another_theta: "attention.rope_theta is 10000 in the export, 100000 here",
    with_a_tensor_of_zeros: "layers.1.ffn.up_proj.weight: all its numbers are zero",
    with_noise_in_a_tensor: "layers.0.attention.o_proj.weight: off by (29|30|31)",
    with_a_norm_doubled: "layers.0.ffn_norm.weight: it is 2 times the checkpoint's",
    with_a_transposed_matrix: "layers.0.attention.o_proj.weight: it is transposed",
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


class TestCauses:
    """What a runtime would say is here what a broken model says, which is the same for any runtime."""

    @pytest.mark.parametrize(
        ("name", "breaking"),
        # the llama's o_proj is not square
        [(name, how) for how in BROKEN for name in MAKE if (name, how) != ("llama", with_a_transposed_matrix)],
    )
    def test_a_mistake_is_named(self, name: str, breaking: Callable[[Decoder], None]) -> None:
        theirs, model = broken(name, breaking), MAKE[name]()
        before = copy.deepcopy(model.state_dict())
        contents = Contents("F32", settings_of(theirs), Holding(theirs))
        cause = find_cause(model, IDS, log_probs(theirs, IDS, 12), contents)
        assert re.search(BROKEN[breaking].replace("1e-06", EPS[name]), cause), cause
        # and the checkpoint's model is what it was
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert settings_of(model) == settings_of(MAKE[name]())

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
        theirs = broken(name, breaking)
        # Where a file's tensors cannot be read, as in a .pte, what the runtime says is enough.
        empty: dict[str, Tensor] = {}
        for held in (empty, Holding(theirs)):
            contents = Contents("F32", settings_of(theirs), held)
            assert words in find_cause(MAKE[name](), IDS, log_probs(theirs, IDS, 12), contents)

    def test_halves_turned_in_place_of_neighbours_are_named(self) -> None:
        theirs = make_llama()
        model = make_llama(rope_interleaved=True)
        model.load_state_dict(theirs.state_dict())
        cause = find_cause(model, IDS, log_probs(theirs, IDS, 12), Contents("F32", {}, Holding(theirs)))
        assert "neighbours are turned in the checkpoint, halves in the export" in cause

    def test_rounding_alone_is_told_from_a_mistake(self) -> None:
        theirs, model = make_plm(), make_plm()
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                step = parameter.data.abs().amax(1, keepdim=True) / 3
                parameter.data = (parameter.data / step).round() * step
        contents = Contents("Q2_K", settings_of(theirs), Holding(theirs))
        cause = find_cause(model, IDS, log_probs(theirs, IDS, 12), contents)
        assert "it is this rounding that moves the model" in cause

    def test_what_nothing_explains_is_said_to_be_unexplained(self) -> None:
        model = make_plm()
        theirs = log_probs(model, IDS, 12).roll(1, dims=1)
        assert "No single mistake explains it" in find_cause(model, IDS, theirs, Contents("F32", settings_of(model)))


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

    @pytest.mark.parametrize("factor", [0.8, 0.96, 1.04, 1.2])
    def test_a_factor_within_what_rounding_may_do_is_found(self, factor: float, tmp_path: Path) -> None:
        model = make_plm()
        parts(model)[1].attention.o_proj.weight.data *= factor
        write_gguf(model, bundled(), tmp_path / "a.gguf", kind="Q4_0")
        found = suspect_tensors(make_plm(), read_contents(tmp_path / "a.gguf", make_plm()))
        assert list(found) == ["layers.1.attention.o_proj.weight"]
        said = re.fullmatch(r"it is about ([\d.]+) times the checkpoint's", found["layers.1.attention.o_proj.weight"])
        assert said is not None
        assert float(said[1]) == pytest.approx(factor, abs=0.01)

    def test_clipped_outliers_are_no_factor(self) -> None:
        model = make_plm()
        weight = parts(model)[0].ffn.up_proj.weight.data
        weight.clamp_(-2 * float(weight.std()), 2 * float(weight.std()))
        assert suspect_tensors(make_plm(), Contents("Q4_0", tensors=Holding(model))) == {}

    def test_a_runtime_that_computes_something_else_is_found_however_coarse_the_type(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(make_plm(), None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        write_gguf(make_plm(), bundled(), tmp_path / "a.gguf", kind="Q4_0")
        contents = read_contents(tmp_path / "a.gguf", make_plm())

        def own_divergence(eps: float) -> Check:
            runs = make_plm()
            runs.load_state_dict(dict(contents.tensors))
            for module in runs.modules():
                if isinstance(module, RMSNorm):
                    module.eps = eps
            runtime = Fake(runs, ids=lambda text: bundled().encode(text, specials=True))
            monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: runtime)
            report = verify(tmp_path / "a.gguf", tmp_path / "plm", positions=16)
            assert "KL divergence: mean, nats" not in [check.name for check in report.failed]
            return next(check for check in report.checks if check.name == "from the export's own numbers: KL")

        right, wrong = own_divergence(1e-6), own_divergence(0.1)
        assert right.value < 1e-9
        assert not wrong.passed

    @pytest.mark.parametrize(("scheme", "most"), [("int4", 0.01), ("int8_dynamic_int4", 0.1), ("int8_dynamic", 0.015)])
    def test_where_inputs_are_rounded_too_more_is_allowed(
        self, scheme: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(quantized(scheme), None, tmp_path / "a")
        save_model(make_plm(), None, tmp_path / "plm")
        for name in ("a", "plm"):
            bundled().save(tmp_path / name)
        runtime = Fake(quantized(scheme), ids=lambda text: bundled().encode(text, specials=True))
        monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: runtime)
        checks = {check.name: check for check in verify(tmp_path / "a", tmp_path / "plm", positions=4).checks}
        found = checks["from the export's own numbers: KL"]
        assert (found.threshold, found.passed) == (most, True)


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


def with_another_template() -> Tokenizer:
    tokenizer = bundled()
    assert tokenizer.chat_template is not None
    template = tokenizer.chat_template.replace("You are a helpful assistant.", "")
    return Tokenizer(tokenizer.vocabulary, eos=tokenizer.eos, vocab_size=tokenizer.vocab_size, chat_template=template)


class TestGguf:
    """Through llama.cpp itself."""

    def test_a_right_file_passes_each_check(self, checkpoint: Path, tmp_path: Path) -> None:
        write_gguf(load_model(checkpoint), bundled(), tmp_path / "a.gguf", kind="F32")
        report = verify(tmp_path / "a.gguf", checkpoint, positions=8, prefer="xllamacpp", threads=1)
        assert report.failed == []
        assert (report.kind, report.positions, report.passed, report.cause) == ("F32", 8, True, "")
        values = {check.name: check.value for check in report.checks}
        assert values["log-probabilities: largest difference"] < 1e-4
        assert values["token ids: texts that differ"] == values["chat prompts that differ"] == 0

    def test_a_broken_file_fails_and_says_why(self, tmp_path: Path) -> None:
        save_model(make_plm(), None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        model = broken("plm", with_rope_rows_of_q_and_k_permuted)
        with_another_eps(model)
        write_gguf(model, with_merges_swapped(), tmp_path / "a.gguf", kind="F32")
        report = verify(tmp_path / "a.gguf", tmp_path / "plm", positions=4, prefer="xllamacpp", threads=1)
        causes = {check.name: check.cause or "" for check in report.failed}
        assert causes["settings that differ"] == "norm.eps is 0.001 in the export, 1e-06 here"
        assert "RoPE's pairs" in causes["KL divergence: mean, nats"]
        assert causes["token ids: texts that differ"].startswith("token ")
        assert "chat prompts that differ" not in causes

    def test_a_quantized_file_is_held_to_what_its_type_can(self, tmp_path: Path) -> None:
        save_model(make_plm(), None, tmp_path / "plm")
        bundled().save(tmp_path / "plm")
        write_gguf(make_plm(), with_another_template(), tmp_path / "a.gguf", kind="Q8_0")
        report = verify(tmp_path / "a.gguf", tmp_path / "plm", positions=4, prefer="xllamacpp", threads=1)
        assert [check.name for check in report.failed] == ["chat prompts that differ"]
        assert "the export's chat template is another one" in report.cause
        kl = next(check for check in report.checks if check.name.startswith("KL"))
        assert kl.threshold == limits_of("Q8_0").kl
        assert 1e-6 < kl.value < kl.threshold


class Fake(Runtime):
    """A runtime that is our model, but for what is put in its place."""

    name, vocab_size, context = "fake", bundled().vocab_size, 128

    def __init__(self, model: Decoder, *, ids: Callable[[str], list[int]], writes: Sequence[int] | None = None) -> None:
        self.model, self.ids, self.writes = model, ids, writes
        self.path = Path("fake")

    def log_probs(self, ids: Sequence[int], last: int) -> Tensor:
        return log_probs(self.model, ids, last)

    def start(self, ids: Sequence[int]) -> int:
        self.read = list(ids)
        return self.next()

    def step(self, id: int) -> int:
        self.read.append(id)
        return self.next()

    def next(self) -> int:
        return int(log_probs(self.model, self.read, 1).argmax())

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
        monkeypatch.setattr(verifying, "open_runtime", lambda *args, **options: runtime)
        report = verify(tmp_path / "a.pte", tmp_path / "plm", positions=16)
        check = next(check for check in report.checks if check.name == "from the quantized model: KL")
        assert check.passed == passes


class TestPrompts:
    def fake(self) -> Fake:
        runtime = Fake(make_plm(), ids=lambda text: [])
        runtime.name = "llama.cpp (llama_cpp)"
        return runtime

    def compared(self, runtime: Runtime) -> Check:
        report = Report("a", "b", runtime.name, "F32", 4)
        verifying._compare_prompts(report, runtime, bundled(), Contents("F32"))
        return report.checks[-1]

    def test_are_rendered_by_llama_cpps_own_engine_where_it_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        other = self.fake()
        other.name = "llama.cpp (xllamacpp)"
        monkeypatch.setattr(other, "render", lambda messages: "otherwise")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(verifying, "open_runtime", lambda path, **options: other)
        assert "llama.cpp (xllamacpp) renders the same template otherwise" in (self.compared(self.fake()).cause or "")

    def test_say_what_rendered_them_where_it_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = self.fake()
        template = ChatTemplate(bundled().chat_template or "", bundled(), "a")
        monkeypatch.setattr(runtime, "render", lambda messages: template.render(messages, add_generation_prompt=True))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        check = self.compared(runtime)
        assert check.passed
        assert "by Python's Jinja" in (check.cause or "")


class TestOfATokenizer:
    @pytest.mark.parametrize(
        ("ids", "words"),
        [
            (lambda text: [7, *bundled().encode(text, specials=True)], "puts 7 before each text"),
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
        assert "KL divergence: mean, nats" not in causes

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
        report.add("one", float("nan"), 0.1, "it broke")
        report.add("two", 0.5, None)
        assert [check.name for check in report.failed] == ["one"]
        data = json.loads(report.as_json())
        assert (data["passed"], data["checks"][0]["value"]) == (False, None)
        assert len(report.table().rows) == 2
        assert report.checks[1] == Check("two", 0.5, None, True)

    def test_its_checks_are_legible_in_a_narrow_terminal(self) -> None:
        report = Report("exports/a-model-of-some-name-20261121-154047-Q8_0.gguf", "b", "llama.cpp", "Q8_0", 64)
        long = "a remark of many words that has to go over several lines of what is left of the terminal's width"
        names = ["log-probabilities: largest difference", "token ids: texts not in NFC that differ"]
        for name in names:
            report.add(name, 1.25e-10, 5e-3, long)
        shown = "\n".join(report.table().lines(100))
        assert all(re.search(rf"{name[:30]}.* +1\.25e-10 +0\.005 +ok +a remark", shown) for name in names), shown

    def test_coarser_types_have_wider_limits(self) -> None:
        order = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]
        allowed = [limits_of(kind).kl for kind in order]
        assert allowed == sorted(allowed)
        with pytest.raises(UserError, match="no limits are known for X9"):
            limits_of("X9")

    def test_a_text_too_short_to_prove_anything_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(make_plm(), None, tmp_path / "a")
        bundled().save(tmp_path / "a")
        for text, count in (("", 0), ("Hello world", 3)):
            with pytest.raises(UserError, match=f"a text of {count} tokens is too short"):
                verify(tmp_path / "a", tmp_path / "a", text=text)
        page = hard_texts.PAGE
        for most, held in ((100, 100), (32, 32), (16, 16)):
            assert len(verifying._ids(bundled(), page, most)) == held
        with pytest.raises(UserError, match="15 tokens are all that it reads"):
            verifying._ids(bundled(), page, 15)
        with pytest.raises(ValueError, match="positions must be at least 1, not 0"):
            verify(tmp_path / "a", tmp_path / "a", positions=0)
