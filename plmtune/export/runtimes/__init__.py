"""The programs that serve models on devices, opened from Python behind one interface."""

from __future__ import annotations

from plmtune.export.runtimes.base import InferenceRuntime, Timing
from plmtune.export.runtimes.opening import UNVERIFIED, RuntimeName, choose_runtime, form_of, open_runtime

__all__ = ["UNVERIFIED", "InferenceRuntime", "RuntimeName", "Timing", "choose_runtime", "form_of", "open_runtime"]
