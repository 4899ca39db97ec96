"""The proof that an export is the model that it was made from, in the program that will serve it."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from plmtune.data.chat_template import ChatTemplate
from plmtune.data.sources import BadRow
from plmtune.data.tokenizers import Tokenizer
from plmtune.errors import UserError
from plmtune.export import hard_texts
from plmtune.export.contents import Contents, bits_of, differing, read_contents, settings_of, tokenizer_tables
from plmtune.export.diagnosis import find_cause, log_probs, suspect_tensors, with_tensors
from plmtune.export.runtimes import Runtime, RuntimeName, open_runtime
from plmtune.models.adapters import load_its_tokenizer, load_model
from plmtune.models.files import checkpoint_directory
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Quantized
from plmtune.tables import Column, Table

# Tokens that are read in all, so that RoPE is tried on more positions than are compared.
_WINDOW = 256
# Of a text's tokens, half of it where the model takes no more.
_LEAST = 32
_NO_TEMPLATES = "llama.cpp (llama_cpp)"
_PROMPT, _WRITTEN = 16, 24
# Two to three times what was measured: 1e-4 of a PLM of `make demo`, 4e-3 of SmolLM2-135M, of 4 bits as of 8, since
# llama.cpp rounds inputs too, in blocks; 0.03 of SmolLM2-135M where a whole token's inputs share a scale.
_FROM_OWN, _FROM_OWN_DYNAMIC = 0.01, 0.1
# Where a row of log-probabilities costs a second.
_SLOW_POSITIONS = 12
_LOWEST = -80.0
# Below one in a million rounding in fp32, of a deep model, may be more than 1e-4 in a log-probability.
_LIKELY = math.log(1e-6)


@dataclass(frozen=True)
class Limits:
    """How far an export of some kind may be from its checkpoint.

    Attributes:
        difference: of any log-probability, in nats; None: nothing is asked, since unlikely tokens move freely.
        kl: mean KL divergence of the checkpoint's distribution from the export's, in nats.
        tie: nats by which one token must be likelier than another before it counts that the export prefers the other.
        choices: share of tokens that the export prefers otherwise.
        perplexity: relative difference.
    """

    difference: float | None
    kl: float
    tie: float
    choices: float
    perplexity: float


# Two to three times the largest that was measured in llama.cpp on 64 positions of the shipped page, of two models: a
# PLM of `make demo` (1.4M parameters) and SmolLM2-135M, whose weights had been rounded to Q4_1 before. KL of the two in
# nats: F32 1e-12, 1e-11; F16 2e-7, 5e-6; BF16 1e-5, 2e-4; Q8_0 2e-4, 5e-3; Q6_K 3e-4, 0.013; Q5_K 1e-3, 0.08;
# Q4_K 3e-3, 0.07; Q4_0 7e-3, 0.35; Q3_K 0.013, 0.56. The largest difference: F32 2e-5, 7e-5; F16 0.007, 0.04; BF16
# 0.06, 0.3.
LIMITS: dict[str, Limits] = {
    "F32": Limits(1e-4, 1e-7, 2e-4, 0.0, 1e-4),
    "F16": Limits(0.1, 2e-5, 0.02, 0.0, 2e-3),
    "BF16": Limits(1.0, 1e-3, 0.1, 0.02, 0.03),
}
_LIMITS_OF_BITS = {
    8: Limits(None, 0.015, 0.1, 0.1, 0.03),
    6: Limits(None, 0.04, 0.1, 0.15, 0.06),
    5: Limits(None, 0.2, 0.1, 0.3, 0.12),
    4: Limits(None, 0.8, 0.1, 0.45, 0.5),
    3: Limits(None, 1.5, 0.1, 0.6, 1.0),
    2: Limits(None, 3.0, 0.1, 0.8, 3.0),
}


def limits_of(kind: str) -> Limits:
    """How far an export of this kind may be off.

    Raises:
        UserError: for a kind that is not known.
    """
    found = LIMITS.get(kind) or _LIMITS_OF_BITS.get(bits_of(kind) or 0)
    if found is None:
        raise UserError(f"no limits are known for {kind}: it cannot be said whether such an export is right.")
    return found


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        value: what was found; smaller is better.
        threshold: what it may be at most; None: it is only shown.
        cause: why it failed; of one that passed, what is to be known of it.
    """

    name: str
    value: float
    threshold: float | None
    passed: bool
    cause: str | None = None


