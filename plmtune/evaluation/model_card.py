"""A model card: what a run's or a model directory's own files say of a model, in Hugging Face's Markdown.

Nothing is claimed that no file says. What only a person can know stands there as "Fill in:".
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from plmtune.data.order import show_mix
from plmtune.errors import UserError
from plmtune.evaluation import results as result_files
from plmtune.evaluation.markdown import Markdown, code, escape, hub_link, table
from plmtune.evaluation.model_facts import Run, Weights, base_of, family_of, is_of, read_run, read_weights
from plmtune.io.atomic import atomic_write
from plmtune.io.hub import model_of, parse
from plmtune.models import adapters, checkpoint_files
from plmtune.training.plot import draw_curves, sparsity_layers
from plmtune.units import parse_count, show_bytes, show_count

CURVES = "curves.png"
_FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow")  # the datasets library's names for files
# A validation's numbers that the card shows, with what they are.
_MEASURED = {
    "validation_loss": "validation loss",
    "bits_per_byte": "validation, bits per byte",
    "validation/accuracy": "held-out pairs whose chosen answer is preferred",
    "validation/margin": "margin of rewards on held-out pairs",
}
_ROUND = {"direct": "reward of direct answers after the rounds", "refined": "reward of refined answers after them"}


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
        results: of its evaluations; with none, what the run itself measured of this checkpoint.
        path: None: README.md in `checkpoint`.
        sources: the files that `results` are from, for what is said of them.

    Returns:
        Where it is.

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
        _training(run, curves) if run else _unknown_training(),
        _evaluation(found),
        _sparsity(run) if run else [],
        _use(directory, weights),
        _for_people(),
        _provenance(run, found),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"
    with atomic_write(path, user_error=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _own_results(run: Run) -> list[dict[str, Any]]:
    """What the run measured of this very checkpoint while it trained."""
    path = result_files.step_file(run.path, run.step)
    return [result_files.load(path)] if path.is_file() else []


def _refuse_another(
    model: Mapping[str, Any], source: Path | None, directory: Path, run: Run | None, parameters: int | None
) -> None:
    """Refuse the scores of another model than the card's, whatever is alike in both."""
    told = ""
    for what, ours, theirs in (
        ("step", run.step if run else None, model.get("step")),
        ("parameters", parameters, model.get("parameters")),
    ):
        if not told and ours is not None and theirs is not None and ours != theirs:
            told = f" ({what} {_show(theirs)}, and this has {_show(ours)})"
    if not told and is_of(model, directory, run):
        return
    theirs = model.get("run") or model.get("path") or model.get("name")
    step = f"step {model['step']} of " if model.get("run") and model.get("step") is not None else ""
    raise UserError(
        f"{source or 'A result'} holds scores of another model than {directory}: of {step}{theirs!s:.200}{told}. "
        "A card shows the scores of its own model only: leave the file out, or evaluate this model with plmtune eval."
    )


def _place_curves(run: Run, card: Path, overwrite: bool) -> bool:
    """Have the run's curves beside the card; False if there are none to draw."""
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
        return checkpoint_files.name_of(directory)
    return f"{run.path.parent.name}-{run.path.name}, step {run.step:,}"


