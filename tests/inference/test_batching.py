"""Continuous batching: the answers of requests that share a batch are those they would get alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_plm

from plmtune.errors import LogitsNotFinite
from plmtune.inference import request_queue
from plmtune.inference.batching import Answer, BatchedGenerator, _exponential
from plmtune.inference.request_queue import Request
from plmtune.inference.sampling import generate
from plmtune.modules.decoder import Decoder


def small_plm() -> Decoder:
    return tiny_plm(101)


def small_llama() -> Decoder:
    return tiny_llama(101)


MODELS = {"plm": small_plm, "llama": small_llama}


def requests() -> list[Request]:
    """A dozen prompts of 1 to 40 tokens, answers of 1 to 20."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 40, 1, 7, 25, 12, 2, 33, 18, 5, 9, 28)
    prompts = [torch.randint(101, (length,), generator=generator).tolist() for length in lengths]
    return [Request(f"q{i}", prompt, 1 + 7 * i % 20, seed=i) for i, prompt in enumerate(prompts)]


def answers(engine: BatchedGenerator, wanted: Iterable[Request]) -> dict[str, Answer]:
    for request in wanted:
        engine.submit(request)
    return {answer.key: answer for answer in engine.run()}


def alone(model: Decoder, request: Request, end_ids: frozenset[int] = frozenset(), **options: float) -> Answer:
    """The likeliest answer, written by `generate`."""
    prompt = torch.tensor([request.tokens])
    columns = generate(model, prompt, max_new_tokens=request.max_new_tokens, temperature=0, **options)
    written: list[int] = []
    for column in columns:
        if int(column) in end_ids:
            return Answer(request.key, written, True)
        written.append(int(column))
    return Answer(request.key, written, False)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestGreedy:
    @pytest.mark.parametrize("batch_size", [1, 3, 16])
    def test_answers_are_those_of_one_at_a_time(self, make: Callable[[], Decoder], batch_size: int) -> None:
        model = make()
        found = answers(BatchedGenerator(model, batch_size=batch_size, temperature=0), requests())
        assert found == {request.key: alone(model, request) for request in requests()}

    def test_each_ends_at_its_own_end_and_ids_after_it_are_not_read(self, make: Callable[[], Decoder]) -> None:
        model = make()
        ends = frozenset(alone(model, request).tokens[-1] for request in requests()[4:8])
        found = answers(BatchedGenerator(model, batch_size=4, temperature=0, end_ids=ends), requests())
        assert found == {request.key: alone(model, request, ends) for request in requests()}
        assert {answer.ended for answer in found.values()} == {True, False}

    def test_a_slot_shows_nothing_of_who_had_it_before(self, make: Callable[[], Decoder]) -> None:
        model = make()
        engine = BatchedGenerator(model, batch_size=2, temperature=0)
        last = Request("last", [5, 6, 7], 20)
        found = answers(engine, [Request(f"long{i}", [i] * 40, 20) for i in range(5)] + [last])
        assert found["last"] == alone(model, last)

    def test_memory_that_was_never_written_shows_nowhere(
        self, make: Callable[[], Decoder], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make()
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
        found = answers(BatchedGenerator(model, batch_size=3, temperature=0), requests()[:3])
        monkeypatch.undo()
        assert found == {request.key: alone(model, request) for request in requests()[:3]}


class TestAutocast:
    @pytest.mark.parametrize("name", MODELS)
    def test_a_model_under_training_in_bf16_writes_answers_too(self, name: str) -> None:
        # Weights and cache are fp32, what is to be kept is bf16.
        engine = BatchedGenerator(MODELS[name](), batch_size=4, temperature=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = answers(engine, requests())
        assert {key: len(answer.tokens) for key, answer in found.items()} == {
            request.key: request.max_new_tokens for request in requests()
        }


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestSampling:
    def test_a_repetition_penalty_is_that_of_one_prompt_alone(self, make: Callable[[], Decoder]) -> None:
        model = make()
        found = answers(BatchedGenerator(model, batch_size=4, temperature=0, repetition_penalty=3.0), requests())
        assert found == {request.key: alone(model, request, repetition_penalty=3.0) for request in requests()}
        assert found != answers(BatchedGenerator(model, batch_size=4, temperature=0), requests())

    @pytest.mark.parametrize(
        "cut",
        [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}, {"min_p": 0.2, "repetition_penalty": 1.2}],
    )
    def test_neither_batch_size_nor_order_changes_an_answer(self, make: Callable[[], Decoder], cut: dict) -> None:
        model = make()
        first = answers(BatchedGenerator(model, batch_size=1, **cut), requests())
        assert answers(BatchedGenerator(model, batch_size=5, **cut), reversed(requests())) == first
        assert answers(BatchedGenerator(model, batch_size=16, **cut), requests()[::2])["q4"] == first["q4"]

    def test_the_seed_decides(self, make: Callable[[], Decoder]) -> None:
        model = make()
        found = answers(
            BatchedGenerator(model, batch_size=4), [Request(str(i), [1, 2, 3], 15, seed=i // 2) for i in range(4)]
        )
        assert found["0"].tokens == found["1"].tokens
        assert found["2"].tokens == found["3"].tokens
        assert found["0"].tokens != found["2"].tokens


def letters(ids: Sequence[int]) -> bytes:
    """Ids as text: pieces of one to three bytes, of which the first is a letter."""
    return b"".join(bytes([97 + i % 26, *b"\xe4\xbd"[: i // 26 % 3]]) for i in ids)


def stopping(model: Decoder, **options: Any) -> BatchedGenerator:
    return BatchedGenerator(model, batch_size=4, temperature=0, decode_bytes=letters, **options)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestUntil:
    def test_an_answer_ends_with_the_token_that_completes_a_stop(self, make: Callable[[], Decoder]) -> None:
        model = make()
        wanted = {request.key: request for request in requests() if request.max_new_tokens >= 8}
        wholes = {key: alone(model, request).tokens for key, request in wanted.items()}
        for begin, end in ((0, 3), (4, 8)):
            # Begins in the middle of its first token where that has several bytes.
            stops = {key: letters(whole[begin:end])[-(end - begin) :] for key, whole in wholes.items()}
            asked = [
                Request(key, wanted[key].tokens, wanted[key].max_new_tokens, until=(b"never", stop))
                for key, stop in stops.items()
            ]
            found = answers(stopping(model), asked)
            for key, whole in wholes.items():
                first = next(n for n in range(1, len(whole) + 1) if stops[key] in letters(whole[:n]))
                assert found[key] == Answer(key, whole[:first], False, stopped=True)
                assert found[key].finish_reason == "stop"

    def test_what_the_prompt_ends_in_is_no_part_of_a_stop(self, make: Callable[[], Decoder]) -> None:
        model = make()
        request = requests()[1]
        whole = alone(model, request).tokens
        stop = letters([request.tokens[-1], whole[0]])
        assert stop not in letters(whole)
        until = Request("a", request.tokens, request.max_new_tokens, until=(stop,))
        assert answers(stopping(model), [until])["a"] == Answer("a", whole, False)


class TestWhy:
    def test_an_end_a_stop_and_neither_are_told_apart(self) -> None:
        model = small_plm()
        request = requests()[2]
        whole = alone(model, Request("a", request.tokens, 12)).tokens
        asked = [Request("a", request.tokens, 12)]
        ended = answers(stopping(model, end_ids={whole[5]}), asked)["a"]
        cut = answers(stopping(model), asked)["a"]
        assert cut.finish_reason == "length"
        assert cut.tokens == whole
        assert ended.finish_reason == "end"
        assert ended.tokens == whole[: whole.index(whole[5])]

    def test_a_stop_that_comes_with_the_last_token_is_one(self) -> None:
        model = small_plm()
        whole = alone(model, Request("a", [7], 6)).tokens
        found = answers(stopping(model), [Request("a", [7], 6, until=(letters(whole),))])
        assert found["a"] == Answer("a", whole, False, stopped=True)


@pytest.fixture
def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens a row) of each forward."""
    shapes: list[tuple[int, int]] = []
    forward = Decoder.forward

    def counted(model: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append((tokens.shape[0], tokens.shape[1]))
        return forward(model, tokens, **options)

    monkeypatch.setattr(Decoder, "forward", counted)
    return shapes


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestSharedPrefixes:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(request_queue, "_MIN_SHARED", 8)
        monkeypatch.setattr(request_queue, "_MIN_SAVED", 20)

    def test_are_read_once_and_change_no_answer(
        self, make: Callable[[], Decoder], tokens_read: list[tuple[int, int]]
    ) -> None:
        model = make()
        examples = list(range(20, 50))
        alike = [Request(f"s{i}", [*examples, *request.tokens[:9]], 8) for i, request in enumerate(requests())]
        expected = {request.key: alone(model, request) for request in [*alike, *requests()]}
        tokens_read.clear()
        assert answers(BatchedGenerator(model, batch_size=4, temperature=0), [*requests(), *alike]) == expected
        longer = [shape for shape in tokens_read if shape[1] > 1]
        assert longer.count((1, 30)) == 1
        # All else is what follows the examples, at most 9 tokens, and the dozen others.
        others = sum(len(request.tokens) for request in requests())
        assert sum(rows * tokens for rows, tokens in longer) <= 1.15 * (30 + 12 * 9 + others)

    def test_of_a_prefix_inside_a_prefix_each_is_read_once(
        self, make: Callable[[], Decoder], tokens_read: list[tuple[int, int]]
    ) -> None:
        model = make()
        shots = [Request(f"{i}/{j}", [*range(20), *[50 + i] * 12, i, j], 3) for i in range(4) for j in range(5)]
        expected = {request.key: alone(model, request) for request in shots}
        tokens_read.clear()
        assert answers(BatchedGenerator(model, batch_size=5, temperature=0), shots) == expected
        stems = [tokens for rows, tokens in tokens_read if rows == 1 and tokens > 2]
        assert stems == [20, 13, 13, 13, 13]

    def test_a_prompt_that_is_asked_again_is_read_once_and_drawn_by_each_seed(
        self, make: Callable[[], Decoder], tokens_read: list[tuple[int, int]]
    ) -> None:
        model = make()
        prompt = list(range(40))
        again = [Request(f"{i}", prompt, 10, seed=i) for i in range(8)]
        expected = {
            request.key: answers(BatchedGenerator(model, batch_size=1), [request])[request.key] for request in again
        }
        assert len({tuple(answer.tokens) for answer in expected.values()}) == 8
        tokens_read.clear()
        assert answers(BatchedGenerator(model, batch_size=3), again) == expected
        assert [shape for shape in tokens_read if shape[1] > 1] == [(1, 39)]
        # The prompt's last token is read with the step that writes the first of the answer.
        assert sum(rows for rows, tokens in tokens_read if tokens == 1) == 8 * 10

    def test_prompts_of_which_one_begins_the_other(self, make: Callable[[], Decoder]) -> None:
        model = make()
        nested = [Request(f"{i}", list(range(i)), 5) for i in (40, 12, 13, 40, 39, 1, 12)]
        found = answers(BatchedGenerator(model, batch_size=2, temperature=0), nested)
        assert found == {request.key: alone(model, request) for request in nested}

    def test_an_interrupt_while_they_are_read_leaves_nothing_half_done(
        self, make: Callable[[], Decoder], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make()
        shots = [Request(f"{i}", [*range(20), *[50 + i // 3] * 12, i], 3) for i in range(9)]
        expected = {request.key: alone(model, request) for request in shots}
        calls = 0
        forward = Decoder.forward

        def every_other(model: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            states = forward(model, tokens, **options)
            if calls % 2:
                raise KeyboardInterrupt
            return states

        monkeypatch.setattr(Decoder, "forward", every_other)
        engine = BatchedGenerator(model, batch_size=4, temperature=0)
        for request in shots:
            engine.submit(request)
        found = {}
        for _ in range(100):
            try:
                for answer in engine.run():
                    found[answer.key] = answer
                break
            except KeyboardInterrupt:
                continue
        assert found == expected


class TestNotFinite:
    @pytest.mark.parametrize("temperature", [0, 1])
    def test_numbers_that_are_none_name_the_request(self, temperature: float) -> None:
        model = small_plm()
        with torch.no_grad():
            model.tok_embeddings.weight[77] = float("nan")
            model.tok_embeddings.weight[78] = float("nan")
        engine = BatchedGenerator(model, batch_size=3, temperature=temperature, num_tokens=70)
        with pytest.raises(LogitsNotFinite, match="item bad: the model gives numbers that are NaN") as caught:
            answers(engine, [Request("good", [1, 2], 3), Request("bad", [5, 77], 3), Request("fine", [3, 4], 3)])
        assert caught.value.item == "bad"


class TestRun:
    def test_what_is_submitted_while_running_is_answered(self) -> None:
        model = small_plm()
        engine = BatchedGenerator(model, batch_size=3, temperature=0)
        for request in requests()[:5]:
            engine.submit(request)
        turns = {}
        for answer in engine.run():
            turns[answer.key] = answer
            if not answer.key.endswith("+"):
                prompt = next(request.tokens for request in requests() if request.key == answer.key)
                engine.submit(Request(answer.key + "+", [*prompt[-10:], *answer.tokens], 6))
        assert len(turns) == 10
        for request in requests()[:5]:
            follow = Request(request.key + "+", [*request.tokens[-10:], *turns[request.key].tokens], 6)
            assert turns[follow.key] == alone(model, follow)

    def test_answers_come_as_they_end_and_a_waiting_prompt_takes_the_place(self) -> None:
        engine = BatchedGenerator(small_plm(), batch_size=2, temperature=0)
        for key, new in (("long", 30), ("a", 3), ("b", 3), ("c", 3)):
            engine.submit(Request(key, [1, 2], new))
        order = [answer.key for answer in engine.run()]
        assert order == ["a", "b", "c", "long"]

    def test_goes_on_after_an_interrupt_as_if_there_had_been_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small_plm()
        expected = answers(BatchedGenerator(model, batch_size=3), requests())
        engine = BatchedGenerator(model, batch_size=3)
        for request in requests():
            engine.submit(request)
        found: dict[str, Answer] = {}
        interrupts = 0
        calls = 0
        real = model.layers[1].forward

        def forward(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 4 == 0:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(model.layers[1], "forward", forward)
        while len(found) < len(expected):
            try:
                for answer in engine.run():
                    assert answer.key not in found
                    found[answer.key] = answer
            except KeyboardInterrupt:
                interrupts += 1
        assert found == expected
        assert interrupts > 5

    def test_a_consumer_that_stops_reading_can_read_on(self) -> None:
        model = small_plm()
        engine = BatchedGenerator(model, batch_size=3)
        for request in requests():
            engine.submit(request)
        found = [next(engine.run()) for _ in requests()]
        assert {answer.key: answer for answer in found} == answers(BatchedGenerator(model, batch_size=3), requests())
        assert list(engine.run()) == []

    def test_a_model_in_training_answers_as_in_evaluation_and_stays_in_training(self) -> None:
        model = small_plm().eval()
        expected = answers(BatchedGenerator(model, batch_size=3), requests()[:3])
        layer: Any = model.layers[0]
        layer.ffn = torch.nn.Sequential(layer.ffn, torch.nn.Dropout(0.5))
        model.train()
        assert answers(BatchedGenerator(model, batch_size=3), requests()[:3]) == expected
        assert model.training

    def test_an_answer_goes_no_further_than_the_model(self) -> None:
        found = answers(BatchedGenerator(small_plm(), batch_size=1), [Request("a", [1] * 60, 1000)])
        assert len(found["a"].tokens) == 4
        assert not found["a"].ended

    def test_ids_without_text_are_never_drawn(self) -> None:
        model = small_plm()
        with torch.no_grad():
            model.tok_embeddings.weight[90:] *= 100
        for temperature in (0, 1):
            engine = BatchedGenerator(model, batch_size=4, temperature=temperature, num_tokens=90)
            found = answers(engine, requests())
            assert max(max(answer.tokens) for answer in found.values()) < 90


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (Request("a", [], 5), "request a: the prompt is empty"),
            (Request("b", [1] * 64, 5), r"request b: the prompt has 64 tokens, the model's max_seq_len is 64"),
            (Request("c", [1], 0), "request c: max_new_tokens must be at least 1, not 0"),
            (Request("d", [1, 101], 1), "request d: the prompt has id 101, the model's vocabulary has 101"),
            (Request("e", [1, -1], 1), "request e: the prompt has id -1, the model's vocabulary has 101"),
            (Request("f", [1], 1, until=(b"a", b"")), "request f: one of until is empty"),
            (Request("g", [1], 1, until=(b"a",)), "request g: until needs an engine with decode_bytes"),
        ],
    )
    def test_a_request_that_cannot_be_answered_is_refused_at_once(self, request_: Request, message: str) -> None:
        engine = BatchedGenerator(small_plm(), batch_size=1)
        with pytest.raises(ValueError, match=message):
            engine.submit(request_)
        assert list(engine.run()) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
            ({"batch_size": 1, "temperature": -1.0}, r"temperature \(-1.0\) must be at least 0"),
            ({"batch_size": 1, "top_p": 0.0}, r"top_p \(0.0\) must be above 0 and at most 1"),
            ({"batch_size": 1, "min_p": 2.0}, r"min_p \(2.0\) must be at least 0 and at most 1"),
            ({"batch_size": 1, "repetition_penalty": 0.0}, r"repetition_penalty \(0.0\) must be above 0"),
        ],
    )
    def test_impossible_settings_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BatchedGenerator(small_plm(), **options)


class TestDraws:
    def test_come_as_often_as_their_probability_says(self) -> None:
        # Columns far apart in probability: the rare ones are decided by the smallest numbers.
        probability = torch.tensor([0.6, 0.3, 0.09, 0.009, 0.001])
        n = 200_000
        numbers = torch.cat([_exponential([(seed, 0)], n * 5, torch.device("cpu")) for seed in (1, 2)]).view(-1, 5)
        drawn = (probability / numbers).argmax(-1).bincount(minlength=5) / (2 * n)
        error = (probability * (1 - probability) / (2 * n)).sqrt()
        assert ((drawn - probability).abs() < 4 * error).all()

    def test_are_exponential_and_not_correlated_between_seeds_numbers_and_columns(self) -> None:
        keys = [(0, 0), (0, 1), (1, 0), (2**63, 0)]
        x = _exponential(keys, 100_000, torch.device("cpu")).double()
        assert torch.allclose(x.mean(1), torch.ones(4).double(), atol=0.013)
        assert torch.allclose(x.var(1), torch.ones(4).double(), atol=0.04)
        assert (torch.corrcoef(torch.cat((x[:, 1:], x[:1, :-1]))) - torch.eye(5)).abs().max() < 0.013
        assert x.min() > 0
        assert x.isfinite().all()
