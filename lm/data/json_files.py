"""JSON files that other programs wrote."""

import json
from typing import Any

from lm.errors import UserError


def json_object(content: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object of a file's content. Raises UserError, with `where`, for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise damaged(where, "it is not a JSON object")
    return value


def damaged(where: str, reason: str) -> UserError:
    """The error to raise for a file whose content is not as its format has it."""
    return UserError(f"{where} is damaged: {reason}; fetch it again.")


def is_id(value: Any) -> bool:
    """Whether a JSON value is a token id."""
    return type(value) is int and 0 <= value < 2**31
