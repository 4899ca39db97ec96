"""Templates that double a text, loop for ever or compute numbers without end are stopped before they have done so."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plmtune.errors import UserError
from plmtune.tokenizers.builtin_templates import NAMED
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.rendering import Renderer
from plmtune.tokenizers.template_limits import TemplateLimit
from plmtune.tokenizers.template_sandbox import MAX_TEMPLATE, Sandbox
from plmtune.tokenizers.tokenizer_files import bundled

FILES = Path(__file__).parents[3] / "shared" / "cases" / "files"
SAID = [Message("user", "hello"), Message("assistant", "world")]
MOST_MEMORY = 64 << 20


def repeated(expression: str, start: str = "'aaaaaaaaaaaaaaaa'", behind: str = "") -> str:
    """A template that computes x of x sixty times."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {expression} %}}{{% endfor %}}"
        f"{behind}"
    )


NESTED = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
NESTED += "{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
LONG = "{% set b = 'ab' * 200000 %}{% set c = 'ab' * 200000 ~ 'c' %}{% for i in range(9999) %}"
GROWING = {
    "squares": repeated("ns.x * ns.x", "10"),
    "powers": "{{ 9 ** 9 ** 9 }}{{ (9 ** 100) ** 100 }}",
    "~": repeated("ns.x ~ ns.x"),
    "+": repeated("ns.x + ns.x"),
    "+ of lists": repeated("ns.x + ns.x", "[1]"),
    "+ of escaped texts": repeated("ns.x + ns.x", "'&' | e"),
    "*": "{{ 'x' * 10000000000 }}",
    "* of lists": "{{ [0] * 10000000000 }}",
    "set block": repeated("''").replace("{% set ns.x = '' %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "macro": "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ m('aaaa', 60) }}",
    "macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 25 + "x" + "{% endcall %}" * 25,
    "replace": repeated("ns.x | replace('a', 'aa')"),
    "replace, a method": repeated("ns.x.replace('a', 'aa')"),
    "join": repeated("[ns.x, ns.x] | join"),
    "join with a separator": repeated("ns.x | list | join(ns.x)"),
    "join, a method": repeated("ns.x.join([ns.x, ns.x])"),
    "map": repeated("[[ns.x, ns.x] | join] | map('upper') | join"),
    "format": repeated("'%s%s' | format(ns.x, ns.x)"),
    "%": repeated("'%s%s' % (ns.x, ns.x)"),
    "format, a method": repeated("'{0}{0}'.format(ns.x)"),
    "format_map": repeated("'{a}{a}'.format_map({'a': ns.x})"),
    "format from an attribute": "{{ ('{:1000000000}' | attr('format'))(1) }}",
    "width of %": "{{ '%1000000000d' % 1 }}",
    "width of % given": "{{ '%*d' % (1000000000, 1) }}",
    "width of format": "{{ '{:1000000000}'.format(1) }}",
    "width of format given": "{{ '{:{}}'.format(1, 1000000000) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "center in a filter block": "{% filter center(1000000000) %}x{% endfilter %}",
    "center, a method": "{{ 'x'.center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(1000000) }}",
    "translate": "{{ ('a' * 10000).translate({97: 'b' * 10000}) }}",
    "to_bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "numbers of bytes": "{% set b = (5).from_bytes(('x' * 100000).encode(), 'big') %}{{ b * b }}",
    "round": "{{ 5 | round(-1000000000) }}",
    "indent": "{{ ('\n' * 10000) | indent(100000) }}",
    "wordwrap": "{{ ('a ' * 5000) | wordwrap(1, wrapstring='x' * 10000) }}",
    "batch": "{{ [1] | batch(1000000000, 1) | list }}",
    "sum of lists": "{% set b = [0] * 10000 %}{{ ([b] * 10000) | sum(start=[]) }}",
    "tojson": NESTED + "{{ ns.x | tojson }}",
    "tojson with an indent": "{{ [[[[[[1]]]]]] | tojson(indent=1000000) }}",
    "tojson with separators": repeated("[1, 2, 3, 4] | tojson(separators=(ns.x, ns.x))"),
    "text of a list": NESTED + "{{ ns.x }}",
    "text of a namespace": repeated("namespace(a=ns.x, b=ns.x)", behind="{{ ns.x }}"),
    "text of a mapping": repeated("{'a': ns.x, 'b': ns.x}", behind="{{ ns.x | string }}"),
    "equality": NESTED + "{{ ns.x == ns.y }}",
    "equality, a test": NESTED + "{{ ns.x is eq(ns.y) }}",
    "hash": repeated("(ns.x, ns.x)", behind="{{ {ns.x: 1} }}"),
    "range": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop that leaves out all": "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
    "comparison": LONG + "{% set x = b < c %}{% endfor %}",
    "in": LONG + "{% set x = 'x' in b %}{% endfor %}",
    "find": LONG + "{% set x = b.find('x') %}{% endfor %}",
    "rfind": "{% set b = 'a' * 200000 %}{{ b.rfind('b' + 'a' * 100000) }}",
    "slice": LONG + "{% set x = b[1:] %}{% endfor %}",
    "sort": LONG + "{% set x = b | sort %}{% endfor %}",
    "select": "{% set b = [1] * 20000 %}{% for i in range(9999) %}{{ b | select('eq', 2) | list }}{% endfor %}",
    "changed": LONG + "{{ loop.changed(b) }}{% endfor %}",
    "urlize": "{{ ('(' * 30000) | urlize }}",
    "long text in a loop": "{% set x %}{% for i in range(9999) %}" + "y" * 60000 + "{% endfor %}{% endset %}",
    "texts that are kept": repeated("[ns.x, 'y' * 100000]", "[]"),
    "deep tuples": repeated("((((((((ns.x,),),),),),),),)", "1").replace("range(60)", "range(9999)"),
    "a step that is given back": "{% for i in range(99999) %}{{ [-99999] | map('step (counted)') | list }}{% endfor %}",
}  # fmt: skip


