"""Texts and chats of which two tokenizers must give the same ids."""

# ruff: noqa: RUF001 - letters that look alike are the point

TEXTS = (
    *(
        "",
        " ",
        "  two leading spaces",
        "trailing spaces  ",
        "\n\n\nlines",
        "a\r\nb\tc",
        "no\u00a0break\u200bjoined\ufeff",
    ),
    "def f(x):\n    if x > 1:\n        return [x,  2*x]\n\tpass\n",
    "3.14159 1,234,567 2024-01-01 0x1F 10000000000 １２３ ⅷ ½",
    "don't DON'T we'll THEY'VE it's; http://example.com/a?b=c&d=%20 e@f.org #tag C++ <b>x</b>",
    "<s>[INST] Hi [/INST] Hello</s> <|im_start|>user\nHi<|im_end|>\n<|begin_of_text|>x<|eot_id|><think> y </think>",
    *("日本語のテキスト、漢字。", "한국어 텍스트", "मानक हिन्दी", "نص عربي", "Ελληνικά και русский", "ภาษาไทย", "עברית"),
    *("é e\u0301 ﬁ Ａ ß ẞ İ ǆ", "👩‍👩‍👧‍👦 🇺🇳 👍🏽 😀😀", "▁ ▁▁x Ġ Ċ <0x0A> </s>"),
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": " Hi,  there\n"}],
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "  2, 二"},
        {"role": "user", "content": "Why?"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
)
