"""Names and weights of models, and a server that splits requests."""

import collections

import openai
import pytest
from served_models import serving, wait_until_idle

from lm.errors import UserError
from lm.serve.router import Source, Split, check_names, parse


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("runs/stdlib", Source("stdlib", "runs/stdlib")),
        ("runs/stdlib/", Source("stdlib", "runs/stdlib/")),
        ("A=runs/x", Source("A", "runs/x")),
        ("A=runs/x:0.9", Source("A", "runs/x", 0.9)),
        ("runs/x:1e-2", Source("x", "runs/x", 0.01)),
        ("A=gs://bucket/x", Source("A", "gs://bucket/x")),
        ("A=gs://bucket/x:3", Source("A", "gs://bucket/x", 3.0)),
        ("A=runs/x=y", Source("A", "runs/x=y")),
    ],
)
def test_sources(text, want):
    assert parse(text) == want


def test_an_existing_folder_is_no_declaration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3:0.5").mkdir()
    assert parse("A=lr=3:0.5") == Source("A", "lr=3:0.5")


@pytest.mark.parametrize("text", ["A=x:-1", "A=x:1.2.3", "A=x:1e999", "a b=x", "=x"])
def test_sources_that_are_refused(text):
    with pytest.raises(UserError):
        parse(text)


def test_names_must_differ_and_weights_be_complete():
    a, b = Source("a", "x", 1.0), Source("b", "y", 0.0)
    check_names([a, b], [], "split")
    for sources, adapters in (
        ([a, a], []),
        ([a, b._replace(weight=None)], []),
        ([b, b._replace(name="c")], []),
        ([a, b._replace(name="split")], []),
        ([a, b], [Source("c", "z")]),
        ([a._replace(weight=None)], [b]),
        ([a._replace(weight=None)], [Source("a", "z")]),
    ):
        with pytest.raises(UserError):
            check_names(sources, adapters, "split")


def test_split_follows_its_weights():
    split, count = Split({"a": 0.9, "never": 0, "b": 0.1}), 20_000
    for users in (None, map(str, range(count))):
        chosen = collections.Counter(
            split.choose(None if users is None else next(users)) for _ in range(count)
        )
        # Within five standard deviations of a binomial.
        assert abs(chosen["b"] - 0.1 * count) < 5 * (0.1 * 0.9 * count) ** 0.5
        assert chosen.keys() == {"a", "b"}


def test_a_user_stays_while_weights_change_little():
    users = [f"user {i}" for i in range(2_000)]
    one, same, more = (Split({"a": 1 - share, "b": share}) for share in (0.1, 0.1, 0.2))
    assert [one.choose(x) for x in users] == [same.choose(x) for x in users]
    moved = [x for x in users if one.choose(x) != more.choose(x)]
    assert 0.05 < len(moved) / len(users) < 0.15
    assert all(more.choose(x) == "b" for x in moved)


def test_a_server_that_splits(folders):
    sources = [Source("A", str(folders["one"]), 3), Source("B", str(folders["two"]), 1)]
    with (
        serving(*sources) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):

        def ask(model, **fields):
            return client.completions.create(
                model=model, prompt="the cat", temperature=0, max_tokens=6, **fields
            )

        alone = {name: ask(name).choices[0].text for name in ("A", "B")}
        assert alone["A"] != alone["B"]
        listed = client.models.list().data
        assert [each.id for each in listed] == ["split", "A", "B"]
        assert listed[0].weights == {"A": 0.75, "B": 0.25}
        want = Split({"A": 3, "B": 1})
        users = [f"user {i}" for i in range(24)]
        for user in users:
            for name in ("user", "safety_identifier"):
                made = ask("split", extra_body={name: user})
                assert made.model == want.choose(user)
                assert made.choices[0].text == alone[made.model]
        seen = collections.Counter(ask("split").model for _ in range(40))
        assert sum(seen.values()) == 40 and seen["A"] > seen["B"] > 0
        wait_until_idle(server)
        text = server.service.metrics.text(server.worker.stats).decode()
        of_b = 'lm_requests_total{finish_reason="length",model="split",variant="B"}'
        (line,) = (line for line in text.splitlines() if line.startswith(of_b))
        users_of_b = [user for user in users if want.choose(user) == "B"]
        assert float(line.split()[-1]) == 2 * len(users_of_b) + seen["B"]