@dataclass
class Report:
    """All comparisons of an export.

    Attributes:
        runtime: the program that ran it.
        kind: how most of the export's numbers are written.
        positions: of how many tokens the log-probabilities were compared.
    """

    export: str
    against: str
    runtime: str
    kind: str
    positions: int
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether the export is the model, as far as its kind allows."""
        return not self.failed

    @property
    def cause(self) -> str:
        """Why it failed, each cause once."""
        return " ".join(dict.fromkeys(check.cause for check in self.failed if check.cause))

    def table(self) -> Table:
        """The checks as a table."""
        title = f"{self.export} in {self.runtime}, {self.kind}, {self.positions} positions"
        numbers = (Column("value", right=True), Column("at most", right=True))
        table = Table([Column("check", folds=True), *numbers, "result", Column("remark", folds=True)], title=title)
        for check in self.checks:
            limit = "-" if check.threshold is None else f"{check.threshold:.3g}"
            table.add(check.name, f"{check.value:.3g}", limit, "ok" if check.passed else "FAILED", check.cause or "")
        return table

    def as_json(self) -> str:
        """The report as JSON."""
        data = asdict(self) | {"passed": self.passed}
        for check in data["checks"]:
            check["value"] = check["value"] if math.isfinite(check["value"]) else None
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    def add(self, name: str, value: float, threshold: float | None, cause: str | None = None) -> Check:
        """Append a check; a value that is not a number fails."""
        passed = threshold is None or value <= threshold
        self.checks.append(Check(name, value, threshold, passed, cause))
        return self.checks[-1]


def verify(
    export: str | Path,
    against: str | Path,
    *,
    text: str | None = None,
    positions: int = 64,
    threads: int | None = None,
    prefer: RuntimeName | None = None,
    base: Path | None = None,
) -> Report:
    """Run an export in the program that serves it, and lay what it says beside what the checkpoint says.

    Args:
        export: a .gguf or .pte file, or a directory in Hugging Face's form, quantized or not.
        against: a checkpoint, a model directory or a run: what the export was made from.
        text: to predict; None: a page of prose, code and several languages.
        positions: tokens whose log-probabilities are compared; fewer where the runtime takes a second for each.
        threads: of the runtime; None: its own choice.
        prefer: the runtime, where several serve such a file.
        base: of a checkpoint that is adapters; None: what it names.

    Raises:
        UserError: if something cannot be read or opened. What is read and differs is a failed check of the report.
        ValueError: if positions is below 1.
    """
    if positions < 1:
        raise ValueError(f"positions must be at least 1, not {positions}")
    export, source = Path(export), checkpoint_directory(against)
    model = load_model(source, "cpu", torch.float32, base=base).eval()
    tokenizer = load_its_tokenizer(source, base)
    contents = read_contents(export, model)
    limits = limits_of(contents.kind)
    context = min(model.max_seq_len, _WINDOW + 1)
    with open_runtime(export, threads=threads, context=context, prefer=prefer, exact=True) as runtime:
        ids = _ids(tokenizer, text if text is not None else hard_texts.PAGE, min(context, runtime.context))
        last = min(positions, len(ids) - 1, _SLOW_POSITIONS if runtime.slow_rows else positions)
        report = Report(str(export), str(against), runtime.name, contents.kind, last)
        wrong = differing(contents.settings, settings_of(model))
        said = "; ".join(f"{key} is {held:g} in the export, {wanted:g} here" for key, (held, wanted) in wrong.items())
        report.add("settings that differ", len(wrong), 0, said or None)
        if contents.tensors:
            suspects = suspect_tensors(model, contents)
            said = "; ".join(f"{name}: {what}" for name, what in list(suspects.items())[:4])
            report.add("tensors that differ", len(suspects), 0, said or f"of {len(contents.tensors)}, beyond rounding")
        if runtime.vocab_size == model.vocab_size:
            if export.suffix == ".pte" and bits_of(contents.kind) is not None:
                _compare_with_rounded(report, runtime, _rounded_alike(model, contents), ids, last)
            _compare_numbers(report, runtime, model, ids, last, limits, contents)
        else:
            said = f"the export has {runtime.vocab_size} rows of the vocabulary, the checkpoint {model.vocab_size}"
            report.add("rows of the vocabulary that differ", abs(runtime.vocab_size - model.vocab_size), 0, said)
        _compare_ids(report, runtime, tokenizer, contents)
        _compare_prompts(report, runtime, tokenizer, contents)
    return report


def _ids(tokenizer: Tokenizer, text: str, most: int) -> list[int]:
    ids = tokenizer.with_bos(tokenizer.encode(text))[:most]
    least = _LEAST if most >= _LEAST else _LEAST // 2
    if most < least:
        raise UserError(f"{most} tokens are all that it reads at once; less than {least} prove nothing.")
    if len(ids) < least:
        raise UserError(f"a text of {len(ids)} tokens is too short to prove anything. Give one of a page or more.")
    return ids


def _compare_numbers(
    report: Report,
    runtime: Runtime,
    model: Decoder,
    ids: Sequence[int],
    last: int,
    limits: Limits,
    contents: Contents,
) -> None:
    read, targets = ids[:-1], torch.tensor(ids[-last:])
    ours, theirs = log_probs(model, read, last), runtime.log_probs(read, last)
    gap = (ours.clamp(min=_LOWEST) - theirs.clamp(min=_LOWEST)).abs()
    first = len(report.checks)
    largest = float(gap.where(ours > _LIKELY, 0.0).max())
    report.add("log-probabilities: largest difference", largest, limits.difference, "of tokens above one in a million")
    report.add("KL divergence: mean, nats", _divergence(ours, theirs), limits.kl)
    if contents.tensors:
        with with_tensors(model, contents, list(contents.tensors)):
            own = log_probs(model, read, last)
        dynamic = any("dynamic" in kind for kind in (contents.kind, *contents.kinds.values()))
        most = _FROM_OWN_DYNAMIC if dynamic else _FROM_OWN
        said = "of its tensors in the checkpoint's model: rounding is in both"
        report.add("from the export's own numbers: KL", _divergence(own, theirs), min(limits.kl, most), said)
    lost = (_margins(ours, theirs.argmax(-1)) > limits.tie).double()
    report.add("likeliest tokens that differ", float(lost.mean()), limits.choices, f"by more than {limits.tie:g} nats")
    nats = [-rows.gather(1, targets[:, None]).double().mean() for rows in (ours, theirs)]
    said = f"{float(nats[0].exp()):.5g} -> {float(nats[1].exp()):.5g}"
    report.add("perplexity: relative change", abs(math.expm1(float(nats[1] - nats[0]))), limits.perplexity, said)

    # Each token that the runtime writes is looked at given what it wrote before, so one near tie is one, not a
    # continuation that has gone another way.
    prompt = list(ids[: min(_PROMPT, len(ids) - 1)])
    written = runtime.greedy(prompt, min(_WRITTEN, runtime.context - len(prompt)))
    rows = log_probs(model, [*prompt, *written[:-1]], len(written))
    margins = _margins(rows, torch.tensor(written))
    ties = int(((margins > 0) & (margins <= limits.tie)).sum())
    said = f"of {len(written)}, by more than {limits.tie:g} nats; {ties} near ties"
    report.add("greedy tokens that differ", float((margins > limits.tie).float().mean()), limits.choices, said)

    if any(not check.passed for check in report.checks[first:]):
        cause = find_cause(model, read, theirs, contents)
        for index, check in enumerate(report.checks[first:], first):
            if not check.passed:
                report.checks[index] = replace(check, cause=cause)


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL divergence of theirs (Tensor), log-probabilities [n, v], from ours, in nats."""
    # Normalized once more in double precision, or sums of 50,000 rounded numbers would be most of a small divergence.
    log_p, log_q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1).clamp(min=_LOWEST)
    return abs(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))


