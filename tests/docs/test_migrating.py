"""The keys and commands of ours that docs/migrating.md names exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import documented
import pytest

from plmtune.config.compose import compose
from plmtune.errors import UserError
from plmtune.registry import load

PAGE = documented.ROOT / "docs" / "migrating.md"
CONFIGS = ("sft", "dpo", "pretrain", "quantize")
# The code spans of each table's last column; a command is tested with the commands of the other pages.
OURS = [
    span
    for row in re.findall(r"^\|.*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", row)
    if re.match(r"'?[\w./]+=", span)
]


@pytest.mark.parametrize("overrides", sorted(set(OURS)))
def test_the_overrides_compose_in_one_of_our_configs(overrides: str) -> None:
    refused = []
    for config in CONFIGS:
        try:
            compose(config, [], shlex.split(overrides))
        except UserError as error:
            refused.append(str(error))
        else:
            return
    pytest.fail("\n".join(refused))


HI, HELLO, NO = (
    {"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Hello."), ("assistant", "No."))
)
ROWS = {
    "chat_dataset, sharegpt": {
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
    },
    "chat_template": {"messages": [HI, HELLO]},
    "alpaca": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "instruct_dataset": {"input": "Hi?", "output": "Hello."},
    "preference_dataset": {"chosen": [HI, HELLO], "rejected": [HI, NO]},
    "chat_template.default": {"messages": [HI], "chosen": HELLO, "rejected": NO},
    "chatml.intel": {"system": "Be kind.", "question": "Hi?", "chosen": "Hello.", "rejected": "No."},
    "chatml.argilla": {"instruction": "Hi?", "completion": "Hello.", "label": True},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_their_dataset_types_is_read(name: str, tmp_path: Path) -> None:
    row: dict[str, Any] = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    kind, read = ("preferences", "pairs") if {"chosen", "label"} & set(row) else ("conversations", "conversations")
    data = load("data", kind)(paths=(str(tmp_path / "rows.jsonl"),))
    assert len(list(getattr(data, read)(False))) == 1


def test_the_page_maps_both_programs() -> None:
    assert len(OURS) > 80
