"""The exception for user errors: one sentence that names the field, the value and the fix.

`lm.main` prints it without a traceback and exits with code 2. Any other exception is a bug.
"""

import difflib
import numbers
from collections.abc import Iterable


class UserError(ValueError):
    """A declaration, path, file or record that cannot be used. The user sees the message as is."""

    def _render_traceback_(self) -> list[str]:
        """IPython calls this: notebooks show the sentence without a traceback."""
        return [f"{type(self).__name__}: {self}"]


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known name closest to `name`, or the list of the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises UserError unless `name` is one of `known`; `what` is the field as users write it."""
    known = list(known)
    if name not in known:
        raise UserError(f"{what}={name!r} is not known.{nearest(str(name), known)}")


def check_positive(**fields: float) -> None:
    """Raises UserError naming the first field that is not a number above zero."""
    for field, value in fields.items():
        if not (isinstance(value, numbers.Real) and value > 0):
            raise UserError(f"{field}={value!r} must be above zero.")
