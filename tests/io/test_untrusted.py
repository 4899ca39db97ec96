"""JSON and YAML from anywhere: nested without an end or of another kind, they end in a value or a sentence."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import plmtune
from plmtune.errors import UserError
from plmtune.io.untrusted import load_json, load_yaml

DEEP = ("[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000)
DEEP_YAML = (*DEEP, "- " * 100_000 + "a")

# Read what this process or its like have just written, or sent each other.
OURS = {
    "export/runtimes/xllamacpp.py", "export/contents.py", "models/gguf_tokenizer.py", "preference/reference.py",
    "training/checkpoint.py", "training/distributed.py", "preference/rounds/selection.py", "tokenizers/train_bpe.py",
    "tokenizers/rendering.py", "devices/measure.py", "evaluation/task_index.py", "export/probe_texts.py",
    "tokenizers/compress.py", "training/state.py",
}  # fmt: skip


@pytest.mark.parametrize("text", DEEP)
def test_deep_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="deep"):
        load_json(text)


@pytest.mark.parametrize("loader", [None, yaml.SafeLoader])
@pytest.mark.parametrize("text", DEEP_YAML)
def test_deep_yaml_is_an_error_of_yaml(text: str, loader: Any) -> None:
    with pytest.raises(yaml.YAMLError, match="deep"):
        load_yaml(text, loader)


def test_other_yaml_is_read_as_before() -> None:
    text = "a: [1, {b: c}]\n" * 1 + "x: " + "y" * 10_000
    assert load_yaml(text) == yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError):
        load_yaml("a: 2020-13-45")


def test_no_file_is_read_past_them() -> None:
    found = set()
    for folder in (Path(plmtune.__file__).parent, Path(plmtune.__file__).parents[1] / "recipes"):
        for path in folder.rglob("*.py"):
            if re.search(r"\bjson\.loads?\(|yaml\.(?:safe_)?load\(", path.read_text()) and path.name != "untrusted.py":
                found.add(str(path.relative_to(folder)))
    assert found - OURS == {"config/rules.py"}  # whose loader has limits of its own


def _readers(place: Path) -> dict[str, tuple[str, Callable[[], object]]]:
    """Reader: (the file it reads, how it is asked)."""
    from plmtune.cli.checkpoints import _look
    from plmtune.data.rows import read_rows
    from plmtune.data.shard_manifest import Manifest
    from plmtune.data.text_files import files
    from plmtune.devices.device import load_device
    from plmtune.evaluation import results
    from plmtune.evaluation.local_data import _read_map
    from plmtune.io import manifest, metrics
    from plmtune.io.run_directory import read_record
    from plmtune.io.run_summary import summarize
    from plmtune.models.checkpoint_files import read_json
    from plmtune.tokenizers.tokenizer_files import load_tokenizer

    return {
        "metrics": ("metrics.jsonl", lambda: metrics.read(place / "metrics.jsonl")),
        "runs": ("config.yaml", lambda: summarize(place)),
        "run record": ("run.json", lambda: read_record(place)),
        "result": ("result.json", lambda: results.load(place / "result.json")),
        "map": ("map.yaml", lambda: _read_map(place / "map.yaml")),
        "device": ("device.yaml", lambda: load_device(str(place / "device.yaml"))),
        "tokenizer": ("tokenizer.json", lambda: load_tokenizer(place)),
        "model": ("config.json", lambda: read_json(place, "config.json")),
        "checkpoint": ("manifest.json", lambda: manifest.read(place)),
        "shards": ("manifest.json", lambda: Manifest.read(place)),
        "lines": ("rows.jsonl", lambda: list(files((str(place / "rows.jsonl"),)).documents())),
        "state": ("state.json", lambda: _look(place)),
        "array": ("rows.json", lambda: list(read_rows([place / "rows.json"]))),
    }


NAMES = (
    *("metrics", "runs", "run record", "result", "map", "device", "tokenizer", "model", "checkpoint", "shards"),
    *("lines", "state", "array"),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_ends_in_a_value_or_a_sentence(name: str, tmp_path: Path) -> None:
    file, read = _readers(tmp_path)[name]

    def tried(data: bytes) -> None:
        (tmp_path / file).write_bytes(data)
        try:
            read()
        except UserError as error:
            assert file in str(error)

    for text in DEEP_YAML:
        tried(text.encode())

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.binary(max_size=40) | json_values.map(lambda value: yaml.safe_dump(value).encode()))
    def garbage(data: bytes) -> None:
        tried(data)

    garbage()
