"""Continuous batching: the answers of requests that share a batch are those they would get alone."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from plmtune.continuous import Answer, Engine, Request, _exponential
from plmtune.generation import generate
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def small_plm() -> Decoder:
    torch.manual_seed(0)
    return plm(
        101,
        attention=component(
            "attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
        ),
        ffn=component("ffn", "squared_relu", hidden_dim=96),
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        max_seq_len=64,
        init_std=0.15,
    )


def small_llama() -> Decoder:
    torch.manual_seed(0)
    return llama(
        101,
        attention=component("attention", "gqa", num_kv_heads=2),
        ffn=component("ffn", "swiglu", hidden_dim=96),
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        max_seq_len=64,
        init_std=0.15,
    )


MODELS = {"plm": small_plm, "llama": small_llama}


def requests() -> list[Request]:
    """A dozen prompts of 1 to 40 tokens, answers of 1 to 20."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 40, 1, 7, 25, 12, 2, 33, 18, 5, 9, 28)
    prompts = [torch.randint(101, (length,), generator=generator).tolist() for length in lengths]
    return [Request(f"q{i}", prompt, 1 + 7 * i % 20, seed=i) for i, prompt in enumerate(prompts)]


def answers(engine: Engine, wanted: Iterable[Request]) -> dict[str, Answer]:
    for request in wanted:
        engine.submit(request)
    return {answer.key: answer for answer in engine.run()}


def alone(model: Decoder, request: Request, end_ids: frozenset[int] = frozenset()) -> Answer:
    """The likeliest answer, written by `generate`."""
    prompt = torch.tensor([request.tokens])
    columns = generate(model, prompt, max_new_tokens=request.max_new_tokens, temperature=0)
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
        found = answers(Engine(model, batch_size=batch_size, temperature=0), requests())
        assert found == {request.key: alone(model, request) for request in requests()}

    def test_each_ends_at_its_own_end_and_ids_after_it_are_not_read(self, make: Callable[[], Decoder]) -> None:
        model = make()
        ends = frozenset(alone(model, request).tokens[-1] for request in requests()[4:8])
        found = answers(Engine(model, batch_size=4, temperature=0, end_ids=ends), requests())
        assert found == {request.key: alone(model, request, ends) for request in requests()}
        assert {answer.ended for answer in found.values()} == {True, False}

    def test_a_slot_shows_nothing_of_who_had_it_before(self, make: Callable[[], Decoder]) -> None:
        model = make()
        engine = Engine(model, batch_size=2, temperature=0)
        last = Request("last", [5, 6, 7], 20)
        found = answers(engine, [Request(f"long{i}", [i] * 40, 20) for i in range(5)] + [last])
        assert found["last"] == alone(model, last)

    def test_memory_that_was_never_written_shows_nowhere(
        self, make: Callable[[], Decoder], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make()
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
        found = answers(Engine(model, batch_size=3, temperature=0), requests()[:3])
        monkeypatch.undo()
        assert found == {request.key: alone(model, request) for request in requests()[:3]}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestSampling:
    @pytest.mark.parametrize("cut", [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}])
    def test_neither_batch_size_nor_order_changes_an_answer(self, make: Callable[[], Decoder], cut: dict) -> None:
        model = make()
        first = answers(Engine(model, batch_size=1, **cut), requests())
        assert answers(Engine(model, batch_size=5, **cut), reversed(requests())) == first
        assert answers(Engine(model, batch_size=16, **cut), requests()[::2])["q4"] == first["q4"]

    def test_the_seed_decides(self, make: Callable[[], Decoder]) -> None:
        model = make()
        found = answers(Engine(model, batch_size=4), [Request(str(i), [1, 2, 3], 15, seed=i // 2) for i in range(4)])
        assert found["0"].tokens == found["1"].tokens
        assert found["2"].tokens == found["3"].tokens
        assert found["0"].tokens != found["2"].tokens


class TestRun:
    def test_what_is_submitted_while_running_is_answered(self) -> None:
        model = small_plm()
        engine = Engine(model, batch_size=3, temperature=0)
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
        engine = Engine(small_plm(), batch_size=2, temperature=0)
        for key, new in (("long", 30), ("a", 3), ("b", 3), ("c", 3)):
            engine.submit(Request(key, [1, 2], new))
        order = [answer.key for answer in engine.run()]
        assert order == ["a", "b", "c", "long"]

    def test_goes_on_after_an_interrupt_as_if_there_had_been_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small_plm()
        expected = answers(Engine(model, batch_size=3), requests())
        engine = Engine(model, batch_size=3)
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
        engine = Engine(model, batch_size=3)
        for request in requests():
            engine.submit(request)
        found = [next(engine.run()) for _ in requests()]
        assert {answer.key: answer for answer in found} == answers(Engine(model, batch_size=3), requests())
        assert list(engine.run()) == []

    def test_a_model_in_training_answers_as_in_evaluation_and_stays_in_training(self) -> None:
        model = small_plm().eval()
        expected = answers(Engine(model, batch_size=3), requests()[:3])
        layer: Any = model.layers[0]
        layer.ffn = torch.nn.Sequential(layer.ffn, torch.nn.Dropout(0.5))
        model.train()
        assert answers(Engine(model, batch_size=3), requests()[:3]) == expected
        assert model.training

    def test_an_answer_goes_no_further_than_the_model(self) -> None:
        found = answers(Engine(small_plm(), batch_size=1), [Request("a", [1] * 60, 1000)])
        assert len(found["a"].tokens) == 4
        assert not found["a"].ended

    def test_ids_without_text_are_never_drawn(self) -> None:
        model = small_plm()
        with torch.no_grad():
            model.tok_embeddings.weight[90:] *= 100
        for temperature in (0, 1):
            engine = Engine(model, batch_size=4, temperature=temperature, num_tokens=90)
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
        ],
    )
    def test_a_request_that_cannot_be_answered_is_refused_at_once(self, request_: Request, message: str) -> None:
        engine = Engine(small_plm(), batch_size=1)
        with pytest.raises(ValueError, match=message):
            engine.submit(request_)
        assert list(engine.run()) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
            ({"batch_size": 1, "temperature": -1.0}, "temperature must not be negative, but is -1"),
            ({"batch_size": 1, "top_p": 0.0}, "top_p must be above 0 and at most 1, not 0"),
        ],
    )
    def test_impossible_settings_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Engine(small_plm(), **options)


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
