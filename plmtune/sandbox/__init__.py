"""Run Python code that a model wrote, with its tests, in namespaces of its own."""

from plmtune.sandbox.execute import DISK_BYTES, MEMORY_BYTES, Isolation, NoSandbox, Result, run_all, run_python
from plmtune.sandbox.uncalled import with_calls

__all__ = ["DISK_BYTES", "MEMORY_BYTES", "Isolation", "NoSandbox", "Result", "run_all", "run_python", "with_calls"]
