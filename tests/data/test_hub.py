import builtins
import importlib.machinery
import sys
import types

import pytest

from plmtune.data.hub import hub
from plmtune.errors import UserError

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the package: no network in tests."""
    calls = []

    def load_dataset(name, subset, **settings):
        calls.append((name, subset, settings))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        return iter([{"text": "one"}, {"text": " "}, {"body": "bad"}, {"text": "two"}])

    monkeypatch.setattr("plmtune.hub.silence", lambda: "")
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


class TestHub:
    def test_streams_rows_and_asks_for_no_code(self, datasets):
        source = hub("some/set", "en", revision=COMMIT, split="test")
        assert list(source.documents(skip_bad=True)) == ["one", "two"]
        assert source.skipped == 1
        assert datasets == [("some/set", "en", {"split": "test", "revision": COMMIT, "streaming": True})]

    def test_reads_no_further_than_its_limit(self, datasets):
        assert list(hub("some/set", limit=2).documents()) == ["one"]

    def test_a_bad_row_is_named(self, datasets):
        with pytest.raises(UserError, match="some/set, row 3 of train has no key text"):
            list(hub("some/set").documents())

    def test_what_the_hub_does_not_have_or_cannot_give_is_one_sentence(self, datasets):
        with pytest.raises(UserError, match=r"no/such .*cannot be read: FileNotFoundError.*data=files"):
            list(hub("no/such").documents())

    def test_where_no_hub_answers_its_libraries_do_not_try(self, datasets, monkeypatch):
        from huggingface_hub import constants

        seen = []
        monkeypatch.setattr("plmtune.hub.silence", lambda: "https://huggingface.co does not answer")
        monkeypatch.setattr(
            sys.modules["datasets"], "load_dataset", lambda *_, **__: seen.append(constants.HF_HUB_OFFLINE) or 1 / 0
        )
        with pytest.raises(UserError, match=r"some/set .*cannot be read: https?://.* does not answer"):
            list(hub("some/set").documents())
        with pytest.raises(UserError, match=r"version of some/set: https?://.* does not answer"):
            hub("some/set").fingerprint()
        assert (seen, constants.HF_HUB_OFFLINE) == ([True], False)

    def test_between_rows_the_settings_of_the_libraries_are_their_own(self, datasets, monkeypatch):
        from huggingface_hub import constants

        seen = []
        monkeypatch.setattr("plmtune.hub.silence", lambda: "https://huggingface.co does not answer")
        rows = ({"text": f"{seen.append(constants.HF_HUB_OFFLINE)}"} for _ in range(3))
        monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: rows)
        documents = hub("some/set").documents()
        next(documents)
        assert (seen, constants.HF_HUB_OFFLINE) == ([True], False)
        next(documents)
        documents.close()
        assert (seen, constants.HF_HUB_OFFLINE) == ([True, True], False)

    def test_without_the_package_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"needs the package datasets \(extra hub\)"):
            list(hub("some/set").documents())

    def test_a_pinned_commit_needs_no_hub_to_be_known(self, monkeypatch):
        def no_import(name, *rest, **kwargs):
            assert not name.startswith("huggingface_hub")
            return original(name, *rest, **kwargs)

        original = builtins.__import__
        monkeypatch.setattr(builtins, "__import__", no_import)
        one, other = (hub("some/set", revision=COMMIT, limit=n).fingerprint() for n in (1, 2))
        assert one != other

    def test_the_fingerprint_is_that_of_the_commit(self, monkeypatch):
        commit = "a" * 40
        monkeypatch.setattr("plmtune.hub.silence", lambda: "")
        module = types.ModuleType("huggingface_hub")
        module.HfApi = lambda: types.SimpleNamespace(
            dataset_info=lambda name, revision: types.SimpleNamespace(sha=commit)
        )
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        before = hub("some/set").fingerprint()
        assert before == hub("some/set", revision=commit).fingerprint()
        commit = "b" * 40
        assert hub("some/set").fingerprint() != before

    def test_settings_that_cannot_be(self):
        with pytest.raises(ValueError, match="needs the name of a dataset"):
            hub()
        with pytest.raises(ValueError, match=r"limit \(0\)"):
            hub("some/set", limit=0)
