"""Trees of frozen dataclasses: paths, typed changes by path, and text. (JSON: serialization.py)

A declaration consists of int, float, str, bool, None, tuples, dicts with text keys, and dataclasses
of these. No field is special: types come from the hints of the dataclasses. Paths look like
`model.attention.heads`, `evals.0.every`, `places.single.microbatches`.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.errors import UserError, nearest

Hint = Any  # a type hint, as typing.get_type_hints gives it


class Setting(NamedTuple):
    """A path of a declaration, with its value and its type in words."""

    path: str
    value: Any
    type: str


def kinds(hint: Hint) -> tuple[Hint, ...]:
    """The alternatives of a union; of any other hint, the hint itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in kinds(part))
    if typing.get_origin(hint) is typing.Annotated:
        return kinds(typing.get_args(hint)[0])
    return (hint,)


@functools.cache
def hints_of(cls: type) -> dict[str, Hint]:
    """{field: hint} of the constructor's fields."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def is_config(value: Any) -> bool:
    """Whether a value is a dataclass instance."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _container(kind: Hint) -> type | None:
    """tuple or dict for hints of sequences and mappings, else None."""
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type) or origin is str:
        return None
    if issubclass(origin, Mapping):
        return dict
    return tuple if issubclass(origin, Sequence) else None


def _element(kind: Hint, index: int) -> Hint:
    """The hint of an element of tuple[X, ...], tuple[X, Y] or dict[str, X]."""
    arguments = typing.get_args(kind)
    if not arguments:
        return Any
    if _container(kind) is dict:
        return arguments[1]
    if typing.get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        return arguments[index] if index < len(arguments) else typing.Never
    return arguments[0]


def _children(value: Any, hint: Hint) -> Iterator[tuple[str, Any, Hint]]:
    """(key, value, hint) of the direct children."""
    if is_config(value):
        for name, child in hints_of(type(value)).items():
            yield name, getattr(value, name), child
    elif isinstance(value, tuple | dict):
        own = [kind for kind in kinds(hint) if _container(kind) is type(value)]
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for index, (key, child) in enumerate(items):
            elements = tuple(_element(kind, index) for kind in own)
            yield str(key), child, typing.Union[elements] if elements else Any  # noqa: UP007


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "none",
}


def words(hint: Hint) -> str:
    """'a whole number or none', for error messages."""
    return " or ".join(dict.fromkeys(_kind_in_words(kind) for kind in kinds(hint)))


def _kind_in_words(kind: Hint) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    if _container(kind):
        many = "a list" if _container(kind) is tuple else "a table"
        of = words(_element(kind, 0))
        return (
            many if of == "anything" else f"{many} of ({of})" if " or " in of else f"{many} of {of}"
        )
    if isinstance(kind, type):
        return " or ".join(f"{cls.__name__}(...)" for cls in _classes(kind)) or kind.__name__
    return "anything"


def _classes(kind: type) -> list[type]:
    """The dataclasses that a hint of this class allows: itself and its subclasses, without abstract
    ones."""
    found = [kind] if dataclasses.is_dataclass(kind) and not inspect.isabstract(kind) else []
    for subclass in kind.__subclasses__():
        found += [cls for cls in _classes(subclass) if cls not in found]
    return found


def fit(value: Any, hint: Hint, path: str, lenient: bool = False) -> Any:
    """`value` if it has the hinted type; otherwise raises UserError with the expected type.

    An int is accepted for a float; if `lenient`, also a list for a tuple, and 2e3 for 2000.
    """
    allowed = kinds(hint)
    if Any in allowed or any(_is(value, kind) for kind in allowed):
        return value
    if float in allowed and type(value) is int:
        return float(value) if lenient else value
    if lenient and int in allowed and type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, dict | tuple) or (lenient and isinstance(value, list)):
        container = dict if isinstance(value, dict) else tuple
        own = [kind for kind in allowed if _container(kind) is container]
        for index, kind in enumerate(own):
            try:
                return _fit_elements(value, kind, path, lenient)
            except UserError:
                if index == len(own) - 1:
                    raise
    fix = " Write it as a tuple, in round brackets." if isinstance(value, list) else ""
    raise UserError(f"{path}={text(value)} must be {words(hint)}.{fix}")


def _is(value: Any, kind: Hint) -> bool:
    if kind in _WORDS:
        return type(value) is kind  # exactly: True is an int to isinstance
    if not isinstance(kind, type) or _container(kind):
        return False
    if getattr(kind, "_is_protocol", False):
        return is_config(value)
    return isinstance(value, kind)


def _fit_elements(value: Any, kind: Hint, path: str, lenient: bool) -> Any:
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise UserError(f"{path} has the key {bad[0]!r}; keys must be text.")
        return {
            key: fit(item, _element(kind, 0), f"{path}.{key}", lenient)
            for key, item in value.items()
        }
    arguments = typing.get_args(kind)
    fixed = typing.get_origin(kind) is tuple and arguments and arguments[-1] is not Ellipsis
    if fixed and len(arguments) != len(value):
        raise UserError(f"{path}={text(value)} must have {len(arguments)} elements.")
    return tuple(
        fit(item, _element(kind, index), f"{path}.{index}", lenient)
        for index, item in enumerate(value)
    )


