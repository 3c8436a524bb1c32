"""The line that a command prints when it refuses its flags or its data."""

import re


def assert_one_line(text: str, program: str, *words: object) -> None:
    """Asserts that a text is one line that starts with a program's name and contains all words.

    A word that begins or ends with a letter or digit must do so in the text, too: 1 is not in 10.
    """
    assert text.startswith(f"{program}: ") and text.rstrip("\n").count("\n") == 0, text
    missing = [word for word in words if not re.search(_whole(str(word)), text)]
    assert not missing, f"{missing} missing in {text!r}"


def _whole(word: str) -> str:
    first, last = (r"\b" if word[end].isalnum() else "" for end in (0, -1))
    return f"{first}{re.escape(word)}{last}"
