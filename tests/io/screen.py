"""A terminal for tests."""

import io
import re


class Screen(io.StringIO):
    """A terminal that remembers everything."""

    def isatty(self) -> bool:
        return True

    @property
    def drawn(self) -> list[str]:
        """Every text that stood on a line, without the codes that clear it."""
        return [text for text in re.split(r"\r\033\[2K|\n", self.getvalue()) if text]
