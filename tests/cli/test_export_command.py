"""plmtune export: files that other programs run, proved, and mistakes told before work starts."""

from pathlib import Path

import pytest
from in_process import run, save_small

from plmtune.export import run as export_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_small(tmp_path / "small")
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


class TestGguf:
    def test_an_export_is_proved_and_says_how_it_is_run(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = run(monkeypatch, capsys, "export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 0, err
        assert files(folder / "exports") == ["small-F32.gguf"]
        assert "KL divergence" in out and "proved" in out and "-fa off" in out

    def test_a_drift_fails_the_export_and_leaves_nothing(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write = export_run._write_gguf

        def broken(model, *rest, **settings):  # type: ignore[no-untyped-def]
            model.layers[0].attention.o_proj.weight.data.mul_(1.5)
            return write(model, *rest, **settings)

        monkeypatch.setattr(export_run, "_write_gguf", broken)
        code, out, err = run(monkeypatch, capsys, "export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 2
        assert "did not behave as the checkpoint does, and was removed" in err
        assert "FAIL" in out.upper()
        assert files(folder / "exports") == []


class TestHuggingFace:
    def test_a_plm_as_a_deepseek_is_proved_in_transformers(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("export", "small", "--to", "hf", "--as", "deepseek", "--quant", "fp32")
        code, out, err = run(monkeypatch, capsys, *words)
        assert code == 0, err
        assert (folder / "exports" / "small-deepseek-fp32" / "config.json").is_file()
        assert "vllm serve" in out


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--to", "gguf", "--quant", "q4_k"), "--quant q4_k: gguf has no such type. Did you mean q4_k_"),
            (("--to", "gguf", "--as", "deepseek"), "--as deepseek: only --to hf has other forms"),
            (("--to", "hf", "--adapters", "keep"), "small holds no adapters, but a whole model"),
            (("--to", "executorch", "--quant", "int8"), "--quant int8: executorch has no such type"),
        ],
    )
    def test_is_told_before_anything_is_written(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        words: tuple[str, ...],
        said: str,
    ) -> None:
        code, _, err = run(monkeypatch, capsys, "export", "small", *words)
        assert code == 2
        assert said in err
        assert not files(folder / "exports")

    def test_a_file_that_is_there_is_kept(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "exports").mkdir()
        (folder / "exports" / "small-F32.gguf").write_text("mine")
        code, _, err = run(monkeypatch, capsys, "export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 2 and "is there already" in err and "--overwrite" in err
        assert (folder / "exports" / "small-F32.gguf").read_text() == "mine"

    def test_a_full_disk_is_told_of_first(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
        code, _, err = run(monkeypatch, capsys, "export", "small", "--to", "gguf", "--quant", "f32")
        assert code == 2 and "its disk has 10 B left" in err

    def test_a_missing_package_is_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        code, _, err = run(monkeypatch, capsys, "export", "small", "--to", "executorch")
        assert code == 2 and "needs the package executorch (extra executorch)" in err
