"""What holds for all tests."""

import gc
import multiprocessing

PRELOADED = ["plmtune.recipes.pretrain", "plmtune.training.plot", "torch.distributed.fsdp"]


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every garbage collection, and let forked processes have it imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    # Other modules name others when they are imported, so not before.
    multiprocessing.set_forkserver_preload(PRELOADED)
