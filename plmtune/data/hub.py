"""Text from the Hugging Face hub, streamed through `datasets`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import xxhash

import plmtune.io.hub
from plmtune.data.sources import Source
from plmtune.errors import UserError, did_you_mean
from plmtune.extras import installed, missing
from plmtune.ranges import AT_LEAST_1, NotEmpty, check
from plmtune.registry import register
from plmtune.tokenizers.message import Unused

_MOST_SHOWN = 40  # names of subsets: some datasets have hundreds


@dataclass(eq=False)
class Hub(Source):
    """A dataset; the hub is queried when it is read."""

    name = "hub"

    dataset: str
    subset: str | None
    split: str
    text_key: str
    revision: str | None
    limit: int | None
    _commit: str | None = None  # of the revision, when the hub was queried

    def __post_init__(self) -> None:
        if not installed("datasets"):
            raise missing("datasets", f"data hub: {self.dataset}", "data=files reads files that are here.")

    def documents(self, skip_bad: bool = False) -> Iterator[str]:
        """Stream the texts of the rows."""
        self.skipped, self.unused = 0, Unused()
        rows = ((f"data hub: {place}", row) for place, row in self.rows())
        yield from (text for text in self._texts(rows, self.text_key, skip_bad) if text and not text.isspace())

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Stream the rows, each with its place."""
        from datasets import load_dataset

        try:
            with plmtune.io.hub.without_retries():
                # data files alone are read: no code of the dataset's own is ever run
                revision = self._commit or self.revision  # the rows that the fingerprint is of
                rows = load_dataset(self.dataset, self.subset, split=self.split, revision=revision, streaming=True)
            where = f"{self.dataset}, {self.subset}" if self.subset else self.dataset
            for number, row in enumerate(plmtune.io.hub.draw_offline(islice(rows, self.limit)), 1):
                yield f"{where}, row {number} of {self.split}", row
        except (UserError, MemoryError):
            raise
        except Exception as error:  # errors of datasets, requests and fsspec, and OSErrors
            if isinstance(error, ValueError) and (said := self._list_choices()):
                raise UserError(f"data hub: {said}") from error
            raise UserError(
                f"data hub: {self.dataset} (subset {self.subset}, split {self.split}) cannot be read: "
                f"{_why(error)}. Check the name and the connection, or use data=files"
            ) from error

    def _list_choices(self) -> str:
        """List the subsets or splits if the named one does not exist; empty if that is not the reason of a failure."""
        from datasets import get_dataset_config_names, get_dataset_split_names

        def ask(what: Callable[..., list[str]], *names: str) -> list[str]:
            with contextlib.suppress(Exception), plmtune.io.hub.without_retries():
                return list(what(self.dataset, *names, revision=self._commit or self.revision))
            return []

        subsets = ask(get_dataset_config_names)
        if self.subset is None and len(subsets) > 1:
            return f"{self.dataset} has several subsets: {_listed(subsets)}. Choose one with subset={subsets[0]}"
        if self.subset is not None and subsets and self.subset not in subsets:
            near = did_you_mean(self.subset, subsets)
            return f"{self.dataset} has no subset {self.subset}, but {_listed(subsets)}.{near}"
        chosen = self.subset or next(iter(subsets), None)
        splits = ask(get_dataset_split_names, chosen) if chosen else []
        if splits and self.split not in splits:
            return f"{self.dataset} has no split {self.split}, but {_listed(splits)}: choose one with split={splits[0]}"
        return ""

    def fingerprint(self) -> str:
        """Hash the dataset's commit, which the hub gives unless the revision is one."""
        commit = self._commit or self.revision or "main"
        if not (len(commit) == 40 and set(commit) <= set("0123456789abcdef")):
            try:
                from huggingface_hub import HfApi

                if why := plmtune.io.hub.unavailable_reason():
                    raise OSError(why)
                commit = HfApi().dataset_info(self.dataset, revision=self.revision).sha or commit
            except Exception as error:  # no connection, no such dataset, no permission: one remedy
                raise UserError(
                    f"data hub: the hub does not give the version of {self.dataset}: {_why(error)}. "
                    "Check the name and the connection, or pin revision to a commit"
                ) from error
        self._commit = commit if commit != "main" else None
        what = (self.dataset, self.subset, self.split, self.text_key, commit, self.limit)
        return xxhash.xxh3_128_hexdigest(repr(what).encode())

    def describe(self) -> str:
        parts = [self.dataset, self.subset, self.split, self.revision]
        return "the hub's " + ", ".join(part for part in parts if part)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {len(names) - _MOST_SHOWN:,} more" if names[_MOST_SHOWN:] else "")


def _why(error: Exception) -> str:
    return plmtune.io.hub.unavailable_reason() or f"{type(error).__name__}: {error}"


@register("data", "hub")
def hub(
    name: str = "",
    subset: str | None = None,
    split: str = "train",
    text_key: str = "text",
    revision: str | None = None,
    limit: int | None = None,
) -> Source:
    """Stream a dataset of the Hugging Face hub; its data files only, never code of its own.

    Args:
        name: the dataset, such as HuggingFaceFW/fineweb-edu.
        subset: its configuration; needed for a dataset with several and no default.
        split: train, validation, ...
        text_key: column that holds the text.
        revision: branch, tag or commit; a commit pins the data.
        limit: read so many rows and no more.
    """
    if not name:
        raise ValueError("hub needs the name of a dataset, such as data.name=HuggingFaceFW/fineweb-edu")
    check(AT_LEAST_1, limit=limit)
    check(NotEmpty(), subset=subset, split=split, text_key=text_key, revision=revision)
    return Hub(name, subset, split, text_key, revision, limit)
