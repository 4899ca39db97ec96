"""plmtune bench."""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from in_process import run, save_small

from plmtune.devices import measure as module
from plmtune.devices.measure import Measurement
from plmtune.errors import UserError
from plmtune.export.gguf_writer import write_gguf
from plmtune.models.hf import load_model
from plmtune.tokenizers.tokenizer_files import byte


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure here, where a process for each target would spend seconds on its imports."""

    def measure(target: str, *, contexts: Sequence[int], **settings: object) -> list[Measurement]:
        if target == "broken":
            raise UserError("broken could not be measured.")
        return module.measure_here(target, contexts=contexts, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr("plmtune.devices.measure.read_bandwidth", lambda device: 2e9)


@pytest.mark.usefixtures("in_this_process")
class TestBench:
    def test_prints_one_table_and_writes_json_and_a_picture(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = save_small(tmp_path / "m")
        files = ("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
        words = ("bench", target, target, "--contexts", "16,4", "--new-tokens", "2", "--sparse", "on", *files)
        code, out, err = run(monkeypatch, capsys, *words)
        assert code == 0, err
        assert out.count("fp32, 1 of 1 sparse") == 4 and "reads 2.0 GB/s" in out
        assert "context 16" in err
        found = json.loads((tmp_path / "a.json").read_text())
        assert [entry["context"] for entry in found["measurements"]] == [4, 16, 4, 16]
        assert found["bandwidth"] == 2e9 and found["new_tokens"] == 2
        assert (tmp_path / "a.png").stat().st_size > 5000
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 2 and "--overwrite" in err

    @pytest.mark.parametrize(
        ("architecture", "asked", "settings"),
        [
            ("llama", "both", [False, True]),
            ("llama", "on", [True]),
            ("plm", "both", [False]),
        ],
    )
    def test_a_gguf_is_measured_with_each_setting_that_runs(
        self,
        architecture: str,
        asked: str,
        settings: list[bool],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path, seen = tmp_path / "m.gguf", []
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_context_length(64)
        writer.add_tensor("token_embd.weight", np.zeros((8, 4), dtype=np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()

        def measure(target: str, **given: object) -> list[Measurement]:
            seen.append(given["flash_attention"])
            return []

        monkeypatch.setattr(module, "measure", measure)
        code, _, err = run(monkeypatch, capsys, "bench", path, "--flash-attention", asked)
        assert code == 0, err
        assert seen == settings

    def test_a_plms_file_is_compared_with_its_other_form(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "m.gguf"
        write_gguf(load_model(save_small(tmp_path / "m")), byte(), path, kind="F32")
        measured = Measurement(str(path), "llama.cpp", "F32", 48, 1, None, None, 9.0, 100, 100, 100, 0.5)
        monkeypatch.setattr(module, "measure", lambda *_, **__: [measured])
        code, out, err = run(monkeypatch, capsys, "bench", path)
        assert code == 0, err
        # 2 heads of 12 + 8 numbers, or 16 + 4, of 2 bytes; the copy has 32 x 16 numbers of 4 bytes.
        said = "--as deepseek2 would take a cache of 1.88 KiB instead of 3.75 KiB at 48 tokens"
        assert said in " ".join(out.split()) and "less memory from 52 tokens on" in " ".join(out.split())

    def test_what_fails_is_said_after_the_others_are_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = save_small(tmp_path / "m")
        code, out, err = run(monkeypatch, capsys, "bench", "broken", target, "--contexts", "4", "--new-tokens", "1")
        assert code == 2 and "fp32" in out
        assert "broken could not be measured." in err and "Not measured: 1 of 2." in err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ((), "Name a checkpoint"),
            (("x", "--contexts", "many"), "--contexts: 'many' must be numbers"),
            (("x", "--contexts", "0"), "must be numbers of tokens"),
            (("x", "--json", "a.txt"), "must be a .json file"),
            (("x", "--plot", "nowhere/a.png"), "must be a .png file in a folder"),
            (("x", "--device", "tpu:x"), "--device tpu:x"),
            (("x", "--flash-attention", "on"), "--flash-attention is for .gguf files"),
        ],
    )
    def test_mistakes_are_sentences(
        self,
        words: tuple[str, ...],
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, _, err = run(monkeypatch, capsys, "bench", *words)
        assert code == 2 and said in err and "Traceback" not in err
