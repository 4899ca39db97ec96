"""The files of a model directory: found, opened and replaced without trusting them.

Only JSON and safetensors are ever opened, and only inside the directory.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from plmtune.config.names import check_model_path
from plmtune.errors import Unreadable, UserError, refuse_pointer, unreadable
from plmtune.io import hub, manifest, run_summary, terminal
from plmtune.io.atomic import write_atomically
from plmtune.io.run_directory import state_of
from plmtune.io.untrusted import load_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", CONFIG)  # patterns of a model directory
ADAPTER_CONFIG = "adapter_config.json"  # of a directory that holds adapters and no model

# Far above any real file's, far below what would hurt: JSON lists take 25 times their text in memory.
_MAX_JSON_BYTES = 4 * 2**20
_MAX_HEADER_BYTES = 8 * 2**20
_warned: set[Path] = set()  # unfinished runs whose checkpoint was read


def locate(directory: Path, stem: str = "model") -> dict[str, Path]:
    """Return which file holds each tensor of STEM.safetensors, or of the shards of its index, reading headers only.

    Raises:
        UserError: if this is no checkpoint, or its index points elsewhere.
    """
    weights, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory. A checkpoint is a directory with {CONFIG} and {WEIGHTS}.")
    if _exists(directory / weights):
        path = _inside(directory, weights)
        with opened_weights(path) as opened:
            return dict.fromkeys(opened.keys(), path)
    if not _exists(directory / index):
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{directory} holds {pickles[0]}, a pickle, which can run code when read, and no {weights}. Where you "
                f"trust it, convert it:\n{_conversion(directory)}"
            )
        if shards := sorted(path.name for path in directory.glob(f"{Path(weights).stem}-*{Path(weights).suffix}")):
            raise UserError(f"{directory} holds {shards[0]} and no {index}, which lists the tensors. Copy that, too.")
        raise UserError(f"{directory} holds neither {weights} nor {index}: it is not a checkpoint.")
    weight_map = read_json(directory, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{directory / index}: key weight_map must map tensors to files.")
    locations: dict[str, Path] = {}
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors"):
            raise UserError(f"{directory / index} names {name!r:.80}, which is not a safetensors file.")
        if Path(name).name == name and not _exists(directory / name):
            tensors = [tensor for tensor, file in weight_map.items() if file == name]
            raise UserError(
                f"{directory / index}, key weight_map: {tensors[0]} is in {name}, which is missing. Copy it there."
            )
        path = _inside(directory, name)
        with opened_weights(path) as opened:
            held = set(opened.keys())
        for tensor, file in weight_map.items():
            if file == name and tensor not in held:
                raise UserError(f"{path} misses the tensor {tensor} that {index} says it holds.")
        locations |= {tensor: path for tensor, file in weight_map.items() if file == name}
    return locations


class Stored(Mapping[str, Tensor]):
    """The tensors of a directory's files, each read when it is asked for, so that never all are in memory.

    Args:
        locations: what `locate` returned.
    """

    def __init__(self, locations: Mapping[str, Path]) -> None:
        self._locations = locations

    def __getitem__(self, name: str) -> Tensor:
        with opened_weights(self._locations[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)


def _conversion(directory: Path) -> str:
    """A command that writes safetensors from a directory's pickles, of which it reads tensors alone."""
    code = (
        "import glob, safetensors.torch as s; from torch import load; w = {k: v for f in glob.glob('*.bin') "
        "if 'training' not in f for k, v in load(f, map_location='cpu', weights_only=True).items()}; "
        "s.save_file({k: v.contiguous().clone() for k, v in w.items()}, 'model.safetensors', {'format': 'pt'})"
    )
    return f'cd {shlex.quote(str(directory))} && python -c "{code}"'


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _inside(directory: Path, name: str) -> Path:
    """Return the path of a plain file of `directory`, refusing whatever leads out of it."""
    path = directory / name
    if Path(name).name != name or hub.links_outside(path):
        raise UserError(f"{directory} refers to {name!r:.80}, which lies outside of it. Copy the file into it.")
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    return path


