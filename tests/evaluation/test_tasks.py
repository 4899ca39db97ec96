from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmtune.errors import UserError
from plmtune.evaluation import task_index
from plmtune.evaluation.local_data import LocalData
from plmtune.evaluation.task_index import Known, lm_eval_folder, read_folder
from plmtune.evaluation.tasks import SUITES, Tasks, quiet

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/eval is absent")

SUMS = """
task: sums
dataset_path: nobody/sums
dataset_name: small
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Sum: {{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
ROWS = [{"question": f"{i} + 1", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(4)]


@pytest.fixture(autouse=True)
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have lm-eval's tasks in some of its folders, at first in none: reading all takes seconds."""

    def read(*folders: str) -> None:
        known: dict[str, Known] = {}
        for name in folders:
            known |= read_folder(lm_eval_folder() / name, strict=False)
        monkeypatch.setattr("plmtune.evaluation.tasks.lm_eval_index", lambda: known)

    read()
    return read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks of one's own: sums, and a map with its data."""
    write(tmp_path, "sums.yaml", SUMS)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "map.yml", "sums: {test: ../test.jsonl}")
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def tasks(folder: Path, mapped: str | None = None) -> Tasks:
    if mapped is not None:
        write(folder / "data", "map.yml", mapped)
    return Tasks(include=folder, data=LocalData.open(folder / "data" / "map.yml"))


class TestNames:
    @pytest.fixture(autouse=True)
    def few(self, only: Callable[..., None]) -> None:
        only("arc", "mmlu/default", "humaneval")

    def test_names_stay_in_their_order_and_patterns_open_in_theirs(self) -> None:
        assert Tasks().resolve(["mmlu_virology", "arc_[ce]*y", "mmlu_virology"]) == ["mmlu_virology", "arc_easy"]

    def test_what_a_named_group_or_tag_holds_is_not_named_twice(self) -> None:
        assert Tasks().resolve(["mmlu_virology", "mmlu*", "ai2_arc", "arc_easy"]) == ["mmlu", "ai2_arc"]

    @pytest.mark.parametrize(
        ("name", "said"),
        [("arc_eazy", "Did you mean arc_easy"), ("arc", "Did you mean arc_"), ("plm", "--suite plm"), ("z*", "--list")],
    )
    def test_an_unknown_name_is_refused_with_the_nearest(self, name: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            Tasks().resolve([name])

    def test_a_task_that_runs_code_is_known_by_its_yaml_alone(self) -> None:
        known = Tasks()
        assert known.needs_code("humaneval_instruct")  # which includes the file that says so
        assert not known.needs_code("mmlu")

    def test_a_group_or_tag_needs_code_if_one_of_its_tasks_does(self, folder: Path) -> None:
        write(folder, "code.yaml", "include: sums.yaml\ntask: code\nunsafe_code: true\ntag: mixed\n")
        write(folder, "both.yaml", "group: both\ntask: [sums, {group: inner, task: [code]}]\n")
        known = Tasks(include=folder)
        assert known.needs_code("both")
        assert known.needs_code("mixed")
        assert not known.needs_code("sums")

    def test_the_list_begins_with_the_suites_and_says_where_tasks_are_from(self, folder: Path) -> None:
        listed = {entry.name: entry for entry in Tasks(include=folder).listing()}
        assert list(listed)[: len(SUITES)] == list(SUITES)
        assert (listed["arc_easy"].kind, listed["arc_easy"].output) == ("task", "multiple_choice")
        assert listed["arc_easy"].source.endswith("arc/arc_easy.yaml")
        assert listed["ai2_arc"].source == "2 tasks"
        assert listed["sums"].source == str(folder / "sums.yaml")

    def test_tasks_of_ones_own_take_the_place_of_lm_evals(self, folder: Path) -> None:
        write(folder, "arc.yaml", "include: sums.yaml\ntask: arc_easy\n")
        sources = {entry.name: entry.source for entry in Tasks(include=folder).listing()}
        assert sources["arc_easy"] == str(folder / "arc.yaml")


class TestInclude:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("task: [unclosed", r"bad\.yaml cannot be read as a task: line [12]: "),
            ("- a list", r"bad\.yaml cannot be read as a task: it holds a list"),
            ("include: none.yaml\ntask: x", r"bad\.yaml cannot be read as a task: .*none\.yaml, which it includes"),
            ("include: bad.yaml\ntask: x", r"bad\.yaml cannot be read as a task: it includes .*bad\.yaml twice"),
            ("doc_to_text: x\noutput_type: y", r"bad\.yaml has doc_to_text, output_type but no key task"),
            ("task: {a: b}\n", r"bad\.yaml: the key task must be a name"),
        ],
    )
    def test_a_wrong_file_is_a_sentence_with_its_name(self, folder: Path, text: str, said: str) -> None:
        write(folder, "bad.yaml", text)
        with pytest.raises(UserError, match=said):
            Tasks(include=folder)

    def test_templates_and_files_of_other_kinds_are_no_mistakes(self, folder: Path) -> None:
        write(folder, "template.yaml", SUMS.replace("task: sums", ""))
        write(folder, "more.yaml", "include: template.yaml\ntask: more\n")
        write(folder, "other.yaml", "services: {web: {port: 80}}")
        assert Tasks(include=folder).resolve(["*"]) == ["more", "sums"]

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ("doc_to_txt: x", r"wrong \(.*wrong\.yaml\): lm-eval knows no key doc_to_txt\. Did you mean doc_to_text"),
            ("process_docs: !function none.f", r"wrong\.yaml: wrong cannot be read: ModuleNotFound|ImportError"),
            ("process_docs: !function here.f", r"wrong\.yaml: wrong cannot be read: .*has no function 'f'"),
            ("output_type: guess", r"wrong.* cannot be built: ValueError: Got invalid output_type 'guess'"),
            ("metric_list: [{metric: acd}]", r"acd is none of lm-eval's metrics.* Did you mean acc"),
            (
                "doc_to_text: '{{query}}'",
                r"test\.jsonl: there is no column query, which the task wrong .*reads, but question, choices",
            ),
            (
                "doc_to_target: gold",
                r"there is no column gold, .*choices, answer\. Say in the map what it is: columns: \{gold: ",
            ),
            ("test_split: null\ntraining_split: null", r"It has no key test_split or validation_split"),
        ],
    )
    def test_a_wrong_task_is_a_sentence_when_it_is_built(self, folder: Path, more: str, said: str) -> None:
        write(folder, "here.py", "def g(): pass\n")
        write(folder, "wrong.yaml", f"include: sums.yaml\ntask: wrong\n{more}\n")
        with pytest.raises(UserError, match=said):
            tasks(folder, "wrong: {test: ../test.jsonl}").load("wrong")

    def test_a_group_with_a_name_that_is_no_task_is_refused(self, folder: Path) -> None:
        write(folder, "group.yaml", "group: all\ntask: [sums, smus]\n")
        with pytest.raises(UserError, match="The group all holds smus, and there is no such task"):
            tasks(folder).load("all")


