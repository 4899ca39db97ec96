"""Tokenizers by name and from files: tokenizer.json, tokenizer.model, .tiktoken, model directories, the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from plmtune.errors import UserError, did_you_mean
from plmtune.io import hub, manifest, terminal
from plmtune.registry import register
from plmtune.tokenizers import added_tokens, jieba_sentencepiece, kept_ids, sentencepiece_files, tokenizer_json
from plmtune.tokenizers.bpe import (
    BYTE_PATTERN,
    CHATML_SPECIALS,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    MAX_ID,
    QWEN2_PATTERN,
    SINGLE_BYTES,
    Normalization,
    Vocabulary,
    from_ranks,
    read_file,
    read_tiktoken,
)
from plmtune.tokenizers.builtin_templates import CHATML_TEMPLATE
from plmtune.tokenizers.jieba_sentencepiece import JiebaPieces
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.units import show_number_of

TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer.model",
        "vocab.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ),
    *("special_tokens_map.json", "added_tokens.json", kept_ids.FILE),
)
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")

# The piece that ends a document in PanGu-alpha's released vocabulary.
PANGU_EOS = "<eot>"

# PLM's embedding has more rows than Qwen2 has tokens; known without the file, for a dry run.
QWEN2_ROWS = 151936


def _text_of(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    config = tokenizer_json.load_json(read_file(path), str(path)) if path.is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold one JSON object.")
    return config


def _read_json(path: Path) -> Tokenizer:
    """Read a tokenizer.json or tokenizer.model; the files beside it name its end token, chat template and rows."""
    config = _read_config(path.with_name("tokenizer_config.json"))
    if path.suffix == ".model" and config.get("tokenizer_class") in jieba_sentencepiece.CLASSES:
        config = {"eos_token": PANGU_EOS} | config
        data = jieba_sentencepiece.as_data(read_file(path), [_text_of(config["eos_token"]) or ""])
    elif path.suffix == ".model":
        data, config = sentencepiece_files.read_model(read_file(path), config, str(path))
    else:
        data = tokenizer_json.load_json(read_file(path), str(path))
    data = added_tokens.with_added_of_config(data, config, str(path.with_name("tokenizer_config.json")))
    beside = _read_config(path.with_name("special_tokens_map.json"))
    new = [text for held in (config, beside) for text in _texts_of(held, _LISTS)]
    named = {*new, *_texts_of(config, _NAMES), *_texts_of(beside, _NAMES)}
    data = added_tokens.with_named(data, named, new, _read_config(path.with_name("added_tokens.json")), str(path))
    template = _default_template(config.get("chat_template"))
    jinja = path.with_name("chat_template.jinja")
    if jinja.is_file():
        template = read_file(jinja).decode("utf-8", errors="replace")
    rows = _rows(path, config)
    # As in transformers 5, the post-processor alone decides, not add_bos_token of the configuration.
    firsts = added_tokens.first_tokens(data)
    if rows is not None:
        ends = [_text_of(held.get(name)) for held in (config, beside) for name in ("bos_token", "eos_token")]
        used = "\n".join(text for text in (template, *ends, *(text for text, _ in firsts)) if text)
        data, lacking = added_tokens.without_rows(data, rows, used)
        if lacking:
            more = f" and {len(lacking) - 3:,} more" if len(lacking) > 3 else ""
            count = show_number_of(len(lacking), "special token")
            terminal.say(f"{path}: {count} without a row in the model left out: {', '.join(lacking[:3])}{more}.")
    vocabulary = engine(data, str(path))
    eos = _eos(vocabulary, _text_of(config.get("eos_token", beside.get("eos_token"))), path)
    adds_bos = bool(firsts)
    bos = firsts[0][0] if firsts else _text_of(config.get("bos_token", beside.get("bos_token")))
    for text, identity in firsts[1:]:
        if vocabulary.specials.get(text) != identity:
            raise UserError(f"{path}, key post_processor: {text!r} before a text is no special token of this id.")
    if bos not in vocabulary.specials and not adds_bos:
        bos = None
    beside_it = path.with_name(kept_ids.FILE)
    compressed, kept = kept_ids.read(beside_it) if beside_it.is_file() else ("", ())
    try:
        found = Tokenizer(
            vocabulary,
            eos=eos,
            vocab_size=rows,
            chat_template=template,
            bos=bos,
            adds_bos=adds_bos,
            ends=_ends(path.parent, vocabulary, beside),
            firsts=[text for text, _ in firsts],
            kept=kept,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    if kept and found.fingerprint != compressed:
        raise UserError(
            f"{beside_it} belongs to the tokenizer {compressed}, and {path.name} beside it is {found.fingerprint}. "
            f"Remove {kept_ids.FILE} if that one was replaced on purpose."
        )
    return found


def _rows(path: Path, config: dict[str, Any]) -> int | None:
    """Return the rows of the model beside a tokenizer, padding included; None if no file counts them."""
    rows, source = config.get("padded_vocab_size"), "tokenizer_config.json"
    if rows is None:
        # In checkpoints of other programs the model's config.json counts the padding rows.
        rows, source = _read_config(path.with_name("config.json")).get("vocab_size"), "config.json"
    if rows is not None and (type(rows) is not int or not 0 < rows <= MAX_ID):
        key = "padded_vocab_size" if source == "tokenizer_config.json" else "vocab_size"
        raise UserError(f"{path.with_name(source)}, key {key}: {rows!r:.80} rows in a vocabulary are impossible.")
    return rows


def engine(data: Any, where: str) -> Vocabulary | Library | JiebaPieces:
    """Return tiktoken's tables where they give the ids of the file, else jieba's or the library's tokenizer."""
    if jieba_sentencepiece.is_data(data):
        return JiebaPieces(data, where)
    try:
        return tokenizer_json.parse(data, where)
    except UserError:
        return Library(data, where)


