"""How a round's answers are written: by the model as it stands, many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from plmtune.config.schema import GenerationConfig
from plmtune.data.preferences import Prompt
from plmtune.errors import UserError
from plmtune.inference.batching import BatchedGenerator
from plmtune.models.digest import model_digest
from plmtune.modules.decoder import Decoder
from plmtune.preference.refinement import Refinement
from plmtune.preference.rounds.chains import Chain, write_chains
from plmtune.preference.rounds.rounds import Write
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.tokenizer import Tokenizer


def writer(
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    refinement: Refinement,
    how: GenerationConfig,
    *,
    seed: int,
    progress: Callable[[int, int, float], None],
    stop: Callable[[], bool],
) -> Write:
    """Return what lets `model` answer prompts, with the weights that it has when it is called.

    Args:
        progress, stop: see `write_chains`.
    """

    def write(directory: Path, prompts: Sequence[Prompt], number: int) -> list[Chain] | None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        model.eval()
        try:
            torch.use_deterministic_algorithms(False)  # sampling has no deterministic kernel on a GPU
            engine = BatchedGenerator(
                model,
                batch_size=how.batch_size,
                temperature=how.temperature,
                top_p=how.top_p,
                min_p=how.min_p,
                repetition_penalty=how.repetition_penalty,
                end_ids={template.end_id, *tokenizer.end_ids},
                num_tokens=tokenizer.num_tokens,
                decode_bytes=tokenizer.decode_bytes,
            )
            return write_chains(
                directory,
                prompts,
                engine,
                template,
                refinement,
                turns=how.turns,
                mode=how.mode,
                max_new_tokens=how.max_new_tokens,
                until=how.stop_texts(),
                max_len=model.max_seq_len,
                seed=seed,
                number=number,
                model=model_digest(model),
                progress=progress,
                stop=stop,
            )
        except ValueError as error:
            raise UserError(f"key generation: {error}") from error
        finally:
            model.train()
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

    return write
