"""plmtune convert and plmtune merge, as a person types them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from saved_adapters import save_adapter

import plmtune
from plmtune.cli import main
from plmtune.models.hf import load_model, save_model
from plmtune.models.llama import llama
from plmtune.modules.peft import adapter_parameters
from plmtune.registry import component, load
from plmtune.tokenizers.tokenizer_files import byte

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: a fresh one would spend seconds on importing torch."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plmtune", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return int(exit.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = llama(
        byte().vocab_size,
        attention=component("attention", "gqa", num_kv_heads=1),
        ffn=component("ffn", "swiglu", hidden_dim=32),
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        max_seq_len=32,
        init_std=0.3,
    )
    save_model(model, None, tmp_path / "base")
    byte().save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def file(base: Path) -> Path:
    """A GGUF file without a tokenizer."""
    path, model = base.with_name("a.gguf"), load_model(base)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    for name, tensor in model.state_dict().items():
        leaf = name.split(".")[-2]
        top = {"tok_embeddings": "token_embd", "norm": "output_norm"}
        theirs = f"blk.0.{names[leaf]}" if name.startswith("layers.") else top[leaf]
        writer.add_tensor(f"{theirs}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestConvert:
    def test_writes_a_model_with_the_tokenizer_that_is_named(
        self, file: Path, base: Path, tmp_path: Path, typed: Command
    ) -> None:
        out = tmp_path / "out"
        code, told, err = typed("convert", file, out, "--dtype", "bf16", "--tokenizer", base)
        assert code == 0, err
        assert told.startswith(f"{out}: 6,464 parameters in bf16, from 100.0% F32")
        assert "try it" not in told  # bytes alone have no chat template
        model, tokenizer = plmtune.load(out, "cpu")
        assert torch.equal(model.head_weight, load_model(base).head_weight.bfloat16())
        assert tokenizer.fingerprint == byte().fingerprint

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("{file}", "{tmp}/out"), "model None is not supported, only byte-level BPE (gpt2) and"),
            (("{file}", "{tmp}/base", "--tokenizer", "{tmp}/base"), "holds a model already"),
            (("{tmp}/base", "{tmp}/out"), "is a directory. One in Hugging Face's form needs no conversion"),
            (("{tmp}/nothing.gguf", "{tmp}/out"), "There is no file {tmp}/nothing.gguf (seen from"),
        ],
    )
    def test_mistakes_are_one_sentence_and_nothing_is_left(
        self, file: Path, tmp_path: Path, typed: Command, arguments: tuple[str, ...], message: str
    ) -> None:
        code, out, err = typed("convert", *(a.format(file=file, tmp=tmp_path) for a in arguments))
        assert (code, out) == (2, "")
        assert message.format(tmp=tmp_path) in err and "Traceback" not in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "base"]


class TestMerge:
    @pytest.fixture
    def checkpoint(self, base: Path, tmp_path: Path) -> Path:
        """A run whose newest checkpoint holds adapters."""
        model = load_model(base)
        load("peft", "lora")(model=model, rank=2)
        for parameter in adapter_parameters(model).values():
            torch.nn.init.normal_(parameter)
        directory = tmp_path / "run" / "checkpoints" / "step-00000007"
        save_adapter(model, directory, base)
        byte().save(directory)
        return directory

    def test_writes_a_plain_model_of_a_run(self, checkpoint: Path, tmp_path: Path, typed: Command) -> None:
        out = tmp_path / "out"
        code, told, err = typed("merge", tmp_path / "run", out)
        assert code == 0, err
        assert f"adapters of {checkpoint} merged" in told
        tokens = torch.arange(20)[None]
        assert not (out / "adapter_config.json").exists()
        merged = plmtune.load(checkpoint, "cpu")[0]
        assert torch.equal(load_model(out)(tokens), merged(tokens))
        assert (out / "tokenizer.json").exists()

    def test_what_cannot_be_merged_is_a_sentence(
        self, checkpoint: Path, base: Path, tmp_path: Path, typed: Command
    ) -> None:
        code, _, err = typed("merge", base, tmp_path / "out")
        assert code == 2 and "holds no adapters. To merge whole models give several" in err
        (base / "model.safetensors").unlink()
        code, _, err = typed("merge", checkpoint, tmp_path / "out")
        assert code == 2 and "holds neither model.safetensors" in err
        assert not (tmp_path / "out").exists()


class TestMergeOfWholeModels:
    def test_two_models_give_one_that_loads(self, base: Path, tmp_path: Path, typed: Command) -> None:
        out = tmp_path / "out"
        code, told, err = typed("merge", base, base, out, "--method", "slerp", "--weights", "1,3", "--dtype", "bf16")
        assert code == 0, err
        assert f"slerp of {base} and {base}" in told
        weight = load_model(out).tok_embeddings.weight
        assert torch.equal(weight, load_model(base).tok_embeddings.weight.bfloat16())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "2 models are given. Say how to merge them with --method"),
            (("--method", "ties"), "needs --base DIR"),
            (("--method", "average", "--base", "x"), "has no base"),
            (("--method", "average", "--density", "0.5"), "belongs to --method ties"),
            (("--method", "ties", "--base", "x", "--density", "2"), "at most 1"),
            (("--method", "average", "--weights", "1"), "for each of the 2 models"),
            (("--method", "average", "--weights", "1,x"), "give a number for each model"),
            (("--method", "average", "--weights", ""), "give a number for each model"),
            (("--method", "ties", "--base", "x", "--density", "0"), "is above 0"),
            (("--method", "average", "--weights", "1,nan"), "give a finite number"),
            (("--method", "slerp", "--weights", "0,0"), "one must be above 0"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(
        self, base: Path, tmp_path: Path, typed: Command, options: tuple[str, ...], message: str
    ) -> None:
        code, _, err = typed("merge", base, base, tmp_path / "out", *options)
        assert code == 2 and message in err
        assert not (tmp_path / "out").exists()

    def test_one_model_needs_no_method(self, base: Path, tmp_path: Path, typed: Command) -> None:
        code, _, err = typed("merge", base, tmp_path / "out", "--method", "average")
        assert code == 2 and "merges at least two models, and 1 is given" in err
        for option, value in (("--weights", "1"), ("--weights", ""), ("--density", "0")):
            code, _, err = typed("merge", base, tmp_path / "out", option, value)
            assert code == 2 and f"{option} belongs to --method" in err

    def test_numbers_that_overflow_are_refused_by_the_name_that_was_given(
        self, base: Path, tmp_path: Path, typed: Command
    ) -> None:
        options = ("--method", "task_arithmetic", "--base", tmp_path / "zero", "--weights", "1e38,1e38")
        zero = load_model(base)
        with torch.no_grad():
            zero.norm.weight.sub_(4)
        save_model(zero, None, tmp_path / "zero")
        byte().save(tmp_path / "zero")
        code, _, err = typed("merge", base, base, tmp_path / "out", *options)
        assert code == 2 and f"norm.weight. Nothing is written to {tmp_path / 'out'}." in err
        assert not (tmp_path / "out").exists()


class TestRefusalsAreCheap:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("convert", "nothing.gguf", "out"), "There is no file nothing.gguf"),
            (("merge", "nothing", "out"), "There is no nothing (seen from"),
            (("merge", ".", "."), "holds something else than a model"),
            (("validate", "t.csv"), "There is no config t.csv"),
        ],
    )
    def test_they_come_before_torch(self, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
        (tmp_path / "t.csv").write_text("a,b\n")
        said = "import sys; from plmtune.cli import cli\ntry: cli.main(sys.argv[1:], standalone_mode=False)\n"
        said += "except Exception as error: print(error, 'torch' in sys.modules)"
        command = [sys.executable, "-c", said, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert message in done.stdout and done.stdout.endswith(" False\n")
