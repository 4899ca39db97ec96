"""Export a checkpoint: problems are reported first, and every file is verified before it gets its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from plmtune import dtypes
from plmtune.errors import UserError, either, near_names
from plmtune.export import verify as verifying
from plmtune.export.executorch import SCHEMES, export_pte
from plmtune.export.gguf_quantize import quantize_gguf
from plmtune.export.gguf_writer import write_gguf, write_gguf_adapter
from plmtune.export.huggingface import export_adapter, export_hf, read_generation
from plmtune.export.lint import QUANTIZED, WRITTEN, Target, lint
from plmtune.export.ollama import modelfile
from plmtune.export.report import Report
from plmtune.export.runtimes import UNVERIFIED
from plmtune.export.runtimes.gguf_facts import flash_settings
from plmtune.extras import installed, missing
from plmtune.io.atomic import check_room
from plmtune.io.hub import model_of
from plmtune.models.adapters import holds_adapters, load_model, load_model_tokenizer, read_model_config
from plmtune.models.checkpoint_files import checkpoint_directory, locate, model_name
from plmtune.models.directory import check_free
from plmtune.models.gguf_forms import Form
from plmtune.models.hf_config import read_formats
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import is_quantized
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.units import show_bytes

_KINDS: dict[Target, tuple[str, ...]] = {
    "gguf": tuple(kind.lower() for kind in (*WRITTEN, *QUANTIZED)),
    "hf": dtypes.NAMES,
    "executorch": SCHEMES,
}
As = Literal["deepseek"] | Form
_AS: dict[Target, tuple[str, ...]] = {"gguf": get_args(Form), "hf": ("deepseek",), "executorch": ()}
_DEFAULT: dict[Target, str] = {"gguf": "f16", "hf": "bf16", "executorch": "int8_dynamic"}


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
    as_: As | None = None,
    adapters: Literal["merge", "keep"] = "merge",
    base: Path | None = None,
    context: int | None = None,
    ollama: bool = False,
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
        as_: another form: of hf, see `export.huggingface`; of gguf, see `models.gguf_forms`.
        adapters: merged into their base, or kept as adapters.
        base: of the adapters; None: what they name.
        context: of an executorch program, whose cache has a fixed size; None: at most 2,048.
        ollama: write a Modelfile beside each GGUF file that passes.
        verify: load it in the program that will serve it, and compare.
        log: gets a line for each step.

    Raises:
        UserError: for what cannot be exported, before anything is written.
    """
    source = checkpoint_directory(checkpoint)
    wanted = [kind.strip().lower() for kind in quant if kind.strip()] or [_default(to, source)]
    folder = out or Path("exports")
    name = name or export_name(source)
    if as_ is not None and as_ not in _AS[to]:
        of = next(target for target, forms in _AS.items() if as_ in forms)
        has = f"--to {to} has --as {' and --as '.join(_AS[to])}" if _AS[to] else f"--to {to} has no other forms"
        raise UserError(f"--as {as_} is a form of --to {of}; {has}.")
    if as_ is not None and adapters == "keep":
        raise UserError(f"--as {as_} is a form of whole models. Merge the adapters: --adapters merge.")
    if context is not None and to != "executorch":
        raise UserError(f"--context {context}: only a program for ExecuTorch has a cache of a fixed size.")
    if ollama and (to != "gguf" or adapters == "keep"):
        raise UserError("--ollama: only --to gguf of a whole model has a Modelfile.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file. Name a folder.")
    if adapters == "keep":
        yield from _keep_adapters(source, to, folder, name, base, overwrite)
        return
    paths = {kind: folder / _file_name(to, name, kind, as_) for kind in wanted}
    _check(source, to, paths, as_, overwrite, log, verify)
    for path in paths.values() if ollama else ():
        if (beside := _modelfile(path)).exists() and not overwrite:
            raise UserError(f"{beside} is there already. Name another place with --out, or give --overwrite.")
    log(f"reading {source}")
    tokenizer = load_model_tokenizer(source, base)
    model = load_model(source, dtype=None, base=base).eval()
    if is_quantized(model):
        model = model.float()  # its numbers are products of integers and bf16 scales, which bf16 would round
    folder.mkdir(parents=True, exist_ok=True)
    for kind, path in paths.items():
        log(f"writing {path}" + (", which takes minutes" if to == "executorch" else ""))
        with _temporary(path) as temporary:
            if to == "hf":
                deepseek: Literal["deepseek"] | None = None if as_ is None else "deepseek"
                notes = export_hf(
                    model,
                    tokenizer,
                    temporary,
                    as_=deepseek,
                    dtype=dtypes.from_name(kind),
                    generation=read_generation(source),
                )
            elif to == "executorch":
                notes = export_pte(model, tokenizer, temporary, scheme=kind, max_seq_len=context)
            else:
                notes = _write_gguf(model, tokenizer, temporary, kind.upper(), name, _gguf_form(as_))
            report = None
            if verify:
                log(f"verifying {path}")
                report = _verified(temporary, source, path, kind)
            made = Exported(path, 0, notes, report, _commands(to, temporary, path, tokenizer, as_))
            if not made.passed:
                made.path, made.commands = _unverified(path), []
            elif ollama:
                text, more = modelfile(path.name, tokenizer, source)
                _modelfile(temporary).write_text(text, encoding="utf-8")
                made.notes += more
                if _flash_attention(temporary):
                    made.notes.append("Start Ollama with OLLAMA_FLASH_ATTENTION=0, or it aborts on this model.")
                made.commands.append(f"ollama create {name} -f {_modelfile(path)}")
            _refuse_existing(made.path, overwrite, to)
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
        return f"{name}-{as_ + '-' if as_ else ''}{kind.upper()}.gguf"
    if to == "executorch":
        return f"{name}-{kind}.pte"
    return f"{name}-{as_ or 'hf'}" + ("" if kind == "bf16" else f"-{kind}")


