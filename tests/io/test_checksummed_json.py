"""JSON with its own checksum."""

import json
from typing import Any, ClassVar

import pytest

from plmtune.io import checksummed_json


class TestChecksummedJson:
    CONTENT: ClassVar[dict[str, Any]] = {"name": "全唐詩", "share": 0.01, "none": None, "list": [{"a": 1}, True, "b"]}

    def test_what_was_saved_comes_back(self) -> None:
        assert checksummed_json.loads(checksummed_json.dumps(self.CONTENT)) == self.CONTENT
        assert json.loads(checksummed_json.dumps(self.CONTENT))["name"] == "全唐詩"

    def test_no_flipped_bit_and_no_cut_passes(self) -> None:
        whole = checksummed_json.dumps(self.CONTENT)
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ValueError):
                checksummed_json.loads(bytes(damaged))
        for length in range(len(whole)):
            with pytest.raises(ValueError):
                checksummed_json.loads(whole[:length])
