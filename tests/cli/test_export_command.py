"""plmtune export: files that other programs run, verified, and mistakes told before work starts."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from in_process import run, save_small

from plmtune.errors import UserError
from plmtune.export import export_model as export_run
from plmtune.export import verify

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "verify", partial(verify.verify, positions=16, threads=1))
    save_small(tmp_path / "small")
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return partial(run, monkeypatch, capsys)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


class TestGguf:
    def test_an_export_is_verified_and_says_how_it_is_run(self, folder: Path, command: Command) -> None:
        code, out, err = command("export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 0, err
        assert files(folder / "exports") == ["small-F32.gguf"]
        assert "KL from the export's own numbers" in out and "verified: it is" in out and "-fa off" in out

    def test_what_gguf_lacks_is_said_with_the_format_that_has_it(self, folder: Path, command: Command) -> None:
        path = folder / "small" / "config.json"
        path.write_text(path.read_text().replace('"tie_embeddings": true', '"tie_embeddings": false'))
        code, _, err = command("export", "small", "--to", "gguf")
        assert code == 2 and "cannot be exported to gguf: " in err and err.endswith(" --to hf writes it.\n")
        assert files(folder / "exports") == []

    def test_a_modelfile_lies_beside_the_file(self, folder: Path, command: Command) -> None:
        words = ("export", "small", "--to", "gguf", "--ollama", "--no-verify")
        code, out, err = command(*words)
        assert code == 0, err
        assert files(folder / "exports") == ["small-F16.gguf", "small-F16.gguf.Modelfile"]
        written = (folder / "exports" / "small-F16.gguf.Modelfile").read_text()
        assert written.startswith('FROM ./small-F16.gguf\nTEMPLATE """') and "PARAMETER stop" in written
        assert "ollama create small -f exports/small-F16.gguf.Modelfile" in " ".join(out.split())
        (folder / "exports" / "small-F16.gguf").unlink()
        code, out, err = command(*words)
        assert (code, "small-F16.gguf.Modelfile is there already" in err) == (2, True)
        for more in (("--to", "hf"), ("--to", "gguf", "--adapters", "keep")):
            code, out, err = command("export", "small", "--ollama", *more)
            assert (code, "--ollama: only --to gguf of a whole model has a Modelfile." in err) == (2, True)

    def test_a_plm_as_deepseek2_has_flash_attention(self, folder: Path, command: Command) -> None:
        words = ("export", "small", "--to", "gguf", "--as", "deepseek2", "--quant", "f32")
        code, out, err = command(*words)
        assert code == 0, err
        assert files(folder / "exports") == ["small-deepseek2-F32.gguf"]
        assert "KL with flash attention" in out and "-fa off" not in out
        assert "are a second copy of each layer's up projection" in out

    def test_a_file_that_fails_is_kept_under_another_name_beside_those_that_pass(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command
    ) -> None:
        write = export_run.write_gguf

        def broken(model, *rest, **settings):  # type: ignore[no-untyped-def]
            factor = 1.5 if settings["kind"] == "F32" else 1.0
            model = copy.deepcopy(model)
            model.layers[0].attention.o_proj.weight.data.mul_(factor)
            return write(model, *rest, **settings)

        monkeypatch.setattr(export_run, "write_gguf", broken)
        words = ("export", "small", "--to", "gguf", "--quant", "f32,f16")
        code, out, err = command(*words)
        assert code == 1
        assert files(folder / "exports") == ["small-F16.gguf", "small-F32.gguf.unverified"]
        assert "kept under this name because its verification failed" in out and "FAILED" in out
        cause = "layers.0.attention.o_proj.weight: it is 1.5 times the checkpoint's"
        assert (out + err).count(cause) == err.count(cause) == 1
        # It can be verified again under that name, and is not written over without a word.
        failed = folder / "exports" / "small-F32.gguf.unverified"
        code, out, err = command("verify", failed, "--against", "small", "--positions", 8)
        assert (code, cause in err) == (1, True)
        (folder / "exports" / "small-F16.gguf").unlink()
        code, out, err = command(*words)
        assert (code, "small-F32.gguf.unverified is there already" in err) == (2, True)

    def test_a_file_that_cannot_be_verified_is_kept_with_the_reason(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command
    ) -> None:
        def fails(path: Path, *rest: object, **settings: object) -> None:
            raise UserError(f"{path} holds numbers that are not finite.")

        monkeypatch.setattr(verify, "verify", fails)
        code, _, err = command("export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 1 and "small-F32.gguf holds numbers that are not finite" in err
        assert files(folder / "exports") == ["small-F32.gguf.unverified"]


class TestHuggingFace:
    def test_a_plm_as_a_deepseek_is_verified_in_transformers(self, folder: Path, command: Command) -> None:
        words = ("export", "small", "--to", "hf", "--as", "deepseek", "--quant", "fp32")
        code, out, err = command(*words)
        assert code == 0, err
        assert (folder / "exports" / "small-deepseek-fp32" / "config.json").is_file()
        assert "vllm serve" in out


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--to", "gguf", "--quant", "q4_k"), "--quant q4_k: gguf has no such type. Did you mean q4_k_"),
            (("--to", "gguf", "--as", "deepseek"), "--as deepseek is a form of --to hf; --to gguf has --as deepseek2."),
            (("--to", "hf", "--as", "deepseek2"), "--as deepseek2 is a form of --to gguf; --to hf has --as deepseek."),
            (("--to", "executorch", "--as", "deepseek2"), "--to executorch has no other forms"),
            (("--to", "gguf", "--as", "deepseek2", "--adapters", "keep"), "is a form of whole models"),
            (("--to", "hf", "--adapters", "keep"), "small holds no adapters, but a whole model"),
            (("--to", "executorch", "--quant", "int8"), "--quant int8: executorch has no such type"),
        ],
    )
    def test_is_told_before_anything_is_written(
        self, folder: Path, command: Command, words: tuple[str, ...], said: str
    ) -> None:
        code, _, err = command("export", "small", *words)
        assert code == 2
        assert said in err
        assert not files(folder / "exports")

    def test_a_file_that_is_there_is_kept(self, folder: Path, command: Command) -> None:
        (folder / "exports").mkdir()
        (folder / "exports" / "small-F32.gguf").write_text("mine")
        code, _, err = command("export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 2 and "is there already" in err and "--overwrite" in err
        assert (folder / "exports" / "small-F32.gguf").read_text() == "mine"

    @pytest.mark.parametrize("name", ["small-hf", "small-hf.unverified", "small-F16.gguf"])
    def test_a_directory_that_is_no_export_is_kept_in_any_case(self, folder: Path, command: Command, name: str) -> None:
        kept = folder / "exports" / name / "notes.txt"
        kept.parent.mkdir(parents=True)
        kept.write_text("mine")
        to = "hf" if "hf" in name else "gguf"
        code, _, err = command("export", "small", "--to", to, "--overwrite")
        said = "holds something else than a model" if to == "hf" else "is a directory, and this form is a file"
        assert code == 2 and said in err and kept.read_text() == "mine" and files(folder / "exports") == [name]

    def test_the_checkpoint_itself_is_never_replaced(self, folder: Path, command: Command) -> None:
        (folder / "small").rename(folder / "small-hf")
        before = {file: file.read_bytes() for file in (folder / "small-hf").iterdir()}
        words = ("export", "small-hf", "--to", "hf", "--out", ".", "--name", "small", "--overwrite")
        code, _, err = command(*words)
        assert code == 2 and "holds the checkpoint that is exported" in err
        assert before == {file: file.read_bytes() for file in (folder / "small-hf").iterdir()}

    def test_a_full_disk_is_told_of_first(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
        code, _, err = command("export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 2 and "its disk has 10 B left" in err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("executorch",), "needs the package executorch (extra executorch)"),
            (("gguf", "--quant", "q4_k_m"), "q4_k_m, made by llama.cpp's own quantizer, needs the package llama_cpp"),
            (("gguf",), "Verifying the file (or else --no-verify) needs the package xllamacpp (extra gguf)"),
            (("hf",), "needs the package transformers (extra transformers)"),
        ],
    )
    def test_a_missing_package_is_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command, words: tuple[str, ...], said: str
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        code, _, err = command("export", "small", "--to", *words)
        assert code == 2 and said in err
