"""A plmtune model as lm-eval's language model: requests are encoded, and results are cached."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor

from plmtune.errors import LogitsNotFinite, UserError
from plmtune.evaluation.perplexity import windows
from plmtune.evaluation.result_cache import ResultCache, key
from plmtune.evaluation.scoring import Item, Scorer
from plmtune.evaluation.writing import Prompt, Writer
from plmtune.inference.sampling import check_sampling
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training import distributed

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder

# Part of every key of the cache: increased when the arithmetic or the cached values change.
VERSION = 1
# Defaults of lm-eval's `hf`: the longest answer, and transformers' top_k.
_MAX_NEW_TOKENS = 256
_TOP_K = 50
# Settings of transformers' generate without effect.
_IDLE = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
# Requests that are encoded at once: enough for all cores, few enough for the memory.
_ENCODED_AT_ONCE = 1024
# Marks the end of a message to continue, as in transformers; a template that trims messages removes the space.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class LanguageModel(TemplateLM):
    """lm-eval's interface to a model, over `Scorer` and `Writer`.

    Prompts are encoded as by lm-eval's `hf`, including special tokens in the text. Each finished batch is in the cache
    before the next starts, and cached requests are not computed again. Under torchrun each rank has its own instance,
    and lm-eval gives it its share of the documents.

    Attributes:
        num_known: requests that the cache answered.
        num_truncated: requests longer than the model's context, which lost their beginning.

    Args:
        model: in evaluation mode, equal on every rank.
        batch_size: rows in a forward; None: by memory.
        template: chat template; None: tasks are plain text.
        cache: None: results are not cached.
        digest: identifies the weights and their arithmetic in the cache's keys.
        progress: called with the kind of request, the number done and the total after each batch.
        max_new_tokens: longest answer, below the model's context; None: as the task asks, up to half of it.
        log: called once for each task and length whose answers are shortened to fit the context.
    """

    tokenizer: Tokenizer

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        template: ChatTemplate | None = None,
        cache: ResultCache | None = None,
        digest: str = "",
        progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
        max_new_tokens: int | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        if cache is not None and not digest:
            raise ValueError("a cache of results needs a digest of the model: others would get its answers")
        self.max_new_tokens, self.log = max_new_tokens, log
        self._shortened: set[tuple[str, int]] = set()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.template, self.cache, self.progress = batch_size, template, cache, progress
        self.num_known = self.num_truncated = 0
        self._device, self._rank, self._world_size = model.device, distributed.rank(), distributed.world_size()
        self._scorer = Scorer(model)
        ends = () if template is None else (template.end_id,)
        self._writer = Writer(model, tokenizer, batch_size=batch_size, end_ids=ends)
        # The weights do not determine RoPE, the length of the context, or the order of sums.
        self._base = key(digest, self._device.type, model.config, tokenizer.fingerprint, VERSION).hex()
        self._encoded: dict[str, list[int]] = {}

    # What lm-eval reads.

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one; lm-eval takes one token, of several the last."""
        return self.tokenizer.start_ids[-1]

    @property
    def max_length(self) -> int:
        return self.model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return f"{self.tokenizer.fingerprint}-{self.template.fingerprint if self.template else 'none'}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template.source if chat_template and self.template else None

    # Several processes.

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the numbers of all ranks."""
        if self.world_size == 1:
            return tensor
        held = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(held, tensor)
        return torch.stack(held)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on rank `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        held: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, held, dst=dst)
        return held

    def barrier(self) -> None:
        distributed.barrier()

    # Texts to ids.

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, with bos if the tokenizer adds it and it is not there yet."""
        ids = self._encoded.get(string)
        if ids is None:
            ids = self.tokenizer.encode(string, specials=True)
        return ids if add_special_tokens is False else self.tokenizer.with_bos(ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, as transformers' apply_chat_template.

        It ends with the generation prompt, or the model continues the last message.
        """
        if self.template is None:
            raise UserError("The model has no chat template, so that questions cannot be put as messages.")
        messages = [Message(entry["role"], entry["content"]) for entry in chat_history]
        refused: BadRow | None = None
        # As `hf` does, then without the system message: some templates have no such role.
        for tried in (messages, [message for message in messages if message.role != "system"]):
            try:
                return self._render(tried, add_generation_prompt)
            except BadRow as error:
                refused = refused or error
        raise UserError(f"{self.template.where} cannot put a question: the conversation {refused}.") from refused

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        assert self.template is not None
        if add_generation_prompt:
            return self.template.render(messages, add_generation_prompt=True)
        *before, last = messages
        text = self.template.render([*before, Message(last.role, last.content + _TAG)])
        at = text.rfind(_TAG.strip())
        if at < 0:
            raise BadRow("has a last message of which the template does not write the end")
        return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()

    def _encode_ahead(self, texts: Iterable[tuple[str, int]]) -> None:
        """Encode texts, each with a place to cut it, on all cores; common beginnings are encoded once."""
        cut = {text: (text[:at], text[at:]) for text, at in texts}
        parts = list(dict.fromkeys(part for pair in cut.values() for part in pair))
        encoded = self.tokenizer.encode_batch(parts, specials=True)
        ids = {part: found.tolist() for part, found in zip(parts, encoded, strict=True)}
        self._encoded = {text: ids[head] + ids[tail] for text, (head, tail) in cut.items()}

    # The three kinds of requests.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log-probability, and whether greedy decoding gives it."""
        items: list[Item] = []
        for start in range(0, len(requests), _ENCODED_AT_ONCE):
            pairs = [request.args for request in requests[start : start + _ENCODED_AT_ONCE]]
            texts: list[tuple[str, int]] = []  # that `_encode_pair` encodes, and where they may be cut
            for context, answer in pairs:
                cut = self.tokenizer.last_cut(context.rstrip())
                texts += [(context.rstrip(), cut), (context + answer, cut)]
            self._encode_ahead(texts)
            items += [self._item(context, continuation) for context, continuation in pairs]
        self._encoded = {}
        return self._score("loglikelihood", items, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each text, every token predicted once, in windows of the model's context."""
        items: list[Item] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            # lm-eval's `hf` puts bos before a text and again before its first window.
            first = self.tokenizer.first_ids
            ids = ids[len(first) :] if tuple(ids[: len(first)]) == first else ids
            items += [item for _, item in windows(ids, self.tokenizer.start_ids, self.max_length, self.max_length)]
            owners += [number] * (len(items) - len(owners))
        sums = [0.0] * len(requests)
        scores = self._score("loglikelihood_rolling", items, [requests[owner] for owner in owners])
        for owner, (log_prob, _) in zip(owners, scores, strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the answer to each context, up to the first of the request's stop texts."""
        prompts: list[Prompt] = []
        keys: list[bytes] = []
        seen: Counter[Hashable] = Counter()
        for start in range(0, len(requests), _ENCODED_AT_ONCE):
            chunk = requests[start : start + _ENCODED_AT_ONCE]
            self._encode_ahead((request.args[0], 0) for request in chunk)
            for index, request in enumerate(chunk, start):
                context, settings = request.args
                options = self._options(settings, _place(requests, index), request.task_name or "A task")
                room = self.max_length - options["max_new_tokens"]
                tokens = self.tok_encode(context) or list(self.tokenizer.start_ids)
                self.num_truncated += len(tokens) > room
                tokens = tokens[-room:]
                held = key(self._base, "generate_until", _hash(tokens), options, sorted(self._writer.end_ids))
                # Sampled answers to one question differ, and are reproducible.
                drawn = options["temperature"] > 0
                seed = int.from_bytes(key(held.hex(), seen[held])[:6]) if drawn else 0
                seen[held] += 1
                prompts.append(Prompt(tokens, **(options | {"until": tuple(options["until"])}), seed=seed))
                keys.append(key(held.hex(), seed) if drawn else held)
        self._encoded = {}

        def write(*given: Any) -> Iterator[list[tuple[int, str]]]:
            return ([(number, written.text)] for number, written in self._writer.write(*given))

        return self._answer("generate_until", requests, keys, prompts, write)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score("loglikelihood", [Item(context, answer) for _, context, answer in requests], [])

    def _item(self, context: str, continuation: str) -> Item:
        """Return the ids of a pair, as lm-eval's `TemplateLM` encodes it."""
        first = list(self.tokenizer.start_ids)
        if context:
            before, ids = self._encode_pair(context, continuation)
            return Item(before or first, ids)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return Item(first, ids[len(first) :] if ids[: len(first)] == first else ids)

    def _score(self, kind: str, items: Sequence[Item], requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Score items of `requests`, which messages name."""
        for index, item in enumerate(items):
            if not 0 < len(item.continuation) <= self.max_length:
                raise UserError(
                    f"{_place(requests, index)}: its answer has {len(item.continuation):,} tokens; from 1 to "
                    f"{self.max_length:,}, the model's context, can be scored."
                )
            self.num_truncated += len(item.context) + len(item.continuation) > self.max_length + 1
        keys = [key(self._base, "loglikelihood", _hash(item.context), _hash(item.continuation)) for item in items]
        if self.batch_size is not None:
            # `batch_size` of the longest rows, so that the memory is that of `hf`.
            longest = max((len(item.context) + len(item.continuation) for item in items), default=1)
            self._scorer.token_budget = self.batch_size * min(longest, self.max_length)
        found = self._answer(kind, requests, keys, items, self._scorer.score)
        return [(log_prob, greedy) for log_prob, greedy in found]

    def _answer(
        self,
        kind: str,
        requests: Sequence[Instance],
        keys: Sequence[bytes],
        inputs: Sequence[Any],
        compute: Callable[..., Iterator[list[tuple[int, Any]]]],
    ) -> list[Any]:
        """Return the answer to each input. Inputs with equal keys have one answer, which is in the cache afterwards.

        Args:
            compute: called with the distinct inputs and the numbers of those that the cache knows; yields the numbers
                and answers of a batch.
        """
        firsts = {held: index for index, held in reversed(list(enumerate(keys)))}
        order = list(dict.fromkeys(keys))
        found = self.cache.get(order) if self.cache is not None else {}
        self.num_known += len(found)
        known = {number for number, held in enumerate(order) if held in found}
        self.progress(kind, len(found), len(order))
        try:
            for batch in compute([inputs[firsts[held]] for held in order], known):
                values = {order[number]: value for number, value in batch}
                if self.cache is not None:
                    self.cache.put(values)
                found |= values
                self.progress(kind, len(found), len(order))
        except LogitsNotFinite as error:
            raise UserError(
                f"{_place(requests, firsts[order[int(error.item)]])}: the model's logits are not numbers (NaN). Its "
                "weights are damaged or its training diverged: take an earlier checkpoint, or one computed in fp32 if "
                "this one is in half precision."
            ) from error
        return [found[held] for held in keys]

    def _options(self, settings: Mapping[str, Any], place: str, task: str) -> dict[str, Any]:
        """Return the arguments of `Prompt` except its tokens and seed, as JSON values."""
        try:
            given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), _MAX_NEW_TOKENS))
            until = handle_stop_sequences(given.pop("until"), eos=self.tokenizer.eos)
            if not all(isinstance(text, str) for text in until):
                raise TypeError(f"until must be texts, not {until[:-1]}")
            length, drawn = given.pop("max_gen_toks"), given.pop("do_sample")
            temperature = float(given.pop("temperature", 0.0))
            top_k = int(given.pop("top_k", _TOP_K) or 0) or None
            names = ("top_p", "min_p", "repetition_penalty")
            top_p, min_p, penalty = (None if (v := given.pop(name, None)) is None else float(v) for name in names)
            penalty = 1.0 if penalty is None else penalty
            check_sampling(temperature, top_k, top_p, min_p, penalty)
            if drawn and temperature == 0:
                raise ValueError("do_sample needs a temperature above 0")
            if length < 1:
                raise ValueError(f"max_gen_toks is {length}: at least 1 is needed")
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: generation_kwargs {dict(settings)} are impossible: {error}.") from error
        if unknown := [name for name, value in given.items() if name not in _IDLE or _IDLE[name] != value]:
            raise UserError(
                f"{place}: {unknown[0]}={given[unknown[0]]!r} of its generation_kwargs is not supported; do_sample, "
                "temperature, top_k, top_p, min_p, repetition_penalty, until and max_gen_toks are. Leave it out in a "
                "copy of the task."
            )
        most = self.max_new_tokens or self.max_length // 2
        if length > most and self.max_new_tokens is None and (task, length) not in self._shortened:
            self._shortened.add((task, length))
            self.log(
                f"{task}: its answers may have {length:,} tokens, and the model's context has {self.max_length:,}. "
                f"They are cut at {most:,}; the other {self.max_length - most:,} are for the question "
                "(--max-new-tokens)"
            )
        if not drawn:
            temperature, top_k, top_p, min_p = 0.0, None, None, None
        # Settings without effect are left out, so that cached answers of earlier versions are found.
        return {
            **({"min_p": min_p} if min_p else {}),
            **({"repetition_penalty": penalty} if penalty != 1 else {}),
            "max_new_tokens": min(length, most),
            "until": [text for text in until if text],
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }


def _hash(ids: Sequence[int]) -> str:
    # JSON of a thousand ids takes ten times as long.
    return xxhash.xxh3_128_hexdigest(array("I", ids).tobytes())


def _place(requests: Sequence[Instance], index: int) -> str:
    """Return the task and document of a request, for a person."""
    if not requests or requests[index].task_name is None:
        return f"Request {index}"
    return f"Task {requests[index].task_name}, document {requests[index].doc_id}"
