"""The model behind lm-eval: the numbers of a plain forward, hf's ids, and nothing computed twice."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_models import tiny_llama

from plmtune.errors import UserError
from plmtune.evaluation.language_model import LanguageModel
from plmtune.evaluation.result_cache import ResultCache
from plmtune.inference.batching import BatchedGenerator
from plmtune.inference.request_queue import Request
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.builtin_templates import CHATML_TEMPLATE
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, load_tokenizer

EXAMPLES = "Question: what is 2 and 2?\nAnswer: 4\n\nQuestion: who?\nAnswer: me\n\n"
PAIRS = [
    *((f"{EXAMPLES}Question: {question}\nAnswer:", f" {answer}") for question in "abc" for answer in ("one", "no two")),
    ("the end of a line \n ", "moves"),
    ("", "nothing is before this"),
    ("", "<|endoftext|>starts with the end"),
    ("   ", "blanks"),
    ("long " * 70, "is cut at its beginning"),
    ("<|im_start|>user\nhi<|im_end|>\n", "special tokens are themselves"),
    (f"{EXAMPLES}Question: a\nAnswer:", " one"),  # the first again
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bundled()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return made(tokenizer)


def made(tokenizer: Tokenizer, rope_theta: float = 10000.0) -> Decoder:
    return tiny_llama(
        tokenizer.vocab_size, gqa={"rope_theta": rope_theta}, hidden_dim=64, embed_dim=32, init_std=0.3
    ).eval()


@pytest.fixture
def tokens_through(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each forward."""
    counts: list[int] = []
    forward = model.forward

    def counted(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(tokens.numel())
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return counts


def asked(kind: str, *arguments: tuple[Any, ...], task: str = "a_task") -> list[Instance]:
    return [Instance(kind, {}, args, 0, (task, index, 1)) for index, args in enumerate(arguments)]


def naive(model: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = (context + continuation)[-(model.max_seq_len + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0, -len(continuation) :].log_softmax(-1)
    targets = torch.tensor(continuation)
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


class TestLogLikelihood:
    def test_equals_a_plain_forward_of_each_pair(self, model: Decoder, tokenizer: Tokenizer) -> None:
        lm = LanguageModel(model, tokenizer)
        found = lm.loglikelihood(asked("loglikelihood", *PAIRS))

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, specials=True)

        for (context, answer), score in zip(PAIRS, found, strict=True):
            whole, before = ids(context + answer), ids(context.rstrip())
            if not context:
                before, whole = ([0], [0, *whole]) if whole[0] != tokenizer.eos_id else (whole[:1], whole)
                before[0] = whole[0] = tokenizer.eos_id
            elif not before:
                before, whole = [tokenizer.eos_id], [tokenizer.eos_id, *whole]
            expected = naive(model, before, whole[len(before) :])
            assert score[0] == pytest.approx(expected[0], abs=1e-3), context
            assert score[1] is expected[1]
        assert lm.num_truncated == 1

    def test_the_likeliest_answer_is_greedy(self, model: Decoder, tokenizer: Tokenizer) -> None:
        context = "What follows?"
        with torch.no_grad():
            follows = int(model(torch.tensor([tokenizer.encode(context)]))[0, -1].argmax())
        lm = LanguageModel(model, tokenizer)
        found = lm._loglikelihood_tokens([(("", ""), tokenizer.encode(context), [i]) for i in (follows, follows - 1)])
        assert [greedy for _, greedy in found] == [True, False]

    @pytest.mark.parametrize("answer", ["", "far too long " * 40])
    def test_an_answer_that_cannot_be_scored_names_its_document(
        self, answer: str, model: Decoder, tokenizer: Tokenizer
    ) -> None:
        with pytest.raises(UserError, match=r"Task a_task, document 1: its answer has [0-9]+ tokens"):
            LanguageModel(model, tokenizer).loglikelihood(asked("loglikelihood", ("a", " b"), ("c", answer)))

    def test_nan_names_its_document_and_what_to_do(self, model: Decoder, tokenizer: Tokenizer) -> None:
        state = model.tok_embeddings.weight.detach().clone()
        (broken,) = tokenizer.encode(" table")
        with torch.no_grad():
            model.tok_embeddings.weight[broken] = float("nan")
        try:
            with pytest.raises(UserError, match=r"Task a_task, document [01]: .* not numbers .* earlier checkpoint"):
                LanguageModel(model, tokenizer).loglikelihood(asked("loglikelihood", ("a table", " b"), ("c", " d")))
        finally:
            with torch.no_grad():
                model.tok_embeddings.weight.copy_(state)


class TestRolling:
    def test_every_token_is_predicted_once_with_all_the_context_there_is(
        self, model: Decoder, tokenizer: Tokenizer
    ) -> None:
        random.seed(0)
        texts = [" ".join(random.choices(EXAMPLES.split(), k=number)) for number in (3, 60, 150)]
        found = LanguageModel(model, tokenizer).loglikelihood_rolling(
            asked("loglikelihood_rolling", ("",), *((text,) for text in texts))
        )
        expected = [0.0]
        for text in texts:
            ids = tokenizer.encode(text)
            total = naive(model, [tokenizer.eos_id], ids[: model.max_seq_len])[0]
            for start in range(model.max_seq_len, len(ids), model.max_seq_len):
                new = ids[start : start + model.max_seq_len]
                before = ids[start + len(new) - model.max_seq_len - 1 : start]
                total += naive(model, before, new)[0]
            expected.append(total)
        assert found == pytest.approx(expected, abs=1e-2)
        assert max(len(tokenizer.encode(text)) for text in texts) > 2 * model.max_seq_len


def greedy(model: Decoder, ids: list[int], count: int, end: int, num_tokens: int) -> list[int]:
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count:
            follows = int(model(torch.tensor([ids + written]))[0, -1, :num_tokens].argmax())
            if follows == end:
                break
            written.append(follows)
    return written


class TestGeneration:
    CONTEXTS = (EXAMPLES, "A", "<|im_start|>user\nhi<|im_end|>\n", "long " * 70, "")

    def test_equals_greedy_decoding_of_each_prompt(self, model: Decoder, tokenizer: Tokenizer) -> None:
        lm = LanguageModel(model, tokenizer, batch_size=3)
        found = lm.generate_until(asked("generate_until", *((text, {"max_gen_toks": 12}) for text in self.CONTEXTS)))
        for text, written in zip(self.CONTEXTS, found, strict=True):
            ids = tokenizer.encode(text, specials=True)[-(64 - 12) :] or [tokenizer.eos_id]
            expected = greedy(model, ids, 12, tokenizer.eos_id, tokenizer.num_tokens)
            held = set(tokenizer.specials.values())
            assert written == tokenizer.decode([i for i in expected if i not in held])
        assert lm.num_truncated == 1

    def test_ends_before_the_first_stop_text(self, model: Decoder, tokenizer: Tokenizer) -> None:
        lm = LanguageModel(model, tokenizer)
        (whole,) = lm.generate_until(asked("generate_until", (EXAMPLES, {"max_gen_toks": 12, "until": []})))
        stop = whole[len(whole) // 2 :][:3]
        (cut,) = lm.generate_until(asked("generate_until", (EXAMPLES, {"max_gen_toks": 12, "until": [stop, "@@@"]})))
        assert stop and cut == whole[: whole.index(stop)]

    def test_repeats_differ_and_are_the_same_in_the_next_run(self, model: Decoder, tokenizer: Tokenizer) -> None:
        settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
        (request,) = asked("generate_until", (EXAMPLES, settings))
        runs = [LanguageModel(model, tokenizer).generate_until([request] * 4) for _ in range(2)]
        assert runs[0] == runs[1]
        assert len(set(runs[0])) > 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_beams": 4}, r"num_beams=4 of its generation_kwargs is not supported; do_sample"),
            ({"do_sample": True}, "needs a temperature above 0"),
            ({"temperature": -1.0}, r"are impossible: temperature \(-1.0\) must be at least 0"),
            ({"temperature": None}, "are impossible"),
            ({"max_gen_toks": 0}, "max_gen_toks is 0: at least 1"),
            ({"until": 7}, r"are impossible: until must be texts, not \[7\]"),
        ],
    )
    def test_settings_that_cannot_be_kept_to_name_the_task(
        self, settings: dict[str, Any], message: str, model: Decoder, tokenizer: Tokenizer
    ) -> None:
        with pytest.raises(UserError, match=rf"^Task a_task, document 0: .*{message}"):
            LanguageModel(model, tokenizer).generate_until(asked("generate_until", ("a", settings)))

    @pytest.mark.parametrize(
        ("asked_for", "most", "longest"), [(1024, None, 32), (33, None, 32), (32, None, 32), (1024, 40, 40), (9, 40, 9)]
    )
    def test_answers_are_cut_at_half_of_a_short_context_or_at_what_is_asked_for(
        self, asked_for: int, most: int | None, longest: int, model: Decoder, tokenizer: Tokenizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        lengths: list[tuple[int, int]] = []
        submit = BatchedGenerator.submit

        def noted(self: BatchedGenerator, request: Request) -> None:
            lengths.append((len(request.tokens), request.max_new_tokens))
            submit(self, request)

        monkeypatch.setattr(BatchedGenerator, "submit", noted)
        told: list[str] = []
        lm = LanguageModel(model, tokenizer, max_new_tokens=most, log=told.append)
        settings = {"max_gen_toks": asked_for, "until": ["\n"]}
        lm.generate_until(asked("generate_until", ("a question " * 30, settings), ("another", settings)))
        assert {length for _, length in lengths} == {longest}
        assert max(prompt for prompt, _ in lengths) == 64 - longest
        assert len(told) == (most is None and asked_for > 32)
        assert all("a_task: its answers may have" in line and "context has 64" in line for line in told)

    def test_settings_that_change_nothing_are_taken(self, model: Decoder, tokenizer: Tokenizer) -> None:
        idle = {"num_beams": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 3, "until": "\n"}
        lm = LanguageModel(model, tokenizer)
        found = lm.generate_until(asked("generate_until", ("a", idle), ("a", {"max_gen_toks": 3, "until": ["\n"]})))
        assert found[0] == found[1]


class Killed(BaseException):
    """What a signal looks like from inside."""


def killed_after(calls: int) -> Callable[[str, int, int], None]:
    left = [calls]

    def progress(kind: str, done: int, total: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return progress


class TestGoingOn:
    @pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
    def test_killed_anywhere_it_ends_with_the_same_and_computes_nothing_twice(
        self, kind: str, model: Decoder, tokenizer: Tokenizer, tokens_through: list[int], tmp_path: Path
    ) -> None:
        if kind == "loglikelihood":
            requests = asked(kind, *PAIRS)
        else:
            requests = asked(kind, *((f"Say {i}" * (i % 5 + 1), {"max_gen_toks": 3 + i}) for i in range(9)))

        def run(cache: ResultCache | None, progress: Callable[[str, int, int], None]) -> Any:
            lm = LanguageModel(model, tokenizer, batch_size=1, cache=cache, digest="weights", progress=progress)
            return getattr(lm, kind)(requests)

        told: list[tuple[str, int, int]] = []
        expected = run(None, lambda *about: told.append(about))
        whole = sum(tokens_through)
        tokens_through.clear()
        assert len(told) > 3
        kills = len(told) - 1
        for _ in range(kills):
            with ResultCache(tmp_path / "cache") as cache, pytest.raises(Killed):
                run(cache, killed_after(1))
            before = sum(tokens_through)
        with ResultCache(tmp_path / "cache") as cache:
            found = run(cache, lambda *about: told.append(about))
            assert sum(tokens_through) == before
            again = run(cache, lambda *about: None)
        assert kills > 2
        assert found == expected == again
        if kind == "loglikelihood":
            # Batches are those of the run that was not killed.
            assert before == whole

    def test_other_weights_get_other_answers(self, model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with ResultCache(tmp_path / "cache") as cache:
            for digest, known in (("a", 0), ("b", 0), ("a", 1)):
                lm = LanguageModel(model, tokenizer, cache=cache, digest=digest)
                lm.loglikelihood(asked("loglikelihood", ("a", " b")))
                assert lm.num_known == known

    def test_the_same_weights_under_another_config_get_other_answers(
        self, tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        with ResultCache(tmp_path / "cache") as cache:
            for theta, known in ((10000.0, 0), (500.0, 0), (10000.0, 1)):
                lm = LanguageModel(made(tokenizer, theta), tokenizer, cache=cache, digest="weights")
                lm.loglikelihood(asked("loglikelihood", ("a", " b")))
                assert lm.num_known == known

    def test_a_cache_without_a_digest_is_refused(self, model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with ResultCache(tmp_path / "cache") as cache, pytest.raises(ValueError, match="needs a digest"):
            LanguageModel(model, tokenizer, cache=cache)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "The answer is "},
]
TRIMS = "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
TRIMS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TRIMS


class TestChat:
    @pytest.mark.parametrize("source", [CHATML_TEMPLATE, TRIMS, REFUSES])
    @pytest.mark.parametrize("goes_on", [False, True])
    def test_equals_transformers(self, source: str, goes_on: bool, model: Decoder, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        held = bundled()
        tokenizer = Tokenizer(held.vocabulary, eos=held.eos, chat_template=source)
        tokenizer.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        chat = CHAT if goes_on else CHAT[:2]
        accepted = chat[1:] if source == REFUSES else chat
        expected = theirs.apply_chat_template(
            accepted, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
        lm = LanguageModel(model, tokenizer, template=find_template(None, tokenizer))
        found = lm.apply_chat_template(chat, add_generation_prompt=not goes_on)
        assert found == expected
        assert lm.tok_encode(found) == theirs.encode(expected)

    def test_an_answer_ends_with_its_turn(
        self, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = tokenizer.encode("Paris<|im_end|>\nAnd of", specials=True)
        monkeypatch.setattr(
            BatchedGenerator, "_draw", lambda self, states, draws: [written[len(so_far)] for _, so_far in draws]
        )
        template = ChatTemplate(CHATML_TEMPLATE, tokenizer, "The template")
        question = ("The capital?", {"until": [], "max_gen_toks": len(written)})
        assert LanguageModel(model, tokenizer, template=template).generate_until(asked("generate_until", question)) == [
            "Paris"
        ]
        assert LanguageModel(model, tokenizer).generate_until(asked("generate_until", question)) == ["Paris\nAnd of"]

    def test_a_refused_conversation_is_a_sentence(self, model: Decoder, tokenizer: Tokenizer) -> None:
        source = CHATML_TEMPLATE + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
        lm = LanguageModel(model, tokenizer, template=ChatTemplate(source, tokenizer, "The template"))
        with pytest.raises(UserError, match=r"The template cannot put a question: the conversation .*too long"):
            lm.apply_chat_template([*CHAT[1:], *CHAT[1:]])

    def test_without_a_template_a_chat_is_refused(self, model: Decoder, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="has no chat template"):
            LanguageModel(model, tokenizer).apply_chat_template(CHAT)
        assert LanguageModel(model, tokenizer).chat_template(True) is None


class TestBeginning:
    @pytest.mark.parametrize("adds_bos", [False, True])
    @pytest.mark.parametrize("text", ["a text", "<|im_start|>user", ""])
    @pytest.mark.parametrize("add_special_tokens", [None, False, True])
    def test_ids_are_those_of_hf(
        self, adds_bos: bool, text: str, add_special_tokens: bool | None, model: Decoder, tmp_path: Path
    ) -> None:
        transformers = pytest.importorskip("transformers")
        held = bundled()
        Tokenizer(held.vocabulary, eos=held.eos, bos="<|im_start|>", adds_bos=adds_bos).save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        lm = LanguageModel(model, load_tokenizer(tmp_path))
        # Where a caller asks for it `hf` puts it before a text that has it, too; ours stands there exactly once.
        put = add_special_tokens is not False and not text.startswith("<|im_start|>")
        assert lm.tok_encode(text, add_special_tokens) == theirs.encode(text, add_special_tokens=put)
        # lm-eval's `hf` takes bos where the tokenizer only has one, too; ours begins every text by one rule.
        assert lm.prefix_token_id == (theirs.bos_token_id if adds_bos else theirs.eos_token_id)
        assert lm.eot_token_id == theirs.eos_token_id

    def test_without_one_a_text_is_preceded_by_the_end(self, model: Decoder, tokenizer: Tokenizer) -> None:
        assert LanguageModel(model, tokenizer).prefix_token_id == tokenizer.eos_id


class TestSpread:
    def test_alone_it_has_what_it_gave(self, model: Decoder, tokenizer: Tokenizer) -> None:
        lm = LanguageModel(model, tokenizer)
        assert (lm.rank, lm.world_size, lm.device) == (0, 1, torch.device("cpu"))
        assert lm.all_gather(torch.tensor(3)).tolist() == 3
        assert lm.gather_object("x") == ["x"]
        lm.barrier()
