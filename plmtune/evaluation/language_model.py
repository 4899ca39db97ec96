"""A model of ours as lm-eval's language model: its requests become ids here, and what comes back is kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from plmtune.errors import UserError
from plmtune.evaluation.result_cache import ResultCache, key
from plmtune.evaluation.scoring import Item, NotFinite, Scorer
from plmtune.evaluation.writing import Prompt, Writer
from plmtune.inference.sampling import check_sampling
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder

# Part of every key: another number where the arithmetic, or what a kept value holds, has changed.
VERSION = 1
# What lm-eval's `hf` does where a task does not say: the longest answer, and transformers' own cut of a draw.
_MAX_NEW_TOKENS = 256
_TOP_K = 50
# Settings of transformers' generate at which they change nothing.
_IDLE = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
# Requests that are encoded at once: enough for all cores, few enough that their texts are not all held as ids.
_ENCODED_AT_ONCE = 1024
# Ends what is to be gone on with, as in transformers: a template that trims its messages takes the space off.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class LanguageModel(TemplateLM):
    """What lm-eval asks of a model, over `Scorer` and `Writer`.

    Prompts are made of ids as by lm-eval's `hf`, the text of special tokens standing for the tokens. Each batch that is
    done is in the cache before the next begins, and a request that is there is not computed again. Under torchrun each
    rank has its own, and lm-eval gives it its share of the documents.

    Attributes:
        num_known: requests that the cache answered.
        num_truncated: requests that lost their beginning, being longer than the model's context.

    Args:
        model: the model, in evaluation mode, the same on every rank.
        batch_size: rows that go through the model together; None: by memory.
        template: how a conversation is put; None where tasks are plain text.
        cache: None: nothing is kept.
        digest: names the weights and their arithmetic in the cache's keys.
        progress: told the kind of request, how many are done and of how many, after each batch.
        max_new_tokens: longest answer, whatever a task asks for; None: what the task asks for, as far as the model's
            context allows, half of which is left to the question.
        tell: told once for each task and length that its answers are shortened for want of context.

    Raises:
        ValueError: for a cache without a digest.
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
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        if cache is not None and not digest:
            raise ValueError("a cache of results needs a digest of the model: others would get its answers")
        if max_new_tokens is not None and not 0 < max_new_tokens < model.max_seq_len:
            raise ValueError(
                f"max_new_tokens ({max_new_tokens}) must be at least 1 and below the model's context "
                f"({model.max_seq_len}), which holds the question, too"
            )
        self.max_new_tokens, self.tell = max_new_tokens, tell
        self._shortened: set[tuple[str, int]] = set()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.template, self.cache, self.progress = batch_size, template, cache, progress
        self.num_known = 0
        self.num_truncated = 0
        self._device = model.device
        self._scorer = Scorer(model)
        ends = () if template is None else (template.end_id,)
        self._writer = Writer(model, tokenizer, batch_size=batch_size, end_ids=ends)
        # Weights alone do not say how positions are turned, nor how long a context is, nor what adds up the sums.
        self._base = key(digest, self._device.type, model.config, tokenizer.fingerprint, VERSION).hex()
        self._encoded: dict[str, list[int]] = {}

    # What lm-eval reads of a model.

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.tokenizer.start_id

    @property
    def max_length(self) -> int:
        return self.model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return f"{self.tokenizer.fingerprint}-{self.template.fingerprint if self.template else 'none'}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template.source if chat_template and self.template else None

    # Several processes.

    @property
    def rank(self) -> int:
        return dist.get_rank() if _is_distributed() else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if _is_distributed() else 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, one behind the other."""
        if self.world_size == 1:
            return tensor
        held = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(held, tensor.contiguous())
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in held])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on rank `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        held: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, held, dst=dst)
        return held

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    # Texts to ids.

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, with the token before it where the tokenizer puts one and it is not there yet."""
        ids = self._encoded.get(string)
        if ids is None:
            ids = self.tokenizer.encode(string, specials=True)
        return ids if add_special_tokens is False else self.tokenizer.with_bos(ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Put a conversation, as transformers' apply_chat_template.

        Args:
            add_generation_prompt: end where the model begins to write; else go on with the last message.

        Raises:
            UserError: if the template refuses it, also without what the system says.
        """
        if self.template is None:
            raise UserError("The model has no chat template, so that questions cannot be put as messages.")
        messages = [Message(entry["role"], entry["content"]) for entry in chat_history]
        try:
            return self._render(messages, add_generation_prompt)
        except BadRow as error:
            rest = [message for message in messages if message.role != "system"]
            try:
                return self._render(rest, add_generation_prompt)  # as `hf` does: some templates know no system
            except BadRow:
                raise UserError(f"{self.template.where} cannot put a question: the conversation {error}.") from error

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
        """Encode texts, each with a place to cut it, on all cores, and what several begin with once."""
        cut = {text: (text[:at], text[at:]) for text, at in texts}
        parts = list(dict.fromkeys(part for pair in cut.values() for part in pair))
        encoded = self.tokenizer.encode_batch(parts, specials=True)
        ids = {part: found.tolist() for part, found in zip(parts, encoded, strict=True)}
        self._encoded = {text: ids[head] + ids[tail] for text, (head, tail) in cut.items()}

    # The three kinds of requests.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log-probability, and whether greedy decoding would write it."""
        items: list[Item] = []
        for start in range(0, len(requests), _ENCODED_AT_ONCE):
            pairs = [request.args for request in requests[start : start + _ENCODED_AT_ONCE]]
            # What `_encode_pair` will ask for, and where it may be cut.
            cuts = [(context.rstrip(), self.tokenizer.last_cut(context.rstrip())) for context, _ in pairs]
            self._encode_ahead(
                (text, cut)
                for (context, answer), (bare, cut) in zip(pairs, cuts, strict=True)
                for text in (bare, context + answer)
            )
            items += [self._item(context, continuation) for context, continuation in pairs]
        self._encoded = {}
        return self._score("loglikelihood", items, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each text, every token predicted once, in windows of the model's length."""
        windows: list[Item] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            # lm-eval's `hf` puts bos before a text and once more before its first window.
            ids = ids[1:] if self.tokenizer.adds_bos and ids[:1] == [self.prefix_token_id] else ids
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [Item(*make_disjoint_window(window)) for window in cut]
            owners += [number] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        scores = self._score("loglikelihood_rolling", windows, [requests[owner] for owner in owners])
        for owner, (log_prob, _) in zip(owners, scores, strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes after each context, up to the first of the request's stop texts."""
        prompts: list[Prompt] = []
        keys: list[bytes] = []
        seen: Counter[Hashable] = Counter()
        for start in range(0, len(requests), _ENCODED_AT_ONCE):
            chunk = requests[start : start + _ENCODED_AT_ONCE]
            self._encode_ahead((request.args[0], 0) for request in chunk)
            for index, request in enumerate(chunk, start):
                context, settings = request.args
                options = self._options(settings, _place(request, index), request.task_name or "A task")
                room = self.max_length - options["max_new_tokens"]
                tokens = self.tok_encode(context) or [self.prefix_token_id]
                self.num_truncated += len(tokens) > room
                tokens = tokens[-room:]
                held = key(self._base, "generate_until", _hash(tokens), options, sorted(self._writer.end_ids))
                # Drawn answers to one question differ, and are the same in the next run.
                drawn = options["temperature"] > 0
                seed = int.from_bytes(key(held.hex(), seen[held])[:6]) if drawn else 0
                seen[held] += 1
                prompts.append(Prompt(tokens, **(options | {"until": tuple(options["until"])}), seed=seed))
                keys.append(key(held.hex(), seed) if drawn else held)
        self._encoded = {}
        firsts, found = self._known(keys)
        order = list(firsts)
        known = {number for number, held in enumerate(order) if held in found}
        self.progress("generate_until", len(found), len(order))
        try:
            for number, written in self._writer.write([prompts[firsts[held]] for held in order], known):
                self._keep({order[number]: written.text}, found)
                self.progress("generate_until", len(found), len(order))
        except NotFinite as error:
            raise _not_finite(_place(requests[firsts[order[error.index]]], error.index)) from error
        return [found[held] for held in keys]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score("loglikelihood", [Item(context, answer) for _, context, answer in requests], [])

    def _item(self, context: str, continuation: str) -> Item:
        """The ids of a pair, as lm-eval's `TemplateLM` makes them."""
        first = self.prefix_token_id
        if context:
            before, ids = self._encode_pair(context, continuation)
            return Item(before or [first], ids)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return Item(ids[:1], ids[1:]) if ids[:1] == [first] else Item([first], ids)

    def _score(self, kind: str, items: Sequence[Item], requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Score items; `requests` are whose they are, for messages."""

        def place(index: int) -> str:
            return _place(requests[index] if requests else None, index)

        for index, item in enumerate(items):
            if not 0 < len(item.continuation) <= self.max_length:
                raise UserError(
                    f"{place(index)}: its answer has {len(item.continuation):,} tokens; from 1 to "
                    f"{self.max_length:,}, the model's context, can be scored."
                )
            self.num_truncated += len(item.context) + len(item.continuation) > self.max_length + 1
        keys = [key(self._base, "loglikelihood", _hash(item.context), _hash(item.continuation)) for item in items]
        firsts, found = self._known(keys)
        order = list(firsts)
        if self.batch_size is not None:
            # So many of the longest rows: what they take is what `hf` takes for so many.
            longest = max((len(item.context) + len(item.continuation) for item in items), default=1)
            self._scorer.token_budget = self.batch_size * min(longest, self.max_length)
        known = {number for number, held in enumerate(order) if held in found}
        self.progress(kind, len(found), len(order))
        try:
            for batch in self._scorer.score([items[firsts[held]] for held in order], known):
                self._keep({order[number]: [score.log_prob, score.greedy] for number, score in batch}, found)
                self.progress(kind, len(found), len(order))
        except NotFinite as error:
            raise _not_finite(place(firsts[order[error.index]])) from error
        return [(found[held][0], found[held][1]) for held in keys]

    def _known(self, keys: Sequence[bytes]) -> tuple[dict[bytes, int], dict[bytes, Any]]:
        """Return where each key stands first, and what the cache holds of them."""
        firsts: dict[bytes, int] = {}
        for index, held in enumerate(keys):
            firsts.setdefault(held, index)
        found = self.cache.get(list(firsts)) if self.cache is not None else {}
        self.num_known += len(found)
        return firsts, found

    def _keep(self, values: Mapping[bytes, Any], found: dict[bytes, Any]) -> None:
        if self.cache is not None:
            self.cache.put(values)
        found.update(values)

    def _length(self, asked: int, task: str) -> int:
        """Return how long an answer may be."""
        most = self.max_new_tokens or self.max_length // 2
        if asked <= most:
            return asked
        if self.max_new_tokens is None and (task, asked) not in self._shortened:
            self._shortened.add((task, asked))
            self.tell(
                f"{task}: its answers may have {asked:,} tokens, and the model's context has {self.max_length:,}. They "
                f"are cut at {most:,}; the other {self.max_length - most:,} are for the question (--max-new-tokens)"
            )
        return most

    def _options(self, settings: Mapping[str, Any], place: str, task: str) -> dict[str, Any]:
        """Return how an answer is to be written: what `Prompt` takes but its tokens and seed, as JSON holds it."""
        try:
            given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), _MAX_NEW_TOKENS))
            until = handle_stop_sequences(given.pop("until"), eos=self.tokenizer.eos)
            if not all(isinstance(text, str) for text in until):
                raise TypeError(f"until must be texts, not {until[:-1]}")
            length, drawn = given.pop("max_gen_toks"), given.pop("do_sample")
            temperature = float(given.pop("temperature", 0.0))
            top_k, top_p = given.pop("top_k", _TOP_K), given.pop("top_p", None)
            top_k, top_p = (int(top_k) or None) if top_k is not None else None, None if top_p is None else float(top_p)
            min_p, penalty = given.pop("min_p", None), given.pop("repetition_penalty", None)
            min_p, penalty = None if min_p is None else float(min_p), 1.0 if penalty is None else float(penalty)
            check_sampling(temperature, top_k, top_p, min_p, penalty)
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: generation_kwargs {dict(settings)} are impossible: {error}.") from error
        if unknown := [name for name, value in given.items() if name not in _IDLE or _IDLE[name] != value]:
            raise UserError(
                f"{place}: {unknown[0]}={given[unknown[0]]!r} of its generation_kwargs is not supported; do_sample, "
                "temperature, top_k, top_p, min_p, repetition_penalty, until and max_gen_toks are. Leave it out in a "
                "copy of the task."
            )
        if drawn and temperature == 0:
            raise UserError(f"{place}: do_sample needs a temperature above 0 in its generation_kwargs.")
        if not isinstance(length, int) or length < 1:
            raise UserError(f"{place}: max_gen_toks is {length!r:.80} in its generation_kwargs: at least 1 is needed.")
        length = self._length(length, task)
        if not drawn:
            temperature, top_k, top_p, min_p = 0.0, None, None, None
        # Settings that change nothing stay out, so that answers which earlier versions kept are found.
        more = {"min_p": min_p} if min_p else {}
        return (
            more
            | ({"repetition_penalty": penalty} if penalty != 1 else {})
            | {
                "max_new_tokens": length,
                "until": [text for text in until if text],
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
            }
        )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _hash(ids: Sequence[int]) -> str:
    # JSON of a thousand ids takes ten times as long.
    return xxhash.xxh3_128_hexdigest(array("I", ids).tobytes())


def _place(request: Instance | None, index: int) -> str:
    """Whose request it is, for a person."""
    if request is None or request.task_name is None:
        return f"Request {index}"
    return f"Task {request.task_name}, document {request.doc_id}"


def _not_finite(place: str) -> UserError:
    return UserError(
        f"{place}: the model's logits are not numbers (NaN). Its weights are damaged or its training diverged: "
        "take an earlier checkpoint, or one computed in fp32 if this one is in half precision."
    )
