"""Texts that an export is tried on: a page to predict, and lines that tokenizers disagree about."""

from __future__ import annotations

from plmtune.tokenizers.message import Message

PAGE = '''The lighthouse had stood on the rock since 1847, and in all that time its lamp had failed only twice. The
first time was the great storm of 1901, when the sea broke the windows of the lantern room; the second was the night the
keeper's daughter was born. "We had other things to look at," he used to say.

def read_rows(path, encoding="utf-8"):
    """Yield (number, row) of each line that is not empty."""
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, json.loads(line)

If a train leaves at 9:15 and travels 120 km at 80 km/h, it arrives at 10:45, because 120 / 80 = 1.5 hours. A second
train, at 60 km/h, needs 2 hours for the same way.

Die Straße nach Zürich führt über einen Pass. El niño comió una manzana. 春眠不觉晓，处处闻啼鸟。夜来风雨声，
花落知多少。 Сегодня хорошая погода. The result was positive in 38.7% of 1,204 cases (p < 0.01), as Table 3
shows; see also section 4.2. Water boils at 100 °C at sea level, but at 93 °C on a mountain of 2,000 m.
'''

_LINES = (
    "",
    " ",
    "Hello world! 12345",
    "  two spaces, and three   inside, and trailing   ",
    "\ttab\t\ttabs \t mixed",
    "line\nline\n\n\nthree newlines\r\nand DOS\r\n\r\n",
    "a" * 300,
    "    " * 40 + "x",
    "don't I'LL we've THEY'RE it's 'quoted' o'clock",
    "3.14159 1,000,000 0x1F 1e-7 2024-02-29 12:30 ½ ² Ⅷ ٣٤٥",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0.5f; } // ok",
    "def f(x):\n    return {k: v for k, v in x.items() if v is not None}\n",
    "https://example.org/a/b?q=1&r=%20#top user@example.org C:\\temp\\new",
    "你好，世界。今天天气怎么样？ 漢字とひらがなとカタカナ 한국어 문장",
    "مرحبا بالعالم שלום עולם สวัสดี नमस्ते Привет, мир",
    "naïve café Zürich Ångström ﬁne №5 — “quotes” … ‘x’",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ 🏳️‍🌈",
    "zero\u200bwidth\u200djoiner \u00a0nbsp \u2003em \u3000wide \ufeffbom",
    "control \x01\x02\x1b[0m\x7f bytes \x85 next",
    "a\u0000b",
    "camelCaseAndPascalCase snake_case_name kebab-case SCREAMING_CASE x86_64",
    "Pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaft",
    "!!!??? ... --- *** ### $$$ %%% &&& ((( ))) [[[ ]]] {{{ }}}",
    "\U00020000\U0001f9ff\U0010fffd rare planes",
)
# Text that NFC changes: a tokenizer that normalizes, such as Qwen2's, has other ids for it than one that does not.
DECOMPOSED = (
    "cafe\u0301 Zu\u0308rich A\u030angstro\u0308m",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u212b \u2126 \uf900",
)


def lines(specials: tuple[str, ...]) -> list[str]:
    """What a tokenizer is tried on, the text of its special tokens included; all of it is in NFC."""
    inside = [f"before{text}after {text}{text}\n{text}" for text in specials[:16]]
    return [*_LINES, *inside, PAGE]


CONVERSATIONS = (
    (Message("user", "hi"),),
    (Message("system", "You are terse."), Message("user", "What is 2 + 2?")),
    (
        Message("user", "  Name a color.\n\n"),
        Message("assistant", "Blue."),
        Message("user", 'And "another" one? \u00e9 你好 <b>&amp;</b>'),
    ),
    (
        Message("system", "Be kind."),
        Message("user", "a"),
        Message("assistant", "b\n"),
        Message("user", "c"),
        Message("assistant", ""),
        Message("user", "d"),
    ),
)
