"""Inputs of which plmtune once got something wrong, each a folder with what runs it, in ../shared/cases."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[3] / "shared" / "cases" / "training"
# A folder; what its run prints, as patterns, and what it must not.
READ = {
    "disliked_as_sft": (
        [r"UserError: all 2 rows cannot be used", r"has a label", r"loss=kto"],
        [r"Message\(role='assistant'"],
    ),
    "history_in_pairs": ([r"(?s)Which country has Machu Picchu\?.*Peru\..*And its capital\?"], []),
    "input_beside_response": ([r"Add the numbers\.\n19 and 23"], []),
    "kto_other_names": ([r"rejected='Go away\.'", r"chosen='Bye!'", r"chosen='Hi!'"], [r"is a conversation"]),
    "mix_short_phase": ([r"drawn \{'a': 24, 'b': 8\} said \{'a': 0\.75, 'b': 0\.25\}"], []),
    "paths_of_tables": (
        [r"key data\.paths\[0\]: a table where", r"key data\.paths\[0\]: a list where", r"prepare is empty"],
        [r"Traceback"],
    ),
    "pissa_adapter": (
        [
            r"true PEFT .* plmtune against PEFT \d\.\d+e-0[5-9]",
            r"gaussian PEFT .* plmtune against PEFT \d\.\d+e-0[5-9]",
            r"pissa refused: UserError .*init_lora_weights is 'pissa'",
            r"olora refused: UserError .*init_lora_weights is 'olora'",
        ],
        [],
    ),
    "separator_override": (
        [r"(?s)(data\.separator=\S+\nfiles: [^\n]* 3 documents.*){2}--separator\n.* 3 documents"],
        [],
    ),
    "yaml_duplicate_keys": ([r"plmtune: mine\.yaml, line 3: .*the key optimizer is there twice, first in line 1"], []),
    "yaml_one_beta": ([r"needs 2 values, not 1\.", r"needs 2 values, not 3\."], [r"Traceback"]),
    "null_pair_columns": ([r"2 rows of conversations: 2 can be used"], [r"preference pair"]),
    "reasoning_content": ([r"⟦<think>three sevens are twenty-one</think>\n21<\|im_end\|>⟧"], []),
    "system_prompt_in_pairs": ([r"system\nAnswer in French\."], [r"helpful assistant"]),
    "tools_in_pairs": ([r"line 1 has tools, and the chat template writes none"], [r"1 can be used"]),
    "train_flag": ([r"⟦No: Lima\.<\|im_end\|>⟧", r"7 of them trained"], [r"⟦Quito"]),
    "utf16_jsonl": ([r"(?s)(144 training tokens, 0 held out, 4 documents.*){2}"], [r"bad row"]),
    "weight_zero": ([r"⟦No: Lima\.<\|im_end\|>⟧", r"7 of them trained"], [r"⟦Quito"]),
}

# PEFT four times; several commands, whose subjects tests of data and config have by default too.
SLOW = ("pissa_adapter", "paths_of_tables", "separator_override", "utf16_jsonl", "yaml_one_beta")


@pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases")
class TestData:
    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in READ],
    )
    def test_is_read_or_refused_by_name(self, tmp_path: Path, name: str) -> None:
        folder = shutil.copytree(CASES / name, tmp_path / name)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", str(folder / "run.sh")],
            env=os.environ | {"PATH": path},
            capture_output=True,
            timeout=300,
            check=False,
        )
        said = (done.stdout + done.stderr).decode()
        wanted, unwanted = READ[name]
        for pattern in wanted:
            assert re.search(pattern, said), said
        for pattern in unwanted:
            assert not re.search(pattern, said), said
