"""Modelfiles: Ollama's template writes what the chat template writes, over the Go subset that they use."""

import json
from pathlib import Path
from typing import Any

import pytest
from go_template import render

from plmtune.export.ollama import go_template, modelfile, sampling
from plmtune.tokenizers.bpe import BYTE_PATTERN, SINGLE_BYTES, from_ranks
from plmtune.tokenizers.builtin_templates import NAMED
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.tokenizer import Tokenizer

_SPECIALS = ["<s>", "</s>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<end_of_turn>"]
_HELD = from_ranks({token: rank for rank, token in enumerate(SINGLE_BYTES)}, BYTE_PATTERN, None, _SPECIALS, "bytes")

_LOOP = "{% for message in messages %}"
_PROMPT = "{% if add_generation_prompt %}"
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
)
TEMPLATES = NAMED | {
    "ChatML without a default": _LOOP
    + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    + _PROMPT
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "SmolLM": _LOOP
    + "{% if loop.first and messages[0]['role'] != 'system' %}"
    + "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    + "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    + _PROMPT
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "Llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    + "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    + "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    + _ALTERNATE
    + "{% if loop.index0 == 0 and system_message != false %}"
    + "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    + "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    + "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    + "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "Mistral, the system before the last message": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    + "{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}"
    + "{% set rest = messages %}{% endif %}"
    + "{% for message in rest %}{% if message['role'] == 'user' %}{% if loop.last and system is defined %}"
    + "{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{% else %}"
    + "{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% else %}"
    + "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    "Gemma, no system": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    + "{{ raise_exception('System role not supported') }}{% endif %}"
    + _LOOP
    + _ALTERNATE
    + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    + "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    + _PROMPT
    + "{{'<start_of_turn>model\n'}}{% endif %}",
    "Phi-3, which drops the system": "{{ bos_token }}"
    + _LOOP
    + "{% if message['role'] == 'user' %}{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n'}}"
    + "{{'<|assistant|>\n'}}{% elif message['role'] == 'assistant' %}"
    + "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}",
    "Zephyr, TinyLlama": _LOOP
    + "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    + _PROMPT
    + "{{ '<|assistant|>\n' }}{% endif %}",
    "odd characters": _LOOP
    + "{{ '{{' + message['role'] + '}}\u00a0\U000e0041\"\\\\\"\u200b' + message['content'] + eos_token }}{% endfor %}"
    + _PROMPT
    + "{{ '{{assistant}}\u00a0\U000e0041\"\\\\\"\u200b' }}{% endif %}",
}
_ROLES = [
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant", "user"),
]
_TEXTS = ["Hi!", 'two\n\nlines {{ .System }} {% if %} "q"', "你好 <b>&amp;</b>", "{{", "x = 1  # é", "\\n"]
CONVERSATIONS = [
    [Message(role, _TEXTS[(at + shift) % len(_TEXTS)]) for at, role in enumerate(roles)]
    for shift, roles in enumerate(_ROLES)
]


def tokenizer(template: str | None, *, adds_bos: bool = True, ends: tuple[int, ...] = ()) -> Tokenizer:
    return Tokenizer(_HELD, eos="</s>", bos="<s>", adds_bos=adds_bos, chat_template=template, ends=ends)


