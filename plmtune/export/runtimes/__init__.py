"""The programs that serve models on devices, opened from Python behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from plmtune.errors import UserError, did_you_mean
from plmtune.export.runtimes.base import UNVERIFIED, InferenceRuntime, Timing, form_of
from plmtune.export.runtimes.executorch import ExecuTorchRuntime
from plmtune.export.runtimes.huggingface import TransformersRuntime
from plmtune.export.runtimes.llama_cpp import LlamaCppRuntime
from plmtune.export.runtimes.pytorch import open_ours
from plmtune.export.runtimes.xllamacpp import XLlamaCppRuntime
from plmtune.extras import installed, missing
from plmtune.io import manifest
from plmtune.models.checkpoint_files import ADAPTER_CONFIG, CONFIG, read_json
from plmtune.models.families import by_model_type
from plmtune.ranges import AT_LEAST_1, check

__all__ = ["UNVERIFIED", "InferenceRuntime", "RuntimeName", "Timing", "choose_runtime", "form_of", "open_runtime"]

RuntimeName = Literal["llama_cpp", "xllamacpp", "transformers", "executorch", "plmtune"]
_OPENERS: dict[RuntimeName, Callable[..., InferenceRuntime]] = {
    "llama_cpp": LlamaCppRuntime,
    "xllamacpp": XLlamaCppRuntime,
    "transformers": TransformersRuntime,
    "executorch": ExecuTorchRuntime,
    "plmtune": open_ours,
}


def open_runtime(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    prefer: RuntimeName | None = None,
    exact: bool = False,
    flash_attention: bool | None = None,
) -> InferenceRuntime:
    """Open a model file or directory in the runtime that serves it.

    Args:
        path: a .gguf (llama_cpp where it is installed, else xllamacpp), a .pte (ExecuTorch), a directory of ours,
            quantized or not, a run, or another directory in Hugging Face's form (transformers).
        threads: None: as many as the runtime takes by itself.
        context: tokens of the cache; None: all that the model knows, at most 4,096.
        prefer: the runtime, where several serve such a file.
        exact: compute and cache in fp32 where the runtime can, to compare; else as it does for its users.
        flash_attention: of llama.cpp, on or off; None: as it chooses, where it does not abort on the architecture.

    Raises:
        UserError: if nothing serves it, it is damaged, or a package is missing.
        ValueError: for impossible numbers.
    """
    path = Path(path)
    check(AT_LEAST_1, threads=threads, context=context)
    found = choose_runtime(path, prefer)
    if flash_attention is not None and found not in ("llama_cpp", "xllamacpp"):
        raise ValueError(f"flash_attention is an option of llama.cpp, which does not open {path}")
    settings: dict[str, Any] = {} if flash_attention is None else {"flash_attention": flash_attention}
    return _OPENERS[found](path, threads=threads, context=context, exact=exact, **settings)


def choose_runtime(path: Path, prefer: RuntimeName | None = None) -> RuntimeName:
    """The runtime that opens a file or directory."""
    serving = _serving(path)
    if prefer is not None and prefer not in serving:
        unknown = "" if prefer in get_args(RuntimeName) else did_you_mean(prefer, get_args(RuntimeName))
        raise UserError(f"{prefer} does not serve {path}; {' and '.join(serving)} would.{unknown}")
    found = prefer if prefer is not None else next((name for name in serving if _installed(name)), serving[-1])
    if not _installed(found):
        raise missing(found, str(path))
    return found


def _serving(path: Path) -> tuple[RuntimeName, ...]:
    """The runtimes for such a path, the best first."""
    if not path.exists():
        raise UserError(f"There is no {path} (seen from {Path.cwd()}).")
    if path.is_file():
        if form_of(path) == ".gguf":
            return ("llama_cpp", "xllamacpp")
        if form_of(path) == ".pte":
            return ("executorch",)
        raise UserError(f"{path} is neither a .gguf nor a .pte file, nor a directory: no runtime serves it.")
    manifest.check_files_once(path)
    if not (path / CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file():
        return ("plmtune",)
    keys = read_json(path, CONFIG)
    family = by_model_type().get(str(keys.get("model_type")))
    if "plmtune" in keys or (family is not None and not family.in_transformers):
        return ("plmtune", "transformers")
    return ("transformers",) if family is None else ("transformers", "plmtune")


def _installed(name: RuntimeName) -> bool:
    return name == "plmtune" or installed(name)
