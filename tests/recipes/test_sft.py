"""Supervised fine-tuning, as a person drives it."""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runs import metrics, weights
from safetensors.torch import load_file, save_file
from tuning import SFT, refusal, run, stop_in

import plmtune
from plmtune.config import compose, typed_config
from plmtune.errors import UserError
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.models.hf import save_model
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import Message
from plmtune.training.preflight import choose_seq_len
from plmtune.training.resume_checks import refuse_other_config

TALK = "{component: conversations, paths: [talk.jsonl]}"
TWO = ("data=mix", f"data.sources={{a: {TALK}, b: {TALK}}}")


def recipe() -> Any:
    return importlib.import_module("plmtune.recipes.sft").Sft


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_no_run_starts_from_weights_that_are_not_finite(base: Path, name: str) -> None:
    held = load_file(base / "base/model.safetensors")
    held["model.norm.weight"][0] = math.inf
    save_file(held, base / "base/model.safetensors")
    assert refusal(name, "run_dir=r").startswith("init_from=base: its weights are not finite (norm.weight)")
    assert not (base / "r").exists()


class TestLearning:
    def test_loss_falls_and_the_model_says_what_it_was_taught(self, base: Path, curves: None) -> None:
        run("sft", "run_dir=r", "phases=[{name: main, steps: 40}]", "optimizer.lr=1e-2", "global_batch_size=8")
        entries = metrics(base / "r")
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        assert losses[-1] < 0.3 * losses[0]
        assert [entry for entry in entries if "validation_loss" in entry]
        model, tokenizer = plmtune.load(base / "r")
        template = find_template(None, tokenizer)
        ids = template.encode_prompt((Message("user", "What is path number 0?"),)).tolist()
        with torch.no_grad():
            first = int(model(torch.tensor([ids]))[0, -1].argmax())
        assert tokenizer.decode([first]) == "The"
        assert (base / "r" / "curves.png").stat().st_size > 10_000

    def test_the_loss_is_the_mean_over_answers_alone(self, base: Path) -> None:
        held = load_file(base / "base/model.safetensors")
        held["model.embed_tokens.weight"] *= 30  # logits far apart: other tokens have another mean
        save_file(held, base / "base/model.safetensors")
        model, tokenizer = plmtune.load(base / "base")
        template = find_template(None, tokenizer)
        answers, others = [], []
        for line in (base / "talk.jsonl").read_text().splitlines():
            messages = tuple(Message(**message) for message in json.loads(line)["messages"])
            ids, trained = template.encode(messages, "all")
            tokens = torch.from_numpy(ids).long()
            with torch.no_grad():
                nats = -model(tokens[None])[0].log_softmax(-1)
            for place in range(1, len(ids)):
                (answers if trained[place] else others).append(float(nats[place - 1, tokens[place]]))
        mean = sum(answers) / len(answers)
        assert abs((sum(answers) + sum(others)) / (len(answers) + len(others)) - mean) > 0.02 * mean
        # One step holds all rows.
        run("sft", "run_dir=r", "phases=[]", "epochs=1", "optimizer.lr=0", "chat.holdout=0", "global_batch_size=64",
            "micro_batch_size=16")  # fmt: skip
        assert [entry["loss"] for entry in metrics(base / "r")] == [pytest.approx(mean, rel=1e-5)]

    @pytest.mark.parametrize("peft", ["null", "lora"])
    def test_z_loss_is_a_mean_over_the_same_tokens(self, base: Path, peft: str) -> None:
        model, tokenizer = plmtune.load(base / "base")
        template, found = find_template(None, tokenizer), []
        for line in (base / "talk.jsonl").read_text().splitlines():
            messages = tuple(Message(**message) for message in json.loads(line)["messages"])
            ids, trained = template.encode(messages, "all")
            with torch.no_grad():
                log_z = model(torch.from_numpy(ids).long()[None])[0].logsumexp(-1)
            found += [float(log_z[place - 1]) ** 2 for place in range(1, len(ids)) if trained[place]]
        losses = []
        for z_loss, micro in ((0.0, 16), (0.01, 2)):  # whatever a micro-batch holds of them
            run("sft", f"run_dir=r{micro}", "phases=[]", "epochs=1", "optimizer.lr=0", "chat.holdout=0", f"peft={peft}",
                "global_batch_size=64", f"micro_batch_size={micro}", f"loss.z_loss={z_loss}")  # fmt: skip
            losses += [entry["loss"] for entry in metrics(base / f"r{micro}")]
        assert losses[1] - losses[0] == pytest.approx(0.01 * sum(found) / len(found), rel=1e-4)

    def test_phases_have_their_own_mix_and_budget(self, base: Path) -> None:
        phases = "phases=[{name: general, steps: 2, mix: {b: 1}}, {name: domain, steps: 2, mix: {a: 1}}]"
        run("sft", *TWO, phases, "run_dir=r", "seq_len=160", "chat.truncation=drop")
        entries = [entry for entry in metrics(base / "r") if "phase" in entry]
        assert [entry["phase"] for entry in entries] == ["general", "general", "domain", "domain"]

    def test_the_refinement_objective_takes_pairs(self, base: Path) -> None:
        score = run("sft", "loss=sft_refine", "data=preferences", "data.paths=[pairs.jsonl]", "seq_len=160")
        assert score > 0


