"""The keys and commands of ours that docs/migrating.md names exist."""

from __future__ import annotations

import re
import shlex

import documented
import pytest

from plmtune.config.compose import compose
from plmtune.errors import UserError

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


def test_the_page_maps_both_programs() -> None:
    assert len(OURS) > 80
