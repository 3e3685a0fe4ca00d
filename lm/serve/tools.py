"""Calls of tools in a model's text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as
Hermes and Qwen write them, or the JSON object alone, as Llama 3 does."""

import json
import uuid
from collections.abc import Collection
from typing import Any

from lm.generate.text import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolReader:
    """Tells text from calls as they are written.

        content, calls = reader.read(piece)
        content, calls = reader.finish()

    Text that may be the beginning of a call is held back. What is no call of a known tool is text.

    found   number of calls so far
    """

    def __init__(self, names: Collection[str], most: int | None = None):
        self._names, self._most = names, most
        self._held = ""
        self._is_begun = False  # whether text that is not white space has been seen
        self.found = 0

    def read(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """(text, calls) that a new piece of text completes."""
        self._held += piece
        content, calls = "", []
        while self._held:
            if not self._is_begun and not self._held.strip():
                break
            if not self._is_begun and self._held.lstrip()[0] in "{[":
                break  # perhaps a call without marks: known at the end
            before, mark, after = self._held.partition(OPEN)
            if not mark:
                keep = overlap(self._held, OPEN)
                cut = len(self._held) - keep
                content += self._held[:cut]
                self._is_begun |= bool(self._held[:cut].strip())
                self._held = self._held[cut:]
                break
            inside, closed, rest = after.partition(CLOSE)
            if not closed:
                content, self._held = content + before, mark + after
                self._is_begun = True
                break
            made = self._calls(inside)
            content += before if made is not None else before + mark + inside + closed
            calls += made or []
            self._held, self._is_begun = rest, True
        return content, self._first(calls)

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(text, calls) that were held back."""
        held, self._held = self._held, ""
        # The end of a turn may stand in place of the closing mark.
        text = held.strip()
        made = self._calls(text.removeprefix(OPEN)) if text[:1] in ("{", "[", "<") else None
        return ("", self._first(made)) if made else (held, [])

    def _first(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of the calls, those that are still wanted, numbered."""
        if self._most is not None:
            calls = calls[: max(0, self._most - self.found)]
        for call in calls:
            call["index"] = self.found
            self.found += 1
        return calls

    def _calls(self, text: str) -> list[dict[str, Any]] | None:
        """The calls that a JSON text describes; None if it describes none."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        calls = []
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, dict) or each.get("name") not in self._names:
                return None
            arguments = each.get("arguments", each.get("parameters", {}))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {"name": each["name"], "arguments": arguments}
            calls.append(
                {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            )
        return calls or None
