"""A model that answers by rule, so that chains can be told beforehand."""

from collections.abc import Callable, Iterator

from plmtune.data.preferences import Prompt
from plmtune.inference.batching import Answer
from plmtune.inference.request_queue import Request
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import Message


def prompt(text: str, gold: str | None = None, **extra: object) -> Prompt:
    return Prompt((Message("user", text),), gold, f"data.jsonl, line {len(text)}", extra)


class RuleEngine:
    """Answers with what `say` makes of the prompt's text and the seed. The latest request is answered first."""

    def __init__(self, template: ChatTemplate, say: Callable[[str, int], str]) -> None:
        self.tokenizer, self.say = template.tokenizer, say
        self.waiting: list[Request] = []
        self.asked: list[str] = []

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def run(self) -> Iterator[Answer]:
        while self.waiting:
            request = self.waiting.pop()
            self.asked.append(request.key)
            text = self.say(self.tokenizer.decode(request.tokens), request.seed)
            ids = self.tokenizer.encode(text)
            kept = ids[: request.max_new_tokens]
            yield Answer(request.key, kept, ended=kept == ids)
