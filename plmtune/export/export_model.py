"""Export a checkpoint: problems are reported first, and every file is verified before it gets its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from plmtune import dtypes
from plmtune.errors import UserError, either, near_names
from plmtune.extras import installed, missing
from plmtune.io.atomic import check_room
from plmtune.io.hub import model_of
from plmtune.models.adapters import holds_adapters, load_model, load_model_tokenizer, read_model_config
from plmtune.models.checkpoint_files import checkpoint_directory, locate, model_name
from plmtune.models.hf_config import read_formats
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Quantized
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.units import show_bytes

if TYPE_CHECKING:
    from plmtune.export.lint import Target
    from plmtune.export.verify import Report

SCHEMES = ("fp32", "int8_dynamic", "int8_dynamic_int4")  # of ExecuTorch
_DEFAULT = {"gguf": "f16", "hf": "bf16", "executorch": "int8_dynamic"}


@dataclass
class Exported:
    """One file or directory that was made.

    Attributes:
        notes: for the user, a sentence each.
        report: of the verification; None without one. If it failed, `path` ends in .unverified.
        commands: how it is run.
    """

    path: Path
    num_bytes: int
    notes: list[str]
    report: Report | None
    commands: list[str]

    @property
    def passed(self) -> bool:
        """Whether the verification found no difference, or there was none."""
        return self.report is None or self.report.passed

    def lines(self) -> list[str]:
        verified = "" if self.report is None else ", verified: it is the checkpoint's model"
        if not self.passed:
            verified = ", kept under this name because its verification failed"
        return [
            f"{self.path}: {show_bytes(self.num_bytes)}{verified}",
            *(f"note: {note}" for note in self.notes),
            *(f"warning: {warning}" for warning in (self.report.warnings if self.report else [])),
            *(f"try it: {command}" for command in self.commands),
        ]


def export(
    checkpoint: str | Path,
    to: Target,
    *,
    quant: Sequence[str] = (),
    out: Path | None = None,
    name: str | None = None,
    as_: str | None = None,
    adapters: Literal["merge", "keep"] = "merge",
    base: Path | None = None,
    context: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    log: Callable[[str], None] = lambda text: None,
) -> Iterator[Exported]:
    """Write a checkpoint in another program's form and verify it, one file at a time. One that fails is kept as
    NAME.unverified.

    Args:
        checkpoint: a run, a checkpoint or a model directory.
        quant: GGUF's types, dtypes for hf, schemes for executorch; empty: one that suits.
        out: a folder; None: exports/.
        name: of the files; None: by the checkpoint's place.
        as_: for hf: deepseek or deepseek-relu, see `export.huggingface`.
        adapters: merged into their base, or kept as adapters.
        base: of the adapters; None: what they name.
        context: of an executorch program, whose cache has a fixed size; None: at most 2,048.
        verify: load it in the program that will serve it, and compare.
        log: gets a line for each step.

    Raises:
        UserError: for what cannot be exported, before anything is written.
    """
    source = checkpoint_directory(checkpoint)
    wanted = [kind.strip().lower() for kind in quant if kind.strip()] or [_default(to, source)]
    folder = out or Path("exports")
    name = name or export_name(source)
    if as_ is not None and to != "hf":
        raise UserError(f"--as {as_}: only --to hf has other forms.")
    if context is not None and to != "executorch":
        raise UserError(f"--context {context}: only a program for ExecuTorch has a cache of a fixed size.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file. Name a folder.")
    if adapters == "keep":
        yield from _keep_adapters(source, to, folder, name, base, overwrite)
        return
    description = read_model_config(source)
    paths = {kind: folder / _file_name(to, name, kind, as_) for kind in wanted}
    _check(description, source, to, wanted, paths, as_, overwrite, log, verify)
    log(f"reading {source}")
    tokenizer = load_model_tokenizer(source, base)
    model = load_model(source, dtype=None, base=base).eval()
    if any(isinstance(module, Quantized) for module in model.modules()):
        model = model.float()  # its numbers are products of integers and bf16 scales, which bf16 would round
    writers: dict[str, Callable[..., list[str]]] = {
        "gguf": _write_gguf,
        "hf": _write_hf,
        "executorch": _write_executorch,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for kind, path in paths.items():
        log(f"writing {path}" + (", which takes minutes" if to == "executorch" else ""))
        with _temporary(path) as temporary:
            notes = writers[to](model, tokenizer, temporary, kind, name=name, as_=as_, context=context)
            report = None
            if verify:
                log(f"verifying {path}")
                report = _verified(temporary, source, path, kind)
            made = Exported(path, 0, notes, report, _commands(to, temporary, path, tokenizer, as_))
            if not made.passed:
                made.path, made.commands = _unverified(path), []
            _move(temporary, made.path, overwrite)
        made.num_bytes = _size(made.path)
        yield made


def _default(to: Target, source: Path) -> str:
    """The type where none is named: of a program, what a quantized checkpoint's integers are."""
    formats = read_formats(source)[0] if to == "executorch" and not holds_adapters(source) else {}
    if not formats:
        return _DEFAULT[to]
    return "int8_dynamic_int4" if any(format.bits == 4 for format in formats.values()) else "int8_dynamic"


