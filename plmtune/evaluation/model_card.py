"""Model cards in Hugging Face's Markdown, from the files of a run or a model directory.

The card states only facts from files; a person completes the parts that begin "Fill in:".
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from plmtune.errors import UserError
from plmtune.evaluation import result_table
from plmtune.evaluation import results as result_files
from plmtune.evaluation.card_training import CURVES, sparsity_section, training_section
from plmtune.evaluation.card_values import show_component, show_settings, show_value
from plmtune.evaluation.markdown import code, escape, hub_link, table
from plmtune.evaluation.model_facts import Run, Weights, base_of, family_of, is_of, read_run, read_weights
from plmtune.io.atomic import atomic_write, write_atomically
from plmtune.io.hub import model_of, parse
from plmtune.models import adapters, checkpoint_files
from plmtune.training.plot import draw_curves
from plmtune.units import show_bytes, show_count

_FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow")  # the datasets library's names for files


def write_card(
    checkpoint: str | Path,
    results: Sequence[Mapping[str, Any]],
    path: Path | None = None,
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> Path:
    """Write the card of a run, a checkpoint or a model directory, and its curves beside it.

    Args:
        checkpoint: a run directory stands for its newest checkpoint.
        results: of its evaluations; without any, the run's own result of this checkpoint.
        path: None: README.md in `checkpoint`.
        sources: the files of `results`, for messages.

    Returns:
        The path of the card.

    Raises:
        UserError: if there is no checkpoint, a result is of another one, or a file is there already.
    """
    directory = checkpoint_files.checkpoint_directory(checkpoint)
    if path is None and model_of(directory.resolve()):
        raise UserError(f"{checkpoint} is in the hub's cache. Name the card's file: --out FILE.md")
    path = path or Path(checkpoint) / "README.md"
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise UserError(f"{path} is there already. Name another file with --out, or give --overwrite.")
    run = read_run(directory)
    weights = read_weights(directory)
    parameters = None if adapters.holds_adapters(directory) else weights.parameters
    for result, source in zip_longest(results, sources):
        _refuse_another(result["model"], source, directory, run, parameters)
    found = [dict(result) for result in results] or (_own_results(run) if run else [])
    curves = _place_curves(run, path, overwrite) if run else False

    name = _name(directory, run)
    sections = [
        _front_matter(directory, run, weights),
        _introduction(name, directory, run, weights),
        _model(directory, weights),
        training_section(run, curves) if run else _unknown_training(),
        _evaluation(found),
        sparsity_section(run) if run else [],
        _use(directory, weights),
        _for_people(),
        _provenance(run, found),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"
    write_atomically(path, text, user_error=True)
    return path


def _own_results(run: Run) -> list[dict[str, Any]]:
    """Return the run's own result of this checkpoint."""
    path = result_files.step_file(run.path, run.step)
    return [result_files.load(path)] if path.is_file() else []


def _refuse_another(
    model: Mapping[str, Any], source: Path | None, directory: Path, run: Run | None, parameters: int | None
) -> None:
    """Raise UserError for the scores of another model than the card's."""
    differs = ""
    for what, ours, theirs in (
        ("step", run.step if run else None, model.get("step")),
        ("parameters", parameters, model.get("parameters")),
    ):
        if not differs and ours is not None and theirs is not None and ours != theirs:
            differs = f" ({what} {show_value(theirs)}, and this has {show_value(ours)})"
    if not differs and is_of(model, directory, run):
        return
    theirs = model.get("run") or model.get("path") or model.get("name")
    step = f"step {model['step']} of " if model.get("run") and model.get("step") is not None else ""
    raise UserError(
        f"{source or 'A result'} holds scores of another model than {directory}: of {step}{theirs!s:.200}{differs}. "
        "A card shows the scores of its own model only: leave the file out, or evaluate this model with plmtune eval."
    )


def _place_curves(run: Run, card: Path, overwrite: bool) -> bool:
    """Copy or draw the run's curves beside the card; False if there are none."""
    source, target = run.path / CURVES, card.absolute().parent / CURVES
    if source.resolve() == target.resolve() and source.is_file():
        return True
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already. Name another folder with --out, or give --overwrite.")
    if source.is_file():
        with atomic_write(target, user_error=True) as temporary:
            shutil.copyfile(source, temporary)
        return True
    if not any(entry.get("loss") is not None for entry in run.entries):
        return False
    draw_curves(run.path / "metrics.jsonl", target)
    return True


def _name(directory: Path, run: Run | None) -> str:
    if run is None:
        return checkpoint_files.model_name(directory)
    return f"{run.path.parent.name}-{run.path.name}, step {run.step:,}"