def _rounded_alike(model: Decoder, contents: Contents) -> Decoder:
    """The checkpoint quantized as the program is; itself where it is quantized already."""
    if any(isinstance(module, Quantized) for module in model.modules()):
        return model
    from plmtune.export.executorch import rounding_plan
    from plmtune.quantization.quantize import quantize

    rounded = copy.deepcopy(model)
    scheme = "int8_dynamic" if bits_of(contents.kind) == 8 else "int8_dynamic_int4"
    quantize(rounded, rounding_plan(rounded, scheme))
    return rounded


def _compare_with_rounded(report: Report, runtime: Runtime, rounded: Decoder, ids: Sequence[int], last: int) -> None:
    """What rounding does to the model is one thing; that the program computes the rounded model is another."""
    ours, theirs = log_probs(rounded, ids[:-1], last), runtime.log_probs(ids[:-1], last)
    said = "the program does not compute what the quantized model does; weight-only integers would be such a case"
    # Not to the last bit: an input halfway between two steps of 8 bits goes to the other one in sums of another order,
    # and what follows it differs by such steps: 2e-4 nats after 200 tokens of a PLM of `make demo`, in a right program.
    most = min(limits_of(report.kind).kl, _FROM_OWN_DYNAMIC)
    check = report.add("from the quantized model: KL", _divergence(ours, theirs), most)
    if not check.passed:
        report.checks[-1] = replace(check, cause=said)


def _margins(rows: Tensor, chosen: Tensor) -> Tensor:
    """By how much the likeliest token of each of rows (Tensor), [n, v], is likelier than the chosen one, [n]."""
    return rows.amax(-1) - rows.gather(1, chosen[:, None])[:, 0]