def export_name(source: Path) -> str:
    """A name for what is made of a checkpoint: the run's and its day, or the directory's."""
    if model_of(source.resolve()):
        return model_name(source)
    parts = source.resolve().parts
    if len(parts) > 3 and parts[-2] == "checkpoints":
        return f"{parts[-4]}-{parts[-3]}"
    return f"{parts[-2]}-{parts[-1]}" if parts[-1][:8].isdecimal() else parts[-1]


def _file_name(to: Target, name: str, kind: str, as_: str | None) -> str:
    if to == "gguf":
        return f"{name}-{kind.upper()}.gguf"
    if to == "executorch":
        return f"{name}-{kind}.pte"
    return f"{name}-{as_ or 'hf'}" + ("" if kind == "bf16" else f"-{kind}")


def _check(
    description: dict[str, Any],
    source: Path,
    to: Target,
    kinds: Sequence[str],
    paths: dict[str, Path],
    as_: str | None,
    overwrite: bool,
    log: Callable[[str], None],
    verify: bool,
) -> None:
    """Refuse what would fail later: unknown kinds, parts that the form lacks, packages, files in the way, room."""
    known = _known_kinds(to)
    for kind in kinds:
        if kind not in known:
            near = near_names(kind, known)
            hint = f" Did you mean {either(near)}?" if near else ""
            raise UserError(f"--quant {kind}: {to} has no such type.{hint} Known: {', '.join(known)}.")
    _check_packages(to, kinds, verify)
    from plmtune.export.lint import lint

    for path in (place for each in paths.values() for place in (each, _unverified(each))):
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already. Name another place with --out, or give --overwrite.")
    for finding in lint(description, to, [kind.upper() if to == "gguf" else kind for kind in kinds]):
        if finding.level == "refused":
            raise UserError(f"{source} cannot be exported to {to}: {finding.text}")
        if as_ is None or "--as" not in finding.text:
            log(f"note: {finding.text}")
    size = sum(file.stat().st_size for file in {*locate(source).values()}) if not holds_adapters(source) else 0
    # A type of fewer bits is made of a file of more, which is there for a while.
    check_room(next(iter(paths.values())).parent, size * (1 + len(kinds)))


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Give a place beside `path`; nothing is left there."""
    # The same suffix, since programs go by it.
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
    finally:
        for left in (temporary, *temporary.parent.glob(f"{temporary.name}.*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def _move(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give what was written its name, and what lies beside a program."""
    for made in (temporary, *temporary.parent.glob(f"{temporary.name}.*")):
        place = path.with_name(path.name + made.name.removeprefix(temporary.name))
        if place.is_dir() and overwrite:
            shutil.rmtree(place)
        made.replace(place)


def _unverified(path: Path) -> Path:
    from plmtune.export.runtimes import UNVERIFIED

    return path.with_name(path.name + UNVERIFIED)


def _verified(temporary: Path, source: Path, path: Path, kind: str) -> Report:
    from plmtune.export.verify import Report, verify

    try:
        report = verify(temporary, source, kind=kind)
    except UserError as error:  # the written file is kept, and the report has the reason
        report = Report(str(path), str(source), "no runtime", kind, 0)
        report.add("verified: failures", 1, 0, None, str(error).replace(str(temporary), str(path)))
    report.export = str(path if report.passed else _unverified(path))
    return report


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _known_kinds(to: Target) -> tuple[str, ...]:
    if to == "hf":
        return dtypes.NAMES
    if to == "executorch":
        return SCHEMES
    from plmtune.export.lint import QUANTIZED, WRITTEN

    return tuple(kind.lower() for kind in (*WRITTEN, *QUANTIZED))