def _front_matter(directory: Path, run: Run | None, weights: Weights) -> list[str]:
    base = base_of(directory, run)
    hub = parse(base) if base is not None else None
    kind = "text-classification" if weights.is_reward_model else "text-generation"
    known = [family_of(directory), str(run.config.get("recipe")) if run else ""]
    tags = ["plmtune", *(tag for tag in known if re.fullmatch(r"[\w.-]{1,60}", tag, re.ASCII))]
    return [
        "---",
        "license: ''  # Fill in: for example apache-2.0",
        "language: []  # Fill in: for example [en, zh]",
        "library_name: plmtune",
        f"pipeline_tag: {kind}",
        yaml.safe_dump({"tags": tags}, allow_unicode=True).rstrip(),
        *([f"base_model: {hub.repository}"] if hub else []),
        *(["# base_model:  Fill in: the name on the hub of the base model"] if base and not hub else []),
        "---",
    ]


def _introduction(name: str, directory: Path, run: Run | None, weights: Weights) -> list[str]:
    family = family_of(directory)
    kind = "reward model" if weights.is_reward_model else "language model"
    if adapters.holds_adapters(directory):
        what = f"Adapters of {weights.parameters:,} parameters for a {kind}; they need their base."
    else:
        known = {"plm": "PLM ([arXiv 2503.12167](https://arxiv.org/abs/2503.12167))", "llama": "Llama"}
        of = f" of the family {known.get(family, escape(family))}" if family else ""
        what = f"A {kind}{of} with {weights.parameters:,} parameters."
    lines = [f"# {escape(name)}", "", what]
    if run is None:
        return lines
    base, recipe = base_of(directory, run), run.config.get("recipe")
    hub = parse(base) if base else None
    link = hub_link(hub.repository, hub.revision) if hub else None
    start = f"from {link or code(base)}" if base else "from random weights"
    lines[-1] += f" Trained with plmtune's recipe {code(recipe)}, {start}."
    status = run.record.get("status")
    if status != "finished":
        lines += [
            "",
            f"**The run had not finished when this card was written** (status: {escape(status or 'unknown')}).",
        ]
    if run.last_step > run.step:
        lines += ["", f"This is the checkpoint of step {run.step:,}; the run went on to step {run.last_step:,}."]
    return lines


def _model(directory: Path, weights: Weights) -> list[str]:
    rows = []
    if adapters.holds_adapters(directory):
        config = checkpoint_files.read_json(directory, checkpoint_files.ADAPTER_CONFIG)
        keys = {"r": "rank", "lora_alpha": "alpha", "use_dora": "DoRA", "target_modules": "layers"}
        rows += [("adapters", show_settings({new: config.get(old) for old, new in keys.items()}))]
    rows += [
        ("parameters", f"{weights.parameters:,} ({show_count(weights.parameters)})"),
        ("weights", f"{', '.join(weights.dtypes)}, {show_bytes(weights.bytes)}"),
    ]
    try:
        description = adapters.read_model_config(directory)
    except UserError:
        rows.append(("architecture", "that of the base, which was not available when this card was written"))
        description = {}
    plain = {key: value for key, value in description.items() if not isinstance(value, dict) and key != "component"}
    names = {"max_seq_len": "context, in tokens", "vocab_size": "vocabulary, rows", "embed_dim": "width"}
    names |= {"num_layers": "layers", "num_heads": "heads", "tie_embeddings": "embeddings tied to the head"}
    rows += [(names[key], show_value(plain[key])) for key in names if key in plain]
    rows += [(key, show_component(value)) for key, value in description.items() if isinstance(value, dict)]
    return ["## Model", "", *table(("", ""), rows)]


def _unknown_training() -> list[str]:
    return ["## Training", "", "This model directory has no run beside it, so its files do not describe the "
            "training.", "", "**Fill in:** data, steps, hardware."]  # fmt: skip


