"""Models of the Hugging Face hub by their name, OWNER/NAME[@REVISION]: fetched, or read from the hub's cache.

Only JSON, safetensors, Jinja and SentencePiece's files are fetched: no pickle and no code. The cache is
huggingface_hub's own, and reading it needs neither that package nor a network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from plmtune.errors import UserError
from plmtune.extras import installed, missing
from plmtune.io import terminal
from plmtune.io.atomic import check_room
from plmtune.io.untrusted import load_json
from plmtune.units import show_bytes

T = TypeVar("T")

# A hub that is there answers in a tenth of this. Without a network the libraries themselves retry for 20 seconds.
SECONDS = 1.5

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./+-]{{1,200}}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A name like this means a missing file, or a missing folder of ours, not a model of the hub.
_FILES = (".gguf", ".json", ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".pte", ".txt", ".jinja", ".git")
_FOLDERS = ("runs", "exports", "evaluations", "checkpoints", "conf")
_SMALL = (".json", ".jinja")
_INDEX = ".safetensors.index.json"
# Classes of errors of a network, whichever HTTP library it is: httpx's and the system's, which requests' own extend.
_OF_NETWORK = {"NetworkError", "TimeoutException", "RemoteProtocolError"}
_OF_NETWORK |= {"ConnectionError", "Timeout", "TimeoutError", "gaierror"}


@dataclass(frozen=True)
class HubModel:
    """A model's name on the hub; without a revision it is the newest commit of main."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def parse(text: str | Path) -> HubModel | None:
    """Return the hub's model that `text` names; None for a path, and for text of another form."""
    text = str(text)
    found = _NAME.fullmatch(text)
    if found is None or "--" in text or ".." in text or text.lower().endswith(_FILES):
        return None
    owner = text.partition("/")[0]
    if owner in _FOLDERS or Path(owner).exists():
        return None
    return HubModel(found[1], found[2])


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes or its name."""
    if not path.is_file() or path.suffix.lower() == ".gguf":
        return path.is_file()
    with contextlib.suppress(OSError), path.open("rb") as file:  # an unreadable file is reported where it is opened
        return file.read(4) == b"GGUF"
    return False


def fetch(model: HubModel, *, weights: bool = True) -> Path:
    """Return the directory of a model's files at the hub's newest commit, or from the cache without a network.

    Without `weights` these are left on the hub, where the configuration or tokenizer is enough.
    """
    cached = _cached(model, weights)
    described = cached is not None and any((cached / n).is_file() for n in ("config.json", "adapter_config.json"))
    if cached is not None and (
        (described and _COMMIT.fullmatch(model.revision or "")) or not installed("huggingface_hub")
    ):
        return cached
    if not installed("huggingface_hub"):
        here = f"{model} is no directory here (seen from {Path.cwd()})."
        raise missing("huggingface_hub", "Fetching it from the Hugging Face hub", here)
    if why := unavailable_reason():
        if cached is None:
            raise UserError(_absent(model, weights, why))
        if not offline():
            terminal.say(_from_cache(model, cached, why))
        return cached
    return _download(model, weights)


def pin(text: str) -> str:
    """Return a model's name with its current commit, OWNER/NAME@COMMIT; a path is returned unchanged."""
    named = parse(text)
    return text if named is None else f"{named.repository}@{fetch(named, weights=False).name}"


def is_pin(pinned: Any, text: Any) -> bool:
    """Whether `pinned` names a commit of the model that `text` names without one."""
    ours, theirs = (parse(name) if isinstance(name, str) else None for name in (pinned, text))
    if ours is None or theirs is None or ours.repository != theirs.repository:
        return False
    return bool(_COMMIT.fullmatch(ours.revision or "") and not _COMMIT.fullmatch(theirs.revision or ""))


def _from_cache(model: HubModel, cached: Path, why: str) -> str:
    return f"{why}: {model} is read from the cache, commit {cached.name[:12]}"


def _absent(model: HubModel, weights: bool, why: str) -> str:
    small = _cached(model, weights=False) if weights else None
    held = (
        f"its copy in the hub's cache ({small}) lacks weights" if small else f"it is not in the hub's cache ({cache()})"
    )
    remedy = "Unset it" if offline() else "Connect" if "does not answer" in why else "Fix that"
    where = f"{model} is no directory here (seen from {Path.cwd()}), {held}"
    return f"{where}, and {why}. {remedy}, or name a model directory (plmtune convert FILE.gguf DIR makes one)."


