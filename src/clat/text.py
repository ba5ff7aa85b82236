"""Text that came from outside, made safe to print."""

import unicodedata


def plain(text: object) -> str:
    """The text on one line, with control characters written out, so that a name from a file cannot steer a terminal.

    Letters, marks and spaces stay; newlines, escape sequences and direction changes come out like ``\\x1b``.
    """
    return "".join(_visible(character) for character in str(text))


def _visible(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
