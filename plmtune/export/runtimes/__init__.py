"""The programs that serve models on devices, opened from Python behind one interface."""

from __future__ import annotations

from plmtune.export.runtimes.base import UNVERIFIED, InferenceRuntime, Timing, form_of
from plmtune.export.runtimes.opening import RuntimeName, choose_runtime, open_runtime

__all__ = ["UNVERIFIED", "InferenceRuntime", "RuntimeName", "Timing", "choose_runtime", "form_of", "open_runtime"]
