import pytest

from plmtune.data.chat_template import ChatTemplate, find_template
from plmtune.data.refinement import Refinement
from plmtune.data.tokenizers import bundled


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    return find_template("chatml", bundled())


@pytest.fixture
def refinement() -> Refinement:
    return Refinement("{{ prompt }}\nEarlier: {{ answer }}", "a test")
