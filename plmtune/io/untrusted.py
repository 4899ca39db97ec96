"""Untrusted JSON and YAML: reading ends in a value or a ValueError, whatever the text holds."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
_SHALLOW = 4096  # a text this short cannot nest too deeply


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError if it is not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def load_yaml(text: str, loader: Any = None) -> Any:
    """Return the value of a YAML text; yaml.YAMLError if it is not YAML, or nested too deeply.

    The default loader is libyaml's, if there is one; it crashes the process on a text that is nested 100,000 deep.
    """
    import yaml

    chosen: Any = loader or getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(text) > _SHALLOW:
        depth = 0
        event: Any
        for event in yaml.parse(text, chosen):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=event.start_mark)
    try:
        return yaml.load(text, chosen)
    except (RecursionError, ValueError) as error:  # a date in month 13, a number of thousands of digits
        raise yaml.YAMLError(str(error) if isinstance(error, ValueError) else "it is nested too deeply") from error