def check_types(value: Any, path: str = "") -> None:
    """Raises UserError for the first field, at any depth, whose value has not the hinted type."""
    for key, child, hint in _children(value, Any):
        below = join(path, key)
        if is_config(value):
            fit(child, hint, below)
        if isinstance(child, float) and math.isnan(child):
            raise UserError(f"{below}=nan is not a number; set it to one.")
        check_types(child, below)


def join(path: str, key: str) -> str:
    """'a.b' and 'c' -> 'a.b.c'."""
    return f"{path}.{key}" if path else key


def text(value: Any) -> str:
    """An expression that `parse` reads back; of an object, only fields that differ from their
    defaults."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if is_config(value):
        fields = ", ".join(f"{name}={text(getattr(value, name))}" for name in _changed(value))
        return f"{type(value).__name__}({fields})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(text, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _changed(value: Any) -> list[str]:
    """The fields of an object that differ from their defaults."""
    changed = []
    for field in dataclasses.fields(value):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        if field.init and getattr(value, field.name) != default:
            changed.append(field.name)
    return changed


def parse(source: str, hint: Hint, path: str) -> Any:
    """The text after `path=` as a value of the hinted type. Raises UserError if it is not one.

    Strings need no quotes unless they would parse as another allowed type. An object is written as
    a call of its class with literal arguments: SwiGLU(hidden=128).
    """
    allowed, plain = kinds(hint), source.strip()
    # Before literals, since `none` in a field that allows only text is text.
    for word, value in {"none": None, "true": True, "false": False}.items():
        if plain.lower() == word and type(value) in allowed:
            return value
    try:
        literal = _literal(plain, hint, path)
    except (SyntaxError, _NotLiteral):
        if str in allowed:
            return source
        if not any(_container(kind) is tuple for kind in allowed):
            raise UserError(f"{path}={source} must be {words(hint)}.") from None
        return _list_of_text(plain, hint, path)
    try:
        return fit(literal, hint, path, lenient=True)
    except UserError:
        if str in allowed:
            return source
        raise


def _list_of_text(plain: str, hint: Hint, path: str) -> tuple[Any, ...]:
    """A list whose elements have no quotes: a.txt,b.txt."""
    kind = next(kind for kind in kinds(hint) if _container(kind) is tuple)
    parts = [part.strip() for part in plain.split(",") if part.strip()]
    elements = enumerate(parts)
    return tuple(parse(part, _element(kind, i), f"{path}.{i}") for i, part in elements)


class _NotLiteral(Exception):
    """The source is not a literal; it may be text without quotes."""


def _literal(source: str, hint: Hint, path: str) -> Any:
    """The value of a literal or of a constructor's call, parsed without evaluating it."""
    if re.fullmatch(r"[+-]?(inf|nan)", source):
        return float(source)
    value = _node(ast.parse(source, mode="eval").body, hint, path)
    # Accept 1e6 for the integer 1_000_000.
    if isinstance(value, float) and value.is_integer() and "e" in source.lower():
        return int(value)
    return value


def _node(node: ast.expr, hint: Hint, path: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id="true" | "false" | "none" as word):
            return {"true": True, "false": False, "none": None}[word]
        case ast.Name(id="inf"):
            return math.inf
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(_node(part, hint, path) for part in parts)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values, strict=True)
            return {_node(key, hint, path): _node(value, hint, path) for key, value in pairs}
        case ast.Call(func=ast.Name() | ast.Attribute() as function):
            return _construct(_find(ast.unparse(function), hint, path), node, path)
    raise _NotLiteral


def _find(name: str, hint: Hint, path: str) -> type:
    """The class of this name ('SwiGLU', 'model.SwiGLU') among those that `hint` allows."""
    *package, last = name.split(".")
    known = {cls.__name__: cls for cls in _reachable(hint)}
    if last not in known or not set(package) <= set(known[last].__module__.split(".")):
        if str in kinds(hint):
            raise _NotLiteral
        raise UserError(f"{path}={name}(...) is not known there.{nearest(last, known)}")
    return known[last]


def _reachable(hint: Hint) -> list[type]:
    """The dataclasses that a hint allows at a path or below it, nearest first."""
    found: list[type] = []
    waiting = [hint]
    while waiting:
        for kind in kinds(waiting.pop(0)):
            if _container(kind):
                waiting += [part for part in typing.get_args(kind) if part is not Ellipsis]
            elif isinstance(kind, type):
                new = [cls for cls in _classes(kind) if cls not in found]
                found += new
                waiting += [below for cls in new for below in hints_of(cls).values()]
    return found


