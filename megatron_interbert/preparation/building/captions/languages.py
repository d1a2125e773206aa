"""Recognise tags of languages, and guess the language of a text from its script."""

import re

TAG = re.compile(r"^([a-z]{2,3})([-_][A-Za-z]{2,4})?$")
CODES = """
    ar bg bn ca cs da de el en es et eu fa fi fil fr ga gl gu he hi hr hu hy id is it ja ka kk km kn
    ko lt lv mi mk ml mn mr ms mt my nb ne nl no pa pl pt quz ro ru si sk sl sq sr sv sw ta te th tl
    tr uk ur uz vi yue zh eng zho chi deu ger fra fre jpn kor spa ita por rus
"""
KNOWN = frozenset(CODES.split())
SCRIPTS = {
    "ja": re.compile("[\u3040-\u30ff]"),
    "ko": re.compile("[\uac00-\ud7af]"),
    "zh": re.compile("[\u3400-\u9fff]"),
}


def is_language(tag: object) -> bool:
    """Check whether a text is the tag of a language: `de`, `zh-Hans`."""
    found = TAG.match(tag) if isinstance(tag, str) else None
    return bool(found and found[1] in KNOWN)


def guess_language(text: str) -> str:
    """Guess the language of a text, for files without languages: `ja` if it has kana, `ko` for
    hangul, `zh` for Chinese characters, else `en`.
    """
    for language, letters in SCRIPTS.items():
        if letters.search(text):
            return language

    return "en"