def _download(model: HubModel, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{endpoint()}/{model.repository}"
    try:
        info = HfApi(endpoint=endpoint()).model_info(
            model.repository, revision=model.revision, files_metadata=True, timeout=10
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = _choose(model, sizes, weights)
        cached = _cached(model, weights)
        if cached is not None and cached.name == info.sha and all((cached / name).exists() for name in wanted):
            return cached
        total = sum(sizes[name] for name in wanted)
        check_room(cache(), total, f" Make room for {model}, or set HF_HOME.")
        terminal.say(f"fetching {model} (commit {str(info.sha)[:12]}, {show_bytes(total)}) into {cache()}")
        # By name and not by commit, so that the cache knows the name afterwards.
        place: dict[str, Any] = {"cache_dir": cache(), "endpoint": endpoint()}
        return Path(snapshot_download(model.repository, revision=model.revision, allow_patterns=wanted, **place))
    except GatedRepoError as error:
        raise UserError(f"{model} asks to accept its terms first: see {page}, then hf auth login.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{model.repository} has no revision {model.revision}: {page} lists its revisions.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no {model} (seen from {Path.cwd()}), nor has the Hugging Face hub a model of that name. "
            "Give a directory or another name, or hf auth login if it is private."
        ) from error
    except UserError:
        raise
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's
        cached = _cached(model, weights)
        if cached is not None and (why := _service_error(error)):
            terminal.say(_from_cache(model, cached, why))
            return cached
        raise UserError(f"{model} cannot be fetched from the Hugging Face hub ({_first(error)}). Try again.") from error


def _service_error(error: Exception) -> str:
    """Why the hub did not serve a valid request: rate limit, server error or network error; empty for other errors."""
    for one in _causes(error):
        status = getattr(getattr(one, "response", None), "status_code", 0)
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return f"{endpoint()} answers {status}"
    return _in_words(endpoint(), error) if _kinds(error) & _OF_NETWORK else ""


def _choose(model: HubModel, sizes: dict[str, int], weights: bool) -> list[str]:
    """Choose the files of a model; a repository without safetensors is refused."""
    names = sorted(name for name in sizes if "/" not in name)
    small = [name for name in names if name.endswith(_SMALL) or name in ("tokenizer.model", "vocab.model")]
    if not weights:
        return small
    held = [stem for stem in ("model", "adapter_model") if {f"{stem}.safetensors", f"{stem}{_INDEX}"} & set(names)]
    if not held:
        ggufs = [name for name in sizes if name.endswith(".gguf")]
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        said = "no model.safetensors: it is not a model that plmtune reads."
        if ggufs:
            said = f"GGUF files: fetch one ({ggufs[0]}), then plmtune convert FILE.gguf OUT."
        elif pickles:
            said = f"{pickles[0]}, a pickle, which can run code when read, and no model.safetensors. Name a revision "
            said += "(@refs/pr/N) or another repository that has one."
        raise UserError(f"{model} holds {said}")
    # Some repositories hold a second copy of the weights under a name that is in no index.
    ours = tuple(f"{stem}{sign}" for stem in held for sign in (".safetensors", "-"))
    return [*small, *(name for name in names if name.endswith(".safetensors") and name.startswith(ours))]


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def cache() -> Path:
    """Return where huggingface_hub keeps its repositories."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(named)).expanduser().absolute()


def offline() -> bool:
    """Whether the environment asks for no network."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def unavailable_reason() -> str:
    """Return why the hub cannot be used (offline, or no answer within SECONDS) as a clause; empty if it answers.

    One request is made per process.
    """
    return "HF_HUB_OFFLINE is set" if offline() else _ask(endpoint())


@functools.cache
def _ask(address: str) -> str:
    from huggingface_hub.utils import get_session

    said: list[str] = []

    def ask() -> None:
        try:
            get_session().head(address, timeout=SECONDS)
            said.append("")
        except Exception as error:  # whichever HTTP library it is
            said.append(_in_words(address, error))

    # In a thread: the timeouts of HTTP libraries do not cover DNS.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return said[0] if said else _no_answer(address)


def _in_words(address: str, error: Exception) -> str:
    """Describe why an address did not answer; a wrong setting (proxy, certificate) is named."""
    kinds = _kinds(error)
    if "ProxyError" in kinds:
        return f"the proxy{_proxy(address)} refuses to reach {address} ({_first(error)})"
    if "SSLError" in kinds:
        return f"the certificate of {address} is not accepted ({_first(error)}; SSL_CERT_FILE names those that are)"
    return _no_answer(address) if kinds & _OF_NETWORK else f"{address} cannot be asked ({_first(error)})"


def _no_answer(address: str) -> str:
    proxy = _proxy(address)
    return f"{address} does not answer" + (f" through the proxy{proxy}" if proxy else "")


def _proxy(address: str) -> str:
    """The proxy that the environment sets for an address, without its password."""
    scheme = urlsplit(address).scheme
    found = urlsplit(getproxies().get(scheme, ""))
    return f" {found.hostname}:{found.port} ({scheme.upper()}_PROXY)" if found.hostname else ""


def _first(error: Exception) -> str:
    return f"{next(iter(str(error).strip().splitlines()), '') or type(error).__name__:.200}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kinds(error: Exception) -> set[str]:
    """Names of the classes of an error and of its causes."""
    return {kind.__name__ for one in _causes(error) for kind in type(one).__mro__}


@contextlib.contextmanager
def without_retries() -> Iterator[None]:
    """Make huggingface_hub and datasets read only their caches in this block if no hub answers.

    This changes their settings for the whole process, so no generator may yield inside; see `draw_offline`.
    """
    from huggingface_hub import constants

    settings: list[Any] = [constants]
    if config := getattr(sys.modules.get("datasets"), "config", None):
        settings.append(config)
    held = [place.HF_HUB_OFFLINE for place in settings]
    if any(held) or unavailable_reason():
        for place in settings:
            place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(settings, held, strict=True):
            place.HF_HUB_OFFLINE = value


def draw_offline(rows: Iterable[T]) -> Iterator[T]:
    """Yield rows, each read inside `without_retries`."""
    remaining = iter(rows)
    while True:
        with without_retries():
            try:
                row = next(remaining)
            except StopIteration:
                return
        yield row


def _cached(model: HubModel, weights: bool) -> Path | None:
    """Return the cached snapshot of a model, if it has all weights where they are wanted."""
    folder = cache() / f"models--{model.repository.replace('/', '--')}"
    found = _snapshot(folder, model.revision or "main")
    return found if found is not None and (not weights or _has_weights(found)) else None


def _snapshot(folder: Path, revision: str) -> Path | None:
    """Return the snapshot of a commit, or of a branch or tag as it was fetched."""
    name, ref = revision, folder / "refs" / revision
    if ref.is_file():
        with ref.open("rb") as file:
            name = file.read(80).decode("utf-8", errors="replace").strip()
    found = folder / "snapshots" / name
    return found if re.fullmatch(r"\w+", name) and found.is_dir() and not found.is_symlink() else None


def lacks_weights(directory: Path) -> bool:
    """Whether this is a snapshot whose weights were left on the hub."""
    return model_of(directory) is not None and not _has_weights(directory)


def _has_weights(directory: Path) -> bool:
    for stem in ("model", "adapter_model"):
        if (directory / f"{stem}.safetensors").exists():
            return True
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            names = set(load_json((directory / f"{stem}{_INDEX}").read_text(encoding="utf-8"))["weight_map"].values())
            if names and all((directory / name).exists() for name in names):
                return True
    return False


def newest_snapshot(path: Path) -> Path:
    """Return the newest snapshot of a repository's folder in a cache (models--OWNER--NAME); any other path itself."""
    if path.name == "snapshots" and path.parent.name.startswith("models--"):
        path = path.parent
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    if found := _snapshot(path, "main"):
        return found
    held = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir() and not entry.is_symlink())
    if len(held) != 1:
        raise UserError(f"{path} holds {len(held)} snapshots and no refs/main. Name one: {path}/snapshots/COMMIT.")
    return held[0]


def model_of(directory: Path) -> HubModel | None:
    """Return the name and commit of a snapshot in a cache; None for any other directory."""
    commit, snapshots, folder = directory.name, directory.parent, directory.parent.parent
    owner, dashes, name = folder.name.removeprefix("models--").partition("--")
    if snapshots.name != "snapshots" or not folder.name.startswith("models--") or not dashes:
        return None
    return HubModel(f"{owner}/{name}", commit)


def links_outside(path: Path) -> bool:
    """Whether a file is a link out of its directory; the links of a snapshot into its repository's blobs are not."""
    real, directory = path.resolve(), path.parent.resolve()
    if real.parent == directory:
        return False
    folder = directory.parent.parent
    snapshot = directory.parent.name == "snapshots" and folder.name.startswith("models--")
    return not (snapshot and real.parent == folder / "blobs")
