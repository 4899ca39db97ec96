"""A process imports dynamo when something is compiled, not before, and then compiles as ever."""

import subprocess
import sys

import pytest

CODE = """
import sys, torch
from torch.optim import AdamW, Optimizer
from plmtune.training.without_dynamo import without_dynamo

raw = Optimizer.add_param_group.__wrapped__
with without_dynamo():
    model = torch.nn.Linear(2, 2, device="meta")
    AdamW(model.parameters())
    torch.addcmul(model.weight, model.weight, model.weight)
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
assert not hasattr(raw, "__dynamo_disable") and "_dynamo" not in vars(torch)

with without_dynamo():
    AdamW(model.parameters())
    import torch._dynamo.utils  # asks for more than a mark
    assert torch._dynamo.graph_break() is None
assert sys.modules["torch._dynamo"] is torch._dynamo and torch._dynamo.__file__
assert not hasattr(raw, "__dynamo_disable")
graphs = []
double = torch.compile(lambda x: x * 2, backend=lambda graph, _: graphs.append(graph) or graph.forward)
assert double(torch.ones(1)).item() == 2 and len(graphs) == 1
"""

# A torch that asks in another form, or does not ask at all.
OTHERWISE = """
import sys, torch
from plmtune.training.without_dynamo import without_dynamo

with without_dynamo():
    f = torch._dynamo.disable(recursive=False)(lambda x: x + 1)
    assert f(1) == 2 and torch._dynamo.__file__
with without_dynamo():
    pass
assert torch._dynamo.is_compiling() is False
"""


@pytest.mark.parametrize("code", [CODE, OTHERWISE])
def test_dynamo_is_imported_only_for_what_needs_it_and_no_mark_stays(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
