"""Model cards: only what files say, and every place that a person must fill."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from made_up import result, task
from markdown_it import MarkdownIt
from saved_adapters import save_adapter

from plmtune.cli.card import card as command
from plmtune.errors import UserError
from plmtune.evaluation import model_card, results
from plmtune.evaluation.markdown import escape
from plmtune.evaluation.model_card import write_card
from plmtune.models.adapters import load_model
from plmtune.models.digest import model_digest
from plmtune.models.hf import save_model
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import lora
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte

CONFIG: dict[str, Any] = {
    "recipe": "pretrain",
    "name": "tiny",
    "init_from": None,
    "seed": 7,
    "seq_len": 32,
    "global_batch_size": 4,
    "phases": [{"name": "main", "tokens": None, "steps": 12, "mix": {"code": 0.75, "prose": 0.25}}],
    "data": {
        "component": "mix",
        "sources": {"code": {"component": "stdlib"}, "prose": {"component": "files", "paths": ["my|books"]}},
    },
    "optimizer": {"component": "adamw", "lr": 0.001},
    "scheduler": {"component": "wsdc", "warmup": "1%"},
    "loss": {"component": "cross_entropy"},
    "runtime": {"device": "auto", "precision": "fp32"},
}
LINES = [
    {"step": 6, "loss": 5.0, "tokens": 768, "time": 30.0},
    {"step": 6, "validation_loss": 4.75, "bits_per_byte": 2.5, "sparsity/0": 0.5, "sparsity/1": 0.75},
    {"step": 12, "loss": 4.0, "tokens": 1536, "time": 60.0},
    {"step": 12, "validation_loss": 3.75, "bits_per_byte": 1.5, "sparsity/0": 0.25, "sparsity/1": 0.5},
]


def model() -> Decoder:
    torch.manual_seed(0)
    mla = component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    ffn = component("ffn", "squared_relu", hidden_dim=32)
    sizes = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
    return plm(byte().vocab_size, attention=mla, ffn=ffn, **sizes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that nobody says more of."""
    directory = tmp_path_factory.mktemp("saved") / "lonely"
    save_model(model(), None, directory)
    byte().save(directory)
    return directory


def make_run(place: Path, saved: Path, **config: Any) -> Path:
    run = place / "runs" / "tiny" / "20250317-093000"
    for step in (6, 12):
        directory = run / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        for file in saved.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
    text = yaml.safe_dump({**CONFIG, **config})
    (run / "config.yaml").write_text(text)
    record = {
        "command": ["/home/someone/bin/plmtune", "run", "pretrain", "mix={code: 3, prose: 1}"],
        "status": "finished",
        "started": "2025-03-17T09:30:00Z",
        "ended": "2025-03-17T09:40:00Z",
        "git": {"commit": "abc123", "dirty": True},
        "versions": {"torch": "2.13.0"},
        "data": {"code": "f00d"},
        "attempts": [{"device": "NVIDIA H200", "host": "secret-host"}],
        "config": xxhash.xxh3_128_hexdigest(text.encode()),
    }
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (run / "curves.png").write_bytes(b"a picture")
    return run


@pytest.fixture
def run(tmp_path: Path, saved: Path) -> Path:
    return make_run(tmp_path, saved)


def of(model: Path, step: int | None = None, **changes: Any) -> dict[str, Any]:
    """What a result says of its model: a run where there is a step."""
    said = {"name": "m", "path": str(model), "digest": "0", "parameters": None, "dtype": "float32", "step": step}
    return {**said, "run": str(model) if step is not None else None, **changes}


def text_of(checkpoint: Path, *found: dict[str, Any], **options: Any) -> str:
    return write_card(checkpoint, found, **options).read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


