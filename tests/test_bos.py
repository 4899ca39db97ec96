"""One rule for every path: where a tokenizer adds bos, what the model reads begins with it once; else it has none."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from plmtune.data.preferences import Pair
from plmtune.data.prepare import prepare
from plmtune.data.shards import Shards
from plmtune.data.text_files import files
from plmtune.evaluation.language_model import LanguageModel
from plmtune.evaluation.perplexity import perplexity
from plmtune.inference.batching import BatchedGenerator
from plmtune.inference.chat_session import ChatSession
from plmtune.inference.sampling import complete
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.preference.comparisons import make_comparisons
from plmtune.tokenizers.bpe import BYTE_PATTERN, SINGLE_BYTES, from_ranks
from plmtune.tokenizers.builtin_templates import NAMED
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer import Tokenizer

SPECIALS = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]
EOS, BOS = 256, 257
WRITES_BOS = "{{ bos_token }}" + NAMED["chatml"]
CHAT = (Message("user", "a question"), Message("assistant", "an answer"))


def made(adds_bos: bool) -> Tokenizer:
    ranks = {token: rank for rank, token in enumerate(SINGLE_BYTES)}
    return Tokenizer(from_ranks(ranks, BYTE_PATTERN, None, SPECIALS, "bytes"), bos="<s>", adds_bos=adds_bos)


@pytest.fixture(params=[False, True], ids=["adds none", "adds bos"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return llama(260, embed_dim=24, num_layers=1, num_heads=3, max_seq_len=256).eval()


@pytest.fixture
def read(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Every sequence that the model begins to read."""
    rows: list[list[int]] = []
    forward = Decoder.forward

    def recorded(self, tokens, **options):  # type: ignore[no-untyped-def]
        cache = options.get("cache")
        if cache is None or not getattr(cache, "length", 0):
            rows.extend(tokens.tolist())
        return forward(self, tokens, **options)

    monkeypatch.setattr(Decoder, "forward", recorded)
    yield rows


def follows_the_rule(rows: list[list[int]], tokenizer: Tokenizer, *, written: bool = False) -> None:
    """Check sequences; `written`: a chat template writes bos itself."""
    assert rows
    for row in rows:
        begins = tokenizer.adds_bos or written
        assert (row[0] == BOS, row.count(BOS)) == (begins, int(begins)), row


@pytest.mark.parametrize("prompt", ["a text", "", "<s>a text"])
def test_generation(model: Decoder, tokenizer: Tokenizer, read: list[list[int]], prompt: str) -> None:
    list(complete(model, tokenizer, prompt, max_new_tokens=1))
    follows_the_rule(read, tokenizer, written=prompt.startswith("<s>"))


@pytest.mark.parametrize("source", [NAMED["chatml"], WRITES_BOS], ids=["plain", "writes bos"])
def test_chat_and_fine_tuning(model: Decoder, tokenizer: Tokenizer, read: list[list[int]], source: str) -> None:
    template = ChatTemplate(source, tokenizer, "The template")
    list(ChatSession(model, tokenizer, template).ask("a question", max_new_tokens=1))
    ids, trained = template.encode(CHAT)
    asked = template.encode_prompt(CHAT[:1])
    pair = Pair(CHAT[:1], "an answer", "another", "here", {})
    (comparison,), _, _ = make_comparisons([pair], template, None, seq_len=200, contexts=False, mismatched=False)
    rows = [*read, ids.tolist(), asked.tolist(), comparison.prompt.tolist()]
    follows_the_rule(rows, tokenizer, written=source is WRITES_BOS)
    assert rows[0] == rows[2] == rows[3] == ids[: len(asked)].tolist()
    assert len(ids) == len(trained) and not trained[: len(asked)].any()


@pytest.mark.parametrize("context", ["a context", "", "<s>a context"])
@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_evaluation(
    model: Decoder,
    tokenizer: Tokenizer,
    read: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    context: str,
) -> None:
    if kind == "loglikelihood_rolling" and context in ("", "<s>a context" * (not tokenizer.adds_bos)):
        return  # there is nothing to score, or bos is a token of the document
    prompts: list[list[int]] = []
    submit = BatchedGenerator.submit
    monkeypatch.setattr(BatchedGenerator, "submit", lambda self, r: prompts.append(list(r.tokens)) or submit(self, r))
    arguments = {
        "loglikelihood": (context, " and more"),
        "loglikelihood_rolling": (context,),
        "generate_until": (context, {"until": ["x"], "max_gen_toks": 2}),
    }[kind]
    instance = Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))
    getattr(LanguageModel(model, tokenizer), kind)([instance])
    rows = prompts or [row for row in read if len(row) > 1]
    follows_the_rule(rows, tokenizer, written=context.startswith("<s>"))


def test_evaluation_in_a_chat(model: Decoder, tokenizer: Tokenizer) -> None:
    for source in (NAMED["chatml"], WRITES_BOS):
        template = ChatTemplate(source, tokenizer, "The template")
        lm = LanguageModel(model, tokenizer, template=template)
        ids = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": "a question"}]))
        assert ids == template.encode_prompt(CHAT[:1]).tolist()


def test_perplexity(model: Decoder, tokenizer: Tokenizer, read: list[list[int]]) -> None:
    perplexity(model, tokenizer, ["a text", "another"])
    follows_the_rule(read, tokenizer)


def test_pretraining_documents(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmtune.data.prepare.GROUP", 8)  # a document in several pieces
    texts = ["one document\nof two lines", "another", "<s>", "a third"]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    source = files((str(tmp_path / "text.txt"),), separator="\n\n")
    directory = prepare(source, tokenizer, tmp_path / "shards", holdout=0)
    shards = Shards.open(directory, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
    ids = np.asarray(shards.train.read(0, shards.train.num_tokens)).tolist()
    documents, held = [], []
    for token in ids:
        if token == EOS:
            documents, held = [*documents, held], []
        else:
            held = [*held, token]
    assert not held
    follows_the_rule(documents, tokenizer)
    assert [bytes(document[tokenizer.adds_bos :]).decode() for document in documents] == texts


def test_shards_of_a_tokenizer_that_adds_none_are_not_those_of_one_that_does(tmp_path: Path) -> None:
    assert made(False).fingerprint != made(True).fingerprint
