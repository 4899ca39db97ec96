"""The fixtures of the tests of recipes; functions that tests call stand in `cli_runs` and `tuning`."""

from cli_runs import corpus_text, curves, place, plmtune, short_runs, whole  # noqa: F401
from tuning import base, compose, origin, undisturbed  # noqa: F401
