"""Names and digests of declared classes, for recipes.

A recipe decides whether prepared token shards can be reused. Two classes of the same name must
differ in it, and so must two versions of the code of a user's class.
"""

import dataclasses
import hashlib
import inspect
from typing import Any

from lm import serialization


def class_name(cls: type) -> str:
    """The bare name of a class of lm; the import path of any other, 'experiments.mine.Mine'."""
    return cls.__name__ if _is_own(cls) else serialization.class_name(cls)


def _is_own(cls: type) -> bool:
    return cls.__module__.startswith("lm.")


def code_digest(cls: type, method: str) -> dict[str, str]:
    """{'code': digest of the source code} of a user's class, for its recipe.

    Covers the class and its bases outside lm, up to one that defines `method` itself: such a class
    decides on its own what counts as a change. Empty where the source code is not available.
    """
    classes = []
    for base in cls.__mro__:
        if _is_own(base) or base.__module__ in ("abc", "builtins"):
            continue
        if method in vars(base):
            break
        classes.append(base)
    try:
        code = "".join(inspect.getsource(base) for base in classes)
    except (OSError, TypeError):  # typed into an interpreter
        return {}
    return {"code": hashlib.sha256(code.encode()).hexdigest()} if code else {}


def plain(value: Any) -> Any:
    """A field's value for json.dumps. A value with a `recipe`, such as a source, becomes that."""
    if hasattr(value, "recipe"):
        return value.recipe()
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": class_name(type(value)), **fields}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
