"""Whether an export cuts text and renders conversations as the checkpoint does, in the program that serves it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from gguf import TokenType

from plmtune.export import probe_texts
from plmtune.export.contents import Contents, tokenizer_tables
from plmtune.export.huggingface import end_ids
from plmtune.export.report import Report
from plmtune.export.runtimes import InferenceRuntime, open_runtime
from plmtune.models.gguf_sentencepiece import as_in_llama_cpp, is_sentencepiece, spaces_of, written_tokens
from plmtune.models.gguf_tokenizer import PRE_TOKENIZERS
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.message import BadRow
from plmtune.tokenizers.tokenizer import Tokenizer

_NO_TEMPLATES = "llama.cpp (llama_cpp)"
_RENDERING_CONTEXT = 32


def compare_ids(
    report: Report,
    runtime: InferenceRuntime,
    tokenizer: Tokenizer,
    contents: Contents,
    *,
    vocabulary_differs: bool = False,
) -> None:
    """Add checks of the ids of texts, and of the one that ends a text.

    Args:
        vocabulary_differs: the report already says so, so no other cause is looked for.
    """
    if contents.ends is not None:
        ends = (tokenizer.eos_id, *end_ids(tokenizer))
        said = f"the export ends a text at token {contents.ends}, the checkpoint at {tokenizer.eos_id}"
        wrong = contents.ends not in ends
        # Other programs name a special token by its text, though no template of the checkpoint's ends with it.
        if not wrong and contents.ends_turn not in (None, *ends, *tokenizer.specials.values()):
            wrong, said = True, f"the export ends a turn at token {contents.ends_turn}, which is ordinary text"
        report.add("ids that end a text: that differ", int(wrong), 0, cause=said)
    specials = tuple(tokenizer.specials)
    lines = probe_texts.lines(specials)

    # What a GGUF file can say is compared exactly; what llama.cpp always does otherwise is a figure.
    wanted = as_in_llama_cpp(tokenizer) if runtime.name.startswith("llama.cpp") else tokenizer

    def ids(text: str) -> list[int]:
        return wanted.with_bos(wanted.encode(text, specials=True))

    found: list[tuple[str, list[int], list[int]]] = []
    for line in lines:
        theirs = runtime.encode(line)
        if theirs is None:
            return
        if theirs != ids(line):
            found.append((line, ids(line), theirs))
    cause = _tokenizer_cause(found, runtime, tokenizer, contents) if found and not vocabulary_differs else None
    report.add("token ids: texts that differ", len(found), 0, f"of {len(lines)}", cause)
    if not found and not vocabulary_differs and contents.tokenizer:  # a token that none of the texts has
        cause = _table_cause(tokenizer, contents) or _type_cause(tokenizer, contents)
        report.add("vocabulary: that differs", int(cause is not None), 0, cause=cause)
    if wanted is not tokenizer:
        other = [line for line in lines if tokenizer.with_bos(tokenizer.encode(line, specials=True)) != ids(line)]
        assert isinstance(tokenizer.vocabulary, Library)
        said = f"of {len(lines)}: {spaces_of(tokenizer.vocabulary).difference}"
        report.add("token ids: texts with other spaces", len(other), None, said)
    if tokenizer.vocabulary.normalization is None:
        return
    decomposed = probe_texts.DECOMPOSED
    others = [line for line in decomposed if runtime.encode(line) != ids(line)]
    # llama.cpp has no normalization at all, so no file can ask for it.
    known = len(decomposed) if runtime.name.startswith("llama.cpp") else 0
    said = f"{runtime.name} does not normalize to NFC, the checkpoint's tokenizer does: normalize text before it"
    report.add("token ids: texts not in NFC that differ", len(others), known, said if known else None, said)


def _tokenizer_cause(
    found: Sequence[tuple[str, list[int], list[int]]],
    runtime: InferenceRuntime,
    tokenizer: Tokenizer,
    contents: Contents,
) -> str:
    """Why the texts of `found` have other ids: (text, ours, theirs)."""
    line, ours, theirs = found[0]
    if all(theirs[1:] == ours for _, ours, theirs in found):
        return f"the runtime puts {theirs[0]} before each text, the checkpoint's tokenizer nothing (add_bos_token)"
    if all(theirs == ours[1:] for _, ours, theirs in found):
        return f"the checkpoint's tokenizer puts {ours[0]} before each text, the runtime nothing (add_bos_token)"
    if all(theirs[:-1] == ours for _, ours, theirs in found):
        return f"the runtime puts {theirs[-1]} behind each text, the checkpoint's tokenizer nothing (add_eos_token)"
    if (cause := _table_cause(tokenizer, contents)) is not None:
        return cause
    if all(theirs == tokenizer.encode(text) for text, _, theirs in found):
        return "the text of special tokens is not taken for the tokens: their types in the export are wrong"
    at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    pattern = tokenizer.vocabulary.pattern
    wanted_pre = [name for name, (known, _, _) in PRE_TOKENIZERS.items() if known == pattern]
    pre = "the pre-tokenizer"
    if contents.pre is not None and wanted_pre and contents.pre not in wanted_pre:
        pre = f"tokenizer.ggml.pre is {contents.pre}, the checkpoint's is {' or '.join(wanted_pre[:2])}"
    return (
        f"tokens and merges are the same, so text is cut otherwise ({pre}): {line[:40]!r} has "
        f"{ours[at : at + 4]} here and {theirs[at : at + 4]} in {runtime.name}, from token {at}"
    )


def _table_cause(tokenizer: Tokenizer, contents: Contents) -> str | None:
    """The first token or merge that is another one; None: all are the same, or not known."""
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
    return None


def _type_cause(tokenizer: Tokenizer, contents: Contents) -> str | None:
    """The first token that is special on one side alone; None: there is none."""
    vocabulary = tokenizer.vocabulary
    special = {*vocabulary.added.values(), *vocabulary.specials.values()}
    if isinstance(vocabulary, Library) and is_sentencepiece(vocabulary) and contents.pre == "default":
        with suppress(ValueError):
            special -= {at for at, (_, kind, _) in written_tokens(vocabulary).items() if kind == TokenType.NORMAL}
    for at, text in enumerate(tokenizer_tables(tokenizer)["tokens"]):
        if text and at < len(contents.ordinary) and contents.ordinary[at] == (at in special):
            sides = ("ordinary text", "special") if at in special else ("special", "ordinary text")
            return f"token {at}, {text!r:.80}, is {sides[0]} in the export, {sides[1]} in the checkpoint"
    return None


def compare_prompts(report: Report, runtime: InferenceRuntime, tokenizer: Tokenizer, contents: Contents) -> None:
    """Add a check of rendered conversations."""
    source = tokenizer.chat_template
    first = probe_texts.CONVERSATIONS[0]
    if source is None:
        if (theirs := runtime.render(first)) is not None:
            said = f"the checkpoint has no chat template, the export writes {theirs!r:.80}"
            report.add("chat prompts that differ", 1, 0, cause=said)
        return
    template = ChatTemplate(source, tokenizer, report.against)
    differ: list[tuple[str, str | None]] = []
    with _renderer(runtime) as renderer:
        for messages in probe_texts.CONVERSATIONS:
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
    said = f"of {len(probe_texts.CONVERSATIONS)}"
    if renderer.name == _NO_TEMPLATES:
        said += ", by Python's Jinja: llama.cpp's own engine comes with xllamacpp, which is not installed"
    report.add("chat prompts that differ", len(differ), 0, said, cause)


@contextmanager
def _renderer(runtime: InferenceRuntime) -> Iterator[InferenceRuntime]:
    """What renders a runtime's prompts as its program does: itself, or for llama_cpp, which binds nothing that
    renders templates, llama.cpp's own engine in xllamacpp where that is installed."""
    if runtime.name != _NO_TEMPLATES or importlib.util.find_spec("xllamacpp") is None:
        yield runtime
        return
    with open_runtime(runtime.path, threads=1, context=_RENDERING_CONTEXT, prefer="xllamacpp") as other:
        yield other