class TestLimits:
    @pytest.mark.parametrize("name", GROWING)
    def test_what_grows_without_end_is_stopped_by_name_and_takes_little_memory(self, name):
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match=r"^mine\.jinja (makes|computes|does not come to an end)"):
                Renderer(GROWING[name], {}, "mine.jinja").render(SAID)
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        "source",
        ["{{ " + "(" * 60000, "{{ [" + "1," * 9000 + "] }}", "{{ a" + ".b" * 9000 + " }}", "{% if a %}" * 6000,
         "{{ 0x" + "f" * 60000 + " }}", "{{ " + "not " * 9000 + "a }}"],
    )  # fmt: skip
    def test_what_is_hard_to_read_is_a_sentence(self, source):
        with pytest.raises((UserError, BadRow)):
            Renderer(source, {}, "mine.jinja").render(SAID)
            raise BadRow("came to an end")

    def test_a_template_has_a_largest_size(self):
        with pytest.raises(UserError, match=r"mine\.jinja has 65,537 characters; .* at most 65,536"):
            Renderer("x" * (MAX_TEMPLATE + 1), {}, "mine.jinja")

    @pytest.mark.parametrize("name", ["t07_mul.jinja", "t08_concat.jinja"])
    @pytest.mark.skipif(not FILES.is_dir(), reason=f"{FILES} is not there")
    def test_reported_files_are_refused_by_name(self, name):
        with pytest.raises(UserError, match=rf"{name} (makes|computes)"):
            find_template(str(FILES / name), bundled())