class TestLocalTasks:
    def test_the_prompt_is_the_tasks_own_and_the_documents_the_files(self, folder: Path) -> None:
        task: Any = tasks(folder).load("sums")
        assert [doc["question"] for doc in task.test_docs()] == [row["question"] for row in ROWS]
        assert task.fewshot_context(task.test_docs()[2], num_fewshot=0) == "Sum: 2 + 1"
        built = task.construct_requests(task.test_docs()[2], "Sum: 2 + 1", metadata=("sums", 2, 1))
        assert [request.args for request in built] == [("Sum: 2 + 1", " 2"), ("Sum: 2 + 1", " 3")]

    def test_what_is_kept_of_a_task_names_no_function_of_ours(self, folder: Path) -> None:
        kept = tasks(folder).load("sums").dump_config()  # type: ignore[union-attr]
        assert json.loads(json.dumps(kept))["dataset_path"] == "nobody/sums"
        assert "custom_dataset" not in kept

    def test_groups_hold_tasks_of_their_own_files_and_ones_written_out(self, folder: Path) -> None:
        written_out = SUMS.replace("task: sums", "task: inline").strip().replace("\n", "\n    ")
        write(folder, "group.yaml", f"group: all\ntask:\n  - sums\n  - {written_out}\n")
        mapped = "sums: {test: ../test.jsonl}\n'all::inline': {test: ../test.jsonl}\n"
        group: Any = tasks(folder, mapped).load("all")
        assert [task.task_name for task in group.get_all_tasks()] == ["sums", "all::inline"]
        assert [len(task.test_docs()) for task in group.get_all_tasks()] == [4, 4]

    def test_a_tag_gives_its_tasks(self, folder: Path) -> None:
        write(folder, "more.yaml", "include: sums.yaml\ntask: more\ntag: some\n")
        loaded = tasks(folder, "more: {test: ../test.jsonl}").load("some")
        assert isinstance(loaded, list)
        assert [task.task_name for task in loaded] == ["more"]

    def test_a_class_reads_the_map_too(self, folder: Path) -> None:
        code = (
            "from lm_eval.api.task import ConfigurableTask\n"
            "class Written(ConfigurableTask):\n"
            "    DATASET_PATH = 'nobody/written'\n"
            "    def __init__(self, **kwargs):\n"
            "        super().__init__(config={'metadata': {'version': 1}, 'test_split': 'test'})\n"
            "    def doc_to_text(self, doc): return doc['question']\n"
            "    def doc_to_target(self, doc): return doc['choices'][doc['answer']]\n"
        )
        write(folder, "written.py", code)
        write(folder, "written.yaml", "task: written\nclass: !function written.Written\n")
        task: Any = tasks(folder, "written: {test: ../test.jsonl}").load("written")
        assert task.task_name == "written"
        assert len(task.test_docs()) == 4

    def test_the_split_that_is_evaluated_has_to_be_there(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"has train of the task sums .*evaluated on its split test"):
            tasks(folder, "sums: {train: ../test.jsonl}").load("sums")

    def test_a_missing_file_is_said_before_anything_is_built(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"names .*none\.jsonl for sums/test: it is not there"):
            tasks(folder, "sums: {test: none.jsonl}").load("sums")

    def test_a_split_with_a_slip_in_its_name_is_asked_about(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"evaluated on its split test\. Is tset meant to be it\?$"):
            tasks(folder, "sums: {tset: ../test.jsonl}").load("sums")
        with pytest.raises(UserError, match=r"which the map does not have\. Is trian meant to be it\?"):
            tasks(folder, "sums: {test: ../test.jsonl, trian: ../test.jsonl}").load("sums", num_fewshot=1)