class TestRun:
    def test_says_what_the_model_is_and_how_it_was_trained(self, run: Path) -> None:
        text = text_of(run)
        count = sum(p.numel() for p in model().parameters())
        assert f"| parameters | {count:,} " in text
        assert "| attention | mla (kv_lora_rank 16, " in text and "| ffn | squared_relu (hidden_dim 32) |" in text
        assert "| phase main | 12 steps, mixed of code 75.0%, prose 25.0% |" in text
        assert "| optimizer | adamw (lr 0.001) |" in text and "| tokens | 1,536 (1.54K) |" in text
        assert "| validation, bits per byte | 1.5000 |" in text
        assert "| hardware | NVIDIA H200 |" in text and "| time in steps | 60.0 seconds |" in text
        assert "| command | `plmtune run pretrain 'mix={code: 3, prose: 1}'` |" in text
        assert "abc123, with changes that were not committed" in text and "torch 2.13.0" in text

    def test_sparsity_is_that_of_the_latest_validation(self, run: Path) -> None:
        text = text_of(run)
        assert "37.5% on average" in text and "| 0 | 25.0% |" in text and "| 1 | 50.0% |" in text

    def test_an_earlier_checkpoint_has_the_numbers_of_its_own_step(self, run: Path) -> None:
        text = text_of(run / "checkpoints" / "step-00000006")
        assert "| validation, bits per byte | 2.5000 |" in text and "| tokens | 768 (768) |" in text
        assert "the run went on to step 12" in text

    def test_time_of_a_resumed_run_is_added_up(self, run: Path) -> None:
        again = [{"step": 8, "loss": 4.5, "time": 20.0}, {"step": 12, "loss": 4.0, "time": 90.0}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*LINES[:2], *again]))
        assert "| time in steps | 2.0 minutes |" in text_of(run)  # 30 seconds of one process, 90 of the other

    def test_curves_lie_beside_the_card(self, run: Path, tmp_path: Path) -> None:
        assert "](curves.png)" in text_of(run)
        (tmp_path / "out").mkdir()
        text_of(run, path=tmp_path / "out" / "card.md")
        assert (tmp_path / "out" / "curves.png").read_bytes() == b"a picture"

    def test_curves_are_drawn_where_there_are_none(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (run / "curves.png").unlink()
        monkeypatch.setattr(model_card, "draw_curves", lambda source, target: target.write_bytes(source.read_bytes()))
        text_of(run)
        assert (run / "curves.png").read_bytes() == (run / "metrics.jsonl").read_bytes()

    def test_hosts_and_folders_of_the_program_stay_private(self, run: Path) -> None:
        text = text_of(run)
        assert "secret-host" not in text and "/home/someone" not in text and "`plmtune run pretrain " in text

    def test_a_bar_in_a_name_cannot_break_a_table(self, run: Path) -> None:
        assert r"paths [my\|books]" in text_of(run)

    def test_a_run_that_stopped_is_said_to_have_stopped(self, run: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
        assert "had not finished" in text_of(run)

    def test_a_config_that_was_changed_afterwards_is_refused(self, run: Path) -> None:
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 7", "seed: 8"))
        with pytest.raises(UserError, match="not what the run began with"):
            write_card(run, [])
        assert not (run / "README.md").exists()


class TestData:
    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (
                {"component": "hub", "name": "org/text", "subset": "en", "split": "train", "revision": "v1/x"},
                "hub: the hub's dataset [org/text](https://huggingface.co/datasets/org/text/tree/v1%2Fx) "
                "(revision v1/x, split train, subset en)",
            ),
            (
                {"component": "preferences", "hub": "org/pairs", "paths": [], "subset": None},
                "preferences: the hub's dataset [org/pairs](https://huggingface.co/datasets/org/pairs)",
            ),
            (
                {"component": "mix", "sources": {"a": {"component": "conversations", "hub": "talk"}, "b": {
                    "component": "conversations", "paths": ["org/talk.jsonl"], "hub": None}}},
                "a: conversations: the hub's dataset [talk](https://huggingface.co/datasets/talk)",
            ),
        ],
    )  # fmt: skip
    def test_of_the_hub_is_a_link_and_files_are_files(
        self, tmp_path: Path, saved: Path, data: dict[str, Any], said: str
    ) -> None:
        text = text_of(make_run(tmp_path, saved, data=data, phases=[]))
        assert f"| data | {said} |" in text
        if "sources" in data:
            assert "| data | b: conversations (paths [org/talk.jsonl]) |" in text

    def test_a_phases_shares_are_those_that_it_draws(self, tmp_path: Path, saved: Path) -> None:
        phase = {"name": "main", "tokens": "384", "steps": None, "mix": {"code": 0.9, "prose": 0.1}}
        text = text_of(make_run(tmp_path, saved, phases=[phase]))  # 3 steps of 4 sequences
        assert "384 tokens, mixed of code 91.7% instead of 90.0%, prose 8.3% instead of 10.0% |" in text

    def test_a_base_of_the_hub_is_a_link(self, tmp_path: Path, saved: Path) -> None:
        text = text_of(make_run(tmp_path, saved, init_from="some-org/some_model@abc"))
        assert "from [some-org/some_model](https://huggingface.co/some-org/some_model/tree/abc)." in text

    def test_of_tasks_is_the_hubs_or_files(self, run: Path) -> None:
        entry, rows = task([0, 1])
        found = result("m", {
            "gsm8k": ({**entry, "data": "openai/gsm8k@v2 main"}, rows), "old": ({**entry, "data": "hellaswag"}, rows),
            "mine": ({**entry, "data": "json {'test': '/home/someone/a.json'}"}, rows),
        }, model=of(run, 12))  # fmt: skip
        text = text_of(run, found)
        link = "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k/tree/v2)"
        assert f"From the hub's dataset {link}: gsm8k (subset main)" in text
        assert "[hellaswag](https://huggingface.co/datasets/hellaswag): old" in text
        assert "mine was read from local files" in text and "/home/someone" not in text


