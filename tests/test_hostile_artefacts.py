"""Files made to do harm: no code of theirs runs, nothing outside their directory is opened, memory stays bounded.

A file's reader may take twice the file's size and `ALLOWANCE` beyond it, measured by the kernel's own high-water mark.
What a directory's tensors, index and config may say is in tests/models/test_hostile_checkpoints.py.
"""

import ctypes
import gzip
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

import plmtune
from plmtune.data.text_files import files
from plmtune.errors import UserError
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.models.hf import load_model, save_model
from plmtune.models.plm import plm
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte, load_tokenizer

# Python's objects for the largest texts that are looked into: 4 MiB of JSON, a row of 16 MiB, a tokenizer's values.
ALLOWANCE = 320 << 20
CALLS = ("os.system", "subprocess.Popen", "pickle.find_class", "socket.connect", "os.exec", "os.posix_spawn")


class Audit:
    """What is opened and called while `on`; a hook cannot be taken away again."""

    on = False
    opened: list[str] = []  # noqa: RUF012  (one for all)
    called: list[str] = []  # noqa: RUF012

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.on and event == "open":
            cls.opened.append(str(arguments[0]))
        elif cls.on and event in CALLS:
            cls.called.append(event)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything that reading imports is imported, and the hook is in."""
    directory = tmp_path_factory.mktemp("warm")
    write_model(directory)
    plmtune.load(directory)
    (directory / "a.jsonl").write_text('{"text": "a"}')
    list(files((str(directory / "a.jsonl"),)).documents())
    parquet.write_table(pyarrow.table({"text": ["a"]}), directory / "a.parquet")
    list(files((str(directory / "a.parquet"),)).documents())
    sys.addaudithook(Audit.hook)


def write_model(directory: Path) -> None:
    torch.manual_seed(0)
    attention = component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    ffn = component("ffn", "squared_relu", hidden_dim=32)
    model = plm(257, attention=attention, ffn=ffn, embed_dim=16, num_layers=2, num_heads=2, max_seq_len=32)
    save_model(model, None, directory)
    byte().save(directory)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "place").mkdir()
    yield tmp_path / "place"
    assert not (tmp_path / "OWNED").exists()


def high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def refusal(root: Path, action: Callable[[], object], size: int | None = None) -> str:
    """The sentence that `action` ends with; it opened nothing outside of `root` and took little memory.

    Args:
        size: bytes of the file in question; None: of all below `root`.
    """
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) if size is None else size
    # What earlier tests left with the allocators would hide what is taken now; then the mark begins anew.
    pyarrow.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    Audit.opened, Audit.called, Audit.on = [], [], True
    try:
        with pytest.raises(UserError) as caught:
            action()
    finally:
        Audit.on = False
    grown = high_water() - before
    assert not Audit.called
    code = tuple(map(str, {*sys.path, sys.prefix, sys.base_prefix, Path(plmtune.__file__).parent}))
    outside = [p for p in Audit.opened if not os.path.realpath(p).startswith((str(root.resolve()), "/proc/", *code))]
    assert not outside
    assert grown <= 2 * size + ALLOWANCE, f"{grown:,} bytes for {size:,}"
    said = str(caught.value)
    assert len(said) < 1000 and str(root) in said
    return said


class Boom:
    """Unpickled, it leaves a file behind."""

    def __init__(self, owned: Path) -> None:
        self.owned = owned

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.owned,)


class TestPickles:
    @pytest.mark.parametrize(
        "name",
        ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"],
    )
    @pytest.mark.parametrize("kind", ["pickle", "torch"])
    def test_under_a_good_name_are_not_unpickled(self, place: Path, name: str, kind: str) -> None:
        write_model(place)
        if name == "model.safetensors.index.json":
            (place / "model.safetensors").unlink()
        boom = Boom(place.parent / "OWNED")
        if kind == "pickle":
            (place / name).write_bytes(pickle.dumps(boom))
        else:
            torch.save({"model": boom}, place / name)
        assert name in refusal(place, lambda: plmtune.load(place))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "checkpoint.pth", "model.ckpt"])
    def test_under_their_own_name_are_not_read(self, place: Path, name: str) -> None:
        write_model(place)
        (place / "model.safetensors").unlink()
        (place / name).write_bytes(pickle.dumps(Boom(place.parent / "OWNED")))
        refusal(place, lambda: plmtune.load(place))
        assert not [path for path in Audit.opened if path.endswith(name)]

    def test_as_the_name_of_the_newest_checkpoint_lead_nowhere(self, place: Path) -> None:
        (place / "checkpoints").mkdir()
        (place / "checkpoints/latest").write_bytes(pickle.dumps(Boom(place.parent / "OWNED")))
        refusal(place, lambda: checkpoint_directory(place))

    @pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.parquet", "corpus.jsonl.gz", "corpus.txt.zst"])
    def test_among_the_data_are_not_unpickled(self, place: Path, name: str) -> None:
        (place / name).write_bytes(pickle.dumps(Boom(place.parent / "OWNED")))
        assert name in refusal(place, lambda: list(files((str(place / name),)).documents()))


class TestLinks:
    @pytest.mark.parametrize(
        "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    )
    def test_out_of_a_checkpoint_are_refused(self, place: Path, name: str) -> None:
        write_model(place)
        outside = place.parent / "outside"
        if (place / name).exists():
            (place / name).rename(outside)
        else:
            outside.write_text("x")
        (place / name).symlink_to(outside)
        assert "outside of" in refusal(place, lambda: plmtune.load(place))

    @pytest.mark.parametrize(
        "way", ["../shards/model.safetensors", "/shards/model.safetensors", "link/model.safetensors"]
    )
    def test_and_paths_in_an_index_are_refused(self, place: Path, way: str) -> None:
        shards = place.parent / "shards"
        write_model(shards)
        write_model(place)
        (place / "model.safetensors").unlink()
        (place / "link").symlink_to(shards)
        names = {"model.norm.weight": f"{place.parent}{way}" if way.startswith("/") else way}
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert "outside of" in refusal(place, lambda: plmtune.load(place))

    @pytest.mark.parametrize("latest", ["step-00000005", "../../outside", "step-/../../../outside", None])
    def test_in_the_place_of_a_checkpoint_are_passed_over(self, place: Path, latest: str | None) -> None:
        write_model(place.parent / "outside")
        (place / "checkpoints").mkdir()
        (place / "checkpoints/step-00000005").symlink_to(place.parent / "outside")
        if latest is not None:
            (place / "checkpoints/latest").write_text(latest)
        refusal(place, lambda: plmtune.load(place))

    def test_to_the_newest_are_taken_only_as_plain_files(self, place: Path) -> None:
        (place / "checkpoints").mkdir()
        (place / "checkpoints/latest").symlink_to("/dev/zero")
        refusal(place, lambda: plmtune.load(place))


def header(entries: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def names(number: int) -> str:
    """So many empty tensors."""
    tensor = json.dumps(entry(0, 0, [0]))
    return "{" + ", ".join(f'"{i}": {tensor}' for i in range(number)) + "}"


def made(content: bytes | Callable[[], bytes]) -> bytes:
    """What takes a while to make is made by the test that reads it."""
    return content() if callable(content) else content


SAFETENSORS: dict[str, bytes | Callable[[], bytes]] = {
    "no_header": b"",
    "half_a_length": b"\x01\x00\x00",
    "longer_than_the_file": struct.pack("<Q", 2**62) + b"{}",
    "header_of_a_gigabyte": struct.pack("<Q", 2**30) + b"{}",
    "no_json": header("{{{{"),
    "deep": header("[" * 100_000),
    "number_of_many_digits": header('{"a": {"dtype": "F32", "shape": [' + "9" * 10_000 + '], "data_offsets": [0, 4]}}'),
    "shape_of_terabytes": header({"a": entry(0, 4, [2**40])}, b"1234"),
    "shape_that_overflows": header({"a": entry(0, 4, [2**32, 2**32, 2**32])}, b"1234"),
    "negative_shape": header({"a": entry(0, 4, [-1])}, b"1234"),
    "negative_offset": header({"a": entry(-4, 0, [1])}, b"1234"),
    "offsets_backwards": header({"a": entry(4, 0, [1])}, b"1234"),
    "offset_beyond_the_file": header({"a": entry(0, 2**40, [2**38])}, b"1234"),
    "overlapping": header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"1234" * 3),
    "with_a_hole": header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1234" * 3),
    "unknown_dtype": header({"a": entry(0, 4, [1], "PICKLE")}, b"1234"),
    "duplicate_names": header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                              '"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"1234" * 2),
    "many_names": lambda: header(names(100_000)),
    "more_names_than_any_model": lambda: header(names(200_000)),
    "gzip": lambda: gzip.compress(b"0" * 10_000_000),
}  # fmt: skip


class TestSafetensors:
    @pytest.mark.parametrize("case", SAFETENSORS)
    def test_with_a_lying_header_are_refused(self, place: Path, case: str) -> None:
        write_model(place)
        (place / "model.safetensors").write_bytes(made(SAFETENSORS[case]))
        refusal(place, lambda: load_model(place))


def good_tokenizer(directory: Path) -> dict[str, Any]:
    byte().save(directory)
    data: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text())
    return data


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokenizer.json", content)
    return buffer.getvalue()


TOKENIZERS: dict[str, Callable[[], bytes]] = {
    "gzip_bomb": lambda: gzip.compress(b" " * 50_000_000),
    "zip_bomb": lambda: zipped(b" " * 50_000_000),
    "zstd_bomb": lambda: zstandard.compress(b" " * 50_000_000),
    "deep": lambda: b"[" * 10_000_000,
    "empty_lists": lambda: b"[" + b"[]," * 5_000_000 + b"[]]",
    "short_texts": lambda: json.dumps([f"{i:x}" for i in range(3_000_000)], separators=(",", ":")).encode(),
    "number_of_many_digits": lambda: b'{"model": ' + b"9" * 1_000_000 + b"}",
    "nul_bytes": lambda: bytes(10_000_000),
    "half_a_surrogate_pair": lambda: b'{"model": {"vocab": {"\\ud800": 0}, "merges": []}}',
}

CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a_million_merges": lambda d: d["model"].update(merges=["a b"] * 1_100_000),
    "a_million_tokens": lambda d: d["model"]["vocab"].update({f"{i:07}": i + 300 for i in range(1_000_000)}),
    "an_id_of_billions": lambda d: d["model"]["vocab"].update(aa=2**31),
    "an_id_below_0": lambda d: d["model"]["vocab"].update(aa=-1),
    "an_added_id_of_billions": lambda d: d["added_tokens"].append({"content": "<x>", "id": 2**40, "special": True}),
    "too_many_added": lambda d: d["added_tokens"].extend({"content": f"<{i}>", "id": 257 + i} for i in range(40_000)),
    "added_is_a_table": lambda d: d.update(added_tokens={"content": "a"}),
    "a_token_of_megabytes": lambda d: d["model"]["vocab"].update({"a" * 5_000_000: 257}),
    "a_merge_of_lists": lambda d: d["model"].update(merges=[[["a"], ["b"]]]),
    "a_pattern_of_megabytes": lambda d: set_pattern(d, "a|" * 1_000_000 + "b"),
    "a_pattern_that_grows": lambda d: set_pattern(d, "(?:(?:(?:(?:a{999}){999}){999}){999}){999}"),
    "a_pattern_that_is_none": lambda d: set_pattern(d, "(((("),
    "a_pattern_that_refers_back": lambda d: set_pattern(d, r"(a)\1"),
    "a_model_that_is_none": lambda d: d.update(model={"type": "canary"}),
    "vocab_is_a_list": lambda d: d["model"].update(vocab=["a"]),
}  # fmt: skip


def set_pattern(data: dict[str, Any], pattern: str) -> None:
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern


class TestTokenizers:
    @pytest.mark.parametrize("case", TOKENIZERS)
    def test_that_are_something_else_are_refused(self, place: Path, case: str) -> None:
        (place / "tokenizer.json").write_bytes(TOKENIZERS[case]())
        assert "tokenizer.json" in refusal(place, lambda: load_tokenizer(place))

    @pytest.mark.parametrize("case", CHANGES)
    def test_that_lie_are_refused(self, place: Path, case: str) -> None:
        data = good_tokenizer(place)
        CHANGES[case](data)
        (place / "tokenizer.json").write_text(json.dumps(data))
        assert "tokenizer.json" in refusal(place, lambda: load_tokenizer(place))

    def test_larger_than_any_are_not_read(self, place: Path) -> None:
        with (place / "tokenizer.json").open("wb") as file:
            file.truncate(1 << 40)  # a hole: no disk is used
        assert "1,099,511,627,776" in refusal(place, lambda: load_tokenizer(place), size=0)

    @pytest.mark.parametrize("rows", [-1, 0, 2**60, "257", True, 1.5])
    def test_with_impossible_rows_are_refused(self, place: Path, rows: object) -> None:
        good_tokenizer(place)
        path = place / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "padded_vocab_size": rows}))
        assert "rows" in refusal(place, lambda: load_tokenizer(place))

    @pytest.mark.parametrize(
        "pattern",
        [
            r"(?:x|xx)+(?=y)",  # the look-ahead takes it from the engine that is linear
            r"(?:x|xx)+y",
            r"(?:x+x+)+y",
            r"(?:x|xx)+(?!x|y)(?=z)|.",
        ],
    )
    def test_a_pattern_that_multiplies_its_tries_comes_to_an_end(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
    ) -> None:
        data = good_tokenizer(place)
        set_pattern(data, pattern)
        (place / "tokenizer.json").write_text(json.dumps(data))
        monkeypatch.setattr("plmtune.tokenizers.ranks._PATTERN_SECONDS", 0.1)
        tokenizer = load_tokenizer(place)
        with pytest.raises(
            UserError, match=r"tokenizer\.json, key pre_tokenizer: the pattern .* does not come to an end"
        ):
            tokenizer.encode("x" * 300)

    def test_a_pattern_that_is_slow_on_each_of_many_texts_comes_to_an_end(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = good_tokenizer(place)
        set_pattern(data, r"(?:x|xx)+(?=y)|.")
        (place / "tokenizer.json").write_text(json.dumps(data))
        monkeypatch.setattr("plmtune.tokenizers.ranks._PATTERN_SECONDS", 0.2)
        tokenizer = load_tokenizer(place)
        assert len(tokenizer.encode("x" * 24)) == 24
        with pytest.raises(UserError, match="does not come to an end"):
            tokenizer.encode_batch(["x" * 24] * 1_000)


def read_all(path: Path, **settings: Any) -> Callable[[], object]:
    def read() -> None:
        for _ in files((str(path),), **settings).documents():
            pass

    return read


def zeros(compression: str, path: Path, gigabytes: float, start: bytes = b"", text: bytes = b"a") -> None:
    """A file that unpacks to so much of one text."""
    chunk = text * ((1 << 22) // len(text))
    pack = gzip.compress if compression == "gz" else zstandard.compress
    with path.open("wb") as file:  # both unpack to the texts of their members, one behind another
        file.write(pack(start))
        packed = pack(chunk)
        for _ in range(int(gigabytes * 256)):
            file.write(packed)


class TestData:
    @pytest.mark.parametrize("compression", ["gz", "zst"])
    @pytest.mark.parametrize("kind", ["txt", "jsonl"])
    def test_that_unpacks_to_gigabytes_is_refused_with_file_and_row(
        self, place: Path, kind: str, compression: str
    ) -> None:
        path = place / f"bomb.{kind}.{compression}"
        zeros(compression, path, 0.5, b'{"text": "')
        assert path.stat().st_size < 600_000
        said = refusal(place, read_all(path))
        assert path.name in said and ("line 1" in said or kind == "txt")

    def test_that_is_one_document_when_unpacked_has_a_limit(self, place: Path) -> None:
        path = place / "large.txt.gz"
        with gzip.open(path, "wb", 1) as file:
            noise = os.urandom(1 << 20).hex().encode()  # packs to half, as no bomb does
            for _ in range(34):
                file.write(noise)
        assert "separator" in refusal(place, read_all(path))
        assert sum(1 for _ in files((str(path),), separator="00").documents()) > 1000

    def test_of_blank_lines_without_end_is_refused(self, place: Path) -> None:
        zeros("zst", place / "bomb.jsonl.zst", 0.1, text=b" " * 63 + b"\n")
        assert "unpacks to more than" in refusal(place, read_all(place / "bomb.jsonl.zst"))

    def test_with_a_line_of_a_gigabyte_is_refused_at_that_line(self, place: Path) -> None:
        path = place / "long.jsonl"
        with path.open("wb") as file:
            file.write(b'{"text": "short"}\n{"text": "')
            file.truncate(1 << 30)  # a hole, which reads as zeros
        assert "line 2" in refusal(place, read_all(path), size=0)

    def test_a_line_that_is_too_long_can_be_left_out(self, place: Path) -> None:
        path = place / "long.jsonl"
        long = json.dumps({"text": "x" * (17 << 20)})
        path.write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n{long}\n')
        source = files((str(path),))
        assert list(source.documents(skip_bad=True)) == ["a", "b"]
        assert source.skipped == 2

    @pytest.mark.parametrize(
        "line",
        [
            '{"text": ' + "9" * 5_000_000 + "}",
            '{"text": -' + "9" * 5_000 + "}",
            '{"text": 1e' + "9" * 1_000_000 + "}",
            "[" * 5_000_000,
            '{"text": "a", "b": ' + "[[]," + "[]," * 4_000_000 + "[]]}",
            '{"a": ' * 100_000,
        ],
        ids=["digits", "negative_digits", "exponent", "deep", "empty_lists", "deep_tables"],
    )
    def test_rows_that_multiply_are_refused_with_their_line(self, place: Path, line: str) -> None:
        path = place / "rows.jsonl"
        path.write_text('{"text": "good"}\n' + line)
        assert "line 2" in refusal(place, read_all(path))

    def test_parquet_that_names_one_text_for_a_million_rows_is_refused(self, place: Path) -> None:
        path = place / "bomb.parquet"
        rows = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * 100_000, pyarrow.int32()), pyarrow.array(["x" * (1 << 20)])
        )
        parquet.write_table(pyarrow.table({"text": rows}), path, compression="zstd")
        assert path.stat().st_size < 20_000  # and stands for 100 GB
        assert "unpacks to more than" in refusal(place, read_all(path))

    def test_parquet_with_a_value_that_unpacks_to_hundreds_of_megabytes_is_refused(self, place: Path) -> None:
        path = place / "bomb.parquet"
        parquet.write_table(pyarrow.table({"text": ["x" * (200 << 20)]}), path, compression="zstd")
        assert path.stat().st_size < 200_000
        assert "unpacks to more than" in refusal(place, read_all(path))

    def test_parquet_of_repeated_texts_reads_as_it_did(self, place: Path) -> None:
        texts = [f"text {i % 7}" for i in range(5_000)]
        for kind in (pyarrow.string(), pyarrow.large_string()):
            parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, kind)}), place / "a.parquet")
            assert list(files((str(place / "a.parquet"),)).documents()) == texts

    def test_encodings_that_unpack_are_no_encodings(self, place: Path) -> None:
        (place / "a.txt").write_text("a")
        for encoding in ("zlib", "bz2", "hex", "base64"):
            with pytest.raises(ValueError, match=encoding):
                files((str(place / "a.txt"),), encoding=encoding)


class TestJson:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_larger_than_any_is_not_read(self, place: Path, name: str) -> None:
        write_model(place)
        if "index" in name:
            (place / "model.safetensors").unlink()
        with (place / name).open("wb") as file:
            file.truncate(1 << 40)
        assert name in refusal(place, lambda: load_model(place), size=0)

    @pytest.mark.parametrize(
        "name", ["config.json", pytest.param("model.safetensors.index.json", marks=pytest.mark.slow)]
    )
    def test_of_empty_lists_stays_small(self, place: Path, name: str) -> None:
        write_model(place)
        if "index" in name:
            (place / "model.safetensors").unlink()
        (place / name).write_text("{" + '"a": [' + "[]," * 1_300_000 + "[]]}")
        assert name in refusal(place, lambda: load_model(place))
