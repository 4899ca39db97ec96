"""Log-probabilities of many items are those of each alone, and what they share is computed once."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from plmtune.errors import LogitsNotFinite, UserError
from plmtune.evaluation import scoring
from plmtune.evaluation.scoring import Item, Score, Scorer
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def small_plm() -> Decoder:
    torch.manual_seed(0)
    mla = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    ffn = component("ffn", "squared_relu", hidden_dim=96)
    sizes: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 96}
    return plm(101, attention=mla, ffn=ffn, init_std=0.15, **sizes).eval()


def small_llama() -> Decoder:
    torch.manual_seed(0)
    gqa = component("attention", "gqa", num_kv_heads=2)
    ffn = component("ffn", "swiglu", hidden_dim=96)
    sizes: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 96}
    return llama(101, attention=gqa, ffn=ffn, init_std=0.15, **sizes).eval()


MODELS = {"mla": small_plm, "gqa": small_llama}


@torch.no_grad()
def alone(model: Decoder, item: Item) -> Score:
    """One item as lm-eval's `hf` takes it, from a whole forward and its logits."""
    tokens = [*item.context, *item.continuation][-(model.max_seq_len + 1) :]
    logits = model(torch.tensor([tokens[:-1]]))[0, -len(item.continuation) :]
    targets = torch.tensor(item.continuation)
    log_probs = logits.double().log_softmax(-1).gather(1, targets[:, None])
    return Score(float(log_probs.sum()), bool((logits.argmax(-1) == targets).all()))


def scores(scorer: Scorer, items: list[Item], known: set[int] = frozenset()) -> dict[int, Score]:  # type: ignore[assignment]
    pairs = [pair for batch in scorer.score(items, known) for pair in batch]
    assert len({number for number, _ in pairs}) == len(pairs)
    return dict(pairs)


def assert_as_alone(model: Decoder, items: list[Item], got: dict[int, Score]) -> None:
    for number, score in got.items():
        expected = alone(model, items[number])
        assert score.log_prob == pytest.approx(expected.log_prob, abs=1e-5, rel=1e-5)
        assert score.greedy == expected.greedy


