"""What both bindings of llama.cpp share: the header of a GGUF file is read first, because llama.cpp ends the process on
some damaged files."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from plmtune.errors import UserError
from plmtune.export.runtimes.base import DEFAULT_CONTEXT, InferenceRuntime
from plmtune.models.gguf_file import opened_gguf

# Architectures on which llama.cpp aborts with flash attention, which is its default.
NO_FLASH_ATTENTION = ("plm",)


@dataclass(frozen=True)
class Facts:
    """What is read from the header.

    Attributes:
        architecture: in llama.cpp's names.
        rows: of the vocabulary.
        context: positions the model knows.
        template: of a conversation.
    """

    architecture: str
    rows: int
    context: int
    template: str | None

    def flash_attention(self, asked: bool | None, path: Path) -> bool | None:
        """Whether to switch flash attention on or off; None: llama.cpp chooses.

        Raises:
            UserError: if it is asked for where llama.cpp aborts.
        """
        if self.architecture in NO_FLASH_ATTENTION:
            if asked:
                raise UserError(
                    f"{path} has the architecture {self.architecture}, on which llama.cpp aborts with flash attention: "
                    "leave it off."
                )
            return False
        return asked

    def flash_settings(self) -> tuple[bool, ...]:
        """The settings of flash attention with which llama.cpp can run it."""
        return (False,) if self.architecture in NO_FLASH_ATTENTION else (False, True)


def read_facts(path: Path) -> Facts:
    """Read a file's header.

    Raises:
        UserError: if it is damaged, or does not say what its architecture must.
    """
    with opened_gguf(path) as file:
        architecture = file.metadata.get("general.architecture")
        context = file.metadata.get(f"{architecture}.context_length")
        embedding = file.tensors.get("token_embd.weight")
        if type(context) is not int or context < 1 or embedding is None:
            what = "token_embd.weight" if embedding is None else f"a whole {architecture}.context_length"
            raise UserError(f"{path} has no {what}: it is no model that llama.cpp runs.")
        template = file.metadata.get("tokenizer.chat_template")
        return Facts(str(architecture), embedding.shape[0], context, template if isinstance(template, str) else None)


class GgufRuntime(InferenceRuntime):
    """llama.cpp with one GGUF file open.

    Args:
        threads: None: llama.cpp's own choice.
        context: None: the model's, at most 4,096.
        exact: keys and values in fp32, where llama.cpp's default is fp16, and no flash attention.
        flash_attention: None: as llama.cpp chooses, where it does not abort on the architecture.
    """

    rounds_inputs = True

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None,
        context: int | None,
        exact: bool,
        flash_attention: bool | None = None,
    ) -> None:
        facts = read_facts(path)
        flash_attention = facts.flash_attention(False if exact else flash_attention, path)
        self.path, self.vocab_size, self._template = path, facts.rows, facts.template
        self.context = min(context or DEFAULT_CONTEXT, facts.context)
        self._open(threads, exact, flash_attention)

    @abstractmethod
    def _open(self, threads: int | None, exact: bool, flash_attention: bool | None) -> None:
        """Load `path` with room for `context` tokens."""
