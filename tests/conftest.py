"""What holds for all tests."""

import gc


def pytest_collection_finish() -> None:
    """Leave what is imported by now, millions of objects, out of every garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