EVIL = (
    "a\x1b[31m|b](javascript:x) ![i](data:y) <img src=x onerror=z> `c` [r]: javascript:x\n\n# H\n"
    "[r]\u202e*e* _f_ ~~g~~ \\"
)


class TestTextOfOthers:
    def rendered(self, text: str) -> list[Any]:
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
        return [*tokens, *(child for token in tokens for child in token.children or [])]

    def test_neither_leaves_its_place_nor_leads_anywhere(self, tmp_path: Path, saved: Path) -> None:
        entry, rows = task([0, 1])
        evil = {"name": EVIL, "mix": {EVIL: 1.0}, "steps": 2}
        run = make_run(
            tmp_path, saved, recipe=EVIL, name=EVIL, init_from=EVIL, phases=[evil],
            optimizer={"component": EVIL, EVIL: EVIL},
            data={"component": "mix", "sources": {EVIL: {"component": "hub", "name": EVIL, "revision": EVIL}, "b": {
                "component": "hub", "name": "a/b", "subset": EVIL, "revision": EVIL}}},
        )  # fmt: skip
        record = json.loads((run / "run.json").read_text())
        record |= {"status": EVIL, "command": [EVIL, EVIL], "versions": {EVIL: EVIL}, "git": {"commit": EVIL}}
        (run / "run.json").write_text(json.dumps(record))
        found = result("m", {EVIL: ({**entry, "data": EVIL}, rows)}, failed={EVIL: EVIL}, model=of(run, 12))
        other = make_run(tmp_path / "plain", saved)
        plain = text_of(other, result("m", {"t": (entry, rows)}, failed={"u": "v"}, model=of(other, 12)))
        text = text_of(run, found)
        assert "](javascript:" not in text and "\x1b" not in text and "\u202e" not in text
        tokens = self.rendered(text.split("---\n", 2)[2])
        links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
        assert links and all(link.startswith("https://") for link in links), links
        assert [token.attrs["src"] for token in tokens if token.type == "image"] == ["curves.png"]
        kinds = {token.type for token in tokens}
        assert not kinds & {"html_inline", "html_block", "em_open", "s_open"}
        headings = [sum(token.type == "heading_open" for token in found) for found in (tokens, self.rendered(plain))]
        assert headings[0] == headings[1]

    @given(st.text("ab\\`*_[](){}<>#+-.!|~&:\n\x1b\u202e ", max_size=30))
    def test_is_seen_as_it_is(self, text: str) -> None:
        shown = " ".join(text.split()).replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        lines = ["| x |", "|---|", f"| {escape(text)} |", "| end |"]
        rows = [token for token in self.rendered("\n".join(lines)) if token.type == "inline"]
        assert len(rows) == 3
        said = "".join(child.content for child in rows[1].children)
        assert all(child.type == "text" for child in rows[1].children)
        assert html.unescape(said) == html.unescape(shown)