def _front_matter(directory: Path, run: Run | None, weights: Weights) -> list[str]:
    base = base_of(directory, run)
    hub = parse(base) if base is not None else None
    kind = "text-classification" if weights.is_reward_model else "text-generation"
    told = [family_of(directory), str(run.config.get("recipe")) if run else ""]
    tags = ["plmtune", *(tag for tag in told if re.fullmatch(r"[\w.-]{1,60}", tag, re.ASCII))]
    return [
        "---",
        "license: ''  # Fill in: for example apache-2.0",
        "language: []  # Fill in: for example [en, zh]",
        "library_name: plmtune",
        f"pipeline_tag: {kind}",
        yaml.safe_dump({"tags": tags}, allow_unicode=True).rstrip(),
        *([f"base_model: {hub.repository}"] if hub else []),
        *(["# base_model:  Fill in: the name on the hub of what this was trained from"] if base and not hub else []),
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
        rows += [("adapters", _settings({new: config.get(old) for old, new in keys.items()}))]
    rows += [
        ("parameters", f"{weights.parameters:,} ({show_count(weights.parameters)})"),
        ("weights", f"{', '.join(weights.dtypes)}, {show_bytes(weights.bytes)}"),
    ]
    try:
        description = adapters.read_model_config(directory)
    except UserError:
        rows.append(("architecture", "that of the base, which was not at hand when this card was written"))
        description = {}
    plain = {key: value for key, value in description.items() if not isinstance(value, dict) and key != "component"}
    names = {"max_seq_len": "context, in tokens", "vocab_size": "vocabulary, rows", "embed_dim": "width"}
    names |= {"num_layers": "layers", "num_heads": "heads", "tie_embeddings": "embeddings tied to the head"}
    rows += [(names[key], _show(plain[key])) for key in names if key in plain]
    rows += [(key, _component(value)) for key, value in description.items() if isinstance(value, dict)]
    return ["## Model", "", *table(("", ""), rows)]


def _training(run: Run, curves: bool) -> list[str]:
    config = run.config
    rows: list[tuple[str, str]] = [("recipe", f"{config.get('recipe')}, config {config.get('name')}")]
    command = run.record.get("command")
    if isinstance(command, list) and command:
        rows.append(("command", code(shlex.join([Path(str(command[0])).name, *map(str, command[1:])]))))
    rows += [("data", text) for text in _data(config.get("data"))]
    for phase in config.get("phases") or []:
        length = f"{_show(phase['tokens'])} tokens" if phase.get("tokens") else f"{_show(phase.get('steps'))} steps"
        mix = _mix(phase, config)
        rows.append((f"phase {phase.get('name')}", length + (f", mixed of {mix}" if mix else "")))
    if config.get("rounds"):
        rows.append(("rounds", f"{_show(config['rounds'])}, of {_settings(config.get('generation') or {})}"))
    rows.append(("steps", _show(run.step)))
    if (tokens := run.latest("tokens")) is not None:
        rows.append(("tokens", f"{tokens:,} ({show_count(tokens)})"))
    unit = "pairs" if config.get("recipe") == "preference" else "sequences"
    rows.append(("batch", f"{_show(config.get('global_batch_size'))} {unit} of {_show(config.get('seq_len'))} tokens"))
    for key in ("loss", "optimizer", "scheduler", "peft", "reward"):
        if isinstance(config.get(key), dict):
            rows.append((key, _component(config[key])))
    if config.get("max_grad_norm"):
        rows.append(("gradient norm", f"clipped at {_show(config['max_grad_norm'])}"))
    rows.append(("seed", _show(config.get("seed"))))
    rows += _machine(run)
    for key, name in (_MEASURED | _ROUND).items():
        if (value := run.latest(key)) is not None:
            of = f" (nats a {'pair' if unit == 'pairs' else 'token'})" if key == "validation_loss" else ""
            rows.append((name + of, f"{value:.4f}"))
    if (loss := run.latest("loss")) is not None:
        rows.append(("training loss, last logged", f"{loss:.4f}"))
    lines = ["## Training", "", *table(("", ""), rows)]
    return [*lines, "", f"![loss and learning rate of the run]({CURVES})"] if curves else lines


def _mix(phase: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The shares that a phase draws of its sources."""
    weights = phase.get("mix") or {}
    try:
        steps, sequences = phase.get("steps"), int(config["global_batch_size"])
        if steps is None:
            steps = math.ceil(parse_count(phase["tokens"], "tokens") / (sequences * int(config["seq_len"])))
        return show_mix({str(name): float(weight) for name, weight in weights.items()}, int(steps) * sequences)
    except (KeyError, TypeError, ValueError, UserError):  # of another recipe
        return _settings(weights)


def _unknown_training() -> list[str]:
    return ["## Training", "", "This model directory has no run beside it, so that its files do not say how it was "
            "trained.", "", "**Fill in:** data, steps, hardware."]  # fmt: skip


def _machine(run: Run) -> list[tuple[str, str]]:
    attempts = [one for one in run.record.get("attempts") or [] if isinstance(one, dict)]
    devices = dict.fromkeys(str(one["device"]) for one in attempts if one.get("device"))
    runtime = run.config.get("runtime") or {}
    rows = [("hardware", ", ".join(devices) or "not recorded")]
    wanted = {key: runtime.get(key) for key in ("device", "precision", "strategy")}
    rows.append(("asked of the hardware", _settings(wanted)))
    seconds = last = 0.0
    for entry in run.entries:
        if isinstance(now := entry.get("time"), int | float):  # seconds of one process: a resumed run begins anew
            seconds += now if now < last else now - last
            last = now
    if seconds:
        rows.append(("time in steps", _duration(seconds)))
    return rows


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.1f} seconds"


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
        for line in result_files.lines([result]):
            one = result_files.score(result, line)
            if one is None:
                continue
            entry = result_files.entry_of(result, line.task)
            count = _show(one.samples) + (f" of {_show(entry['documents'])}" if _is_part(one.samples, entry) else "")
            label = result_files.metric_label(line, one.higher_is_better)
            shots = "?" if entry.get("num_fewshot") is None else str(entry["num_fewshot"])
            version = "?" if entry.get("version") is None else str(entry["version"])
            rows.append((line.task, version, shots, count, label, result_files.show_score(one)))
        lines += ["", *table(("task", "version", "shots", "documents", "metric", "score ± standard error"), rows)]
        lines += [f"\nNot measured: {escape(task)} ({escape(reason)})" for task, reason in result["failed"].items()]
        lines += ["", _how(result), *_task_data(result)]
    return lines


def _how(result: Mapping[str, Any]) -> str:
    found, settings = result["environment"], result["settings"]
    parts = [f"Measured {str(result.get('started', ''))[:10]} by lm-eval {found.get('lm_eval', '(version unknown)')}"]
    parts += [f"weights in {found['precision']}"] if found.get("precision") else []
    parts += [f"on {found['device_name']}"] if found.get("device_name") else []
    # `tasks` are the table's rows; what is not set is lm-eval's own.
    given = {key: value for key, value in settings.items() if key != "tasks" and value not in (None, False)}
    return escape(", ".join(parts) + (f"; settings: {_settings(given)}." if given else "."))


def _task_data(result: Mapping[str, Any]) -> list[str]:
    """Where the tasks' documents are from: datasets of the hub, and files without the folders of their machine."""
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
            checkpoint_files = re.sub(r"[^\s,]*/", "", data)
            local.append(f"\n{escape(task)} was read from local files: {escape(checkpoint_files)}")
        else:
            of_hub.setdefault(link, []).append(f"{task} (subset {subset})" if subset else task)
    return [*local, *(f"\nFrom the hub's dataset {link}: {escape(', '.join(tasks))}" for link, tasks in of_hub.items())]


def _is_part(samples: int, entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("documents"), int) and entry["documents"] != samples


def _sparsity(run: Run) -> list[str]:
    layers = sparsity_layers(run.entries)
    if not layers:
        return []
    values = [(key, run.latest(key)) for key in layers]
    known = [value for _, value in values if value is not None]
    if not known:
        return []
    rows = [(key.partition("/")[2], "-" if value is None else f"{value:.1%}") for key, value in values]
    return [
        "## Sparsity",
        "",
        f"Zeros among the activations of the squared ReLU, in the latest validation: {sum(known) / len(known):.1%} on "
        "average over the layers.",
        "",
        *table(("layer", "zeros"), rows),
    ]


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
        rows += [
            ("training began", _show(run.record.get("started"))),
            ("training ended", _show(run.record.get("ended"))),
        ]
        rows.append(("git state of the training", _git(run.record.get("git"))))
        versions = run.record.get("versions")
        rows.append(("versions of the training", _settings(versions) if isinstance(versions, dict) else "unknown"))
        data = run.record.get("data")
        if isinstance(data, dict) and data:
            rows.append(("fingerprints of the data", _settings(data)))
    for result in results:
        rows.append(("git state of the evaluation", _git(result.get("git"))))
        rows.append(("weights that were evaluated", _show(result["model"].get("digest"))))
    if not rows:
        return []
    note = "Commands and paths above are as they were on the machine of the run: take out what is not for the public."
    return ["## Provenance", "", *table(("", ""), [row for row in rows if row[1] != "unknown"]), "", note]


def _git(state: Any) -> str:
    if not isinstance(state, dict):
        return "unknown"
    return f"{state.get('commit')}" + (", with changes that were not committed" if state.get("dirty") else "")


def _data(data: Any) -> Iterable[str]:
    """What a config says of its data, a line a source."""
    if not isinstance(data, dict):
        return []
    if data.get("component") == "mix" and isinstance(data.get("sources"), dict):
        return [Markdown(f"{escape(name)}: {_source(source)}") for name, source in data["sources"].items()]
    return [_source(data)]


def _source(settings: Any) -> Markdown:
    """A source of data; a dataset of the hub with a link to it, at its revision."""
    if not isinstance(settings, dict):
        return escape(settings)
    component = settings.get("component")
    key = "name" if component == "hub" else "hub"
    named = settings.get(key) if component in ("hub", "conversations", "preferences") else None
    link = hub_link(named, settings.get("revision"), dataset=True)
    if link is None:
        return escape(_component(settings))
    more = _settings(
        {name: value for name, value in settings.items() if name not in ("component", key) and value != []}
    )
    return Markdown(f"{escape(component)}: the hub's dataset {link}" + (f" ({escape(more)})" if more else ""))


def _component(settings: Mapping[str, Any]) -> str:
    given = _settings({key: value for key, value in settings.items() if key != "component"})
    return f"{settings.get('component')}" + (f" ({given})" if given else "")


def _settings(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_show(value)}" for key, value in given.items() if value is not None)


def _show(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return f"({_settings(value)})"
    if isinstance(value, list):
        return "[" + ", ".join(map(_show, value)) + "]"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
