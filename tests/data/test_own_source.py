"""Custom data sources and tokenizers, defined outside the lm package."""

import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from made_up_corpus import documents

from lm import data
from lm.data.identity import class_name
from lm.errors import UserError
from lm.experiment import override

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Numbered(data.Source):
    """A source of `count` documents."""

    count: int
    path: str = "x"

    def read(self) -> Iterator[str]:
        yield ""
        yield from documents(self.count)


@dataclass(frozen=True, kw_only=True)
class Upper(data.Source):
    """The documents of another source in upper case."""

    source: data.Source

    def read(self) -> Iterator[str]:
        return (text.upper() for text in self.source.documents())


def test_a_custom_source_needs_only_fields_and_read(tmp_path, tokenizer_config):
    source = Numbered(count=30)
    prepared = data.prepare(source, tokenizer_config, tmp_path)
    texts = [*prepared.texts("numbered", "train"), *prepared.texts("numbered")]
    assert sorted(texts) == sorted(documents(30))
    again = data.prepare(source, tokenizer_config, tmp_path)
    assert again.fingerprint == prepared.fingerprint
    with pytest.raises(UserError, match="count=30, and this declaration has 31"):
        data.prepare(Numbered(count=31), tokenizer_config, tmp_path)


def test_the_recipe_contains_the_module_and_every_field():
    recipe = Numbered(count=30).recipe()
    assert recipe["source"] == f"{__name__}.Numbered"
    assert (recipe["count"], recipe["path"], recipe["held_out"]) == (30, "x", 0.05)
    assert json.loads(json.dumps(recipe)) == recipe
    for changes in ({"count": 31}, {"path": "y"}):
        other = Numbered(**{"count": 30, **changes}).recipe()
        assert other["fingerprint"] != recipe["fingerprint"]
    assert data.Documents(("x",)).recipe()["source"] == "Documents"


def test_a_source_that_wraps_another_source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    source = Upper(source=data.Text(str(path)))
    assert list(source.documents()) == ["ABC"]
    before = source.recipe()
    assert str(tmp_path) not in json.dumps(before)
    path.write_text("abcd")
    assert source.recipe()["fingerprint"] != before["fingerprint"]


MODULE = """
from dataclasses import dataclass
from lm import data

@dataclass(frozen=True, kw_only=True)
class Mine(data.{base}):
    def read(self):
        yield {text!r}
{more}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name, ...) imports a module with a source called Mine."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, text="x", more="", base="Source"):
        (tmp_path / f"{name}.py").write_text(MODULE.format(base=base, text=text, more=more))
        found = types.ModuleType(name)
        found.__file__ = str(tmp_path / f"{name}.py")
        monkeypatch.setitem(sys.modules, name, found)
        code = compile(Path(found.__file__).read_text(), found.__file__, "exec")
        exec(code, vars(found))
        return found.Mine

    return make


def test_classes_of_the_same_name_in_different_modules_differ(module):
    one, two = module("one")(), module("two")()
    assert (one.recipe()["source"], two.recipe()["source"]) == ("one.Mine", "two.Mine")


@pytest.mark.parametrize("base", ["Source", "Text"])
def test_changing_read_changes_the_recipe(module, base, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    fields = {"path": str(tmp_path / "a.txt")} if base == "Text" else {}
    one = module("mine", "x", base=base)(**fields).recipe()
    assert module("mine", "x", base=base)(**fields).recipe() == one
    assert module("mine", "y", base=base)(**fields).recipe() != one


def test_a_custom_fingerprint_replaces_the_default_one(module):
    more = "    def fingerprint(self):\n        return '1'"
    one, two = module("mine", "x", more)().recipe(), module("mine", "y", more)().recipe()
    assert one == two
    assert one["fingerprint"] == "1"


def test_a_module_run_as_a_script_keeps_its_name(tmp_path):
    lines = ("\nfrom lm.data.identity import class_name", "print(class_name(Mine))")
    code = MODULE.format(base="Source", text="x", more="\n".join(lines))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.py").write_text(code)
    ended = subprocess.run(
        [sys.executable, "-m", "package.mine"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert ended.stdout.split() == ["package.mine.Mine"], ended.stderr


def test_classes_of_lm_are_named_without_their_module():
    assert [class_name(cls) for cls in (data.Text, data.SentencePiece)] == ["Text", "SentencePiece"]


def test_a_source_that_does_not_yield_text_is_an_error():
    @dataclass(frozen=True, kw_only=True)
    class Bytes(data.Source):
        def read(self):
            yield b"x"

    with pytest.raises(UserError, match=r"Bytes\.read\(\) must yield str, not bytes"):
        list(Bytes().documents())


@dataclass(frozen=True, kw_only=True)
class Trained(data.TokenizerConfig):
    """A tokenizer declaration that wraps SentencePiece."""

    vocab: int = 384
    sample_bytes: int = 1 << 16

    def build(self, texts):
        return data.SentencePiece(vocab=self.vocab).build(texts)


def test_a_custom_tokenizer_declaration(tmp_path):
    prepared = data.prepare(data.Documents(documents(30)), Trained(), tmp_path)
    assert prepared.tokenizer.vocab == 384
    recipe = Trained().recipe()
    assert (recipe["tokenizer"], recipe["vocab"]) == (f"{__name__}.Trained", 384)


def test_the_command_line_selects_a_custom_source_by_name():
    from experiments import stdlib

    changed = override(stdlib.experiment(), ["data=Numbered(count=7)", "data.path=y"])
    assert changed.data == Numbered(count=7, path="y")
    assert override(changed, ["data.count=8"]).data.count == 8
    assert dataclasses.replace(changed.data, count=9).count == 9
