"""A checkpoint with one flipped bit is refused by name by every command that reads one; a whole one passes."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import run, save_small
from saved_adapters import save_adapter

import plmtune
from plmtune.cli import cli
from plmtune.cli.tokenizer import find_tokenizer
from plmtune.errors import UserError
from plmtune.evaluation import results
from plmtune.export.runtimes import open_runtime
from plmtune.io import checksummed_json, manifest
from plmtune.models.adapters import load_model, load_model_tokenizer
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.models.reward import load_reward_model
from plmtune.modules.peft import init_adapters
from plmtune.registry import load
from plmtune.tokenizers.tokenizer_files import byte
from plmtune.training.init_from import init_checkpoint_directory

WHOLE = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "state.json", "manifest.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "manifest.json")
COMMANDS = (
    "generate {0} --prompt x",
    "chat {0}",
    "perplexity {0} text.txt",
    "eval {0} --tasks arc_easy",
    "card {0}",
    "export {0} --to gguf --out out",
    "verify exports/x.gguf --against {0}",
    "plan {0} --device pi5",
    "run quantize checkpoint={0} run_dir=out",
    "run sft init_from={0} run_dir=out data=conversations data.paths=[rows.jsonl]",
    "data inspect rows.jsonl --tokenizer {0}",
)


def flip(path: Path, where: float = 0.7) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and one of adapters beside the newer."""
    place = tmp_path_factory.mktemp("made")
    for step in (1, 2):
        directory = save_small(place / "checkpoints" / f"step-{step:08d}")
        (directory / "state.json").write_text("{}")
        manifest.write(directory, step, {})
    base = place / "checkpoints/step-00000002"
    model = load_model(base)
    load("peft", "lora")(model=model, rank=2)
    init_adapters(model, torch.Generator().manual_seed(0))
    save_adapter(model, place / "adapters", base)
    byte().save(place / "adapters")
    manifest.write(place / "adapters", 3, {})
    (place / "text.txt").write_text("The quick brown fox. " * 40)
    (place / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (place / "exports").mkdir()
    (place / "exports/x.gguf").touch()
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory; the adapters' base is the copy's."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "adapters/adapter_config.json"
    config.write_text(config.read_text().replace(str(made.resolve()), str(tmp_path.resolve())))
    manifest.write(tmp_path / "adapters", 3, {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestOneFlippedBit:
    @pytest.mark.parametrize("name", WHOLE)
    @pytest.mark.parametrize("given", ["checkpoints/step-00000002", ".", "checkpoints", "checkpoints/latest"])
    def test_is_found_in_each_file_and_another_checkpoint_named(self, place: Path, name: str, given: str) -> None:
        (place / "checkpoints/latest").write_text("step-00000002\n")
        plmtune.load(given, "cpu")  # from now on it is known to be whole
        flip(place / "checkpoints/step-00000002" / name)
        with pytest.raises(UserError, match=rf"{name} is damaged.*whole: .*checkpoints/step-00000001"):
            plmtune.load(given, "cpu")

    @pytest.mark.parametrize("name", ADAPTERS)
    def test_is_found_in_each_file_of_adapters(self, place: Path, name: str) -> None:
        plmtune.load("adapters", "cpu")
        flip(place / "adapters" / name)
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            plmtune.load("adapters", "cpu")

    def test_is_found_in_the_base_of_adapters(self, place: Path) -> None:
        flip(place / "checkpoints/step-00000002/model.safetensors")
        with pytest.raises(UserError, match=r"step-00000002/model.safetensors is damaged"):
            plmtune.load("adapters", "cpu")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_is_found_by_every_command(
        self, place: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = place / "checkpoints/step-00000002"
        # What shows rows reads the tokenizer alone, and says nothing of files that it does not read.
        for file in ("tokenizer.json", "tokenizer_config.json", "manifest.json") if "inspect" in command else WHOLE:
            whole = (directory / file).read_bytes()
            flip(directory / file)
            before = _visible(place)
            words = command.format("checkpoints/step-00000002").split()
            code, _, said = run(monkeypatch, capsys, *words, stdin=b"hi\n")
            assert code == 2 and f"step-00000002/{file} is damaged" in said, (file, said)
            assert _visible(place) == before
            (directory / file).write_bytes(whole)

    def test_is_found_by_merge_in_adapters(self, place: Path) -> None:
        flip(place / "adapters/adapter_model.safetensors")
        with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged"):
            cli.main(["merge", "adapters", "out"], standalone_mode=False)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    @pytest.mark.parametrize(
        "write", ["merge adapters out", "export . --to hf --no-verify --out . --name out", "convert x.gguf out"]
    )
    def test_is_found_in_what_other_commands_wrote(self, place: Path, write: str, name: str) -> None:
        if "gguf" in write:
            made = ["export", ".", "--to", "gguf", "--quant", "f16", "--no-verify", "--out", ".", "--name", "x"]
            cli.main(made, standalone_mode=False)
            next(place.glob("*.gguf")).rename(place / "x.gguf")
        cli.main(write.split(), standalone_mode=False)
        (out,) = (path.parent for path in place.glob("out*/config.json"))
        plmtune.load(out, "cpu")
        flip(out / name)
        for read in (plmtune.load, open_runtime):
            with pytest.raises(UserError, match=rf"{name} is damaged"):
                read(out)

    @pytest.mark.parametrize("read", [load_reward_model, init_checkpoint_directory, find_tokenizer])
    def test_is_found_where_a_run_reads_another(self, place: Path, read: Callable[[str], Any]) -> None:
        file = "tokenizer.json" if read is find_tokenizer else "config.json"
        flip(place / "checkpoints/step-00000002" / file)
        with pytest.raises(UserError, match=rf"{file} is damaged"):
            read("checkpoints/step-00000002")

    def test_a_cut_end_is_found_by_its_size(self, place: Path) -> None:
        os.truncate(place / "checkpoints/step-00000002/model.safetensors", 1000)
        with pytest.raises(UserError, match=r"model.safetensors has 1000 bytes, and its manifest says"):
            checkpoint_directory("checkpoints")


class TestOtherFiles:
    """metrics.jsonl is not among them: it has no checksum, and a digit that changed there is a number like another."""

    def test_of_prepared_tokens_are_found_by_what_reads_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a.txt").write_text("The quick brown fox. " * 40)
        cli.main(["data", "prepare", "a.txt", "--tokenizer", "bundled", "--out", "out"], standalone_mode=False)
        (made,) = Path("out").glob("files-*")
        for file in ("train-00000.bin", "validation-00000.bin", "manifest.json", "tokenizer/tokenizer.json"):
            whole = (made / file).read_bytes()
            for where in (0.1, 0.5, 0.9):
                flip(made / file, where)
                code, _, said = run(monkeypatch, capsys, "data", "inspect", made, "--window", "0", "--seq-len", "8")
                assert code == 2 and file.split("/")[0] in said, (file, said)
                (made / file).write_bytes(whole)
        assert run(monkeypatch, capsys, "data", "inspect", made, "--window", "0", "--seq-len", "8")[0] == 0

    def test_of_results_are_found_wherever_the_bit_is(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        content = {key: {} for key in ("model", "settings", "environment", "tasks", "groups", "failed")}
        rows = [{"metrics": {"acc": 1.0}, "doc_hash": "a", "prompt_hash": "b"}]
        results.save(
            {"format": results.FORMAT, "version": 1, "status": "complete", **content, "samples": {"t": rows}}, path
        )
        whole = path.read_bytes()
        assert results.load(path)["samples"] == {"t": rows}
        for place in range(len(whole)):
            for bit in (0, 1, 2, 5) if place < len(whole) - 60 else range(8):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                with pytest.raises(UserError, match=r"a\.json"):
                    results.load(path)

    def test_of_results_of_earlier_versions_have_no_checksum_and_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        content = {key: {} for key in ("model", "settings", "environment", "tasks", "groups", "failed", "samples")}
        path.write_text(json.dumps({"format": results.FORMAT, "version": 1, "status": "complete", **content}))
        assert results.load(path)["status"] == "complete"


class TestWhatIsWhole:
    def test_is_hashed_once_for_each_state_of_a_file(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[str] = []
        digest = manifest.digest

        def counted(path: Path) -> str:
            hashed.append(path.name)
            return digest(path)

        monkeypatch.setattr(manifest, "digest", counted)
        directory = place / "checkpoints/step-00000002"
        for _ in range(3):
            checkpoint_directory(directory)
        assert sorted(hashed) == sorted(set(WHOLE) - {"manifest.json"})
        os.utime(directory / "config.json")
        checkpoint_directory(directory)
        assert hashed[len(WHOLE) - 1 :] == ["config.json"]
        manifest.check_files(directory)  # the note changes nothing of what the manifest says

    def test_is_remembered_in_the_users_cache_where_its_directory_cannot_be_written(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        atomic_write = checksummed_json.atomic_write

        def refused(path: Path) -> Any:
            if path.name == manifest.VERIFIED:
                raise PermissionError(errno.EACCES, "Permission denied")
            return atomic_write(path)

        monkeypatch.setattr(checksummed_json, "atomic_write", refused)
        checkpoint_directory(place)
        monkeypatch.setattr(manifest, "digest", lambda path: pytest.fail("hashed again"))
        checkpoint_directory(place)
        assert not list((place / "checkpoints").rglob(manifest.VERIFIED))

    @pytest.mark.parametrize("text", [None, '{"name": "a web page", "icons": []}', "[1]"])
    def test_passes_without_a_manifest_or_with_another_programs(self, place: Path, text: str | None) -> None:
        directory = save_small(place / "theirs")
        if text is not None:
            (directory / "manifest.json").write_text(text)
        plmtune.load(directory, "cpu")
        find_tokenizer(str(directory))

    def test_passes_when_it_was_copied_elsewhere(self, place: Path) -> None:
        checkpoint_directory(place)
        shutil.copytree(place / "checkpoints/step-00000002", place / "copy")
        plmtune.load(place / "copy", "cpu")

    @pytest.mark.parametrize("mark", ["latest", "best"])
    def test_is_found_by_its_mark(self, place: Path, mark: str) -> None:
        (place / "checkpoints" / mark).write_text("step-00000001\n")
        assert checkpoint_directory(f"checkpoints/{mark}") == Path("checkpoints/step-00000001")
        (place / "checkpoints" / mark).write_text("step-../../..\n")
        with pytest.raises(UserError, match="is not a directory"):
            checkpoint_directory(f"checkpoints/{mark}")


class TestPermissions:
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
    @pytest.mark.parametrize("known", [False, True])
    def test_a_file_that_may_not_be_read_is_not_called_damaged(
        self, place: Path, name: str, known: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = place / "checkpoints/step-00000002"
        if known:
            checkpoint_directory(directory)
        monkeypatch.setattr(Path, "open", _forbidding(Path.open, name))  # root may read all
        with pytest.raises(UserError) as caught:
            load_model(directory)
            load_model_tokenizer(directory)
            checkpoint_directory(directory)
            manifest.read(directory)
        said = str(caught.value)
        assert f"{name} cannot be read: Permission denied" in said and "damaged" not in said

    def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "open", _forbidding(Path.open, "state.json"))
        with pytest.raises(UserError, match=r"step-00000002/state.json cannot be read"):
            init_checkpoint_directory(".")


def _visible(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.name != manifest.VERIFIED)


def _forbidding(opens: Callable[..., Any], name: str) -> Callable[..., Any]:
    def opened(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opens(self, *arguments, **keywords)

    return opened
