"""Our own writer of safetensors: the library reads every byte back, and files are dealt out by name and size."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from plmtune import dtypes
from plmtune.io import safetensors_writer


def every_kind() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for number, dtype in enumerate(map(dtypes.from_code, dtypes.CODES)):
        values = torch.rand(3, number + 1, generator=generator) * 100
        made[str(dtype)] = values > 50 if dtype == torch.bool else values.to(dtype)
    return {**made, "a scalar": torch.tensor(7.0), "nothing": torch.empty(0, 4), "turned": torch.rand(4, 5).T}


class TestNotFinite:
    @given(
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
        st.lists(st.integers(0, 5), max_size=3),
        st.sampled_from([math.nan, math.inf, -math.inf, None]),
        st.data(),
    )
    def test_is_found_wherever_it_stands(
        self, dtype: torch.dtype, shape: list[int], bad: float | None, data: Any
    ) -> None:
        tensor = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
        expected = []
        if bad is not None and tensor.numel():
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = bad
            expected = ["it"]
        others = every_kind()
        assert safetensors_writer.not_finite({**others, "it": tensor, "parameter": torch.nn.Parameter(tensor)}) == [
            *expected, *(["parameter"] if expected else [])
        ]  # fmt: skip

    def test_of_nothing_is_nothing(self) -> None:
        assert safetensors_writer.not_finite({}) == []


class TestWrite:
    def test_the_library_reads_back_each_type_and_shape_to_the_bit(self, tmp_path: Path) -> None:
        tensors = every_kind()
        safetensors_writer.write(tmp_path / "all.safetensors", tensors)
        found = load_file(tmp_path / "all.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
            same = found[name].reshape(-1).view(torch.uint8) == tensor.contiguous().reshape(-1).view(torch.uint8)
            assert bool(same.all()), name
        with safe_open(tmp_path / "all.safetensors", framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}

    def test_tells_the_bytes_and_the_hash_of_the_file(self, tmp_path: Path) -> None:
        entry = safetensors_writer.write(tmp_path / "x", every_kind())
        data = (tmp_path / "x").read_bytes()
        assert entry == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}

    def test_each_tensor_stands_at_a_multiple_of_its_width(self, tmp_path: Path) -> None:
        safetensors_writer.write(tmp_path / "x", every_kind())
        data = (tmp_path / "x").read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        for name, tensor in every_kind().items():
            assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name

    def test_does_not_depend_on_the_order_of_the_tensors(self, tmp_path: Path) -> None:
        tensors = every_kind()
        one = safetensors_writer.write(tmp_path / "a", tensors)
        assert safetensors_writer.write(tmp_path / "b", {name: tensors[name] for name in reversed(tensors)}) == one


class TestDeal:
    def test_small_ones_stand_in_one_file(self) -> None:
        assert safetensors_writer.deal({"a": 5, "b": 5}, "model", 10) == {"model.safetensors": ["a", "b"]}

    def test_none_at_all_is_an_empty_file(self) -> None:
        assert safetensors_writer.deal({}, "optimizer", 10) == {"optimizer.safetensors": []}

    def test_no_file_exceeds_the_limit_but_one_that_holds_a_single_tensor(self) -> None:
        sizes = {"a": 4, "b": 4, "c": 4, "huge": 30, "d": 1}
        files = safetensors_writer.deal(sizes, "model", 10)
        assert list(files.values()) == [["a", "b"], ["c"], ["huge"], ["d"]]
        assert next(iter(files)) == "model-00001-of-00004.safetensors"

    @pytest.mark.parametrize("limit", [1, 7, 100])
    def test_every_tensor_stands_in_one_file_and_the_index_says_which(self, limit: int) -> None:
        sizes = {f"t{i}": i for i in range(1, 9)}
        files = safetensors_writer.deal(sizes, "model", limit)
        assert [name for names in files.values() for name in names] == list(sizes)
        index = safetensors_writer.index(files, sizes)
        assert index["metadata"]["total_size"] == 36
        assert all(name in files[file] for name, file in index["weight_map"].items())
        assert index["weight_map"].keys() == sizes.keys()