def _construct(cls: type, call: ast.Call, path: str) -> Any:
    hints, values = hints_of(cls), {}
    positional = [field.name for field in dataclasses.fields(cls) if not field.kw_only]
    if len(call.args) > len(positional):
        raise UserError(f"{path}: {cls.__name__}(...) needs names, as in {next(iter(hints))}=....")
    arguments = [*zip(positional, call.args), *((word.arg, word.value) for word in call.keywords)]
    for name, node in arguments:
        below = join(path, str(name))
        if name not in hints:
            raise UserError(f"{below} is not known.{nearest(str(name), hints)}")
        try:
            values[name] = fit(_node(node, hints[name], below), hints[name], below, lenient=True)
        except _NotLiteral:
            expected = words(hints[name])
            raise UserError(f"{below}={ast.unparse(node)} must be {expected}.") from None
    return construct(cls, values, path)


def construct(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """cls(**values). Raises UserError for a missing field."""
    for field in dataclasses.fields(cls):
        default = (field.default, field.default_factory)
        if field.init and field.name not in values and set(default) == {dataclasses.MISSING}:
            raise UserError(f"{path}: {cls.__name__}(...) needs {field.name}=....")
    return cls(**values)


def settings(value: Any) -> list[Setting]:
    """Every path below `value`, in the order of the declaration."""
    return list(_settings(value, Any, ""))


def _settings(value: Any, hint: Hint, path: str) -> Iterator[Setting]:
    for key, child, below in _children(value, hint):
        yield Setting(join(path, key), child, words(below))
        yield from _settings(child, below, join(path, key))


def change(value: Any, changes: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """(`value` with `changes` parsed and applied at their paths, the changes that differ).

    All changes below one object are applied at once, so that its checks see the final state. A
    whole object is replaced before anything below it is changed.
    """
    different: dict[str, Any] = {}
    return _change(value, Any, dict(changes), "", different), different


def _change(
    value: Any, hint: Hint, changes: dict[str, str], path: str, different: dict[str, Any]
) -> Any:
    if path in changes:
        new = parse(changes.pop(path), hint, path)
        # 1 equals 1.0 and is no change; but 1 also equals True, which is one.
        if new != value or isinstance(new, bool) != isinstance(value, bool):
            different[path] = value = new
    if not changes:
        return value
    children = {
        join(path, key): (key, child, below) for key, child, below in _children(value, hint)
    }
    below: dict[str, dict[str, str]] = {}
    for target, source in changes.items():
        own = [p for p in children if target == p or target.startswith(f"{p}.")]
        if not own:
            _raise_unknown(target, path, value, hint)
        below.setdefault(max(own, key=len), {})[target] = source
    new = {}
    for child_path, part in below.items():
        key, child, child_hint = children[child_path]
        new[key] = _change(child, child_hint, part, child_path, different)
    return _replace(value, new)


def _replace(value: Any, new: Mapping[str, Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(new.get(str(index), item) for index, item in enumerate(value))
    return {**value, **new} if isinstance(value, dict) else dataclasses.replace(value, **new)


def _raise_unknown(target: str, path: str, value: Any, hint: Hint) -> typing.NoReturn:
    known = [setting.path for setting in settings(value)]
    if not known:
        whole = [cls.__name__ for cls in _reachable(hint)]
        fix = f" Choose it whole, as in {path}={whole[0]}(...)." if whole else ""
        raise UserError(f"{target} is not known: {path} is {text(value)}.{fix}")
    rest = target.removeprefix(path).lstrip(".")
    same_end = [each for each in known if each.split(".")[-1] == rest.split(".")[-1]]
    close = difflib.get_close_matches(rest, same_end or known, n=1, cutoff=0.5)
    if close:
        raise UserError(f"{target} is not known. Did you mean {join(path, close[0])!r}?")
    there = ", ".join(join(path, key) for key, _, _ in _children(value, hint))
    raise UserError(f"{target} is not known. Known: {there}.")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """'path: x -> y' for every difference."""
    if a == b and type(a) is type(b):
        return []
    below_a = {key: child for key, child, _ in _children(a, Any)}
    below_b = {key: child for key, child, _ in _children(b, Any)}
    if type(a) is not type(b) or (isinstance(a, tuple) and len(a) != len(b)) or not below_a:
        return [f"{path}: {text(a)} -> {text(b)}"]
    found = []
    for key in dict.fromkeys([*below_a, *below_b]):
        where = join(path, key)
        if key in below_a and key in below_b:
            found += differences(below_a[key], below_b[key], where)
        elif key in below_a:
            found.append(f"{where}: {text(below_a[key])} -> (absent)")
        else:
            found.append(f"{where}: (absent) -> {text(below_b[key])}")
    return found


def describe(value: Any, indent: int = 0) -> str:
    """One line per field; children are indented by two spaces."""
    lines = []
    for key, child, _ in _children(value, Any):
        below = describe(child, indent + 2) if _is_nested(child) else ""
        head = type(child).__name__ if is_config(child) else "" if below else text(child)
        lines.append(f"{' ' * indent}{key}: {head}".rstrip())
        if below:
            lines.append(below)
    return "\n".join(lines)


def _is_nested(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_nested, value))
    return is_config(value) or isinstance(value, dict)