def read_json(directory: Path, name: str, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of a directory, refusing one that leads out of it or is absurdly large.

    Raises:
        UserError: naming the file.
    """
    if not _exists(directory / name):
        raise UserError(f"{directory} has no {name}: it is not a checkpoint.")
    path = _inside(directory, name)
    size = path.stat().st_size
    if size > max_bytes:
        raise UserError(f"{path} has {size:,} bytes; a real one has far fewer than {max_bytes:,}.")
    try:
        data = load_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return data


class _WithShared:
    """An opened file with both names of a tensor that two modules share.

    safetensors keeps one of them, and its header's metadata names the other.
    """

    def __init__(self, opened: Any) -> None:
        self._opened, self._held = opened, list(opened.keys())
        kept = set(self._held)
        shared = (opened.metadata() or {}).items()
        self._names = {name: other for name, other in shared if other in kept and name not in kept}

    def keys(self) -> list[str]:
        return [*self._held, *self._names]

    def get_tensor(self, name: str) -> Any:
        return self._opened.get_tensor(self._names.get(name, name))

    def get_slice(self, name: str) -> Any:
        return self._opened.get_slice(self._names.get(name, name))


@contextmanager
def opened_weights(path: Path) -> Iterator[Any]:
    """Map a safetensors file: only its header is read, and one that is absurd or overlaps is refused."""
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise SafetensorError(f"a header of {length:,} bytes, of at most {_MAX_HEADER_BYTES:,}")
        with safe_open(path, framework="pt") as opened:
            yield _WithShared(opened)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}). Copy it again.") from error


def checkpoint_directory(path: str | Path, *, weights: bool = True) -> Path:
    """Return the directory of a model, whichever way a person names it.

    Args:
        path: a model directory; a run directory (or its `checkpoints`), which stands for its newest checkpoint; a
            folder of the hub's cache; or OWNER/NAME[@REVISION] of the Hugging Face hub, where no such path exists.
        weights: False: the configuration is enough, so the hub's weights are not fetched.

    Every command that reads a checkpoint comes by here, so its files are checked against its manifest, if it has one.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    directory = find_checkpoint(path, weights=weights)
    try:
        manifest.check_files_once(directory)
    except Unreadable:
        raise
    except UserError as error:
        raise UserError(f"{error} {_another(directory)}") from error
    return directory


def _another(damaged: Path) -> str:
    """What to use in place of a damaged checkpoint."""
    meant = f"If it was changed on purpose, remove {damaged / manifest.NAME}."
    for step in reversed(manifest.steps(damaged.parent)):
        directory = manifest.step_path(damaged.parent, step)
        if directory != damaged:
            try:
                manifest.check_files_once(directory)
            except UserError:
                continue
            return f"{meant} Use another of its run, which is whole: {directory}"
    return f"{meant} Put a whole copy back."


def find_checkpoint(path: str | Path, *, weights: bool = True) -> Path:
    """As `checkpoint_directory`, without a look at what its files hold.

    Raises:
        UserError: if there is none, saying why where the place is a run's.
    """
    if named := hub.parse(path):
        return hub.fetch(named, weights=weights)
    path = hub.newest_snapshot(Path(path))
    path = manifest.resolve_pointer(path)
    check_model_path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory. Give a checkpoint, a model directory or a run directory.")
    if _exists(path / CONFIG) or _exists(path / ADAPTER_CONFIG):
        if state_of(path) in ("running", "stopped", "failed", "killed"):  # a run whose model is not all written
            raise UserError(run_summary.explain(path))
        return path
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    # A name only, of a directory that is there: `latest` is written after its checkpoint and may be lost.
    name = _read_start(checkpoints / "latest")
    if name.startswith("step-") and Path(name).name == name and _stays_inside(checkpoints / name):
        warn_if_interrupted(checkpoints / name)
        return checkpoints / name
    found = (path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal() and _stays_inside(path))
    steps = {int(path.name[5:25]): path for path in found}
    if not steps:
        raise UserError(
            run_summary.explain(_run_of(checkpoints))
            or f"{path} holds neither {CONFIG} nor checkpoints (step-00000500, ...)."
        )
    warn_if_interrupted(steps[max(steps)])
    return steps[max(steps)]


def _run_of(folder: Path) -> Path:
    """The run whose checkpoints a folder holds: its parent, or itself where it is given alone."""
    return folder.parent if folder.name == "checkpoints" else folder


def warn_if_interrupted(checkpoint: Path) -> None:
    """Warn on stderr, once a process, if the run of a checkpoint did not finish."""
    run = _run_of(checkpoint.parent)
    if os.environ.get("RANK", "0") == "0" and run.resolve() not in _warned:
        _warned.add(run.resolve())
        if said := run_summary.interruption(run, int(checkpoint.name[5:25])):
            terminal.echo(said, err=True)


def model_name(directory: Path) -> str:
    """Return what a model directory is called: the hub's name where it is a snapshot, or its folder's."""
    model = hub.model_of(directory.resolve())
    return model.repository.partition("/")[2] if model else directory.resolve().name or "model"


def _read_start(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(80).decode("utf-8", errors="replace").strip()


def _stays_inside(path: Path) -> bool:
    """Whether this is a directory where it seems to be, and not a link to another place."""
    return path.is_dir() and path.resolve().parent == path.parent.resolve()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(data, indent=2) + "\n")
