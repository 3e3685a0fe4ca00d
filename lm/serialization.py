"""Declarations to JSON and back.

A class is named by its public path, such as `lm.model.SwiGLU`, or by the module of the user that
defines it, so files of lm can move without breaking run folders.
"""

import dataclasses
import importlib
import math
import sys
from typing import Any

from lm.declaration import construct, hints_of, is_config, join
from lm.errors import UserError, nearest


def to_json(value: Any) -> Any:
    """`value` as json.dumps takes it, in strict JSON. `from_json` is its inverse."""
    if is_config(value):
        fields = {name: to_json(getattr(value, name)) for name in hints_of(type(value))}
        return {"type": class_name(type(value)), **fields}
    if isinstance(value, dict):
        if isinstance(value.get("type"), str) or not all(isinstance(key, str) for key in value):
            raise TypeError(f"{value} can't be written: keys are text, and none is 'type'")
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "float", "value": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} can't be part of a declaration")


def class_name(cls: type) -> str:
    """'lm.model.GQA' if the package exports the class; else its module and name, with the module's
    real name where it runs as `python -m MODULE`."""
    if cls.__module__ == "__main__":
        return f"{_main_module()}.{cls.__qualname__}"
    package = ".".join(cls.__module__.split(".")[:2])
    public = getattr(sys.modules.get(package), cls.__qualname__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"


def _main_module() -> str:
    """The importable name of the module that was started, or '__main__'."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else "__main__"


def from_json(content: Any, path: str = "") -> Any:
    """Inverse of `to_json`. Raises UserError for what this version does not know."""
    if isinstance(content, list):
        return tuple(from_json(item, join(path, str(i))) for i, item in enumerate(content))
    if not isinstance(content, dict):
        return content
    name = content.get("type")
    if name == "float":
        return float(content["value"])
    if not isinstance(name, str):
        return {key: from_json(item, join(path, key)) for key, item in content.items()}
    cls = _class_of(name, path)
    known = hints_of(cls)
    for field in content:
        if field != "type" and field not in known:
            raise UserError(
                f"{join(path, field)} is not a field of {cls.__name__} in this version of lm; "
                f"the file was written by another one.{nearest(field, known)}"
            )
    fields = {
        field: from_json(item, join(path, field))
        for field, item in content.items()
        if field != "type"
    }
    return construct(cls, fields, path or "the declaration")


def _class_of(name: str, path: str) -> type:
    """The dataclass of this name. Raises UserError if there is none."""
    module, _, attribute = name.rpartition(".")
    where = f"{path or 'the declaration'} has the type {name!r}"
    try:
        main = module in ("__main__", _main_module())
        source = sys.modules["__main__"] if main else importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{where}, whose module cannot be imported ({error}). If it is yours, run the command "
            "from the folder that holds it, or install it; if it is lm's, the file was written by "
            "another version."
        ) from None
    found = getattr(source, attribute, None)
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        return found
    if module.split(".")[0] == "lm":
        raise UserError(
            f"{where}, which this version of lm does not know; the file was written by another one."
        )
    raise UserError(f"{where}, but {module} defines no such dataclass.")


def check_readable(value: Any, path: str = "") -> None:
    """Raises UserError for an object whose class another process could not find by its name, and
    for a value that JSON does not hold."""
    if is_config(value):
        cls = type(value)
        if "." in cls.__qualname__:
            raise UserError(
                f"{path or 'the declaration'} is of class {cls.__name__}, which is defined inside "
                "a function or class; define it at the top of a module, so that the run can be "
                "opened again."
            )
        main = sys.modules["__main__"]
        if class_name(cls).startswith("__main__.") and hasattr(main, "__file__"):
            raise UserError(
                f"{path or 'the declaration'} is of class {cls.__name__}, defined in a script that "
                "was started by its path; start it as python -m MODULE, so that the run can be "
                "opened again."
            )
        children = {name: getattr(value, name) for name in hints_of(cls)}
    elif isinstance(value, tuple):
        children = {str(index): item for index, item in enumerate(value)}
    elif isinstance(value, dict):
        children = value
    elif value is None or isinstance(value, bool | int | float | str):
        children = {}
    else:
        raise UserError(
            f"{path or 'the declaration'} is of type {type(value).__name__}, which "
            "experiment.json cannot hold; use numbers, text, tuples, dicts or dataclasses of these."
        )
    for key, child in children.items():
        check_readable(child, join(path, key))
