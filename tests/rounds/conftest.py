import pytest

from plmtune.data.chat_template import ChatTemplate, find_template
from plmtune.data.refinement import Refinement
from plmtune.data.tokenizers import bundled
from plmtune.evaluation.code_eval import missing


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
