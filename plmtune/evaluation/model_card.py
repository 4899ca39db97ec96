"""Model cards in Hugging Face's Markdown, from the files of a run or a model directory.

The card states only facts from files; a person completes the parts that begin "Fill in:". Its text is
model_card.md.jinja, in which every value is escaped.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import yaml

from plmtune.data.order import show_mix
from plmtune.errors import UserError
from plmtune.evaluation import result_table
from plmtune.evaluation import results as result_files
from plmtune.evaluation.markdown import Markdown, code, escape, hub_link, show_component, show_settings, show_value
from plmtune.evaluation.model_facts import Run, Weights, base_of, family_of, is_of, read_run, read_weights
from plmtune.io.atomic import atomic_write, write_atomically
from plmtune.io.hub import model_of, parse
from plmtune.models import adapters, checkpoint_files
from plmtune.training.plot import draw_curves, sparsity_layers
from plmtune.units import parse_count, show_bytes, show_count

CURVES = "curves.png"
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow")  # the datasets library's names for files
_FAMILIES = {"plm": Markdown("PLM ([arXiv 2503.12167](https://arxiv.org/abs/2503.12167))"), "llama": "Llama"}
# A validation's numbers that the card shows, with what they are.
_MEASURED = {
    "validation_loss": "validation loss",
    "bits_per_byte": "validation, bits per byte",
    "validation/accuracy": "held-out pairs whose chosen answer is preferred",
    "validation/margin": "margin of rewards on held-out pairs",
    "direct": "reward of direct answers after the rounds",
    "refined": "reward of refined answers after them",
    "loss": "training loss, last logged",
}


def write_card(
    checkpoint: str | Path,
    results: Sequence[Mapping[str, Any]],
    path: Path | None = None,
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> Path:
    """Write the card of a run, a checkpoint or a model directory, and its curves beside it; return its path.

    Args:
        checkpoint: a run directory stands for its newest checkpoint.
        results: of its evaluations; without any, the run's own result of this checkpoint.
        path: None: README.md in `checkpoint`.
        sources: the files of `results`, for messages.
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
    found = list(results)
    if run and not found and (own := result_files.step_file(run.path, run.step)).is_file():
        found = [result_files.load(own)]
    curves = _place_curves(run, path, overwrite) if run else False

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, finalize=escape)
    environment.filters |= {
        "show": show_value, "settings": show_settings, "component": show_component, "code": code, "plain": Markdown,
        "count": show_count, "bytes": show_bytes, "git": _git,
    }  # fmt: skip
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    facts = {**_model(directory, weights, run), **(_training(run) if run else {}), "run": run, "curves": curves}
    functions = {"mix_of": _mix, "scores_of": _scores, "how": _how, "origins_of": _origins}
    text = template.render(**facts, **functions, results=found, record=run.record if run else {})
    # No value has a line end, so that these are the gaps that conditions leave.
    write_atomically(path, re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n", user_error=True)
    return path


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


def _model(directory: Path, weights: Weights, run: Run | None) -> dict[str, Any]:
    """What the card says of the model itself."""
    base, family = base_of(directory, run), family_of(directory)
    hub = parse(base) if base is not None else None
    link = hub_link(hub.repository, hub.revision) if hub else None
    known = [family, str(run.config.get("recipe")) if run else ""]
    tags = ["plmtune", *(tag for tag in known if re.fullmatch(r"[\w.-]{1,60}", tag, re.ASCII))]
    held = None
    if adapters.holds_adapters(directory):
        config = checkpoint_files.read_json(directory, checkpoint_files.ADAPTER_CONFIG)
        keys = {"r": "rank", "lora_alpha": "alpha", "use_dora": "DoRA", "target_modules": "layers"}
        held = {new: config.get(old) for old, new in keys.items()}
    own = "tokenizer_config.json"
    return {
        "name": f"{run.path.parent.name}-{run.path.name}, step {run.step:,}"
        if run
        else checkpoint_files.model_name(directory),
        "tags": Markdown(yaml.safe_dump({"tags": tags}, allow_unicode=True).rstrip()),
        "hub": hub,
        "base": base,
        "start": link or (code(base) if base else "random weights"),
        "family": _FAMILIES.get(family, family),
        "kind": "reward model" if weights.is_reward_model else "language model",
        "weights": weights,
        "adapters": held,
        "architecture": _architecture(directory),
        "chats": (directory / own).is_file() and checkpoint_files.read_json(directory, own).get("chat_template"),
    }


def _architecture(directory: Path) -> list[tuple[str, str]]:
    try:
        description = adapters.read_model_config(directory)
    except UserError:
        return [("architecture", "that of the base, which was not available when this card was written")]
    plain = {key: value for key, value in description.items() if not isinstance(value, dict) and key != "component"}
    names = {"max_seq_len": "context, in tokens", "vocab_size": "vocabulary, rows", "embed_dim": "width"}
    names |= {"num_layers": "layers", "num_heads": "heads", "tie_embeddings": "embeddings tied to the head"}
    rows = [(names[key], show_value(plain[key])) for key in names if key in plain]
    return rows + [(key, show_component(value)) for key, value in description.items() if isinstance(value, dict)]


def _training(run: Run) -> dict[str, Any]:
    """What the card says of a run."""
    command = run.record.get("command")
    given = [str(word) for word in command] if isinstance(command, list) else []
    return {
        "config": run.config,
        "command": shlex.join([Path(given[0]).name, *given[1:]]) if given else None,
        "data": _data(run.config.get("data")),
        "machine": _machine(run),
        "measured": _MEASURED,
        "zeros": {key.partition("/")[2]: run.latest(key) for key in sparsity_layers(run.entries)},
    }


def _mix(phase: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The shares that a phase draws of its sources."""
    weights = phase.get("mix") or {}
    try:
        steps, sequences = phase.get("steps"), int(config["global_batch_size"])
        if steps is None:
            steps = math.ceil(parse_count(phase["tokens"], "tokens") / (sequences * int(config["seq_len"])))
        return show_mix({str(name): float(weight) for name, weight in weights.items()}, int(steps) * sequences)
    except (KeyError, TypeError, ValueError, UserError):  # of another recipe
        return show_settings(weights)


def _machine(run: Run) -> list[tuple[str, str]]:
    attempts = [one for one in run.record.get("attempts") or [] if isinstance(one, dict)]
    devices = dict.fromkeys(str(one["device"]) for one in attempts if one.get("device"))
    runtime = run.config.get("runtime") or {}
    rows = [("hardware", ", ".join(devices) or "not recorded")]
    wanted = {key: runtime.get(key) for key in ("device", "precision", "strategy")}
    rows.append(("asked of the hardware", show_settings(wanted)))
    seconds = last = 0.0
    for entry in run.entries:
        if isinstance(now := entry.get("time"), int | float):  # seconds of one process: a resumed run starts at 0
            seconds += now if now < last else now - last
            last = now
    short = f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.1f} seconds"
    if seconds:
        rows.append(("time in steps", f"{seconds / 3600:.2f} hours" if seconds >= 3600 else short))
    return rows


def _data(data: Any) -> list[Markdown]:
    """What a config says of its data, a line a source."""
    if isinstance(data, dict) and data.get("component") == "mix" and isinstance(data.get("sources"), dict):
        return [Markdown(f"{escape(name)}: {_source(source)}") for name, source in data["sources"].items()]
    return [_source(data)] if isinstance(data, dict) else []


def _source(settings: Any) -> Markdown:
    """A source of data; a dataset of the hub with a link to it, at its revision."""
    if not isinstance(settings, dict):
        return escape(settings)
    component = settings.get("component")
    key = "name" if component == "hub" else "hub"
    named = settings.get(key) if component in ("hub", "conversations", "preferences") else None
    link = hub_link(named, settings.get("revision"), dataset=True)
    if link is None:
        return escape(show_component(settings))
    more = show_settings(
        {name: value for name, value in settings.items() if name not in ("component", key) and value != []}
    )
    return Markdown(f"{escape(component)}: the hub's dataset {link}" + (f" ({escape(more)})" if more else ""))


def _scores(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the table of a result."""
    rows: list[tuple[str, ...]] = []
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
        rows.append((line.task, version, shots, show_value(one.samples) + part, label, result_table.show_score(one)))
    return rows


def _how(result: Mapping[str, Any]) -> str:
    found, settings = result["environment"], result["settings"]
    parts = [f"Measured {str(result.get('started', ''))[:10]} by lm-eval {found.get('lm_eval', '(version unknown)')}"]
    parts += [f"weights in {found['precision']}"] if found.get("precision") else []
    parts += [f"on {found['device_name']}"] if found.get("device_name") else []
    # `tasks` are the table's rows; unset settings are lm-eval's defaults.
    given = {key: value for key, value in settings.items() if key != "tasks" and value not in (None, False)}
    return escape(", ".join(parts) + (f"; settings: {show_settings(given)}." if given else "."))


def _origins(result: Mapping[str, Any]) -> tuple[list[tuple[str, str]], dict[Markdown, list[str]]]:
    """Return tasks with their files, without folders, and datasets of the hub with their tasks."""
    local: list[tuple[str, str]] = []
    of_hub: dict[Markdown, list[str]] = {}
    for task, entry in result["tasks"].items():
        data = str(entry.get("data") or "hub")
        name, _, subset = data.partition(" ")
        name, _, revision = name.partition("@")
        if data == "hub" or not name:
            continue
        link = None if name in _FILE_FORMATS else hub_link(name, revision, dataset=True)
        if link is None or name.endswith(":"):
            local.append((task, re.sub(r"[^\s,]*/", "", data)))
        else:
            of_hub.setdefault(link, []).append(f"{task} (subset {subset})" if subset else task)
    return local, of_hub


def _git(state: Any) -> str:
    if not isinstance(state, dict):
        return "unknown"
    return f"{state.get('commit')}" + (", with changes that were not committed" if state.get("dirty") else "")
