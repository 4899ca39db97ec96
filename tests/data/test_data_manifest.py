import json
import random

import pytest

from plmtune.data.shard_manifest import Manifest
from plmtune.errors import UserError
from plmtune.io import checksummed_json


def rewrite(directory, **changes):
    """Change the manifest's entries and its checksum, as no accident would."""
    path = directory / "manifest.json"
    path.write_bytes(checksummed_json.dumps({**checksummed_json.loads(path.read_bytes()), **changes}))


class TestManifest:
    @pytest.fixture
    def directory(self, make_shards):
        return make_shards("code", range(1, 99), range(50), shard_tokens=40).directory

    def test_a_flipped_bit_is_found_and_the_file_named(self, directory):
        path = directory / "manifest.json"
        whole = path.read_bytes()
        draw = random.Random(1)
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"^{path} ") as caught:
                Manifest.read(directory)
            assert f"Delete {directory} and run the same command" in str(caught.value)
        path.write_bytes(whole)
        Manifest.read(directory)

    def test_a_truncation_is_found_and_the_file_named(self, directory):
        path = directory / "manifest.json"
        whole = path.read_bytes()
        for length in random.Random(2).sample(range(len(whole)), 50):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=f"^{path} is damaged: "):
                Manifest.read(directory)

    def test_a_changed_line_end_is_damage_too(self, directory):
        path = directory / "manifest.json"
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        with pytest.raises(UserError, match=r"manifest.json is damaged: it does not match its own checksum"):
            Manifest.read(directory)

    def test_the_format_without_a_checksum_is_named(self, directory):
        path = directory / "manifest.json"
        old = {**checksummed_json.loads(path.read_bytes()), "format": 1}
        path.write_text(json.dumps(old, indent=1, ensure_ascii=False))
        with pytest.raises(UserError, match=r"manifest.json has format 1; this version reads 2\. Delete .* again"):
            Manifest.read(directory)

    def test_a_later_format_is_named(self, directory):
        rewrite(directory, format=99)
        with pytest.raises(UserError, match=r"manifest.json has format 99; this version reads 2"):
            Manifest.read(directory)

    def test_a_directory_without_manifest_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"is no directory of prepared tokens: it has no manifest.json"):
            Manifest.read(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000, '{"format": 1}', '{"xxh3_128": 1}'])
    def test_what_is_no_manifest_is_refused(self, directory, text):
        (directory / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"manifest.json is damaged: .* Delete .* again"):
            Manifest.read(directory)

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "<u4"},
            {"eos_id": 1000},
            {"eos_id": None},
            {"vocab_size": "many"},
            {"splits": {}},
            {"splits": None},
            {"surprise": 1},
        ],
    )
    def test_one_that_contradicts_itself_is_refused(self, directory, change):
        rewrite(directory, **change)
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            Manifest.read(directory)

    def test_it_cannot_name_files_elsewhere(self, directory):
        splits = checksummed_json.loads((directory / "manifest.json").read_bytes())["splits"]
        splits["train"]["shards"][0]["file"] = "../code/train-00000.bin"
        rewrite(directory, splits=splits)
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            Manifest.read(directory)

    def test_names_in_any_script_come_back(self, directory):
        rewrite(directory, source_description="全唐詩.txt (10.2 MB)")
        assert "全唐詩".encode() in (directory / "manifest.json").read_bytes()
        assert Manifest.read(directory).source_description == "全唐詩.txt (10.2 MB)"
