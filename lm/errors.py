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
    """Raises UserError naming the first field that is not a finite number above zero, also in
    float32, in which it is used."""
    for field, value in fields.items():
        if not (_is_finite(value) and value > 0):
            raise UserError(f"{field}={value!r} must be above zero{_and_finite(value)}.")
        if isinstance(value, float) and value < _SMALLEST:
            raise UserError(f"{field}={value!r} is zero in float32; raise it.")


def check_not_negative(**fields: float) -> None:
    """Raises UserError naming the first field that is not a finite number from zero on."""
    for field, value in fields.items():
        if not (_is_finite(value) and value >= 0):
            raise UserError(f"{field}={value!r} must be zero or above{_and_finite(value)}.")


def check_size(**fields: int) -> None:
    """Raises UserError naming the first field that is not a whole number from 1 to 2**31 - 1, the
    largest size of an array's axis."""
    for field, value in fields.items():
        if not isinstance(value, numbers.Integral):
            raise UserError(f"{field}={value!r} must be a whole number.")
        check_positive(**{field: value})
        if value >= 2**31:
            raise UserError(f"{field}={value!r} must be below 2**31.")


def check_seed(**fields: int) -> None:
    """Raises UserError naming the first field that is not a seed. JAX reads 32 bits of a seed, so
    that larger ones would coincide."""
    for field, value in fields.items():
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not (is_whole and 0 <= value < 2**32):
            raise UserError(f"{field}={value!r} must be a whole number from 0 to 2**32 - 1.")


# Of positive numbers in float32.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def _is_finite(value: float) -> bool:
    is_number = isinstance(value, numbers.Real)
    return is_number and (isinstance(value, int) or abs(value) <= _LARGEST)


def _and_finite(value: float) -> str:
    is_large = isinstance(value, float) and value > _LARGEST
    return " and finite in float32" if is_large else ""