class TestTargets:
    """lm-eval gives a target that is none of the choices 0 without a word."""

    @pytest.fixture
    def load(self, folder: Path) -> Callable[[str], Any]:
        def load(more: str) -> Any:
            files = f"dataset_kwargs: {{data_files: {{test: {folder / 'test.jsonl'}}}}}\n"
            files += "dataset_path: json\ndataset_name: null\ntraining_split: null\n"
            write(folder, "own.yaml", f"include: sums.yaml\ntask: own\n{files}{more}\n")
            return Tasks(include=folder).load("own")

        return load

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ("doc_to_target: answr", r"own \(.*own\.yaml\): the target 'answr' of document 0 is none of its 2 choices"
             r"\. Its columns: question, choices, answer\. Did you mean answer\?"),
            ("doc_to_target: '{{choices[1]}}.'", r"the target '1\.' of document 0 is none of its 2 choices"),
            ("doc_to_target: -1", "the target -1 of document 0"),
        ],
    )  # fmt: skip
    def test_that_are_no_choice_are_refused(self, load: Callable[[str], Any], more: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            load(more)

    @pytest.mark.parametrize("wrong", [2, -1])
    def test_of_any_row_of_a_file_that_are_no_choice_are_refused_with_the_row(self, folder: Path, wrong: int) -> None:
        held = [*ROWS[:2], {**ROWS[2], "answer": wrong}, ROWS[3]]
        (folder / "test.jsonl").write_text("\n".join(json.dumps(row) + "\n" for row in held))
        with pytest.raises(
            UserError, match=rf"target {wrong} of document 2 \(.*test\.jsonl, line 5\) is none of its 2"
        ):
            tasks(folder, "sums: {test: ../test.jsonl}").load("sums")

    @pytest.mark.parametrize("target", ["answer", "1", "'{{answer}}'", "'b'", "[0, 1]", "'[1]'", "'{{[answer]}}'"])
    def test_may_be_places_texts_and_lists_of_places(self, load: Callable[[str], Any], target: str) -> None:
        assert load(f"doc_to_choice: [a, b]\ndoc_to_target: {target}")

    def test_of_a_task_that_marks_by_itself_are_its_own_matter(self, folder: Path, load: Callable[[str], Any]) -> None:
        write(folder, "marks.py", "def f(doc, results): return {'acc': 1}\n")
        assert load("doc_to_target: anything\nprocess_results: !function marks.f")


SHUFFLING = """
import random
import numpy as np

def process_docs(dataset):
    def shuffled(row):
        right, choices = row["choices"][row["answer"]], [*row["choices"], *"abcdef"]
        random.shuffle(choices)
        np.random.shuffle(choices)
        return {**row, "choices": choices, "answer": choices.index(right)}
    return dataset.map(shuffled)
"""


class TestShuffledChoices:
    """Tasks such as gpqa put their choices into an order by chance when their documents are read."""

    @pytest.fixture
    def shuffling(self, folder: Path) -> Path:
        write(folder, "shuffling.py", SHUFFLING)
        more = "process_docs: !function shuffling.process_docs\n"
        write(folder, "sums.yaml", SUMS.replace("training_split: train", "training_split: test") + more)
        return folder

    def test_are_marked_in_the_order_in_which_they_were_asked(self, shuffling: Path) -> None:
        task: Any = tasks(shuffling).load("sums")
        asked, marked = ([doc for _, doc in task.doc_iterator()] for _ in range(2))
        assert asked == marked == list(task.task_docs)

    def test_have_one_order_as_question_and_as_example(self, shuffling: Path) -> None:
        task: Any = tasks(shuffling).load("sums")
        assert list(task.training_docs()) == list(task.test_docs()) == list(task.eval_docs)

    def test_of_a_class_are_marked_as_asked_too(self, folder: Path) -> None:
        code = SHUFFLING + (
            "from lm_eval.api.task import ConfigurableTask\n"
            "class Written(ConfigurableTask):\n"
            "    DATASET_PATH = 'nobody/written'\n"
            "    def __init__(self, **kwargs):\n"
            "        super().__init__(config={'metadata': {'version': 1}, 'test_split': 'test'})\n"
            "    def test_docs(self): return process_docs(self.dataset['test'])\n"
            "    def doc_to_text(self, doc): return doc['question']\n"
            "    def doc_to_target(self, doc): return doc['choices'][doc['answer']]\n"
        )
        write(folder, "written.py", code)
        write(folder, "written.yaml", "task: written\nclass: !function written.Written\n")
        task: Any = tasks(folder, "written: {test: ../test.jsonl}").load("written")
        assert list(task.eval_docs) == list(task.eval_docs)

    def test_are_shuffled_as_lm_evals_own_runner_seeds_it(self, shuffling: Path) -> None:
        random.seed(7)
        np.random.seed(7)
        before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        task: Any = tasks(shuffling).load("sums")
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
        random.seed(0)  # the defaults of `simple_evaluate`
        np.random.seed(1234)
        expected = []
        for row in ROWS:
            choices = [*row["choices"], *"abcdef"]  # type: ignore[misc]
            random.shuffle(choices)
            np.random.shuffle(choices)
            expected.append(choices)
        assert [doc["choices"] for doc in task.eval_docs] == expected


class TestExamples:
    def test_no_examples_need_no_split_for_them(self, folder: Path) -> None:
        tasks(folder).load("sums")
        tasks(folder).load("sums", num_fewshot=0)

    def test_examples_need_their_split(self, folder: Path) -> None:
        with pytest.raises(
            UserError, match=r"sums: its 2 few-shot examples are from the split train, .*--num-fewshot 0"
        ):
            tasks(folder).load("sums", num_fewshot=2)

    def test_as_many_are_needed_as_are_asked_for(self, folder: Path) -> None:
        known = tasks(folder, "sums: {test: ../test.jsonl, train: ../test.jsonl}")
        known.load("sums", num_fewshot=4)
        with pytest.raises(UserError, match="5 few-shot examples are asked for, from 4 documents"):
            known.load("sums", num_fewshot=5)

    def test_a_task_made_for_none_stays_without(self, folder: Path) -> None:
        write(folder, "none.yaml", "include: sums.yaml\ntask: none\nnum_fewshot: 0\n")
        tasks(folder, "none: {test: ../test.jsonl}").load("none", num_fewshot=3)

    def test_examples_that_a_task_has_by_itself_count(self, folder: Path) -> None:
        write(folder, "own.yaml", "include: sums.yaml\ntask: own\nnum_fewshot: 2\n")
        known = tasks(folder, "own: {test: ../test.jsonl}")
        with pytest.raises(UserError, match="own: its 2 few-shot examples"):
            known.load("own")
        known.load("own", num_fewshot=0)


class TestWithoutData:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import datasets

        monkeypatch.setattr("plmtune.io.hub.unavailable_reason", lambda: "https://huggingface.co does not answer")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def test_it_is_said_at_once_how_to_get_them(self, folder: Path) -> None:
        import datasets
        from huggingface_hub import constants

        held = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        with pytest.raises(UserError) as error:
            Tasks(include=folder).load("sums")
        said = str(error.value)
        assert "nobody/sums (small), cannot be read: https://huggingface.co does not answer" in said
        assert f"run {sys.executable} -c" in said
        assert "datasets.load_dataset('nobody/sums', 'small')" in said
        assert said.endswith(
            "sums:\n"
            "  test: sums_test.jsonl  # columns: question, answer, choices\n"
            "  train: sums_train.jsonl  # the same, for few-shot examples"
        )
        assert held == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)

    def test_the_entry_that_is_printed_is_one_that_a_map_can_have(self, folder: Path) -> None:
        with pytest.raises(UserError) as error:
            Tasks(include=folder).load("sums")
        for split in ("test", "train"):
            write(folder / "data", f"sums_{split}.jsonl", (folder / "test.jsonl").read_text())
        entry = str(error.value).partition("--data:\n")[2]
        assert tasks(folder, entry).load("sums", num_fewshot=2)

    def test_the_columns_of_a_task_are_listed(self, folder: Path, only: Callable[..., None]) -> None:
        entry = "sums:\n  test: sums_test.jsonl  # columns: question, answer, choices\n"
        entry += "  train: sums_train.jsonl  # the same, for few-shot examples"
        assert Tasks(include=folder).map_entries("sums") == [entry]
        only("hellaswag")
        (entry,) = Tasks().map_entries("hellaswag")
        for column in ("ctx_a", "ctx_b", "activity_label", "endings", "label"):  # read by its process_docs
            assert column in entry.partition("# columns: ")[2].partition("\n")[0]
        assert "query" not in entry  # made by it

    def test_files_that_a_task_names_itself_need_no_hub(self, folder: Path) -> None:
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'test.jsonl'}}}}}\n"
        files += "dataset_name: null\n"
        write(folder, "local.yaml", f"include: sums.yaml\ntask: local\ntraining_split: null\n{files}")
        task: Any = Tasks(include=folder).load("local")
        assert len(task.test_docs()) == 4

    def test_what_a_function_of_the_task_says_is_not_hidden(self, folder: Path) -> None:
        write(folder, "made.py", "def rows(**settings): raise KeyError('nobody thought of this')\n")
        write(folder, "made.yaml", "include: sums.yaml\ntask: made\ncustom_dataset: !function made.rows\n")
        with pytest.raises(UserError, match="cannot be read: KeyError: 'nobody thought of this'"):
            Tasks(include=folder).load("made")

    def test_an_entry_with_a_slip_in_its_name_is_asked_about_first(self, folder: Path) -> None:
        write(folder, "capitals.yaml", "include: sums.yaml\ntask: capitals\n")
        with pytest.raises(
            UserError, match=r"^.*map\.yml has no entry for capitals; it has capitels\. Did you mean that"
        ):
            tasks(folder, "capitels: {test: ../test.jsonl}").load("capitals")

    def test_files_that_would_serve_are_named(self, folder: Path, only: Callable[..., None]) -> None:
        only("gsm8k")
        with pytest.raises(UserError, match=r"The folder of --data has no gsm8k_test\.jsonl"):
            Tasks(data=LocalData.open(folder)).load("gsm8k")


