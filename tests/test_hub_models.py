"""Models by their name on the Hugging Face hub: fetched from a server of the test's own, or read from a cache."""

import json
import shutil
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import plmtune
from plmtune.cli import main
from plmtune.config import compose
from plmtune.errors import UserError
from plmtune.export.export_model import export_name
from plmtune.io import hub
from plmtune.models import adapters
from plmtune.models.checkpoint_files import checkpoint_directory, model_name
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.registry import component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, file
from plmtune.training.init_from import (
    choose_init_checkpoint,
    find_init_checkpoint,
    init_checkpoint_directory,
    pin_revisions,
)
from plmtune.training.resume_checks import keep_pinned_revisions, refuse_other_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = COMMIT[::-1]

pytest.importorskip("huggingface_hub")


def write_model(directory: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = component("attention", "gqa", num_kv_heads=2)
        model = llama(
            bundled().vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=32, attention=attention
        )
    save_model(model, None, directory)
    bundled().save(directory)


class Server:
    """What the hub serves of models: names to files, at one commit."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.commit = COMMIT
        self.asked: list[str] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0].strip("/")
        self.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[:2])
        files = self.repositories.get(name, {})
        revision = parts[3] if len(parts) > 3 else "main"
        commit = revision if revision in (COMMIT, NEWER) else self.commit
        body, headers, status = b"", {"X-Repo-Commit": commit}, 200
        if name in self.refused:
            status, headers["X-Error-Code"] = self.refused[name]
        elif path and name not in self.repositories:
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        elif path.startswith("api/models/") and "tree" in parts:
            held = [{"type": "file", "path": f, "size": len(b), "oid": _etag(f)} for f, b in files.items()]
            body = json.dumps(held).encode()
        elif path.startswith("api/models/") and revision not in ("main", COMMIT, NEWER):
            status, headers["X-Error-Code"] = 404, "RevisionNotFound"
        elif path.startswith("api/models/"):
            siblings = [{"rfilename": f, "size": len(b)} for f, b in files.items()]
            body = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        elif "resolve" in parts:
            body = files["/".join(parts[4:])]
            headers["ETag"] = f'"{_etag(parts[-1])}"'
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def _etag(name: str) -> str:
    return name.encode().hex().ljust(40, "0")[:40]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    hub._ask.cache_clear()
    yield
    hub._ask.cache_clear()


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    unwanted = ("modeling_m.py", "pytorch_model.bin", "README.md", "onnx/model.onnx", "consolidated.safetensors")
    return files | dict.fromkeys(unwanted, b"unwanted")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_files: dict[str, bytes]) -> Iterator[Server]:
    """A hub with the model o/m, an empty cache, and an empty folder to work in."""
    server = Server()
    server.repositories["o/m"] = dict(model_files)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server
    server.close()


def make_cache(folder: Path, model: Path, commit: str = COMMIT) -> Path:
    """Lay a model out as huggingface_hub does; returns the snapshot."""
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for path in model.iterdir():
        shutil.copy(path, folder / "blobs" / _etag(path.name))
        (snapshot / path.name).symlink_to(Path("../../blobs") / _etag(path.name))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


class TestFetch:
    def test_a_name_is_fetched_and_loaded_without_code_or_pickles(self, served: Server) -> None:
        model, tokenizer = plmtune.load("o/m")
        assert (model.embed_dim, tokenizer.fingerprint) == (16, bundled().fingerprint)
        held = {path.name for path in checkpoint_directory("o/m").iterdir()}
        assert held == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

    @pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
    @pytest.mark.parametrize("name", ["o/m", "o/m@main", f"o/m@{COMMIT}"])
    def test_what_was_fetched_is_there_without_a_network(
        self, served: Server, offline: bool, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = checkpoint_directory("o/m")
        served.close()
        hub._ask.cache_clear()
        if offline:
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert checkpoint_directory(name) == before
        assert before.name == COMMIT

    def test_a_commit_that_is_in_the_cache_asks_the_hub_for_nothing(self, served: Server) -> None:
        before = checkpoint_directory(f"o/m@{COMMIT}")
        served.asked.clear()
        assert checkpoint_directory(f"o/m@{COMMIT}") == before
        assert served.asked == []

    def test_a_branch_is_what_it_is_now(self, served: Server) -> None:
        assert checkpoint_directory("o/m").name == COMMIT
        served.commit = NEWER
        assert checkpoint_directory("o/m").name == NEWER
        assert checkpoint_directory(f"o/m@{COMMIT}").name == COMMIT

    def test_the_configuration_alone_leaves_the_weights_there(self, served: Server) -> None:
        small = checkpoint_directory("o/m", weights=False)
        assert not (small / "model.safetensors").exists()
        assert (checkpoint_directory("o/m") / "model.safetensors").exists()

    def test_a_directory_of_that_name_wins(self, served: Server) -> None:
        write_model(Path("o/m"))
        assert checkpoint_directory("o/m") == Path("o/m")
        with pytest.raises(UserError, match="There is no o/n "):
            checkpoint_directory("o/n")
        assert served.asked == []

    @pytest.mark.parametrize(
        "path", ["runs/sft", "m", "a/b/c", "./o", "/o/m", "models/m.gguf", "o/m@", "../m", "o/m.yaml"]
    )
    def test_a_path_that_is_not_there_asks_the_hub_for_nothing(self, served: Server, path: str) -> None:
        with pytest.raises(UserError, match=r"There is no .* \(seen from "):
            checkpoint_directory(path)
        assert served.asked == []

    def test_a_tokenizer_is_had_by_the_name_of_its_model(self, served: Server) -> None:
        assert file("o/m").fingerprint == bundled().fingerprint
        assert not [path for path in served.asked if path.endswith(".safetensors")]

    def test_adapters_find_their_base_by_name_and_revision(self, served: Server, tmp_path: Path) -> None:
        (tmp_path / "adapters").mkdir()
        base = {"base_model_name_or_path": "o/m", "revision": COMMIT}
        (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(base))
        assert adapters.find_base(tmp_path / "adapters") == checkpoint_directory(f"o/m@{COMMIT}")
        assert adapters._named(checkpoint_directory("o/m")) == base


class TestAHubThatIsUnwell:
    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_what_was_fetched_is_read_from_the_cache_with_a_notice(
        self, served: Server, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = checkpoint_directory("o/m")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        served.refused["o/m"] = status, ""
        assert checkpoint_directory("o/m") == before
        said = f"{served.address} answers {status}: o/m is read from the cache, commit {COMMIT[:12]}"
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("status", [429, 503])
    def test_what_was_not_fetched_is_refused_with_its_answer(
        self, served: Server, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        served.refused["o/m"] = status, ""
        with pytest.raises(UserError, match=rf"o/m cannot be fetched from the Hugging Face hub \(.*{status}"):
            checkpoint_directory("o/m")

    def test_a_model_that_is_gone_is_not_read_from_the_cache(self, served: Server) -> None:
        checkpoint_directory("o/m")
        served.refused["o/m"] = 404, "RepoNotFound"
        with pytest.raises(UserError, match="nor has the Hugging Face hub a model of that name"):
            checkpoint_directory("o/m")

    def test_a_certificate_that_is_not_accepted_is_named(self, served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        class Session:
            def head(self, address: str, timeout: float) -> None:
                raise ConnectionError("failed") from ssl.SSLCertVerificationError("CERTIFICATE_VERIFY_FAILED")

        monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
        with pytest.raises(UserError, match=r"and the certificate of http://.* is not accepted .* Fix that, or name"):
            checkpoint_directory("o/m")

    def test_a_proxy_that_refuses_or_does_not_answer_is_named_without_its_password(
        self, served: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class ProxyError(OSError):
            pass

        class Session:
            error: Exception = ProxyError("407 Proxy Authentication Required")

            def head(self, address: str, timeout: float) -> None:
                raise self.error

        monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
        monkeypatch.setenv("http_proxy", "http://me:secret@proxy.example:3128")
        with pytest.raises(UserError, match=r"the proxy proxy\.example:3128 \(HTTP_PROXY\) refuses .*\(407 Proxy"):
            checkpoint_directory("o/m")
        hub._ask.cache_clear()
        Session.error = ConnectionError("refused")
        with pytest.raises(UserError, match=r"does not answer through the proxy proxy\.example:3128 \(HTTP_PROXY\)"):
            checkpoint_directory("o/m")


class TestRefusals:
    def test_a_name_that_the_hub_does_not_know(self, served: Server) -> None:
        with pytest.raises(UserError, match=r"There is no o/x \(seen from .*nor has the Hugging Face hub a model"):
            checkpoint_directory("o/x")

    def test_a_revision_that_it_does_not_know(self, served: Server) -> None:
        with pytest.raises(UserError, match=r"o/m has no revision v9: http://.*/o/m lists its revisions"):
            checkpoint_directory("o/m@v9")

    def test_a_model_whose_terms_are_to_be_accepted(self, served: Server) -> None:
        served.refused["o/m"] = 403, "GatedRepo"
        with pytest.raises(UserError, match=r"o/m asks to accept its terms first: see http://.*/o/m, then hf"):
            checkpoint_directory("o/m")

    @pytest.mark.parametrize(
        ("files", "said"),
        [
            (["config.json", "pytorch_model.bin"], r"pytorch_model\.bin, a pickle, which can run code"),
            (["a-q4_0.gguf"], r"holds GGUF files: fetch one \(a-q4_0\.gguf\), then plmtune convert FILE\.gguf OUT"),
            (["README.md"], r"holds no model\.safetensors"),
        ],
    )
    def test_a_repository_without_safetensors(self, served: Server, files: list[str], said: str) -> None:
        served.repositories["o/m"] = dict.fromkeys(files, b"{}")
        with pytest.raises(UserError, match=said):
            checkpoint_directory("o/m")
        assert not [path for path in served.asked if "resolve" in path]

    def test_a_model_that_the_disk_has_no_room_for(self, served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"needs .*, and its disk has .* left\. Make room for o/m"):
            checkpoint_directory("o/m")

    @pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
    def test_without_a_network_nothing_is_tried_again(
        self, served: Server, offline: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served.close()
        if offline:
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")

        def sleep(seconds: float) -> None:
            raise AssertionError("a library waits to try again")

        monkeypatch.setattr(time, "sleep", sleep)
        why = "HF_HUB_OFFLINE is set. Unset it" if offline else "does not answer. Connect"
        with pytest.raises(UserError, match=rf"o/m is no directory here .* not in the hub's cache .* {why}, or name"):
            checkpoint_directory("o/m")

    def test_weights_that_were_never_fetched_are_named(self, served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint_directory("o/m", weights=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match=r"its copy in the hub's cache \(.*\) lacks weights"):
            checkpoint_directory("o/m")

    def test_without_the_package_the_cache_is_read_and_else_it_is_named(
        self, served: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint_directory("o/m")
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert checkpoint_directory("o/m").name == COMMIT
        with pytest.raises(UserError, match=r"o/n is no directory here .* huggingface_hub .extra hub.*pip install"):
            checkpoint_directory("o/n")


class TestSnapshots:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_model(tmp_path / "model")
        make_cache(tmp_path / "models--o--m", tmp_path / "model")
        return tmp_path / "models--o--m"

    @pytest.mark.parametrize("way", [f"snapshots/{COMMIT}", "snapshots", ""])
    def test_are_read_by_their_path_too(self, folder: Path, way: str) -> None:
        model, _ = plmtune.load(folder / way)
        assert model.embed_dim == 16
        directory = checkpoint_directory(folder / way)
        assert (model_name(directory), export_name(directory)) == ("m", "m")
        assert str(hub.model_of(directory)) == f"o/m@{COMMIT}"
        assert file(str(folder / way)).fingerprint == bundled().fingerprint

    def test_of_two_the_one_that_main_names_counts(self, folder: Path) -> None:
        make_cache(folder, folder.parent / "model", NEWER)
        assert checkpoint_directory(folder).name == NEWER
        (folder / "refs" / "main").unlink()
        with pytest.raises(UserError, match=r"holds 2 snapshots and no refs/main\. Name one"):
            checkpoint_directory(folder)

    @pytest.mark.parametrize("ref", ["../../outside", "..", "/", "x" * 1000, ""])
    def test_a_ref_leads_nowhere_else(self, folder: Path, ref: str) -> None:
        make_cache(folder, folder.parent / "model", NEWER)
        (folder / "refs" / "main").write_text(ref)
        with pytest.raises(UserError, match="Name one"):
            checkpoint_directory(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("to", ["outside", "a blob that is a link", "another repository", "blobs in a blob"])
    def test_links_to_other_places_are_refused(self, folder: Path, name: str, to: str) -> None:
        outside = folder.parent / "outside"
        shutil.copy(folder.parent / "model" / name, outside)
        link, blob = folder / "snapshots" / COMMIT / name, folder / "blobs" / _etag(name)
        if to == "outside":
            link.unlink()
            link.symlink_to(outside)
        elif to == "a blob that is a link":
            blob.unlink()
            blob.symlink_to(outside)
        elif to == "another repository":
            make_cache(folder.parent / "models--o--n", folder.parent / "model")
            link.unlink()
            link.symlink_to(f"../../../models--o--n/blobs/{_etag(name)}")
        else:
            (folder / "blobs" / "x").mkdir()
            blob.rename(folder / "blobs" / "x" / "y")
            link.unlink()
            link.symlink_to("../../blobs/x/y")
        with pytest.raises(UserError, match=r"outside of"):
            plmtune.load(folder / "snapshots" / COMMIT)

    def test_the_layout_alone_opens_no_other_folder(self, folder: Path) -> None:
        folder.rename(folder.parent / "o--m")
        with pytest.raises(UserError, match=r"outside of"):
            plmtune.load(folder.parent / "o--m" / "snapshots" / COMMIT)


class TestRuns:
    def test_keep_the_commit_that_they_start_from(self, served: Server) -> None:
        cfg = compose.compose("sft", (), ["init_from=o/m"])
        pin_revisions(cfg)
        said = choose_init_checkpoint(cfg)
        assert said == f"starting from o/m@{COMMIT}"
        assert (cfg.init_from, cfg.tokenizer.settings["path"]) == (f"o/m@{COMMIT}", f"o/m@{COMMIT}")
        assert not [path for path in served.asked if path.endswith(".safetensors")]
        served.commit = NEWER  # main moves on meanwhile
        tokenizer: Tokenizer = file(cfg.tokenizer.settings["path"])
        model = cfg.model(vocab_size=tokenizer.vocab_size)
        init = find_init_checkpoint(cfg.init_from, model, tokenizer, cfg.scheduler)
        assert init is not None and init.directory.name == COMMIT

    def test_their_tokenizer_and_reward_model_keep_their_commits_too(self, served: Server) -> None:
        words = ["tokenizer=file", "tokenizer.path=o/m", "reward=reward_model", "reward.path=o/m", "rounds=1"]
        cfg = compose.compose("dpo", (), words)
        pin_revisions(cfg)
        assert [cfg.tokenizer.settings["path"], cfg.reward.settings["path"]] == [f"o/m@{COMMIT}"] * 2
        assert not [path for path in served.asked if path.endswith(".safetensors")]
        pin_revisions(cfg, weights=True)  # a run begins: the reward model is there before it is asked
        assert [path for path in served.asked if path.endswith(".safetensors")]

    def test_resume_with_the_commit_that_they_began_with(self, served: Server, tmp_path: Path) -> None:
        words = ["tokenizer=file", "tokenizer.path=o/m", "init_from=o/m"]
        began = compose.compose("sft", (), words)
        pin_revisions(began)
        choose_init_checkpoint(began)
        served.commit = NEWER
        again = compose.compose("sft", (), words)
        refuse_other_config(tmp_path, began, again)
        keep_pinned_revisions(again, began)
        assert (again.init_from, again.tokenizer) == (f"o/m@{COMMIT}", began.tokenizer)
        for other in (f"o/m@{NEWER}", "o/n"):
            again.init_from = other
            with pytest.raises(UserError, match=f"was started with init_from=o/m@{COMMIT}, not {other}"):
                refuse_other_config(tmp_path, began, again)

    def test_another_machine_fetches_the_commit_into_its_own_cache(
        self, served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cfg = compose.compose("sft", (), ["init_from=o/m"])
        pin_revisions(cfg)
        served.commit = NEWER
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache of another"))
        directory = init_checkpoint_directory(cfg.init_from)
        assert directory.is_relative_to(tmp_path / "cache of another") and directory.name == COMMIT


class TestCommands:
    @pytest.mark.parametrize(
        "command",
        [
            "generate {} --prompt a",
            "chat {}",
            "eval {} --tasks arc_easy",
            "perplexity {} text.txt",
            "export {} --to hf",
            "verify out.gguf --against {}",
            "merge {} out",
            "card {}",
            "plan {}",
            "run quantize checkpoint={}",
            "run demo_sft init_from={}",
            "run demo tokenizer=file tokenizer.path={}",
        ],
    )
    def test_a_gguf_file_in_the_place_of_a_directory_says_to_convert_it(
        self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("m.gguf").write_bytes(b"GGUF" + bytes(100))
        Path("text.txt").write_text("a")
        monkeypatch.setattr("sys.argv", ["plmtune", *command.format("m.gguf").split()])
        with pytest.raises(SystemExit) as ended:
            main()
        said = " ".join(capsys.readouterr().err.split())
        assert ended.value.code == 2 and "m.gguf is a GGUF file" in said and "plmtune convert" in said
