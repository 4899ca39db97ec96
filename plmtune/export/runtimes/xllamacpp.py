"""GGUF files by llama.cpp's server, which the ready wheel xllamacpp runs inside this process.

The server answers calls and, on the loopback, HTTP; tokenizer and chat template are to be had by the latter alone, with
a key that only this process knows.
"""

from __future__ import annotations

import json
import math
import secrets
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export.runtimes.base import Timing
from plmtune.export.runtimes.gguf_facts import FLASH_ATTENTION, GgufRuntime
from plmtune.io.terminal import track
from plmtune.tokenizers.message import Message

# Requests go to this machine, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class XLlamaCppRuntime(GgufRuntime):
    """A llama.cpp server with one slot, which keeps the cache of its last prompt.

    A step hands the whole prompt over as JSON, of which the server reads the new token alone. So `timed` has the server
    write all tokens and returns its own figures. A row of log-probabilities is JSON too: 0.7 s for
    50,000 ids, 0.03 s for 1,000.
    """

    name = "llama.cpp (xllamacpp)"

    def _open(self, threads: int | None, exact: bool, flash_attention: bool | None) -> None:
        import xllamacpp as lib

        path, self._key = self.path, secrets.token_hex(16)
        params = lib.CommonParams()
        params.model.path = str(path)
        # A slot keeps a place for the token that it writes.
        params.n_ctx = self.context + 1
        params.flash_attn_type = getattr(lib.llama_flash_attn_type, FLASH_ATTENTION[flash_attention])
        params.n_parallel, params.warmup, params.fit_params, params.verbosity = 1, False, False, -1
        params.ui, params.endpoint_slots, params.cache_ram_mib = False, False, 0
        params.n_threads_http, params.api_keys = 1, [self._key]
        self._saved = tempfile.TemporaryDirectory(prefix="plmtune-")
        params.slot_save_path = f"{self._saved.name}/"
        if threads is not None:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = lib.ggml_type.GGML_TYPE_F32
        try:
            self._server: Any = lib.Server(params)
        except RuntimeError as error:
            self._saved.cleanup()
            raise UserError(f"llama.cpp cannot load {path}: {error}") from error
        self._ids: list[int] = []
        # The server keeps a row back where the token that it writes ends a text or a character is not whole yet. So it
        # always writes the same one; rows are of the logits before any bias.
        whole = self._post("/tokenize", {"content": "a"})["tokens"][-1]
        self._bias = [[whole, 1e9]]
        # A server that is closed before its loop has begun waits for it for ever; an answer shows that it runs.
        self._complete([whole], 1)

    def clear(self) -> None:
        self._ids = []

    def read(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        self._ids += ids
        ends = track(range(len(self._ids) - last + 1, len(self._ids) + 1), f"of {last} positions computed")
        rows = torch.full((last, self.vocab_size), float("-inf"))
        for row, end in zip(rows, ends, strict=True):  # growing prompts: of each the server reads the one new token
            found = self._complete(self._ids[:end], min(top_k or self.vocab_size, self.vocab_size))
            # JSON has no NaN: the server writes null.
            numbers = [math.nan if entry["logprob"] is None else entry["logprob"] for entry in found]
            row[[entry["id"] for entry in found]] = torch.tensor(numbers)
        # They are not normalized: the server sums 50,000 probabilities in fp32, one after the other, off by 1e-4.
        return rows

    def timed(self, ids: Sequence[int], n: int) -> Timing:
        # Greedy without the samplers that the server has by default, and without log-probabilities.
        greedy = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}
        answer = self._server.handle_completions({"prompt": list(ids), "n_predict": n + 1, **greedy})
        timings = answer.get("timings") if isinstance(answer, dict) else None
        # The first token comes with the prompt; the last is missing where it fills the model's context.
        decoded = 0 if timings is None else timings["predicted_n"] - 1
        if timings is None or decoded < max(1, n - 1):
            raise UserError(f"llama.cpp failed on {len(ids)} tokens with {self.path}: {answer!s:.300}")
        return Timing(timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3 / decoded)

    def _complete(self, ids: list[int], count: int) -> list[dict[str, Any]]:
        """The `count` likeliest ids after some, with their log-probabilities, the likeliest first."""
        asked = {"n_predict": 1, "n_probs": count, "temperature": 0.0, "cache_prompt": True, "logit_bias": self._bias}
        answer = self._server.handle_completions({"prompt": ids, **asked})
        if "choices" not in answer:
            message = answer.get("message", answer) if isinstance(answer, dict) else answer
            raise UserError(f"llama.cpp failed on {len(ids)} tokens with {self.path}: {message!s:.300}")
        top: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return top

    def state_bytes(self, ids: Sequence[int]) -> int:
        self._ids = list(ids)
        self._complete(self._ids, 1)
        saved: int = self._post("/slots/0?action=save", {"filename": "state"})["n_written"]
        return saved

    def encode(self, text: str) -> list[int] | None:
        asked = {"content": text, "add_special": True, "parse_special": True}
        ids: list[int] = self._post("/tokenize", asked)["tokens"]
        return ids

    def render(self, messages: Sequence[Message]) -> str | None:
        if self._template is None:
            return None  # the server would take ChatML
        said = [{"role": message.role, "content": message.content} for message in messages]
        prompt: str = self._post("/apply-template", {"messages": said})["prompt"]
        return prompt

    def _post(self, route: str, data: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._server.listening_address + route, json.dumps(data).encode(), headers)
        try:
            with _OPENER.open(request) as reply:
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read(1000).decode(errors="replace")
            raise UserError(f"llama.cpp's {route} failed with {self.path}: {reason}") from error
        return answer

    def close(self) -> None:
        del self._server
        self._saved.cleanup()
