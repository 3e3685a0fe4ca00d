"""Typed overrides by path, JSON and text, tested on dataclasses with every kind of field."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import declaration, serialization
from lm.errors import UserError


@dataclass(frozen=True)
class Tokens:
    count: float


@dataclass(frozen=True, kw_only=True)
class Wide:
    hidden: int = 8

    def __post_init__(self):
        if self.hidden % 2:
            raise UserError(f"ffn.hidden={self.hidden} must be even.")


@dataclass(frozen=True, kw_only=True)
class Many:
    experts: int
    inner: Wide = Wide()


@dataclass(frozen=True, kw_only=True)
class Heads:
    heads: int = 6
    groups: int = 3

    def __post_init__(self):
        if self.heads % self.groups:
            raise UserError(f"heads={self.heads} is not a multiple of groups={self.groups}.")


@dataclass(frozen=True, kw_only=True)
class Whole:
    count: int = 3
    rate: float = 0.1
    flag: bool = False
    word: str = "none"
    maybe: float | None = None
    length: int | float | Tokens = 100
    files: str | tuple[str, ...] = "*.txt"
    numbers: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    ffn: Wide | Many = Wide()
    heads: Heads = Heads()
    optional: Wide | None = None
    list: tuple[Heads, ...] = (Heads(), Heads(heads=9))
    table: Mapping[str, float] = field(default_factory=lambda: {"a": 0.5, "b.c": 1.5})
    places: dict[str, Wide] = field(default_factory=lambda: {"v5p-64": Wide()})


# from_json imports only classes from `lm` and `experiments`.
sys.modules["lm.made_up"] = sys.modules[__name__]
for _cls in (Tokens, Wide, Many, Heads, Whole):
    _cls.__module__ = "lm.made_up"


def changed(*written):
    return declaration.change(Whole(), dict(each.split("=", 1) for each in written))[0]


ACCEPTED = [
    ("count=2_000", "count", 2000),
    ("count=1e3", "count", 1000),
    ("count=-4", "count", -4),
    ("rate=1", "rate", 1.0),
    ("rate=1e-3", "rate", 1e-3),
    ("rate=inf", "rate", math.inf),
    ("rate=-inf", "rate", -math.inf),
    ("flag=true", "flag", True),
    ("flag=False", "flag", False),
    ("word=none", "word", "none"),
    ("word=12", "word", "12"),
    ("word='12'", "word", "12"),
    ("word=a b", "word", "a b"),
    ("word=f(x)", "word", "f(x)"),
    ("maybe=0.5", "maybe", 0.5),
    ("maybe=none", "maybe", None),
    ("length=2000", "length", 2000),
    ("length=1e6", "length", 1_000_000),
    ("length=0.1", "length", 0.1),
    ("length=Tokens(1e9)", "length", Tokens(1e9)),
    ("length=Tokens(count=5)", "length", Tokens(5.0)),
    ("files=books/*.txt", "files", "books/*.txt"),
    ("files=a,b", "files", "a,b"),
    ("files=('a', 'b')", "files", ("a", "b")),
    ("files=['a']", "files", ("a",)),
    ("numbers=4,5", "numbers", (4, 5)),
    ("numbers=(4,)", "numbers", (4,)),
    ("numbers=()", "numbers", ()),
    ("numbers.1=7", "numbers", (1, 7)),
    ("pair=(2, 'b')", "pair", (2, "b")),
    ("ffn.hidden=16", "ffn", Wide(hidden=16)),
    ("ffn=Many(experts=4)", "ffn", Many(experts=4)),
    ("ffn=made_up.Many(experts=4, inner=Wide(hidden=2))", "ffn",
     Many(experts=4, inner=Wide(hidden=2))),
    ("optional=Wide(hidden=4)", "optional", Wide(hidden=4)),
    ("list.1.heads=3", "list", (Heads(), Heads(heads=3))),
    ("list=(Heads(heads=12),)", "list", (Heads(heads=12),)),
    ("table.a=2", "table", {"a": 2.0, "b.c": 1.5}),
    ("table.b.c=2", "table", {"a": 0.5, "b.c": 2.0}),
    ("table={'x': 1}", "table", {"x": 1.0}),
    ("places.v5p-64.hidden=2", "places", {"v5p-64": Wide(hidden=2)}),
]  # fmt: skip


@pytest.mark.parametrize(("written", "name", "value"), ACCEPTED, ids=[a[0] for a in ACCEPTED])
def test_override_is_parsed_by_the_type_of_its_field(written, name, value):
    got = changed(written)
    assert getattr(got, name) == value
    assert type(getattr(got, name)) is type(value)
    # The other fields are unchanged.
    assert dataclasses.replace(got, **{name: getattr(Whole(), name)}) == Whole()


REFUSED = [
    ("count=two", "count=two must be a whole number"),
    ("count=2.5", "count=2.5 must be a whole number"),
    ("count=true", "count=true must be a whole number"),
    ("count=", "count= must be a whole number"),
    ("rate=fast", "rate=fast must be a number"),
    ("flag=1", "flag=1 must be true or false"),
    ("maybe=x", "maybe=x must be a number or none"),
    ("numbers=1,x", "numbers.1=x must be a whole number"),
    ("numbers=1.5,2", "numbers.0=1.5 must be a whole number"),
    ("pair=(1,)", "pair=\\(1,\\) must have 2 elements"),
    ("ffn=5", "ffn=5 must be Wide\\(...\\) or Many\\(...\\)"),
    ("ffn=Wide", "ffn=Wide must be Wide\\(...\\)"),
    ("ffn=Heads()", "ffn=Heads\\(...\\) is not known there. Known: Many, Wide"),
    ("ffn=Wid()", "Did you mean 'Wide'"),
    ("ffn=Many()", "ffn: Many\\(...\\) needs experts="),
    ("ffn=Many(expert=2)", "ffn.expert is not known. Did you mean 'experts'"),
    ("ffn=Many(experts=open('x'))", "ffn.experts"),
    ("ffn=Wide(hidden=3)", "ffn.hidden=3 must be even"),
    ("ffn=Wide(4)", "needs names"),
    ("ffn=__import__('os')", "not known there"),
    ("table.zzzzzz=1", "table.zzzzzz is not known. Known: table.a, table.b.c"),
    ("optional.hidden=2", "optional is none. Choose it whole, as in optional=Wide"),
    ("ffn.hiden=2", "ffn.hiden is not known. Did you mean 'ffn.hidden'"),
    ("fnn.hidden=2", "Did you mean 'ffn.hidden'"),
    ("count.x=2", "count.x is not known: count is 3"),
    ("heads.heads=7", "heads=7 is not a multiple of groups=3"),
    ("list.2.heads=3", "list.2.heads is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "sentence"), REFUSED, ids=[r[0] for r in REFUSED])
def test_invalid_override_raises_error_that_names_accepted_values(written, sentence):
    with pytest.raises(UserError, match=sentence):
        changed(written)


def test_overrides_of_one_object_are_applied_together():
    # Applied one by one, heads=4 with groups=3 or heads=6 with groups=4 would be rejected.
    assert changed("heads.heads=4", "heads.groups=4").heads == Heads(heads=4, groups=4)
    assert changed("heads.groups=4", "heads.heads=4").heads == Heads(heads=4, groups=4)


def test_override_of_object_is_applied_before_overrides_of_its_fields():
    both = ["ffn.inner.hidden=4", "ffn=Many(experts=2)"]
    assert changed(*both) == changed(*reversed(both))
    assert changed(*both).ffn == Many(experts=2, inner=Wide(hidden=4))


def test_change_reports_only_values_that_differ():
    given = {"count": "3", "rate": "0.1", "ffn": "Wide(hidden=8)", "heads.heads": "9"}
    assert declaration.change(Whole(), given)[1] == {"heads.heads": 9}


@pytest.mark.parametrize(("written", "name", "value"), ACCEPTED, ids=[a[0] for a in ACCEPTED])
def test_parse_inverts_text(written, name, value):
    hint = declaration.hints_of(Whole)[name]
    assert declaration.parse(declaration.text(value), hint, name) == value


FIELDS = {
    "count": st.integers(),
    "rate": st.floats(allow_nan=False),
    "flag": st.booleans(),
    "word": st.text(),
    "maybe": st.none() | st.floats(allow_nan=False),
    "length": st.integers() | st.floats(0, 1) | st.builds(Tokens, st.floats(1, 1e12)),
    "files": st.text() | st.lists(st.text()).map(tuple),
    "numbers": st.lists(st.integers()).map(tuple),
    "ffn": st.builds(Many, experts=st.integers()) | st.just(Wide(hidden=2)),
    "optional": st.none() | st.just(Wide()),
    "table": st.dictionaries(st.text(), st.floats(allow_nan=False)),
}


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_json_round_trip_preserves_value(fields):
    value = Whole(**fields)
    written = json.dumps(serialization.to_json(value), allow_nan=False)
    got = serialization.from_json(json.loads(written))
    assert got == value
    assert repr(got) == repr(value)  # == does not distinguish 1 from 1.0 or 0.0 from -0.0
    assert declaration.describe(got) == declaration.describe(value)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ({"type": "lm.parallel.mesh.Mesh", "dat": 2}, "dat is not a field of Mesh in this version"),
        (
            {"type": "lm.parallel.mesh.Mash"},
            "type 'lm.parallel.mesh.Mash', which this version of lm does not know",
        ),
        ({"type": "lm.nothing.Mesh"}, "cannot be imported"),
        ({"type": "os.system"}, "os defines no such dataclass"),
        ({"type": "lm.parallel.mesh.choose"}, "does not know"),
        ({"a": [{"type": "subprocess.Popen"}]}, "a.0 has the type 'subprocess.Popen'"),
        ({"type": "lm.parallel.mesh.Mesh", "data": 0}, "mesh.data=0 must be above zero"),
    ],
)
def test_from_json_rejects_unknown_types_and_fields(written, sentence):
    with pytest.raises(UserError, match=sentence):
        serialization.from_json(written)


def test_to_json_rejects_unsupported_values():
    for value in ([1], {"type": "x"}, {1: 2}, object()):
        with pytest.raises(TypeError):
            serialization.to_json(value)


def test_check_types_checks_nested_fields():
    declaration.check_types(Whole(rate=1))
    for wrong, sentence in [
        (Whole(count="3"), "count='3' must be a whole number"),
        (Whole(count=3.0), "count=3.0 must be a whole number"),
        (Whole(count=True), "count=true must be a whole number"),
        (Whole(files=["a"]), "files=\\('a',\\) must be text or a list of text"),
        (Whole(table={1: 2.0}), "keys must be text"),
        (Whole(ffn=Many(experts=2, inner=Heads())), "ffn.inner=Heads\\(\\) must be Wide"),
        (Whole(list=(Heads(), Wide())), "list.1=Wide\\(\\) must be Heads"),
    ]:
        with pytest.raises(UserError, match=sentence):
            declaration.check_types(wrong)


def test_differences_list_path_and_both_values():
    a, b = Whole(), changed("ffn=Many(experts=2)", "heads.heads=9", "table={'a': 0.5, 'd': 1}")
    assert declaration.differences(a, b) == [
        "ffn: Wide() -> Many(experts=2)",
        "heads.heads: 6 -> 9",
        "table.b.c: 1.5 -> (absent)",
        "table.d: (absent) -> 1.0",
    ]
    assert declaration.differences(a, Whole()) == []


def test_setting_every_path_to_its_current_value_changes_nothing():
    settings = declaration.settings(Whole())
    assert ("ffn.hidden", 8, "a whole number") in settings
    assert ("places.v5p-64.hidden", 8, "a whole number") in settings
    given = {setting.path: declaration.text(setting.value) for setting in settings}
    assert declaration.change(Whole(), given) == (Whole(), {})


def test_describe_indents_fields_by_path():
    value = dataclasses.replace(Whole(), table={}, list=(Heads(),), files=("a", "b"))
    assert declaration.describe(value).splitlines() == [
        "count: 3",
        "rate: 0.1",
        "flag: false",
        "word: 'none'",
        "maybe: none",
        "length: 100",
        "files: ('a', 'b')",
        "numbers: (1, 2)",
        "pair: (1, 'a')",
        "ffn: Wide",
        "  hidden: 8",
        "heads: Heads",
        "  heads: 6",
        "  groups: 3",
        "optional: none",
        "list:",
        "  0: Heads",
        "    heads: 6",
        "    groups: 3",
        "table: {}",
        "places:",
        "  v5p-64: Wide",
        "    hidden: 8",
    ]
