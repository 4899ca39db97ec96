import sys

import pytest

from plmtune.data.sources import Mix, StandardLibrary, mix, named_sources, shards, stdlib
from plmtune.errors import UserError
from plmtune.registry import component


class TestStandardLibrary:
    def test_holds_the_reference_and_the_sources_of_this_python(self):
        pytest.importorskip("pydoc_data.topics")
        documents = list(stdlib().documents())
        assert sum(map(len, documents)) > 5_000_000
        assert any('The "with" statement' in text for text in documents)  # a reference topic
        assert any("class JSONDecoder" in text for text in documents)

    def test_is_the_same_each_time(self):
        assert list(stdlib().documents()) == list(stdlib().documents())

    def test_works_without_the_reference_topics(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        source = stdlib()
        assert source.topics == {}
        assert "class JSONDecoder" in "".join(source.documents())

    def test_a_python_without_its_sources_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(UserError, match="holds no Python sources"):
            stdlib()

    def test_leaves_out_other_peoples_packages_and_files_in_wrong_encodings(self, tmp_path):
        for name, content in {
            "b.py": b"b = 1\n",
            "a.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n",
            "site-packages/c.py": b"c = 1\n",
            "test/wrong.py": b"d = '\xff'\n",
            "test/e.py": b"e = 1\n",
            "empty.py": b"\n",
        }.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        source = StandardLibrary(tmp_path, {"z": "topic z", "y": "topic y"})
        assert list(source.documents()) == [
            "topic y",
            "topic z",
            "# -*- coding: latin-1 -*-\nname = 'é'\n",
            "b = 1\n",
            "e = 1\n",
        ]

    def test_the_fingerprint_follows_the_text(self, tmp_path):
        source = StandardLibrary(tmp_path, {"a": "one"})
        before = source.fingerprint()
        (tmp_path / "a.py").write_text("a = 1\n")
        assert source.fingerprint() != before


class TestMix:
    @pytest.fixture
    def text(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("text")
        return component("data", "files", paths=(str(path),))

    def test_builds_its_sources_under_their_names(self, text):
        made = mix({"mine": text, "python": component("data", "stdlib")})
        assert list(made.sources) == ["mine", "python"]
        assert list(made.sources["mine"].documents()) == ["text"]

    def test_a_single_source_goes_by_its_components_name(self, text):
        assert list(named_sources(text())) == ["files"]
        assert list(named_sources(stdlib())) == ["stdlib"]
        made = mix({"mine": text})
        assert named_sources(made) == made.sources
        assert isinstance(made, Mix)

    def test_nothing_and_mixes_in_mixes_are_refused(self, text):
        with pytest.raises(ValueError, match="mix needs at least one source"):
            mix({})
        with pytest.raises(ValueError, match="source inner of the mix is itself a mix"):
            mix({"inner": component("data", "mix", sources={"mine": text})})


class TestShards:
    def test_a_prepared_directory_is_a_source_of_tokens_only(self, make_shards):
        source = shards(str(make_shards("a", range(10)).directory))
        assert list(named_sources(source)) == ["shards"]
        with pytest.raises(UserError, match="holds tokens, not text"):
            source.documents()

    @pytest.mark.parametrize("path", ["", "nowhere"])
    def test_what_is_none_is_refused(self, tmp_path, path):
        with pytest.raises(UserError, match="no directory of prepared tokens"):
            shards(path and str(tmp_path / path))
