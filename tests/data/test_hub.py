import builtins
import contextlib
import importlib.machinery
import sys
import types

import pytest

from plmtune.data.conversations import conversations
from plmtune.data.hub import hub
from plmtune.data.preferences import preferences
from plmtune.errors import UserError

SUBSETS = {"english": ["train"], "french": ["valid", "test"]}
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
PAIR = {"prompt": "Who?", "chosen": "I.", "rejected": "You."}
READERS = {
    "hub": lambda name, **how: list(hub(name, text_key="prompt", **how).documents()),
    "conversations": lambda name, **how: list(conversations(hub=name, messages_key="messages", **how).conversations()),
    "preferences": lambda name, **how: list(preferences(hub=name, **how).pairs()),
}
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the package: no network in tests."""
    calls = []

    def load_dataset(name, subset, **settings):
        calls.append((name, subset, settings))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        if name == "many/sets" and subset not in SUBSETS:
            raise ValueError(f"Config name is missing, or BuilderConfig {subset} not found.\nPlease pick one")
        if name == "many/sets":
            if settings["split"] not in SUBSETS[subset]:
                raise ValueError(f"Bad split: {settings['split']}")
            return iter([{"messages": TALK, **PAIR}])
        return iter([{"text": "one"}, {"text": " "}, {"body": "bad"}, {"text": "two"}])

    monkeypatch.setattr("plmtune.io.hub.unavailable_reason", lambda: "")
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    module.get_dataset_config_names = lambda name, revision: list(SUBSETS if name == "many/sets" else ["default"])
    module.get_dataset_split_names = lambda name, subset, revision: SUBSETS[subset]
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
        monkeypatch.setattr("plmtune.io.hub.unavailable_reason", lambda: "https://huggingface.co does not answer")
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
        monkeypatch.setattr("plmtune.io.hub.unavailable_reason", lambda: "https://huggingface.co does not answer")
        rows = ({"text": f"{seen.append(constants.HF_HUB_OFFLINE)}"} for _ in range(3))
        monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: rows)
        documents = hub("some/set").documents()
        next(documents)
        assert (seen, constants.HF_HUB_OFFLINE) == ([True], False)
        next(documents)
        documents.close()
        assert (seen, constants.HF_HUB_OFFLINE) == ([True, True], False)

    @pytest.mark.parametrize("kind", READERS)
    def test_every_kind_of_data_takes_subset_split_and_revision(self, datasets, kind):
        assert len(READERS[kind]("many/sets", subset="french", split="test", revision=COMMIT)) == 1
        assert datasets == [("many/sets", "french", {"split": "test", "revision": COMMIT, "streaming": True})]

    @pytest.mark.parametrize("kind", READERS)
    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({}, "many/sets has several subsets: english, french. Choose one with subset=english"),
            ({"subset": "frensh"}, r"many/sets has no subset frensh, but english, french\. Did you mean french\?"),
            ({"subset": "french"}, "many/sets has no split train, but valid, test: choose one with split=valid"),
        ],
    )
    def test_what_it_does_not_have_is_said_with_what_it_has(self, datasets, kind, how, message):
        with pytest.raises(UserError, match=f"data hub: {message}"):
            READERS[kind]("many/sets", **how)

    def test_the_rows_are_of_the_commit_that_the_fingerprint_is_of(self, datasets, monkeypatch):
        module = types.ModuleType("huggingface_hub")
        module.HfApi = lambda: types.SimpleNamespace(
            dataset_info=lambda name, revision: types.SimpleNamespace(sha=COMMIT)
        )
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setattr("plmtune.io.hub.without_retries", contextlib.nullcontext)
        source = hub("some/set", revision="v1")
        source.fingerprint()
        next(source.documents())
        assert datasets[0][2]["revision"] == COMMIT

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
        monkeypatch.setattr("plmtune.io.hub.unavailable_reason", lambda: "")
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