class TestFrontMatter:
    def test_is_yaml_with_empty_fields_for_what_no_file_knows(self, run: Path) -> None:
        found = front_matter(text_of(run))
        assert found["license"] == "" and found["language"] == [] and "base_model" not in found
        assert found["tags"] == ["plmtune", "plm", "pretrain"] and found["pipeline_tag"] == "text-generation"

    def test_a_base_of_the_hub_is_named_and_a_local_one_is_left_to_fill_in(self, tmp_path: Path, saved: Path) -> None:
        hub = make_run(tmp_path / "a", saved, init_from="some-org/some-model")
        assert front_matter(text_of(hub))["base_model"] == "some-org/some-model"
        text = text_of(make_run(tmp_path / "b", saved, init_from=str(saved)))
        assert "base_model" not in front_matter(text) and "# base_model:  Fill in" in text


class TestModelDirectory:
    def test_without_a_run_the_card_says_that_it_knows_less(self, saved: Path, tmp_path: Path) -> None:
        text = text_of(saved, path=tmp_path / "card.md")
        assert "no run beside it" in text and "**Fill in:** data, steps, hardware." in text
        assert "# lonely" in text and "| layers | 2 |" in text
        assert "Sparsity" not in text and "Provenance" not in text

    def test_adapters_are_called_adapters(self, saved: Path, tmp_path: Path) -> None:
        tuned = model()
        lora(tuned, rank=4)
        save_adapter(tuned, tmp_path / "adapters", saved)
        text = text_of(tmp_path / "adapters")
        assert "they need their base" in text and "rank 4" in text and "| layers | 2 |" in text

    def test_adapters_without_their_base_do_not_guess_its_architecture(self, saved: Path, tmp_path: Path) -> None:
        tuned = model()
        lora(tuned, rank=4)
        save_adapter(tuned, tmp_path / "adapters", saved)
        config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
        gone = json.dumps(config | {"base_model_name_or_path": "/nowhere"})
        (tmp_path / "adapters" / "adapter_config.json").write_text(gone)
        text = text_of(tmp_path / "adapters")
        assert "not available" in text and "| layers | 2 |" not in text