def in_ollama(template: str, messages: list[Message]) -> str:
    """As template.Execute of Ollama, of turns of alternating roles."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    held = [{"Role": message.role, "Content": message.content} for message in messages]
    return render(template, System=system, Messages=held)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_writes_what_the_chat_template_writes(name: str, adds_bos: bool) -> None:
    made = tokenizer(TEMPLATES[name], adds_bos=adds_bos)
    template, _ = go_template(made)
    assert template is not None
    jinja = ChatTemplate(TEMPLATES[name], made, name)
    written = 0
    for messages in CONVERSATIONS:
        try:
            wanted = jinja.render(messages, add_generation_prompt=True)
        except BadRow:
            continue
        # Ollama puts bos before a prompt itself where the file says so.
        assert in_ollama(template, messages) == (wanted.removeprefix("<s>") if adds_bos else wanted)
        written += 1
    assert written >= 3


class TestNotes:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("Llama 2", "strips white space around a message"),
            ("Gemma, no system", "takes no system message. Ollama's puts one before the first message of the user."),
            ("Phi-3, which drops the system", "leaves out system messages, and so does Ollama's."),
        ],
    )
    def test_say_what_is_otherwise(self, name: str, said: str) -> None:
        assert any(said in note for note in go_template(tokenizer(TEMPLATES[name]))[1])

    def test_of_plain_templates_are_none(self) -> None:
        assert go_template(tokenizer(TEMPLATES["Zephyr, TinyLlama"]))[1] == []

    def test_name_thoughts_that_the_chat_template_leaves_out(self) -> None:
        source = TEMPLATES["ChatML without a default"].replace(
            "message['content']", "message['content'].split('</think>')[-1]"
        )
        (note,) = go_template(tokenizer(source))[1]
        assert note.startswith("The chat template leaves thoughts out of earlier answers")

    def test_a_system_message_that_the_chat_template_refuses_precedes_the_users_first(self) -> None:
        template, _ = go_template(tokenizer(TEMPLATES["Gemma, no system"]))
        assert template is not None
        messages = [
            Message("system", "Be kind."),
            Message("user", "a"),
            Message("assistant", "b"),
            Message("user", "c"),
        ]
        assert in_ollama(template, messages).startswith("<start_of_turn>user\nBe kind.\n\na<end_of_turn>\n")

    @pytest.mark.parametrize(
        "source",
        [
            # The number of turns; the length of a message; no end of an answer.
            _LOOP + "{{ messages | length }}{{ message['role'] + message['content'] + eos_token }}{% endfor %}",
            _LOOP + "{{ message['role'] + message['content'] + eos_token * message['content'] | length }}{% endfor %}",
            _LOOP + "{{ message['content'] }}{% endfor %}",
            _LOOP + "{{ '\"\"\"' + message['role'] + message['content'] + eos_token }}{% endfor %}",
        ],
    )
    def test_without_an_equal_template_there_is_none_and_that_is_said(self, source: str) -> None:
        text, notes = modelfile("a.gguf", tokenizer(source), Path("nowhere"))
        assert "TEMPLATE" not in text
        assert notes[0].endswith(
            "the Modelfile has no TEMPLATE. Ollama then takes a nearly equal one that it knows, or in newer versions "
            "the file's own."
        )


class TestModelfile:
    def test_names_the_file_the_template_the_ends_and_the_sampling(self, tmp_path: Path) -> None:
        settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 1}
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        made = tokenizer(NAMED["chatml"], ends=(_HELD.specials["<|eot_id|>"],))
        text, notes = modelfile("a-Q8_0.gguf", made, tmp_path)
        first, rest = text.split('TEMPLATE """')
        template, rest = rest.split('"""\n')
        assert (first, notes) == ("FROM ./a-Q8_0.gguf\n", [])
        assert template == go_template(made)[0]
        assert rest.splitlines() == [
            'PARAMETER stop "</s>"',
            'PARAMETER stop "<|eot_id|>"',
            'PARAMETER stop "<|im_end|>"',
            "PARAMETER temperature 0.6",
            "PARAMETER top_k 20",
            "PARAMETER repeat_penalty 1.1",
        ]

    def test_of_a_base_model_takes_the_prompt_alone(self, tmp_path: Path) -> None:
        text, notes = modelfile("a.gguf", tokenizer(None), tmp_path)
        assert (text, notes) == (
            'FROM ./a.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "</s>"\n',
            [],
        )

    @pytest.mark.parametrize(
        ("settings", "parameters"),
        [
            ({}, {}),
            ({"temperature": 0.5}, {}),  # transformers decodes greedily without do_sample
            ({"do_sample": False, "temperature": 0.5}, {"temperature": 0}),
            ({"do_sample": True, "top_p": 0.9, "min_p": None, "top_k": True}, {"top_p": 0.9}),
        ],
    )
    def test_sampling_is_that_of_transformers(self, settings: dict[str, Any], parameters: dict[str, Any]) -> None:
        assert sampling(settings) == parameters
