"""The programs that serve models on devices, opened from Python behind one interface."""

from __future__ import annotations

from plmtune.export.runtimes.base import Runtime, Timing
from plmtune.export.runtimes.opening import RuntimeName, open_runtime

__all__ = ["Runtime", "RuntimeName", "Timing", "open_runtime"]