class TestRightTemplates:
    """None of what real templates do comes near a limit."""

    def test_hundreds_of_turns_that_look_back_at_each_other(self):
        source = (
            "{% for m in messages %}{% set ns = namespace(last=0) %}"
            "{% for other in messages %}{% if other.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
            "{% endfor %}{{ m.role }}{{ m.content | trim }}{{ ns.last }}\n{% endfor %}"
        )
        messages = [Message(("user", "assistant")[i % 2], "some words of a turn " * 20) for i in range(300)]
        assert Renderer(source, {}, "t").render(messages)[0].count("\n") == 300

    def test_a_text_that_collects_all_turns(self):
        source = (
            "{% set ns = namespace(all='') %}{% for m in messages %}"
            "{% set ns.all = ns.all + m.role + ': ' + m.content + '\n' %}{% endfor %}{{ ns.all }}"
        )
        messages = [Message("user", "x" * 2_000)] * 200
        assert len(Renderer(source, {}, "t").render(messages)[0]) == 200 * 2_007

    def test_one_text_of_ten_million_characters(self):
        source = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"
        text = "word " * 2_000_000
        assert Renderer(source, {}, "t").render([Message("user", text)])[0] == text.strip()

    def test_many_tools_as_json(self):
        tools = [{"name": f"f{i}", "parameters": {f"p{j}": {"type": "x"} for j in range(9)}} for i in range(300)]
        source = "{% for tool in tools %}{{ tool | tojson }}{{ tool.parameters | tojson(indent=4) }}{% endfor %}"
        messages = [Message("tools", json.dumps(tools)), Message("user", "hello")]
        assert Renderer(source, {}, "t").render(messages)[0].count('"p8"') == 600

    @pytest.mark.parametrize("long", [0, -2, -1])
    @pytest.mark.parametrize("number", [20, 400])
    def test_a_turn_that_is_compared_with_each_other(self, number, long):
        """As templates find the first or last turn, one of which holds a whole file."""
        source = (
            "{% set asked = messages | selectattr('role', 'eq', 'user') | list %}{% for m in messages %}"
            "{% if m == asked[-1] %}[{% endif %}{{ m.role ~ m.content }}"
            "{% if m != messages | last and m is ne(messages[0]) %}\n{% endif %}{% endfor %}"
        )
        messages = [Message(("user", "assistant")[i % 2], str(i)) for i in range(number)]
        messages[long] = Message(messages[long].role, "word " * 30_000)
        assert Renderer(source, {}, "t").render(messages)[0].count("[") == 1

    def test_a_text_that_collects_short_turns_with_what_stands_around_them(self):
        around = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>\n"
        head, middle, end = around.split("{}")
        source = (
            "{% set ns = namespace(all='') %}{% for m in messages %}"
            f"{{% set ns.all = ns.all + '{head}' + m.role %}}{{% set ns.all = ns.all ~ '{middle}' %}}"
            f"{{% set ns.all = ns.all + m.content + '{end}' %}}"
            "{% endfor %}{{ ns.all }}"
        )
        messages = [Message("user", "word " * 30_000), *[Message("user", "y")] * 899]
        assert Renderer(source, {}, "t").render(messages)[0].count("user") == 900

    @pytest.mark.parametrize("number", [1, 300])
    def test_tools_in_words_of_the_template(self, number):
        """As TypeScript: a macro for each type, with all of them collected in one text."""
        source = (
            "{% macro kind(of) %}{% if of.type == 'array' %}{{ kind(of['items']) + '[]' }}{% elif of.enum %}"
            "{{ of.enum | join(' | ') }}{% elif of.type == 'object' %}{{ '{' }}{% for name, inner in "
            "of.properties.items() %}{{ name + ('' if name in (of.required or []) else '?') + ': ' }}{{ kind(inner) }}"
            "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ '}' }}{% else %}{{ of.type }}{% endif %}"
            "{% endmacro %}{% set ns = namespace(all='') %}{% for tool in tools %}"
            "{% set ns.all = ns.all ~ (tool | string) ~ kind(tool.parameters) ~ '\n' %}{% endfor %}"
            "{{ ns.all }}{{ messages[0].content }}"
        )
        properties = {f"p{i}": {"type": "array", "items": {"type": "x"}} for i in range(3_000 // number)}
        tools = [{"name": f"f{i}", "parameters": {"type": "object", "properties": properties}} for i in range(number)]
        messages = [Message("tools", json.dumps(tools)), Message("user", "hello")]
        assert Renderer(source, {}, "t").render(messages)[0].count("x[]") == len(properties) * number

    def test_deep_json_with_an_indent_and_calls_with_many_numbers(self):
        deep: object = {"type": "x"}
        for _ in range(20):
            deep = {"type": "object", "properties": {"a": {"type": "x"}, "b": deep}}
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": list(range(20_000))}}}
        source = (
            "{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% for m in messages %}{{ m.content }}"
            "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
            "{{ call.function.arguments | tojson(indent=2) }}{% endfor %}{% endfor %}"
        )
        messages = [Message("tools", json.dumps([deep] * 50)), Message("user", "a")]
        messages.append(Message("assistant", "", {"tool_calls": [call]}))
        assert Renderer(source, {}, "t").render(messages)[0].endswith("19999\n  ]\n}")

    @pytest.mark.parametrize("name", NAMED)
    def test_spend_a_hundredth_of_what_they_may(self, name):
        template = ChatTemplate(NAMED[name], bundled(), name) if name == "plain" else None
        renderer = template._renderer if template else Renderer(NAMED[name], {"bos_token": "<s>"}, name)
        renderer.render(SAID)
        limits = renderer._environment.limits
        assert limits._most_steps - limits.steps < limits._most_steps / 100
        assert limits._most_chars - limits.chars < limits._most_chars / 100

    def test_numbers_that_are_compared_are_no_widths(self):
        source = "{{ messages | selectattr('time', 'gt', 1700000000) | list | length }}{{ {}.get('x', 10 ** 12) }}"
        messages = [Message("user", "a", {"time": 1800000000})]
        assert Renderer(source, {}, "t").render(messages)[0] == "1" + "1000000000000"


TEXTS = st.sampled_from(["x", "'ab'", "'a b\\n'", "y", "''", "'%s'", "'&' | e"])
LISTS = st.sampled_from(["[x, y]", "x | list", "[[x], y]", "[1, 2]", "x.split('a')", "range(9) | list"])
NUMBERS = st.sampled_from(["2", "10", "x | length", "999", "10 ** 9", "-3"])


def made(operations: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    both = st.tuples(operations, operations)
    sized = st.tuples(operations, NUMBERS)
    return st.one_of(
        both.map("({0[0]}) ~ ({0[1]})".format),
        both.map("({0[0]}) + ({0[1]})".format),
        both.map("[{0[0]}, {0[1]}] | join".format),
        both.map("({0[0]}) | replace('a', {0[1]})".format),
        both.map("('{{}}{{}}').format({0[0]}, {0[1]})".format),
        both.map("'%s %s' % ({0[0]}, {0[1]})".format),
        both.map("({0[0]}).join([{0[1]}, {0[1]}, {0[1]}])".format),
        both.map("[{0[0]}, {0[1]}] | tojson(ensure_ascii=true)".format),
        both.map("({0[0]}) if ({0[0]}) in ({0[1]}) else ({0[1]})".format),
        sized.map("({0[0]}) * ({0[1]})".format),
        sized.map("({0[0]}) | center({0[1]})".format),
        sized.map("({0[0]}) | indent({0[1]})".format),
        sized.map("({0[0]}).ljust({0[1]})".format),
        sized.map("({0[0]}) | batch({0[1]}, 'z') | list | string".format),
        operations.map("({0}) | sort | join".format),
        operations.map("({0}) | wordwrap(3)".format),
        operations.map("({0})[1:] | upper".format),
        st.tuples(LISTS, operations).map("({0[0]}) | map('string') | join({0[1]})".format),
        LISTS.map("({0}) | string".format),
    )


EXPRESSIONS = st.recursive(TEXTS, made, max_leaves=5)


LIMITED = Sandbox()
PLAIN = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
PLAIN.filters["tojson"] = json.dumps


class TestAnyExpression:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(EXPRESSIONS, st.integers(0, 40))
    def test_ends_within_the_limits_and_writes_what_jinja_writes(self, expression, times):
        source = (
            f"{{% set ns = namespace(x='ab') %}}{{% for i in range({times}) %}}{{% set x, y = ns.x, 'a c' %}}"
            f"{{% set ns.x = {expression} %}}{{% endfor %}}{{{{ ns.x }}}}"
        )
        template = LIMITED.from_string(source)
        limits = LIMITED.limits
        LIMITED.restart()
        try:
            text = template.render()
        except TemplateLimit:
            return
        except (TypeError, ValueError) as error:
            text = repr(error)
        assert limits.steps >= 0 and limits.chars >= 0
        assert len(text) <= limits._most_chars
        try:
            assert PLAIN.from_string(source).render() == text
        except (TypeError, ValueError) as error:
            assert repr(error) == text
