"""What holds for all tests."""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

# Compiled test modules and the package are kept beside their sources, for the next run and for each process of a test.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PRELOADED = ["plmtune.recipes.pretrain", "plmtune.training.plot", "torch.distributed.fsdp"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what thorough.txt lists: tests of a second or more, whose promises cheaper tests make first."""
    listed = frozenset(Path(__file__).with_name("thorough.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if not listed.isdisjoint((item.nodeid, item.nodeid.partition("[")[0])):
            item.add_marker("thorough")
    if not any("::" in argument for argument in config.args):  # all parameters of a test are here, or none
        ids = {item.nodeid for item in items}
        collected = {name.partition("[")[0] for name in ids}
        gone = [line for line in sorted(listed - ids) if "[" in line and line.partition("[")[0] in collected]
        if gone:
            raise pytest.UsageError(f"tests/thorough.txt names parameters that no test has: {', '.join(gone)}")


def pytest_collection_finish() -> None:
    """Compose fast, leave what is imported by now out of every garbage collection, let forked processes have it."""
    import composing  # the first import of Hydra in a process that collects no test of a config

    composing.read_once()
    composing.parse_once()
    composing.merge_once()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    # Other modules name others when they are imported, so not before.
    multiprocessing.set_forkserver_preload(PRELOADED)
