"""A model that knows the answers, or half of them, gets the score that it deserves: prompts to result file."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from plmtune.config.compose import compose
from plmtune.evaluation import results, writing
from plmtune.evaluation.code_eval import CodeRunner, missing
from plmtune.evaluation.evaluate import Settings, describe_model, evaluate
from plmtune.evaluation.language_model import LanguageModel
from plmtune.evaluation.local_data import LocalData
from plmtune.evaluation.tasks import Tasks
from plmtune.inference.batching import Answer
from plmtune.inference.request_queue import Request
from plmtune.tokenizers.tokenizer_files import bundled

DATA = Path(__file__).parents[3] / "shared" / "data" / "eval"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def loaded(name: str) -> tuple[Tasks, Any]:
    tasks = Tasks(data=LocalData.open(DATA), code=CodeRunner("namespaces"))
    return tasks, tasks.load(name)


def score(
    monkeypatch: pytest.MonkeyPatch, place: Path, task: str, limit: int | None, knows: Callable[[str], str]
) -> dict[str, Any]:
    """Evaluate where the engine writes what `knows` says of a prompt, and then goes on with the next question."""
    tokenizer = bundled()

    class Knowing:
        def __init__(self, *settings: Any, **options: Any) -> None:
            self.asked: list[Request] = []

        def submit(self, request: Request) -> None:
            self.asked.append(request)

        def run(self) -> Iterator[Answer]:
            for request in self.asked:
                text = knows(tokenizer.decode(request.tokens)) + f"{request.until[0].decode()} and more"
                yield Answer(request.key, tokenizer.encode(text), ended=False, stopped=True)

    monkeypatch.setattr(writing, "BatchedGenerator", Knowing)
    model = compose("pretrain", (), ["model=plm_tiny", "model.max_seq_len=16384"]).model(tokenizer.vocab_size)
    model.init_weights(torch.Generator().manual_seed(0))
    lm = LanguageModel(model.eval(), tokenizer)
    tasks, wanted = loaded(task)
    file = place / "result.json"
    evaluate(
        lm,
        tasks,
        {task: wanted},
        Settings(limit=limit),
        about=describe_model("oracle", place, model, "0"),
        failed={},
        file=file,
    )
    return results.load(file)


def values(result: dict[str, Any], task: str) -> list[float]:
    return [metric["value"] for metric in result["tasks"][task]["metrics"].values()]


class TestGsm8k:
    def answers(self, share: int) -> Callable[[str], str]:
        """The gold answer of a question, or nothing of use for all but each `share`-th."""
        known = {
            f"Question: {row['question']}\nAnswer:": f" {row['answer']}" if index % share == 0 else " I do not know."
            for index, row in enumerate(rows("gsm8k_test.jsonl"))
        }
        return lambda prompt: known[prompt[prompt.rindex("Question: ") :]]

    def test_a_model_that_knows_all_or_half_of_the_answers_scores_1_or_a_half(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert values(score(monkeypatch, tmp_path, "gsm8k", 8, self.answers(1)), "gsm8k") == [1.0, 1.0]
        assert values(score(monkeypatch, tmp_path, "gsm8k", 8, self.answers(2)), "gsm8k") == [0.5, 0.5]

    @pytest.mark.slow
    def test_all_1319(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        result = score(monkeypatch, tmp_path, "gsm8k", None, self.answers(1))
        assert values(result, "gsm8k") == [1.0, 1.0]
        assert result["tasks"]["gsm8k"]["samples"] == len(result["samples"]["gsm8k"]) == 1319
        assert values(score(monkeypatch, tmp_path, "gsm8k", None, self.answers(2)), "gsm8k") == [660 / 1319] * 2


@pytest.mark.skipif(missing() is not None, reason=f"no sandbox here: {missing()}")
class TestHumanEval:
    def answers(self, share: int) -> Callable[[str], str]:
        known = {
            row["prompt"]: row["canonical_solution"] if index % share == 0 else "    return None\n"
            for index, row in enumerate(rows("HumanEval.jsonl"))
        }
        return known.__getitem__

    def test_a_model_that_knows_all_or_half_of_the_answers_scores_1_or_a_half(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert values(score(monkeypatch, tmp_path, "humaneval", 4, self.answers(1)), "humaneval") == [1.0]
        assert values(score(monkeypatch, tmp_path, "humaneval", 4, self.answers(2)), "humaneval") == [0.5]

    @pytest.mark.slow
    def test_all_164(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        result = score(monkeypatch, tmp_path, "humaneval", None, self.answers(1))
        assert values(result, "humaneval") == [1.0]
        assert result["tasks"]["humaneval"]["samples"] == 164
        assert values(score(monkeypatch, tmp_path, "humaneval", None, self.answers(2)), "humaneval") == [0.5]