def _evaluation(results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["## Evaluation"]
    if not results:
        return [*lines, "", "**Fill in:** not measured by tasks (`plmtune eval`, then `plmtune card` with its result)."]
    for number, result in enumerate(results, start=1):
        if len(results) > 1:
            lines += ["", f"### Result {number}"]
        if result["status"] != "complete":
            lines += ["", "**Not complete:** the evaluation was interrupted."]
        rows = []
        for line in result_table.lines([result]):
            one = result_table.score(result, line)
            if one is None:
                continue
            entry = result_table.entry_of(result, line.task)
            documents = entry.get("documents")
            part = f" of {show_value(documents)}" if isinstance(documents, int) and documents != one.samples else ""
            label = result_table.metric_label(line, one.higher_is_better)
            shots = "?" if entry.get("num_fewshot") is None else str(entry["num_fewshot"])
            version = "?" if entry.get("version") is None else str(entry["version"])
            rows.append(
                (line.task, version, shots, show_value(one.samples) + part, label, result_table.show_score(one))
            )
        lines += ["", *table(("task", "version", "shots", "documents", "metric", "score ± standard error"), rows)]
        lines += [f"\nNot measured: {escape(task)} ({escape(reason)})" for task, reason in result["failed"].items()]
        lines += ["", _how(result), *_task_data(result)]
    return lines


def _how(result: Mapping[str, Any]) -> str:
    found, settings = result["environment"], result["settings"]
    parts = [f"Measured {str(result.get('started', ''))[:10]} by lm-eval {found.get('lm_eval', '(version unknown)')}"]
    parts += [f"weights in {found['precision']}"] if found.get("precision") else []
    parts += [f"on {found['device_name']}"] if found.get("device_name") else []
    # `tasks` are the table's rows; unset settings are lm-eval's defaults.
    given = {key: value for key, value in settings.items() if key != "tasks" and value not in (None, False)}
    return escape(", ".join(parts) + (f"; settings: {show_settings(given)}." if given else "."))


def _task_data(result: Mapping[str, Any]) -> list[str]:
    """Return the origins of the tasks' documents: datasets of the hub, and files without their folders."""
    local: list[str] = []
    of_hub: dict[str, list[str]] = {}
    for task, entry in result["tasks"].items():
        data = str(entry.get("data") or "hub")
        name, _, subset = data.partition(" ")
        name, _, revision = name.partition("@")
        if data == "hub" or not name:
            continue
        link = None if name in _FILE_FORMATS else hub_link(name, revision, dataset=True)
        if link is None or name.endswith(":"):
            files = re.sub(r"[^\s,]*/", "", data)
            local.append(f"\n{escape(task)} was read from local files: {escape(files)}")
        else:
            of_hub.setdefault(link, []).append(f"{task} (subset {subset})" if subset else task)
    return [*local, *(f"\nFrom the hub's dataset {link}: {escape(', '.join(tasks))}" for link, tasks in of_hub.items())]


def _use(directory: Path, weights: Weights) -> list[str]:
    if weights.is_reward_model:
        return ["## Use", "", "It scores answers: `plmtune run aries reward.path=DIRECTORY` takes it as a judge."]
    lines = ["## Use", "", "```python", "import plmtune", "", 'model, tokenizer = plmtune.load("DIRECTORY")', "```", ""]
    lines.append('    plmtune generate DIRECTORY --prompt "..."')
    name = "tokenizer_config.json"
    if (directory / name).is_file() and checkpoint_files.read_json(directory, name).get("chat_template"):
        lines.append("    plmtune chat DIRECTORY")
    if adapters.holds_adapters(directory):
        lines += ["", "The adapters find their base where `adapter_config.json` says; `plmtune merge DIRECTORY OUT` "
                  "makes one plain model of both."]  # fmt: skip
    return lines


def _for_people() -> list[str]:
    return [
        "## Intended use and limits",
        "",
        "**Fill in:** what it is for, and what it is not for.",
        "",
        "**Fill in:** known weaknesses, biases and risks.",
        "",
        "## Licence",
        "",
        "**Fill in:** licence of the weights, and licences of the training data.",
        "",
        "**Fill in:** who to ask, and how to cite.",
    ]


def _provenance(run: Run | None, results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    if run is not None:
        versions = run.record.get("versions")
        rows += [
            ("training began", show_value(run.record.get("started"))),
            ("training ended", show_value(run.record.get("ended"))),
            ("git state of the training", _git(run.record.get("git"))),
            ("versions of the training", show_settings(versions) if isinstance(versions, dict) else "unknown"),
        ]
        data = run.record.get("data")
        if isinstance(data, dict) and data:
            rows.append(("fingerprints of the data", show_settings(data)))
    for result in results:
        rows.append(("git state of the evaluation", _git(result.get("git"))))
        rows.append(("weights that were evaluated", show_value(result["model"].get("digest"))))
    if not rows:
        return []
    note = "Commands and paths above are as they were on the machine of the run: remove what must not be public."
    return ["## Provenance", "", *table(("", ""), [row for row in rows if row[1] != "unknown"]), "", note]


def _git(state: Any) -> str:
    if not isinstance(state, dict):
        return "unknown"
    return f"{state.get('commit')}" + (", with changes that were not committed" if state.get("dirty") else "")