def _check(
    source: Path,
    to: Target,
    paths: dict[str, Path],
    as_: As | None,
    overwrite: bool,
    log: Callable[[str], None],
    verify: bool,
) -> None:
    """Refuse what would fail later: unknown kinds, parts that the form lacks, packages, files in the way, room.

    Args:
        paths: kind -> the file of it.
    """
    description = read_model_config(source)
    known = _KINDS[to]
    for kind in paths:
        if kind not in known:
            near = near_names(kind, known)
            hint = f" Did you mean {either(near)}?" if near else ""
            raise UserError(f"--quant {kind}: {to} has no such type.{hint} Known: {', '.join(known)}.")
    needed: list[tuple[tuple[str, ...], str]] = []  # any of the modules; what needs one
    if to == "executorch":
        needed.append((("executorch",), "Exporting for ExecuTorch"))
    if to == "gguf" and (made := [kind for kind in paths if kind.upper() not in WRITTEN]):
        needed.append((("llama_cpp",), f"{made[0]}, made by llama.cpp's own quantizer,"))
    if to == "gguf" and verify:
        needed.append((("xllamacpp", "llama_cpp"), "Verifying the file (or else --no-verify)"))
    if to == "hf" and verify:
        needed.append((("transformers",), "Verifying the directory (or else --no-verify)"))
    for modules, why in needed:
        if not any(installed(module) for module in modules):
            raise missing(modules[0], why)
    for path in (place for each in paths.values() for place in (each, _unverified(each))):
        _refuse_existing(path, overwrite, to)
        if path.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{path} holds the checkpoint that is exported. Name another place with --out.")
    for finding in lint(description, to, list(paths), _gguf_form(as_)):
        if finding.level == "refused":
            other = to == "gguf" and all(one.level != "refused" for one in lint(description, "hf"))
            way = " --to hf writes it." if other and as_ is None else ""
            raise UserError(f"{source} cannot be exported to {to}: {finding.text}{way}")
        if as_ is None or "--as" not in finding.text:
            log(f"note: {finding.text}")
    size = sum(file.stat().st_size for file in {*locate(source).values()}) if not holds_adapters(source) else 0
    # A type of fewer bits is made of a file of more, which is there for a while.
    check_room(next(iter(paths.values())).parent, size * (1 + len(paths)))


