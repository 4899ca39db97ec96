"""Rollouts of a round: the policy answers every prompt in turns.

An answer depends on (seed, round, prompt, turn) alone, and is journaled as soon as it is complete. So a round that was
killed resumes with the answers that it has, and ends with the same chains as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plmtune.config.sections import GenerationConfig
from plmtune.data.order import key_of
from plmtune.data.preferences import Prompt
from plmtune.errors import UserError
from plmtune.inference.batching import BatchedGenerator
from plmtune.inference.request_queue import Request
from plmtune.inference.sampling import before_stop, encode_stops
from plmtune.models.digest import model_digest
from plmtune.modules.attributes import eval_mode
from plmtune.modules.decoder import Decoder
from plmtune.preference.refinement import Refinement
from plmtune.preference.rounds.chains import CHAINS, Answers, Chain, Journal, Turn, read_chains
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training import distributed
from plmtune.training.determinism import preserve_random_state

# (directory, prompts, number of the round) -> chains, or None if the run is to stop
Rollout = Callable[[Path, Sequence[Prompt], int], list[Chain] | None]
Progress = Callable[[int, int, float], None]  # (answers so far, answers of this process, tokens a second)

POLL_SECONDS = 1.0  # between two exchanges with other processes, and two checks for a stop


def policy_rollout(
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    refinement: Refinement,
    settings: GenerationConfig,
    *,
    seed: int,
    progress: Progress,
    stop: Callable[[], bool],
) -> Rollout:
    """Return a function that answers prompts with the weights that `model` has when it is called."""

    def rollout(directory: Path, prompts: Sequence[Prompt], number: int) -> list[Chain] | None:
        try:
            with preserve_random_state(next(model.parameters()).device), eval_mode(model):
                torch.use_deterministic_algorithms(False)  # sampling has no deterministic kernel on a GPU
                engine = BatchedGenerator(
                    model,
                    batch_size=settings.batch_size,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    min_p=settings.min_p,
                    repetition_penalty=settings.repetition_penalty,
                    end_ids={template.end_id, *tokenizer.end_ids},
                    num_tokens=tokenizer.num_tokens,
                    decode_bytes=tokenizer.decode_bytes,
                )
                asked = Requests(prompts, template, refinement, settings, model.max_seq_len, seed, number)
                return generate_chains(directory, asked, engine, model_digest(model), progress=progress, stop=stop)
        except ValueError as error:
            raise UserError(f"key generation: {error}") from error

    return rollout


def generate_chains(
    directory: Path,
    asked: Requests,
    engine: BatchedGenerator,
    model: str,
    *,
    progress: Progress = lambda done, total, tokens_per_second: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Chain] | None:
    """Answer every prompt in turns, and save the chains; every process calls it with the same prompts.

    Args:
        directory: of this round, the same for all processes. Answers that a killed call left there are reused.
        engine: generates the answers; without requests.
        model: digest of the weights; answers of other weights are refused.
        progress: called after each answer.
        stop: asked once a second, on every process at the same times; True ends the call, which returns None.
    """
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory, {"model": model, **asked.described()})
    if not distributed.broadcast_from_rank0(journal.is_complete):
        if not _generate(asked, journal, engine, progress, stop):
            return None
        if distributed.rank() == 0:
            answers = journal.read()
            journal.finish(asked.chain(index, answers) for index in range(len(asked.prompts)))
        distributed.barrier()
    return read_chains(directory / CHAINS)


@dataclass(frozen=True)
class Requests:
    """The request for each (prompt, turn): a pure function of the answers before it."""

    prompts: Sequence[Prompt]
    template: ChatTemplate
    refinement: Refinement
    settings: GenerationConfig
    max_len: int  # most tokens of a prompt with its answer
    seed: int
    number: int  # of the round; with `seed` it decides the samples

    def __post_init__(self) -> None:
        if self.max_prompt < 1:
            raise ValueError(
                f"max_new_tokens ({self.settings.max_new_tokens}) leaves no room for a prompt in {self.max_len} tokens"
            )

    @property
    def max_prompt(self) -> int:
        return self.max_len - self.settings.max_new_tokens

    def described(self) -> dict[str, Any]:
        """What the answers depend on, beside the model, for the journal."""
        return {
            "template": self.template.fingerprint,
            "refinement": self.refinement.source,
            "prompts": f"{key_of(*(prompt.messages for prompt in self.prompts)):016x}",
            "turns": self.settings.turns,
            "strategy": self.settings.mode,  # the name of the first version, which saved settings have
            "max_new_tokens": self.settings.max_new_tokens,
            "max_len": self.max_len,
            "seed": self.seed,
            "number": self.number,
        }

    def due(self, index: int, answers: Answers, after: int = -1) -> list[Request | str]:
        """The requests that are possible once turn `after` is answered (-1: all), or why one is impossible."""
        missing = [turn for turn in range(self.settings.turns) if (index, turn) not in answers]
        if self.settings.mode == "chain":
            missing = missing[:1]  # the others depend on it
        elif after >= 0:
            missing = []  # all were requested at once
        return [self._request(index, turn, answers) for turn in missing]

    def _request(self, index: int, turn: int, answers: Answers) -> Request | str:
        prompt = self.prompts[index].messages
        try:
            if turn == 0 or self.settings.mode == "samples":
                ids = self.template.encode_prompt(prompt)
            else:
                earlier = answers[index, turn - 1].text
                found = self.refinement.encode(self.template, prompt, earlier, max_len=self.max_prompt)
                if found is None:
                    return f"leaves no room in {self.max_prompt:,} tokens for an answer to refine"
                ids = found[0]
        except BadRow as error:
            return str(error)
        if len(ids) > self.max_prompt:
            return f"has a prompt of more than {self.max_prompt:,} tokens"
        seed = key_of(self.seed, self.number, index, turn) >> 1  # torch's generators take 63 bits
        until = encode_stops(self.settings.stop_texts())
        return Request(f"{index}/{turn}", ids.tolist(), self.settings.max_new_tokens, seed, until)

    def chain(self, index: int, answers: Answers) -> Chain:
        """The prompt with its answers, once all possible ones exist."""
        given = tuple(answers[index, turn] for turn in range(self.settings.turns) if (index, turn) in answers)
        reasons = [reason for reason in self.due(index, answers) if isinstance(reason, str)]
        prompt = self.prompts[index]
        return Chain(prompt.messages, given, prompt.place, prompt.extra, prompt.gold, reasons[0] if reasons else None)


def _generate(
    asked: Requests, journal: Journal, engine: BatchedGenerator, progress: Progress, stop: Callable[[], bool]
) -> bool:
    """Generate the answers that this process's journal lacks; True once all processes have finished."""
    answers, turns, until = journal.read(), asked.settings.turns, asked.settings.stop_texts()
    mine = range(distributed.rank(), len(asked.prompts), distributed.world_size())
    done = sum((index, turn) in answers for index in mine for turn in range(turns))
    distributed.barrier()  # another process must not append to a file while it is read
    journal.open()

    def submit(index: int, after: int = -1) -> None:
        for request in asked.due(index, answers, after):
            if isinstance(request, Request):
                engine.submit(request)

    for index in mine:
        submit(index)
    began = polled = time.monotonic()
    tokens = 0
    for answer in engine.run():
        index, turn = map(int, answer.key.split("/"))
        text = before_stop(asked.template.tokenizer.decode(answer.tokens), until)
        answers[index, turn] = Turn(text, answer.ended or answer.stopped)
        journal.add(index, turn, answers[index, turn])
        submit(index, after=turn)
        now = time.monotonic()
        done, tokens = done + 1, tokens + len(answer.tokens)
        progress(done, len(mine) * turns, tokens / max(now - began, 1e-9))
        if now - polled >= POLL_SECONDS:
            polled = now
            distributed.any_rank(True)
            if distributed.any_rank(stop()):
                return False
    while distributed.any_rank(False):
        if distributed.any_rank(stop()):
            return False
    return True