def _default_template(found: Any) -> str | None:
    """Return a template, or the one named default of a list, as transformers does."""
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return _text_of(found)


def _texts_of(config: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Return the special tokens that tokenizer_config.json or special_tokens_map.json names under keys."""
    held: list[Any] = []
    for key in keys:
        entry: Any = config.get(key)
        if isinstance(entry, dict) and "content" not in entry:
            entry = list(entry.values())
        held += entry if isinstance(entry, list) else [entry]
    return [text for token in held if (text := _text_of(token))]


def _ends(directory: Path, vocabulary: Vocabulary | Library | JiebaPieces, beside: dict[str, Any]) -> list[int]:
    """Return the ids that end a model's answers: all that the files beside a tokenizer name.

    Where generation_config.json names some, those of config.json must be special: its class may have a default.
    """
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = _read_config(directory / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(identity) is int and 0 <= identity < MAX_ID for identity in ids):
            raise UserError(f"{directory / name}: eos_token_id {found!r:.80} is no token id, and no list of them.")
        ends += [identity for identity in ids if not ends or identity in vocabulary.specials.values()]
    named = vocabulary.specials.get(_text_of(beside.get("eos_token")) or "")
    return ends if named is None else [*ends, named]


def _eos(vocabulary: Vocabulary | Library | JiebaPieces, named: str | None, path: Path) -> str:
    specials = vocabulary.specials
    if named is not None and named not in specials:
        where = path.with_name("tokenizer_config.json")
        raise UserError(f"{where}: eos_token {named!r} is no special token.{did_you_mean(named, specials)}")
    found = named or next((name for name in _EOS_NAMES if name in specials), None)
    if found is None:
        raise UserError(
            f"{path} does not say which token ends a document. Name one of its special tokens "
            f"({', '.join(specials) or 'it has none'}) as eos_token in tokenizer_config.json beside it."
        )
    return found


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a directory that `Tokenizer.save` wrote, or of any checkpoint.

    Raises:
        UserError: if there is none, or it cannot be represented exactly.
    """
    return _read(Path(directory))


def _read(path: Path, pattern: str = QWEN2_PATTERN, normalization: Normalization | None = "NFC") -> Tokenizer:
    path = hub.newest_snapshot(path.expanduser())
    if named := hub.parse(path):
        path = hub.fetch(named, weights=False)
    if path.is_dir():
        for name in (*TOKENIZER_FILES, "config.json"):
            if hub.links_outside(path / name):
                raise UserError(f"{path / name} is a link to a place outside of {path}. Copy the file into it.")
        whole = path / "tokenizer.json"
        held = [whole] if whole.is_file() else sorted(path.glob("*.tiktoken")) or sorted(path.glob("tokenizer.model"))
        # The name beside PanGu-alpha's class of tokenizers.
        held = held or sorted(path.glob("vocab.model"))
        if not held:
            raise UserError(
                f"{path} has no tokenizer: tokenizer.json, tokenizer.model or a .tiktoken file. "
                + (
                    "transformers makes a tokenizer.json of its vocab.json: AutoTokenizer.from_pretrained(DIR)"
                    ".save_pretrained(DIR)"
                    if (path / "vocab.json").is_file()
                    else "Copy those of the model into it, with tokenizer_config.json"
                )
            )
        if held[1:]:
            raise UserError(f"{path} holds {len(held)} .tiktoken files. Name one of them: {held[0]}")
        manifest.check_files_once(path, only=TOKENIZER_FILES)
        path = held[0]
    if hub.is_gguf(path):
        raise UserError(f"{path} is a GGUF file. Make a model directory of it, which has a tokenizer: plmtune convert")
    if path.suffix == ".tiktoken":
        return Tokenizer(read_tiktoken(path, pattern, normalization), chat_template=CHATML_TEMPLATE)
    return _read_json(path)


@register("tokenizer", "bundled")
def bundled() -> Tokenizer:
    """The BPE that comes with plmtune: 4,096 tokens, trained on the Python standard library."""
    return load_tokenizer(Path(__file__).parent / "assets")


@register("tokenizer", "qwen2")
def qwen2(path: str | None = None) -> Tokenizer:
    """Qwen2's tokenizer, which PLM uses: 151,646 tokens in 151,936 rows, ChatML.

    Args:
        path: its ranks (qwen.tiktoken), its tokenizer.json or a directory with one; none: Hugging Face's hub.

    Raises:
        UserError: if there is no such file, or no hub.
    """
    try:
        found = _read(Path(path) if path is not None else hub.fetch(hub.HubModel("Qwen/Qwen2-1.5B"), weights=False))
    except UserError as error:
        local = " Or pass a local file: tokenizer.path=FILE (its qwen.tiktoken or tokenizer.json)."
        raise UserError(f"{error}{local if path is None else ''}") from error
    vocabulary = found.vocabulary
    if [vocabulary.specials.get(name) for name in CHATML_SPECIALS] != [151643, 151644, 151645]:
        raise UserError(
            f"{path or 'Qwen/Qwen2-1.5B'} is not Qwen2's tokenizer: its special tokens are "
            f"{vocabulary.specials}, not <|endoftext|> at 151643 and the two after it. Use tokenizer=file."
        )
    rows = max(QWEN2_ROWS, found.num_tokens)
    return Tokenizer(vocabulary, eos=found.eos, vocab_size=rows, chat_template=CHATML_TEMPLATE)


@register("tokenizer", "file")
def file(path: str = "", *, pattern: Literal["qwen2", "llama3", "gpt2"] = "qwen2") -> Tokenizer:
    """A tokenizer.json, a SentencePiece model, a .tiktoken file, or a directory with one (any checkpoint).

    Args:
        path: the file or directory, or a model of the Hugging Face hub (OWNER/NAME).
        pattern: pre-tokenizer of a .tiktoken file, which does not contain one. With qwen2 text is normalized to NFC.
            The three ChatML tokens follow the last rank.

    Raises:
        UserError: if it cannot be read, or would give other ids.
    """
    if not path:
        raise UserError("tokenizer=file needs a path: tokenizer.path=FILE_OR_DIRECTORY.")
    if not Path(path).expanduser().exists() and not hub.parse(path):
        raise UserError(f"key tokenizer.path: there is no file or directory {path} (seen from {Path.cwd()}).")
    patterns = {"qwen2": QWEN2_PATTERN, "llama3": LLAMA3_PATTERN, "gpt2": GPT2_PATTERN}
    return _read(Path(path), patterns[pattern], "NFC" if pattern == "qwen2" else None)


@register("tokenizer", "pangu_alpha")
def pangu_alpha(path: str = "", *, eos: str = PANGU_EOS) -> Tokenizer:
    """PanGu-alpha's text: jieba's words joined by spaces, in the pieces of a SentencePiece model.

    Args:
        path: the model file (vocab.model), or a directory with it or with a tokenizer that was saved.
        eos: the piece that ends a document.

    Raises:
        UserError: if it cannot be read, has no such piece or none for spaces, or jieba is not installed.
    """
    if not path:
        raise UserError("tokenizer=pangu_alpha needs a path: tokenizer.path=FILE_OR_DIRECTORY (its vocab.model).")
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"key tokenizer.path: there is no file or directory {path} (seen from {Path.cwd()}).")
    if place.is_dir() and (place / "tokenizer.json").is_file():
        found = _read(place)
        if not isinstance(found.vocabulary, JiebaPieces):
            raise UserError(f"key tokenizer.path: {path} holds a tokenizer of another kind. Use tokenizer=file.")
        if found.eos != eos:
            raise UserError(f"key tokenizer.eos: {eos!r:.40} is not {found.eos!r}, which ends a document in {path}.")
        return found
    if place.is_dir():
        held = sorted(place.glob("*.model"))
        if len(held) != 1:
            raise UserError(f"key tokenizer.path: {path} holds {len(held)} .model files. Name one file.")
        place = held[0]
    vocabulary = JiebaPieces(jieba_sentencepiece.as_data(read_file(place), [eos]), str(place))
    return Tokenizer(vocabulary, eos=eos)


@register("tokenizer", "byte")
def byte() -> Tokenizer:
    """One token a byte, and <|endoftext|>: 257 tokens."""
    ranks = {token: rank for rank, token in enumerate(SINGLE_BYTES)}
    return Tokenizer(from_ranks(ranks, BYTE_PATTERN, None, ["<|endoftext|>"], "byte"))