class TestResuming:
    @pytest.mark.parametrize(
        "extra",
        [(), ("peft=lora", "peft.dropout=0.1"), ("phases=[]", "epochs=1.5"), ("phases=[]", "epochs=2", *TWO)],
        ids=["all", "lora", "epochs", "two sources"],
    )
    def test_a_stopped_run_resumes_bit_by_bit(
        self, base: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
    ) -> None:
        whole = undisturbed("sft", *extra)
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit) as stopped:
                run("sft", "run_dir=cut", *extra)
        assert stopped.value.code == 75
        assert len([entry for entry in metrics(base / "cut") if "loss" in entry]) == 3
        run("sft", "run_dir=cut", "resume=true", *extra)
        assert weights(base / "cut") == weights(whole)
        assert metrics(base / "cut") == metrics(whole)

    def test_a_resume_needs_not_name_what_the_run_took_over(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit):
                run("sft", "run_dir=cut")
        (base / "base").rename(base / "moved")  # a run of full weights no longer needs its origin
        (base / "base").mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (base / "base" / file).write_bytes((base / "moved" / file).read_bytes())
        run("sft", "run_dir=cut", "resume=true", "init_from=null")
        assert [entry for entry in metrics(base / "cut") if "loss" in entry][-1]["step"] == 6