def _compare_ids(report: Report, runtime: Runtime, tokenizer: Tokenizer, contents: Contents) -> None:
    specials = tuple(tokenizer.specials)
    lines = hard_texts.lines(specials)
    before = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    found: list[tuple[str, list[int], list[int]]] = []
    for line in lines:
        theirs = runtime.encode(line)
        if theirs is None:
            return
        ours = before + tokenizer.encode(line, specials=True)
        if theirs != ours:
            found.append((line, ours, theirs))
    cause = _tokenizer_cause(found, runtime, tokenizer, contents) if found else None
    report.add("token ids: texts that differ", len(found), 0, cause or f"of {len(lines)}")
    if tokenizer.vocabulary.normalization is None:
        return
    decomposed = hard_texts.decomposed_lines()
    others = [line for line in decomposed if runtime.encode(line) != before + tokenizer.encode(line, specials=True)]
    # llama.cpp has no normalization at all, so no file can ask for it.
    known = len(decomposed) if runtime.name.startswith("llama.cpp") else 0
    said = f"{runtime.name} does not normalize to NFC, the checkpoint's tokenizer does: normalize text before it"
    report.add("token ids: texts not in NFC that differ", len(others), known, said if others else None)


def _tokenizer_cause(
    found: Sequence[tuple[str, list[int], list[int]]], runtime: Runtime, tokenizer: Tokenizer, contents: Contents
) -> str:
    """Why the texts of `found` have other ids: (text, ours, theirs)."""
    line, ours, theirs = found[0]
    if all(theirs[1:] == ours for _, ours, theirs in found):
        return f"the runtime puts {theirs[0]} before each text, the checkpoint's tokenizer nothing (add_bos_token)"
    if all(theirs == ours[1:] for _, ours, theirs in found):
        return f"the checkpoint's tokenizer puts {ours[0]} before each text, the runtime nothing (add_bos_token)"
    wanted = tokenizer_tables(tokenizer)
    for name, what in (("tokens", "token"), ("merges", "merge")):
        held = contents.tokenizer.get(name)
        if held is None or not wanted[name]:
            continue
        pairs = enumerate(zip(held, wanted[name], strict=False))
        other = next(((at, a, b) for at, (a, b) in pairs if a != b and b), None)
        if other is not None:
            return f"{what} {other[0]} is {other[1]!r} in the export, {other[2]!r} in the checkpoint"
        if len(held) < len(wanted[name]):
            return f"the export has {len(held)} {name}, the checkpoint {len(wanted[name])}"
    if all(theirs == tokenizer.encode(text) for text, _, theirs in found):
        return "the text of special tokens is not taken for the tokens: their types in the export are wrong"
    at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return (
        f"tokens and merges are the same, so text is cut otherwise (the pre-tokenizer): {line[:40]!r} has "
        f"{ours[at : at + 4]} here and {theirs[at : at + 4]} in {runtime.name}, from token {at}"
    )


def _compare_prompts(report: Report, runtime: Runtime, tokenizer: Tokenizer, contents: Contents) -> None:
    source = tokenizer.chat_template
    first = hard_texts.CONVERSATIONS[0]
    if source is None:
        if (theirs := runtime.render(first)) is not None:
            report.add(
                "chat prompts that differ", 1, 0, f"the checkpoint has no chat template, the export {theirs!r:.80}"
            )
        return
    template = ChatTemplate(source, tokenizer, report.against)
    differ: list[tuple[str, str | None]] = []
    with _renderer(runtime) as renderer:
        for messages in hard_texts.CONVERSATIONS:
            try:
                ours = template.render(messages, add_generation_prompt=True)
            except BadRow:
                continue  # the template takes no system message, or wants none to be empty
            theirs = renderer.render(messages)
            if theirs is None and runtime.encode("") is None:
                return  # a runtime without text
            if theirs != ours:
                differ.append((ours, theirs))
    cause = None
    if differ:
        ours, theirs = differ[0]
        if theirs is None:
            cause = "the export has no chat template"
        elif contents.template is not None and contents.template != source:
            cause = (
                f"the export's chat template is another one: it writes {theirs!r:.120}, the checkpoint's {ours!r:.120}"
            )
        else:
            cause = f"{renderer.name} renders the same template otherwise: {theirs!r:.120}, not {ours!r:.120}"
    said = f"of {len(hard_texts.CONVERSATIONS)}"
    if renderer.name == _NO_TEMPLATES:
        said += ", by Python's Jinja: llama.cpp's own engine comes with xllamacpp, which is not installed"
    report.add("chat prompts that differ", len(differ), 0, cause or said)


@contextmanager
def _renderer(runtime: Runtime) -> Iterator[Runtime]:
    """What renders a runtime's prompts as its program does: itself, or for llama_cpp, which binds nothing that
    renders templates, llama.cpp's own engine in xllamacpp where that is installed."""
    if runtime.name != _NO_TEMPLATES or importlib.util.find_spec("xllamacpp") is None:
        yield runtime
        return
    with open_runtime(runtime.path, threads=1, context=_LEAST, prefer="xllamacpp") as other:
        yield other
