"""Text that UTF-8 can encode, and the names of encodings."""

import codecs

from lm.errors import UserError, check_name

_ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252", "ascii")  # suggested for a misspelt one
_NOT_TEXT = ("idna", "punycode", "undefined")  # Python's codecs for other purposes


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which is not a character and has no
    UTF-8 form. JSON, Python literals and command lines that are not UTF-8 can contain them; two
    halves side by side become their character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def check_encoding(field: str, encoding: str) -> None:
    """Raises UserError unless `encoding` names a text encoding; `field` is as users write it."""
    try:
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):
        check_name(field, encoding, _ENCODINGS)
    if name in _NOT_TEXT or not _decodes(encoding):
        raise UserError(f"{field}={encoding!r} is no text encoding; set it to one, as in 'utf-8'.")


def _decodes(encoding: str) -> bool:
    """Whether a codec turns bytes into text, block by block."""
    try:
        b"a".decode(encoding, "replace")
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):
        return False
    return True
