import pytest

from plmtune.errors import UserError
from plmtune.preference.refinement import Refinement, find_refinement
from plmtune.tokenizers.message import Message

PROMPT = (
    Message("system", "Be kind."),
    Message("user", "One?"),
    Message("assistant", "1"),
    Message("user", "Two?"),
)


class TestFill:
    def test_the_last_user_message_alone_is_replaced(self):
        filled = Refinement("Q {{ prompt }} A {{ answer }}", "mine.jinja").fill(PROMPT, "2")
        assert filled == (*PROMPT[:3], Message("user", "Q Two? A 2"))

    def test_jinja_in_an_answer_is_text(self):
        filled = Refinement("{{ prompt }}|{{ answer }}", "mine.jinja").fill(PROMPT, "{{ prompt }}{% if %}")
        assert filled[-1].content == "Two?|{{ prompt }}{% if %}"

    def test_blocks_leave_no_lines(self):
        source = "{{ prompt }}\n{% if answer %}\nEarlier: {{ answer }}\n{% endif %}\nBetter:"
        assert Refinement(source, "mine.jinja").fill(PROMPT, "2")[-1].content == "Two?\nEarlier: 2\nBetter:"

    def test_the_shipped_template_shows_question_and_answer(self):
        text = find_refinement(None).fill(PROMPT, "an early answer")[-1].content
        assert text.startswith("Two?\n")
        assert "an early answer\n" in text
        assert "{" not in text and text == text.strip()

    def test_a_template_that_fails_on_some_texts_is_a_sentence(self):
        refinement = Refinement("{{ prompt }}{{ 1 / (answer | length) }}", "mine.jinja")
        with pytest.raises(UserError, match=r"mine\.jinja fails: ZeroDivisionError"):
            refinement.fill(PROMPT, "")


class TestRefusals:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{{ prompt }}", "does not use answer"),
            ("{{ answer }}", "does not use prompt"),
            ("Try again.", "does not use answer and prompt"),
            ("{{ prompt }}{{ answr }}", "does not use answer, and uses answr"),
            ("{{ prompt }}{{ answer }}{{ context }}", "uses context"),
            ("{{ prompt }", "no Jinja template"),
            ("{% for x in prompt %}{{ answer }}", "no Jinja template"),
            ("{{ prompt.__class__.__mro__ }}{{ answer }}", "fails: SecurityError"),
            ("{{ prompt + 1 }}{{ answer }}", "fails: TypeError"),
            ("{% for i in range(10 ** 9) %}{{ prompt }}{{ answer }}{% endfor %}", "fails: OverflowError"),
            (
                "{% for i in range(9999) %}{% set x = range(99999) %}{% endfor %}{{ prompt }}{{ answer }}",
                "does not come to an end",
            ),
            (
                "{% for i in range(9999) %}{{ prompt }}{{ answer }}{{ 'a' * 999 }}{% endfor %}",
                "makes or reads more than",
            ),
            ("{{ prompt.title_of }}{{ answer }}", "fails: UndefinedError"),
            ("{% if false %}{{ prompt }}{{ answer }}{% endif %}", "writes nothing"),
        ],
    )
    def test_a_template_that_cannot_work_is_a_sentence_with_its_file(self, source, message):
        with pytest.raises(UserError, match=rf"mine\.jinja.* {message}|mine\.jinja is {message}"):
            Refinement(source, "mine.jinja")

    def test_a_file_that_cannot_be_read_is_a_sentence(self, tmp_path):
        with pytest.raises(UserError, match=r"refinement.template=.*No such file"):
            find_refinement(str(tmp_path / "none.jinja"))
        path = tmp_path / "mine.jinja"
        path.write_bytes(b"{{ prompt }}{{ answer }}\xff")
        with pytest.raises(UserError, match="not UTF-8 at byte 24"):
            find_refinement(str(path))
        path.write_bytes(b" " * (1 << 16) + b" ")
        with pytest.raises(UserError, match="more than 65,536 bytes"):
            find_refinement(str(path))

    def test_a_file_of_ones_own_is_used(self, tmp_path):
        path = tmp_path / "mine.jinja"
        path.write_text("{{ answer }}?! {{ prompt }}", encoding="utf-8")
        assert find_refinement(str(path)).fill(PROMPT, "2")[-1].content == "2?! Two?"