class TestScores:
    def test_a_score_has_its_error_count_shots_and_version(self, run: Path) -> None:
        entry, rows = task([0, 1, 1, 1])
        found = result(
            "m", {"arc_easy": ({**entry, "documents": 2376}, rows)}, failed={"humaneval": "no data"}, model=of(run, 12)
        )
        text = text_of(run, found)
        assert "| arc_easy | 1.0 | 0 | 4 of 2,376 | acc ↑ | 0.7500 ± 0.2500 |" in text
        assert "Not measured: humaneval (no data)" in text and "by lm-eval 0.4.13" in text

    def test_files_in_place_of_the_hubs_data_are_named(self, run: Path) -> None:
        entry, rows = task([0, 1])
        found = result("m", {"t": ({**entry, "data": "test: /home/someone/arc.jsonl (beef)"}, rows)}, model=of(run, 12))
        assert "t was read from local files: test: arc.jsonl (beef)" in text_of(run, found)

    def test_scores_of_another_step_or_size_are_refused(self, run: Path) -> None:
        for key, value in (("step", 6), ("parameters", 5000)):
            with pytest.raises(UserError, match=f"{key} {value:,}, and this has"):
                write_card(run, [result("m", {}, model={**of(run, 12), key: value})])

    def test_scores_of_another_run_at_the_same_step_are_refused_with_their_file(
        self, run: Path, saved: Path, tmp_path: Path
    ) -> None:
        other = make_run(tmp_path / "other", saved)
        both = [result("m", {}, model=of(place, 12)) for place in (run, other)]
        with pytest.raises(UserError, match=rf"^b\.json holds scores of another model .*: of step 12 of {other}\. "):
            write_card(run, both, sources=[Path("a.json"), Path("b.json")])
        assert not (run / "README.md").exists()

    def test_a_run_and_a_folder_of_equal_size_do_not_share_scores(self, run: Path, saved: Path) -> None:
        for model, scores in ((run, of(saved)), (saved, of(run, 12)), (saved, of(run))):
            with pytest.raises(UserError, match="another model"):
                write_card(model, [result("m", {}, model=scores)], run / "card.md")
        assert "Result" not in text_of(saved, result("m", {}, model=of(saved)), path=run / "card.md")

    def test_a_run_is_known_by_any_way_to_it(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (run.parent / "latest").symlink_to(run)
        monkeypatch.chdir(run.parent)
        assert "| t |" in text_of(run, result("m", {"t": task([0, 1])}, model=of(Path("latest"), 12)))

    def test_scores_of_the_same_weights_are_taken_wherever_they_lay(self, run: Path, saved: Path) -> None:
        digest = model_digest(load_model(saved, dtype=torch.bfloat16))
        measured: dict[str, Any] = {"dtype": "bfloat16", "digest": digest}
        trained = {**measured, "digest": f"{digest} torch.bfloat16"}
        for scores in (of(Path("/gone/model"), **measured), of(Path("/gone/run"), 12, **trained)):
            assert "| t |" in text_of(run, result("m", {"t": task([0, 1])}, model=scores), overwrite=True)
        with pytest.raises(UserError, match="another model"):  # as numbers of another kind they are other weights
            write_card(run, [result("m", {}, model={**scores, "dtype": "float32"})], overwrite=True)

    def test_what_the_run_itself_measured_of_this_step_is_taken(self, run: Path) -> None:
        (run / "evaluations").mkdir()
        results.save(result("m", {"own": task([0, 1])}), run / "evaluations" / "step-00000012.json")
        assert "| own |" in text_of(run)
        assert "| own |" not in text_of(run / "checkpoints" / "step-00000006")

    def test_without_scores_the_section_is_left_to_fill_in(self, run: Path) -> None:
        assert "**Fill in:** not measured by tasks" in text_of(run)


class TestCommand:
    def test_a_card_that_is_there_stays_unless_it_may_be_replaced(self, run: Path) -> None:
        (run / "README.md").write_text("mine")
        with pytest.raises(UserError, match="--overwrite"):
            CliRunner().invoke(command, [str(run)], catch_exceptions=False)
        assert (run / "README.md").read_text() == "mine"
        done = CliRunner().invoke(command, [str(run), "--overwrite"], catch_exceptions=False)
        assert "places say Fill in" in done.output and (run / "README.md").read_text().startswith("---\n")

    def test_what_is_no_checkpoint_or_no_folder_is_a_sentence(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="There is no nowhere"):
            CliRunner().invoke(command, ["nowhere"], catch_exceptions=False)
        with pytest.raises(UserError, match="there is no folder"):
            CliRunner().invoke(command, [str(run), "--out", str(tmp_path / "a" / "b.md")], catch_exceptions=False)

    def test_a_file_with_scores_of_another_model_is_named(self, run: Path, tmp_path: Path) -> None:
        results.save(result("m", {}, model=of(tmp_path, 6)), tmp_path / "other.json")
        with pytest.raises(UserError, match=r"other\.json holds scores of another model"):
            CliRunner().invoke(command, [str(run), str(tmp_path / "other.json")], catch_exceptions=False)
