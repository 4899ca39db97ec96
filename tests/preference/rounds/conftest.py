import pytest

from plmtune.evaluation.code_eval import missing
from plmtune.preference.refinement import Refinement
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.tokenizer_files import bundled


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    return find_template("chatml", bundled())


@pytest.fixture
def refinement() -> Refinement:
    return Refinement("{{ prompt }}\nEarlier: {{ answer }}", "a test")


@pytest.fixture
def sandbox() -> None:
    if lacking := missing():
        pytest.skip(f"there is no sandbox here: {lacking}")