def _gguf_form(as_: As | None) -> Form | None:
    return "deepseek2" if as_ == "deepseek2" else None


def _refuse_existing(path: Path, overwrite: bool, to: Target) -> None:
    """Refuse what is in the way of an export; with `overwrite` what is no export of this form, which is never deleted.

    Raises:
        UserError: naming it.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Name another place with --out, or give --overwrite.")
    if to == "hf":
        check_free(path, overwrite)
    elif path.is_dir():
        raise UserError(f"{path} is a directory, and this form is a file. Name another place with --out.")
    elif to == "executorch":
        tokenizer = path.with_name(f"{path.name}.tokenizer")
        if tokenizer.is_dir() and any(tokenizer.iterdir()) and not (tokenizer / "tokenizer.json").is_file():
            raise UserError(f"{tokenizer} is there already, and holds something else than a tokenizer. Move it away.")


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


def _modelfile(path: Path) -> Path:
    return path.with_name(f"{path.name}.Modelfile")


def _unverified(path: Path) -> Path:
    return path.with_name(path.name + UNVERIFIED)


def _verified(temporary: Path, source: Path, path: Path, kind: str) -> Report:
    try:
        report = verifying.verify(temporary, source, kind=kind)
    except UserError as error:  # the written file is kept, and the report has the reason
        report = Report(str(path), str(source), "no runtime", kind, 0)
        report.add("verified: failures", 1, 0, None, str(error).replace(str(temporary), str(path)))
    report.export = str(path if report.passed else _unverified(path))
    return report


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _write_gguf(model: Decoder, tokenizer: Tokenizer, path: Path, kind: str, name: str, form: Form | None) -> list[str]:
    if kind in WRITTEN:
        return write_gguf(model, tokenizer, path, kind=kind, name=name, as_=form)
    # llama.cpp's quantizer reads a file: one of all the bits there are.
    whole = path.with_name(f"{path.name}.source.gguf")
    source = "F32" if model.dtype == torch.float32 else "BF16"
    notes = write_gguf(model, tokenizer, whole, kind=source, name=name, as_=form)
    notes += quantize_gguf(whole, path, kind)
    whole.unlink()
    return notes


def _keep_adapters(
    source: Path, to: Target, folder: Path, name: str, base: Path | None, overwrite: bool
) -> Iterator[Exported]:
    """Export adapters without their base: PEFT's directory, or llama.cpp's file."""
    if not holds_adapters(source):
        raise UserError(f"--adapters keep: {source} holds no adapters, but a whole model.")
    if to == "executorch":
        raise UserError("--adapters keep: an ExecuTorch program holds its weights. Merge them: --adapters merge.")
    path = folder / (f"{name}-lora.gguf" if to == "gguf" else f"{name}-adapters")
    if to == "hf":
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already. Name another place with --out, or give --overwrite.")
    else:
        _refuse_existing(path, overwrite, to)
    folder.mkdir(parents=True, exist_ok=True)
    if to == "hf":
        notes, commands = export_adapter(source, path, base=base), []
    else:
        notes = write_gguf_adapter(source, path, base=base)
        commands = [f"llama-cli -m BASE.gguf --lora {path}{_flash_attention(path)}"]
    yield Exported(path, _size(path), notes, None, commands)


def _flash_attention(path: Path) -> str:
    """The option that llama.cpp needs for a file."""
    return "" if True in flash_settings(path) else " -fa off"


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
