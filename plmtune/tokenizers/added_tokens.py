"""Tokens that a checkpoint's files add to a tokenizer.json, or put before a text, as in transformers."""

from __future__ import annotations

from typing import Any

from plmtune.errors import UserError


def with_added_of_config(data: Any, config: dict[str, Any], where: str) -> Any:
    """Return a tokenizer.json with the added tokens of a tokenizer_config.json, as transformers merges them.

    Raises:
        UserError: if added_tokens_decoder does not map ids to tokens.
    """
    named = config.get("added_tokens_decoder") or {}
    if not isinstance(data, dict) or not named:
        return data
    held = data.get("added_tokens") or []
    if not isinstance(named, dict) or not all(
        key.isdecimal() and len(key) < 10 and isinstance(entry, dict) and isinstance(entry.get("content"), str)
        for key, entry in named.items()
    ):
        raise UserError(f"{where}: added_tokens_decoder must map ids to tokens, each with its content.")
    if not isinstance(held, list) or not all(_names_a_token(entry) for entry in held):
        return data  # `parse` refuses it
    ids = {entry.get("content"): entry.get("id") for entry in held}
    changed = {
        entry["content"]: {"normalized": not entry.get("special"), **entry, "id": ids.get(entry["content"], int(key))}
        for key, entry in sorted(named.items(), key=lambda item: int(item[0]))
    }
    return data | {"added_tokens": [e for e in held if e.get("content") not in changed] + list(changed.values())}


def _names_a_token(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str)


def with_named(data: Any, named: set[str], new: list[str], more: dict[str, Any], where: str) -> Any:
    """Return a tokenizer.json with tokens that only the files beside it name, as transformers adds them.

    Args:
        named: special tokens of tokenizer_config.json and special_tokens_map.json.
        new: those of them that become tokens if the vocabulary has them not.
        more: added_tokens.json: ids by token.

    Raises:
        UserError: if an id of `more` is none.
    """
    if not isinstance(data, dict) or not isinstance(held := data.get("added_tokens") or [], list):
        return data
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        vocab = {entry[0]: identity for identity, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    if not isinstance(vocab, dict) or not all(_names_a_token(entry) for entry in held):
        return data  # `parse` refuses it
    if not all(type(identity) is int for identity in more.values()):
        raise UserError(f"{where}: added_tokens.json must map tokens to ids.")
    known = {entry.get("content") for entry in held}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": identity, "content": text, **flags, "normalized": text not in named, "special": text in named}
        for text, identity in sorted(more.items(), key=lambda item: item[1])
        if text not in known
    ]
    known |= more.keys()
    added += [
        {"id": vocab[text], "content": text, **flags, "normalized": False, "special": True}
        for text in sorted(named - known & vocab.keys())
    ]
    ids = [entry.get("id") for entry in (*held, *added)]
    free = max([-1, *(i for i in (*vocab.values(), *ids) if type(i) is int)]) + 1
    added += [
        {"id": free + at, "content": text, **flags, "normalized": False, "special": True}
        for at, text in enumerate(text for text in dict.fromkeys(new) if text not in known and text not in vocab)
    ]
    return data | {"added_tokens": [*held, *added]} if added else data


def without_rows(data: Any, rows: int, used: str) -> tuple[Any, list[str]]:
    """Return a tokenizer.json without the special tokens that have no row in the model, and their texts.

    Gemma 3's tokenizer names the image token of its larger models, for which the models of text have no row.

    Args:
        rows: of the model.
        used: texts in which a token must not be left out, since the model could not be used.
    """
    held = data.get("added_tokens") if isinstance(data, dict) else None
    model = data.get("model") if isinstance(data, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(held, list) or not isinstance(vocab, list | dict) or not all(map(_names_a_token, held)):
        return data, []  # `parse` refuses it
    if len(vocab) > rows:  # another model's
        return data, []
    possible = range(rows, len(vocab) + len(held))  # `parse` refuses others
    lacking = [e["content"] for e in held if e.get("special") and type(e.get("id")) is int and e["id"] in possible]
    if any(text in used for text in lacking):
        return data, []
    return data | {"added_tokens": [entry for entry in held if entry["content"] not in lacking]}, lacking


def first_tokens(data: Any) -> list[tuple[str, int]]:
    """Return the special tokens, with their ids, that a tokenizer.json puts before each text."""
    entry = data.get("post_processor") if isinstance(data, dict) else None
    steps = (entry.get("processors") or [entry]) if isinstance(entry, dict) else []
    found: list[tuple[str, int]] = []
    for step in steps if isinstance(steps, list) else []:
        form = step.get("single") if isinstance(step, dict) and step.get("type") == "TemplateProcessing" else None
        held = step.get("special_tokens") if isinstance(step, dict) else None
        before = []
        for head in form if isinstance(form, list) else []:
            token = head.get("SpecialToken") if isinstance(head, dict) else None
            if not isinstance(token, dict) or not isinstance(text := token.get("id"), str):
                break
            entry = held.get(text) if isinstance(held, dict) else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            before.append((text, ids[0] if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int else -1))
        found = before + found  # a later step puts its tokens before those of an earlier one
    return found