class TestSequenceLength:
    def test_without_one_it_is_the_context_of_a_model_that_reads_no_more(
        self, base: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("sft", "seq_len=null", "run_dir=r", "phases=[{name: main, steps: 1}]")
        saved = typed_config.load_config(base / "r/config.yaml")
        assert saved.seq_len == saved.model.settings["max_seq_len"] < 2048
        assert f"seq_len={saved.seq_len}, as the model reads no more tokens at once" in capsys.readouterr().err
        now = [text for text in SFT if not text.startswith(("seq_len", "phases"))] + ["phases=[{name: main, steps: 1}]"]
        refuse_other_config(base / "r", saved, compose.compose("sft", (), [*now, "seq_len=null"]))

    @pytest.mark.parametrize(("context", "seq_len"), [(512, 512), (4096, 2048), (None, 2048)])
    def test_a_longer_context_is_not_filled(self, context: int | None, seq_len: int) -> None:
        model = SimpleNamespace(max_seq_len=context) if context else None
        assert choose_seq_len(None, model, shown=False) == seq_len

    def test_one_that_was_asked_for_is_refused_where_it_exceeds_the_context(self, base: Path) -> None:
        assert "key seq_len: 2048 exceeds the model's max_seq_len" in refusal("sft", "seq_len=2048", "run_dir=r")


class TestWhatIsSaidFirst:
    @pytest.mark.parametrize("name", ["sft", "dpo", "aries"])
    def test_missing_data_are_named_before_a_model_is_looked_for(
        self, base: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "plmtune.training.launcher.choose_init_checkpoint", lambda *_, **__: pytest.fail("a model was looked for")
        )
        said = refusal(name, "data.paths=[nowhere.jsonl]", "init_from=null")
        assert "There is no file nowhere.jsonl" in said


class TestEpochs:
    def test_an_epoch_is_each_row_once_and_the_schedule_ends_with_the_last(self, base: Path) -> None:
        one = ["phases=[]", "global_batch_size=1", "micro_batch_size=1", "scheduler=linear", "scheduler.warmup=0"]
        quiet = ["validation.every=0", "checkpoint.every=0", "scheduler.final_factor=0.5"]
        steps = {}
        for epochs in (1, 1.5):
            run("sft", f"run_dir=r{epochs}", f"epochs={epochs}", *one, *quiet)
            logged = [entry for entry in metrics(base / f"r{epochs}") if "loss" in entry]
            steps[epochs] = logged[-1]["step"]
            assert 0.5 <= logged[-1]["lr"] / logged[0]["lr"] < 0.6
        rows = steps[1]
        assert 5 < rows < 40  # packed
        assert steps[1.5] == math.ceil(1.5 * rows)
        run("sft", "run_dir=short", "epochs=1", *one, *quiet, f"global_batch_size={rows - 1}")
        (entry, last) = (entry for entry in metrics(base / "short") if "loss" in entry)
        assert last["tokens"] * (rows - 1) == entry["tokens"] * rows  # the last step had one row

    def test_every_row_of_two_sources_is_drawn_so_often(self, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run("sft", "phases=[]", "epochs=2", *TWO, "run_dir=r", "validation.every=0", "checkpoint.every=0")
        said = capsys.readouterr().err
        assert said.count("seen 2.00 times") == 2

    def test_without_epochs_and_phases_it_is_three_and_the_plan_says_so(
        self, base: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("sft", "phases=[]", dry_run=True)
        assert "3 epochs: the number of steps follows from the data" in capsys.readouterr().out

    @pytest.mark.parametrize("epochs", ["0", "-1", "nan", "inf"])
    def test_impossible_epochs_are_refused(self, base: Path, epochs: str) -> None:
        assert "key epochs" in refusal("sft", "phases=[]", f"epochs={epochs}", "run_dir=r")
        assert not (base / "r").exists()

    def test_epochs_beside_phases_are_refused(self, base: Path) -> None:
        assert "epochs: is 2, and phases says" in refusal("sft", "epochs=2", "run_dir=r")

    @pytest.mark.parametrize("settings", [("sft", "phases=[]", "epochs=1"), ("dpo", "epochs=1")], ids=["sft", "dpo"])
    def test_a_schedule_longer_than_the_data_is_refused_before_anything_is_made(
        self, base: Path, settings: tuple[str, ...]
    ) -> None:
        assert "warmup (500 steps) exceeds" in refusal(*settings, "scheduler.warmup=500", "run_dir=r")
        assert not (base / "r").exists()


class TestAdapters:
    @pytest.mark.parametrize("peft", ["lora", "qlora", "dora"])
    def test_a_checkpoint_holds_adapters_alone_and_loads_merged(self, base: Path, peft: str) -> None:
        run("sft", f"peft={peft}", "peft.rank=4", "run_dir=r", "optimizer.lr=1e-2")
        directory = checkpoint_directory(base / "r")
        names = {path.name for path in directory.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
        assert "model.safetensors" not in names
        before, _ = plmtune.load(base / "base")
        after, _ = plmtune.load(base / "r")
        changed = {
            name.split(".")[-2]
            for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
            if not torch.equal(old, new)
        }
        assert "q_proj" in changed
        assert not changed & {"tok_embeddings", "attention_norm", "norm"}

    def test_the_next_stage_starts_from_merged_adapters(self, base: Path) -> None:
        run("sft", "peft=lora", "run_dir=first", "optimizer.lr=1e-2")
        run("sft", "init_from=first", "run_dir=second", "phases=[{name: main, steps: 1}]", "optimizer.lr=0")
        first, _ = plmtune.load(base / "first")
        second, _ = plmtune.load(base / "second")
        for old, new in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.allclose(old, new, atol=1e-6)

    def test_another_base_in_its_place_is_refused(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit):
                run("sft", "peft=lora", "run_dir=cut")
        model, _ = plmtune.load(base / "base")
        model.norm.weight.data *= 1.01
        save_model(model, None, base / "base")
        with pytest.raises(UserError, match="no longer holds the base weights of the adapters"):
            run("sft", "peft=lora", "run_dir=cut", "resume=true")


class TestSaving:
    def test_the_template_that_was_learned_is_saved_with_the_model(self, base: Path) -> None:
        own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        own += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        (base / "own.jinja").write_text(own)
        run("sft", "chat.template=own.jinja", "run_dir=r", "phases=[{name: main, steps: 1}]")
        _, tokenizer = plmtune.load(base / "r")
        assert tokenizer.chat_template == own


class TestMistakes:
    def test_rows_that_cannot_be_used_are_counted_with_the_first_place(self, base: Path) -> None:
        path = base / "talk.jsonl"
        rows = path.read_text().splitlines()
        rows[7] = json.dumps({"messages": [{"role": "user", "content": "And?"}]})
        rows[9] = json.dumps({"messages": [{"role": "user", "content": "So?"}]})
        path.write_text("\n".join(rows) + "\n")
        said = refusal("sft")
        assert "talk.jsonl, line 8" in said
        assert "2 rows cannot be used" in said
        assert "chat.skip_bad=true" in said
        assert not (base / "runs").exists()
        run("sft", "chat.skip_bad=true", "run_dir=r")

    def test_columns_that_nothing_reads_are_counted(self, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
        path = base / "talk.jsonl"
        rows = [json.loads(line) | {"id": number} for number, line in enumerate(path.read_text().splitlines())]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run("sft", "run_dir=r", "phases=[{name: main, steps: 1}]")
        assert "conversations: columns not used: id (40 rows)" in " ".join(capfd.readouterr().err.split())

    def test_nothing_left_to_train_on_is_said_with_the_reasons(self, base: Path) -> None:
        said = refusal("sft", "seq_len=16")
        assert "none of its 40 conversations can be trained on" in said
        assert "longer than seq_len" in said

    def test_text_and_pairs_are_no_conversations(self, base: Path) -> None:
        assert "plain text" in refusal("sft", "data=stdlib")
        assert "pairs" in refusal("sft", "data=preferences", "data.paths=[pairs.jsonl]")

    def test_a_preference_loss_belongs_elsewhere(self, base: Path) -> None:
        takes = "dpo is not for this recipe, which takes cross_entropy, forward_kl, reverse_kl, jsd, sft_refine"
        assert takes in refusal("sft", "loss=dpo")

    def test_another_model_is_refused_by_the_key_that_differs(self, base: Path) -> None:
        assert "embed_dim=64, this run 128" in refusal("sft", "model=plm_demo")

    def test_another_vocabulary_is_refused(self, base: Path) -> None:
        assert "vocab_size=4096, this run 257" in refusal("sft", "tokenizer=byte")

    def test_nothing_to_start_from_says_what_to_run(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        said = refusal("sft", "init_from=null")
        assert "no finished pretrain run" in said
        assert "plmtune run demo" in said
        assert "init_from=DIR" in said