class Runner:
    """Stands for `code_eval.CodeRunner`."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        import evaluate

        before, evaluate.load = evaluate.load, lambda name: self
        try:
            yield
        finally:
            evaluate.load = before

    def compute(self, references: Any, predictions: Any, k: Any) -> tuple[dict[str, float], dict[str, Any]]:
        return {"pass@1": 1.0}, {}


class TestCode:
    CODE = "include: sums.yaml\ntask: code\nunsafe_code: true\nprocess_docs: !function metric.f\n"

    def test_without_a_runner_it_is_refused_and_nothing_of_it_is_imported(self, folder: Path) -> None:
        write(folder, "code.yaml", self.CODE)
        write(folder, "metric.py", "raise SystemExit('code_eval')")
        with pytest.raises(UserError, match="code runs code that the model writes: allow it with --unsafe-code"):
            tasks(folder, "code: {test: ../test.jsonl}").load("code")

    def test_one_that_runs_code_by_itself_is_refused_even_with_a_runner(self, folder: Path) -> None:
        write(folder, "code.yaml", self.CODE)
        write(folder, "metric.py", "import subprocess\nraise SystemExit")
        known = Tasks(include=folder, code=Runner())  # type: ignore[arg-type]
        with pytest.raises(UserError, match="by its own means"):
            known.load("code")

    def test_one_that_is_hidden_in_a_group_is_refused(self, folder: Path) -> None:
        write(folder, "group.yaml", "group: all\ntask:\n  - task: sums\n    unsafe_code: true\n")
        with pytest.raises(UserError, match="unsafe_code inside a group"):
            tasks(folder).load("all")

    @pytest.mark.slow  # the package evaluate takes seconds to import
    @shared
    def test_the_runner_of_this_evaluation_is_the_one_that_is_asked(
        self, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only("humaneval")
        monkeypatch.delitem(sys.modules, "lm_eval.tasks.humaneval.utils", raising=False)
        for runner in (Runner(), Runner()):
            known = Tasks(data=LocalData.open(SHARED), code=runner)  # type: ignore[arg-type]
            task: Any = known.load("humaneval")
            assert task.config.metric_list[0]["metric"].__globals__["compute_"] is runner
            assert len(task.test_docs()) == 164


@shared
class TestOfficialPrompts:
    @pytest.fixture
    def known(self, only: Callable[..., None]) -> Tasks:
        only("arc", "gsm8k", "lambada", "mmlu/default")
        return Tasks(data=LocalData.open(SHARED))

    def request(self, task: Any, index: int, num_fewshot: int = 0) -> list[tuple[Any, ...]]:
        task.set_fewshot_seed(1234)
        context = task.fewshot_context(task.test_docs()[index], num_fewshot=num_fewshot)
        built = task.construct_requests(task.test_docs()[index], context, metadata=(task.task_name, index, 1))
        return [one.args for one in (built if isinstance(built, list) else [built])]

    def test_arc_easy(self, known: Tasks) -> None:
        requests = self.request(known.load("arc_easy"), 1)
        question = (
            "Question: Which piece of safety equipment is used to keep mold spores from entering the respiratory "
            "system?\nAnswer:"
        )
        choices = [" safety goggles", " breathing mask", " rubber gloves", " lead apron"]
        assert requests == [(question, choice) for choice in choices]
        task: Any = known.load("arc_easy")
        assert task.doc_to_target(task.test_docs()[1]) == 1

    def test_lambada_parts_the_last_word(self, known: Tasks) -> None:
        [(context, word)] = self.request(known.load("lambada_openai"), 0)
        assert context.endswith("his mouth curved in a confident grin, I don't care about")
        assert word == " signs"

    def test_gsm8k_has_five_examples_of_the_training_split(self, known: Tasks) -> None:
        task: Any = known.load("gsm8k")
        [(context, settings)] = self.request(task, 0, num_fewshot=5)
        parts = context.split("\n\n")
        assert len(parts) == 6
        assert parts[5].startswith("Question: Janet\u2019s ducks lay 16 eggs per day.")
        assert parts[5].endswith("\nAnswer:")
        answers = {row["answer"] for row in task.training_docs()}
        assert all(part.partition("\nAnswer: ")[2] in answers for part in parts[:5])
        assert settings["until"] == ["Question:", "</s>", "<|im_end|>"]

    def test_mmlu_has_the_first_of_dev_as_examples(self, known: Tasks) -> None:
        requests = self.request(known.load("mmlu_virology"), 0, num_fewshot=1)
        description = "The following are multiple choice questions (with answers) about virology.\n\n"
        assert requests[0][0].startswith(description)
        assert requests[0][0].endswith("\nA. 100\nB. 1\nC. 10\nD. unknown\nAnswer:")
        assert requests[0][0].count("Answer:") == 2
        assert [choice for _, choice in requests] == [" A", " B", " C", " D"]

    @pytest.mark.slow
    def test_all_of_mmlu_is_one_group(self, known: Tasks) -> None:
        group: Any = known.load("mmlu")
        assert len(group.get_all_tasks()) == 57
        assert sum(len(task.test_docs()) for task in group.get_all_tasks()) == 14042


class TestIndex:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A small folder in place of lm-eval's, and a cache of one's own."""
        folder = tmp_path / "tasks"
        folder.mkdir()
        write(folder, "sums.yaml", SUMS)
        write(folder, "broken.yaml", "task: [")
        monkeypatch.setattr(task_index, "lm_eval_folder", lambda: folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return folder

    def kept(self, tmp_path: Path) -> Path:
        [file] = (tmp_path / "cache" / "plmtune").iterdir()
        return file

    def test_names_are_read_once_and_said_so(
        self, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = task_index.lm_eval_index()
        assert list(first) == ["sums"]
        assert "Reading the names of lm-eval's tasks" in capsys.readouterr().err
        monkeypatch.setattr(task_index, "read_folder", None)
        assert task_index.lm_eval_index() == first
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("damage", ["empty", "cut", "a bit"])
    def test_a_damaged_cache_is_made_again(self, package: Path, tmp_path: Path, damage: str) -> None:
        first = task_index.lm_eval_index()
        whole = self.kept(tmp_path).read_bytes()
        at = whole.index(b"multiple_choice")
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        self.kept(tmp_path).write_bytes({"empty": b"", "cut": whole[:-9], "a bit": flipped}[damage])
        assert task_index.lm_eval_index() == first
        assert self.kept(tmp_path).read_bytes() == whole

    def test_another_version_of_lm_eval_is_read_anew(
        self, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task_index.lm_eval_index()
        write(package, "more.yaml", "task: more\n")
        assert "more" not in task_index.lm_eval_index()
        monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
        assert "more" in task_index.lm_eval_index()

    def test_a_cache_that_cannot_be_written_is_done_without(
        self, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert list(task_index.lm_eval_index()) == ["sums"]

    @pytest.mark.slow  # lm-eval's own takes 20 seconds
    def test_it_is_lm_evals_own(self) -> None:
        from lm_eval.tasks._index import TaskIndex

        from plmtune.evaluation.task_building import _KINDS

        folder = lm_eval_folder().resolve()
        with quiet():
            theirs = TaskIndex.build([folder])
        ours = read_folder(folder, strict=False)
        assert {name: (_KINDS[known.kind], known.path and Path(known.path)) for name, known in ours.items()} == {
            name: (entry.kind, entry.yaml_path) for name, entry in theirs.items()
        }
        assert {name: set(known.members) for name, known in ours.items() if known.kind == "tag"} == {
            name: entry.tags for name, entry in theirs.items() if entry.yaml_path is None
        }

    def test_every_task_of_the_suites_is_lm_evals(self, only: Callable[..., None]) -> None:
        only("arc", "mmlu/default", "cmmlu", "ceval", "gsm8k", "mathqa", "humaneval", "mbpp", "super_glue",
             "hellaswag", "logiqa", "piqa", "lambada")  # fmt: skip
        for names in SUITES.values():
            assert Tasks().resolve(names) == list(names)


class TestPrivateNames:
    """Names of lm-eval that are not its interface. A failure here says what a new version changed."""

    def test_the_factory_has_the_steps_that_are_replaced(self) -> None:
        import inspect

        from lm_eval.tasks._factory import TaskFactory

        assert list(inspect.signature(TaskFactory._build_task).parameters) == ["self", "entry", "overrides"]
        assert list(inspect.signature(TaskFactory._load_full_config).parameters) == ["self", "entry", "overrides"]
        members = inspect.signature(TaskFactory._build_group_members).parameters
        assert list(members) == ["self", "member_list", "group_name", "overrides", "registry"]

    def test_a_manager_without_defaults_reads_no_files(self) -> None:
        assert Tasks().manager.all_tasks == []


class TestQuiet:
    def test_neither_logs_nor_bars_are_seen_inside_and_both_are_after(self, capsys: pytest.CaptureFixture[str]) -> None:
        import lm_eval.api.metrics
        import lm_eval.api.task

        log = logging.getLogger("lm_eval.somewhere")
        log.addHandler(handler := logging.StreamHandler())
        try:
            with quiet():
                log.error("unseen")
                assert list(lm_eval.api.task.tqdm(range(3))) == [0, 1, 2]
                lm_eval.api.metrics._bootstrap_internal_no_mp(sum, [1, 2], 10)
            assert capsys.readouterr() == ("", "")
            log.error("seen")
            assert list(lm_eval.api.task.tqdm(range(3))) == [0, 1, 2]
            assert "3/3" in capsys.readouterr().err
        finally:
            log.removeHandler(handler)