def _check_packages(to: Target, kinds: Sequence[str], verify: bool) -> None:
    """Say which package is missing before the work that needs it at its end."""
    needed: list[tuple[tuple[str, ...], str]] = []  # any of the modules; what needs one
    if to == "gguf":
        from plmtune.export.lint import WRITTEN

        made = [kind for kind in kinds if kind.upper() not in WRITTEN]
        if made:
            needed.append((("llama_cpp",), f"{made[0]}, made by llama.cpp's own quantizer,"))
        if verify:
            needed.append((("xllamacpp", "llama_cpp"), "Verifying the file (or else --no-verify)"))
    if to == "hf" and verify:
        needed.append((("transformers",), "Verifying the directory (or else --no-verify)"))
    if to == "executorch":
        needed.append((("executorch",), "Exporting for ExecuTorch"))
    for modules, why in needed:
        if not any(installed(module) for module in modules):
            raise missing(modules[0], why)


def _write_gguf(model: Decoder, tokenizer: Tokenizer, path: Path, kind: str, *, name: str, **_: Any) -> list[str]:
    from plmtune.export.gguf_writer import write_gguf
    from plmtune.export.lint import WRITTEN

    if kind.upper() in WRITTEN:
        return write_gguf(model, tokenizer, path, kind=kind.upper(), name=name)
    from plmtune.export.gguf_quantize import quantize_gguf

    # llama.cpp's quantizer reads a file: one of all the bits there are.
    whole = path.with_name(f"{path.name}.source.gguf")
    notes = write_gguf(model, tokenizer, whole, kind="F32" if model.dtype == torch.float32 else "BF16", name=name)
    notes += quantize_gguf(whole, path, kind.upper())
    whole.unlink()
    return notes


def _write_hf(model: Decoder, tokenizer: Tokenizer, path: Path, kind: str, *, as_: str | None, **_: Any) -> list[str]:
    from plmtune.export.huggingface import export_hf

    return export_hf(model, tokenizer, path, as_=as_, dtype=dtypes.from_name(kind))  # type: ignore[arg-type]


def _write_executorch(
    model: Decoder, tokenizer: Tokenizer, path: Path, kind: str, *, context: int | None, **_: Any
) -> list[str]:
    from plmtune.export.executorch import export_pte

    return export_pte(model, tokenizer, path, scheme=kind, max_seq_len=context)


def _keep_adapters(
    source: Path, to: Target, folder: Path, name: str, base: Path | None, overwrite: bool
) -> Iterator[Exported]:
    """Export adapters without their base: PEFT's directory, or llama.cpp's file."""
    if not holds_adapters(source):
        raise UserError(f"--adapters keep: {source} holds no adapters, but a whole model.")
    if to == "executorch":
        raise UserError("--adapters keep: an ExecuTorch program holds its weights. Merge them: --adapters merge.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{name}-lora.gguf" if to == "gguf" else f"{name}-adapters")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Name another place with --out, or give --overwrite.")
    if to == "hf":
        from plmtune.export.huggingface import export_adapter

        notes = export_adapter(source, path, overwrite=overwrite)
        yield Exported(path, _size(path), notes, None, [])
        return
    from plmtune.export.gguf_writer import write_gguf_adapter

    with _temporary(path) as temporary:
        notes = write_gguf_adapter(source, temporary, base=base)
        _move(temporary, path, overwrite)
    yield Exported(path, _size(path), notes, None, [f"llama-cli -m BASE.gguf --lora {path}{_flash_attention(path)}"])


def _flash_attention(path: Path) -> str:
    """The option that llama.cpp needs for a file."""
    from plmtune.export.runtimes.gguf_facts import NO_FLASH_ATTENTION
    from plmtune.models.gguf_file import opened_gguf

    with opened_gguf(path) as file:
        return " -fa off" if file.metadata.get("general.architecture") in NO_FLASH_ATTENTION else ""


def _commands(to: Target, written: Path, path: Path, tokenizer: Tokenizer, as_: str | None) -> list[str]:
    """How a person runs what was written, once it has its name."""
    chat = tokenizer.chat_template is not None
    if to == "gguf":
        options = _flash_attention(written)
        return [
            f'llama-cli -m {path}{options} -no-cnv -p "Once upon a time"',
            *([f"llama-cli -m {path}{options} -cnv"] * chat),
        ]
    if to == "executorch":
        return [f"plmtune bench {path}"]
    served = [f"vllm serve {path}", f"python -m sglang.launch_server --model-path {path}"] if as_ == "deepseek" else []
    return served or [f"plmtune bench {path}"]