class Ids:
    """Random ids, the same in each run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, length: int) -> list[int]:
        return [self.random.randrange(101) for _ in range(length)]


def tree_of_items(seed: int) -> list[Item]:
    """Few-shot examples, questions, continuations, some of them twice, and contexts that end inside another."""
    ids = Ids(seed)
    choose = ids.random.choice
    examples = [ids(0), ids(40), ids(60)]
    items = []
    for _ in range(12):
        question = choose(examples) + ids(choose([1, 5, 12]))
        for _ in range(choose([1, 4])):
            items.append(Item(question + ids(choose([0, 0, 2])), ids(choose([1, 1, 2, 7]))))
    items += [Item(item.context[:2], item.continuation) for item in items[:3]]
    items += [Item(item.context[:1], [*item.context[1:], *item.continuation]) for item in items[:2]]
    return [*items, items[0]]


@contextmanager
def counted(model: Decoder) -> Iterator[list[int]]:
    """Collect how many tokens each forward computes, padding included."""
    seen: list[int] = []
    handle = model.tok_embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    yield seen
    handle.remove()


def few_shot(questions: int = 12) -> list[Item]:
    """Questions of 5 tokens with 4 letters to choose from, behind 50 tokens of examples."""
    ids = Ids(1)
    examples = ids(50)
    return [
        Item(question, [letter])
        for question in (examples + ids(5) for _ in range(questions))
        for letter in (7, 8, 9, 10)
    ]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestScores:
    @pytest.mark.parametrize(("seed", "budget"), [(0, 1), (1, 60), (2, 400), (3, 4000)])
    def test_a_tree_of_prefixes_scores_as_each_item_alone(
        self, make: Callable[[], Decoder], seed: int, budget: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scoring, "_FORWARD_CPU", 1)  # prefixes wherever they spare a token
        model, items = make(), tree_of_items(seed)
        got = scores(Scorer(model, token_budget=budget), items)
        assert sorted(got) == list(range(len(items)))
        assert_as_alone(model, items, got)

    def test_a_likeliest_continuation_is_greedy(self, make: Callable[[], Decoder]) -> None:
        model, context = make(), [5, 6, 7]
        tokens = list(context)
        for _ in range(3):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        other = [*tokens[3:-1], (tokens[-1] + 1) % 101]
        got = scores(Scorer(model), [Item(context, tokens[3:]), Item(context, other)])
        assert (got[0].greedy, got[1].greedy) == (True, False)

    def test_too_long_a_context_loses_its_beginning(self, make: Callable[[], Decoder]) -> None:
        model, ids = make(), Ids(2)
        lengths = ((94, 3), (95, 3), (200, 3), (1, 96), (7, 96))
        items = [Item(ids(context), ids(continuation)) for context, continuation in lengths]
        assert_as_alone(model, items, scores(Scorer(model), items))

    def test_the_middle_of_a_tree_may_lie_behind_the_last_position(self, make: Callable[[], Decoder]) -> None:
        # 80 + 5 * 12 tokens in one row exceed max_seq_len, but no position does.
        model, ids = make(), Ids(3)
        question = ids(80)
        items = [Item(question, ids(13)) for _ in range(5)]
        with counted(model) as seen:
            assert_as_alone(model, items, scores(Scorer(model), items))
            assert seen[0] == 80 + 5 * 12

    def test_questions_that_are_rows_under_one_stem_may_be_longer_than_the_model_together(
        self, make: Callable[[], Decoder]
    ) -> None:
        model, ids = make(), Ids(4)
        examples = ids(70)
        questions = [examples + ids(10) for _ in range(24)]
        items = [Item(question, ids(8)) for question in questions for _ in range(4)]
        with counted(model) as seen:
            assert_as_alone(model, items, scores(Scorer(model), items))
            assert seen[0] == 70
            assert max(seen) > 96


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestTokensComputed:
    def test_one_token_continuations_need_no_token_of_their_own(self, make: Callable[[], Decoder]) -> None:
        model = make()
        items = [Item([3, 4, 5, 6], [letter]) for letter in range(20, 24)]
        with counted(model) as seen:
            scores(Scorer(model), items)
        assert seen == [4]

    def test_a_question_is_computed_once_for_all_its_continuations(self, make: Callable[[], Decoder]) -> None:
        model = make()
        items = [Item([3, 4, 5, 6], [letter, letter, letter]) for letter in range(20, 24)]
        with counted(model) as seen:
            scores(Scorer(model), items)
        assert seen == [4 + 4 * 2]

    def test_contexts_that_differ_late_share_what_is_before(self, make: Callable[[], Decoder]) -> None:
        model, before = make(), list(range(30))
        items = [Item([*before, name], [50, 51, 52]) for name in (40, 41)]
        with counted(model) as seen:
            scores(Scorer(model), items)
        assert seen == [30 + 2 * 3]

    def test_few_shot_examples_are_computed_once_for_all_questions(self, make: Callable[[], Decoder]) -> None:
        model, items = make(), few_shot(200)
        with counted(model) as seen:
            scores(Scorer(model, token_budget=500), items)
        assert seen[0] == 50
        assert len(seen) > 2
        assert sum(seen[1:]) <= 200 * 5  # some questions have a common beginning

    def test_each_subject_has_its_own_prefix_although_all_share_a_beginning(self, make: Callable[[], Decoder]) -> None:
        model, ids = make(), Ids(9)
        begin = ids(33)
        subjects = [begin + ids(27), begin + ids(37)]
        items = [Item(subject + ids(20), [5]) for subject in subjects for _ in range(40)]
        with counted(model) as seen:
            scores(Scorer(model), items)
        assert seen.count(60) == seen.count(70) == 1
        assert sum(seen) <= 60 + 70 + 80 * 20


class TestKnown:
    def test_what_is_known_is_left_out_and_the_rest_scores_the_same(self) -> None:
        model, items = small_plm(), tree_of_items(5)
        known = set(range(0, len(items), 2))
        got = scores(Scorer(model, token_budget=200), items, known)
        assert sorted(got) == [number for number in range(len(items)) if number not in known]
        assert_as_alone(model, items, got)

    def test_what_remains_comes_in_the_batches_of_a_whole_run(self) -> None:
        items = tree_of_items(6)
        scorer = Scorer(small_llama(), token_budget=60)
        batches = list(scorer.score(items))
        assert len(batches) > 4
        done = {number for batch in batches[:3] for number, _ in batch}
        assert list(scorer.score(items, done)) == batches[3:]

    def test_nothing_is_computed_where_all_is_known(self) -> None:
        model, items = small_plm(), few_shot()
        with counted(model) as seen:
            assert scores(Scorer(model), items, set(range(len(items)))) == {}
        assert seen == []


class SmallMemory:
    """Stands for an allocator that has room for so many tokens of a forward."""

    def __init__(self, model: Decoder, room: int, error: Exception) -> None:
        self.room, self.error, self.tried = room, error, list[int]()
        model.norm.register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.tried.append(inputs[0].shape[0] * inputs[0].shape[1])
        if self.tried[-1] > self.room:
            raise self.error


FULL = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "cpu, in other words": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "python": MemoryError(),
}


class TestMemory:
    @pytest.mark.parametrize("error", FULL.values(), ids=FULL)
    def test_a_batch_that_does_not_fit_is_halved_until_it_does(self, error: Exception) -> None:
        model, ids = small_llama(), Ids(7)
        items = [Item([first, *ids(9)], ids(1)) for first in range(64)]
        memory = SmallMemory(model, 100, error)
        got = scores(Scorer(model, token_budget=320), items)
        assert sorted(got) == list(range(64))
        # 32 rows, 16, 8; all that follow begin with 8.
        assert memory.tried == [320, 160] + [80] * 8
        memory.room = 320
        assert_as_alone(model, items, got)

    def test_a_question_that_does_not_fit_is_divided_by_its_continuations(self) -> None:
        model, ids = small_plm(), Ids(8)
        question = ids(20)
        items = [Item(question, ids(11)) for _ in range(4)]
        memory = SmallMemory(model, 45, FULL["python"])
        got = scores(Scorer(model), items)
        assert memory.tried == [60, 40, 40]
        memory.room = 60
        assert_as_alone(model, items, got)

    def test_a_text_that_alone_does_not_fit_ends_in_words(self) -> None:
        model = small_plm()
        SmallMemory(model, 5, FULL["cpu"])
        with pytest.raises(UserError, match="memory does not suffice for one text of 9 tokens on cpu"):
            scores(Scorer(model), [Item([1] * 9, [2]), Item([2] * 8, [2])])

    def test_other_errors_are_not_taken_for_it(self) -> None:
        model = small_plm()
        SmallMemory(model, 5, RuntimeError("shapes do not match"))
        with pytest.raises(RuntimeError, match="shapes do not match"):
            scores(Scorer(model), [Item([1] * 9, [2])])


class TestRefusals:
    def test_nan_names_the_first_item_that_met_it(self) -> None:
        model = small_llama()
        nan = torch.tensor(float("nan"))
        model.tok_embeddings.register_forward_hook(lambda _, ids, out: out.where(ids[0][..., None] != 50, nan))
        items = [Item([1, 2], [3, 4]), Item([1, 50], [3]), Item([1, 50], [4]), Item([1, 50, 2], [4])]
        with pytest.raises(LogitsNotFinite, match="item 1") as caught:
            scores(Scorer(model), items)
        assert caught.value.item == 1

    @pytest.mark.parametrize(
        ("item", "words"),
        [
            (Item([1], [2] * 97), r"item 1: context \(1\) and continuation \(97, at most 96\)"),
            (Item([1, 101], [2]), r"item 1 holds an id that the model's vocabulary \(101\) has not"),
            (Item([-1], [2]), "item 1 holds an id"),
            (Item([], [2]), r"item 1: context \(0\) .* need at least one token each"),
            (Item([1], []), r"item 1: .* continuation \(0, at most 96\) need at least one token each"),
        ],
    )
    def test_an_item_that_cannot_be_scored_is_named_before_anything_runs(self, item: Item, words: str) -> None:
        model = small_plm()
        with counted(model) as seen, pytest.raises(ValueError, match=words):
            Scorer(model).score([Item([1], [2]), item])
        assert seen == []

    def test_a_budget_below_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="token_budget must be at least 1, not 0"):
            Scorer(small_plm(), token_budget=0)


class TestMode:
    def test_a_model_in_training_mode_computes_as_in_evaluation_and_keeps_its_mode(self) -> None:
        model = small_plm().train()
        modes = []
        model.norm.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
        for _ in Scorer(model).score(few_shot()):
            assert model.training
        assert set(modes) == {(False, False)}
