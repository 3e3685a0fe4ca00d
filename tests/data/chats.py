"""Helpers for tests of conversations."""

import json


def write(path, *records):
    """Writes records as JSON lines, and returns the path as text."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def trained(tokenizer, ids, weights):
    """The runs of tokens with a loss, as text; special tokens as their pieces."""
    runs, run = [], ""
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight:
            run += tokenizer.decode([token]) or tokenizer.piece(token)
        elif run:
            runs, run = [*runs, run], ""
    return [*runs, run] if run else runs
