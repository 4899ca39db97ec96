"""Chat templates: what counting their steps and characters costs, against jinja's sandbox as transformers sets it up.

    python benchmarks/chat_templates.py [--quick] [--data DIRECTORY]

The rows are those of DIRECTORY/sft that have two turns, and the same joined to conversations of ten. Prints CPU
seconds a thousand renderings on both sides, which alternate, and what part of all the work on a row, tokens included,
the counting is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from side_by_side import machine

from plmtune.data.conversations import conversations
from plmtune.tokenizers.builtin_templates import NAMED
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer_files import bundled

DATA = Path(__file__).parents[2] / "shared" / "data"
# As Qwen3's: it looks back for the last question, and splits answers at </think>.
LOOKS_BACK = (
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not"
    " (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'user' or message.role == 'system' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning_content = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content }}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def cpu(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def compare(name: str, source: str, rows: list[tuple[Message, ...]], rounds: int) -> None:
    """Print a line for one template."""
    template = ChatTemplate(source, bundled(), name)
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    compiled = plain.from_string(source)
    eos = template.tokenizer.eos

    def without_limits(row: tuple[Message, ...]) -> str:
        said = [{"role": message.role, "content": message.content} for message in row]
        return "".join(compiled.generate(messages=said, add_generation_prompt=False, eos_token=eos))

    assert all(template.render(row) == without_limits(row) for row in rows)
    taken = [
        (
            cpu(lambda: [template.render(row) for row in rows]),
            cpu(lambda: [without_limits(row) for row in rows]),
            cpu(lambda: template.encode_batch(rows)),
        )
        for _ in range(rounds)
    ]
    limited, unlimited, encoded = (median(column) / len(rows) * 1000 for column in zip(*taken, strict=True))
    renderings = template_renderings(template, rows)
    share = renderings * (limited - unlimited) / encoded
    print(
        f"{name:11} {len(rows[0]):>5} {limited:>8.3f} {unlimited:>8.3f} {limited / unlimited:>6.2f}x {encoded:>8.3f} "
        f"{renderings:>6.1f} {share:>7.1%}"
    )


def template_renderings(template: ChatTemplate, rows: list[tuple[Message, ...]]) -> float:
    """Return how often a row is rendered to be encoded."""
    held, count = template._renderer._write, 0

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        return held(*args)  # type: ignore[arg-type]

    template._renderer._write = counting  # type: ignore[method-assign, assignment]
    template.encode_batch(rows)
    return count / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    source = conversations((str(options.data / "sft" / "lf_alpaca_en_demo.json"),))
    short = [tuple(one.messages) for one in source.conversations() if len(one.messages) == 2]
    short = short[: 100 if options.quick else None]
    joined = [sum(short[at : at + 5], ()) for at in range(0, len(short) - 4, 5)]
    print(machine())
    print("template    turns  limited  without  ratio  encoded  times   share")
    for rows in (short, joined):
        for name, text in {"chatml": NAMED["chatml"], "plain": NAMED["plain"], "looks back": LOOKS_BACK}.items():
            compare(name, text, rows, 3 if options.quick else 9)


if __name__ == "__main__":
    main()
