"""The bench: what it times and compiles, and its refusals."""

import json

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import bench

SMALL = bench.Case(
    "sum",
    "8",
    lambda: (jnp.ones(8),),
    {"ours": jnp.sum, "broken": lambda x: x @ jnp.ones(3)},
    8.0,
)


def test_every_case_has_a_form_of_ours_that_traces():
    for case in bench.cases():
        arrays = jax.eval_shape(case.make)
        assert jax.eval_shape(next(iter(case.forms.values())), *arrays) is not None
        assert next(iter(case.forms)) == "ours"
        assert 0 < bench.floor(case, case.forms["ours"], "v5e") < 1


def test_a_form_that_fails_is_a_row_with_its_reason():
    ours, broken = bench.rows([SMALL], [], "v5e")
    assert ours["ms"] > 0 and 0 <= ours["share_of_floor"] < 1
    assert broken["error"].startswith("TypeError")
    assert bench.table([ours, broken]).splitlines()[0].split()[:4] == [
        "kernel", "size", "form", "chip",
    ]  # fmt: skip


def test_compiles_for_a_chip_that_is_not_there(monkeypatch, tmp_path, capsys):
    pytest.importorskip("libtpu")
    monkeypatch.setattr(bench, "cases", lambda: [SMALL])
    bench.main(["--chips", "v5e", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["form"] for row in rows] == ["ours", "broken"]
    assert rows[0]["temporaries_mib"] >= 0 and "code_kib" in capsys.readouterr().out


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(SystemExit, match=r'without libtpu it can.t compile.*pip install "jax'):
        bench.main([])
    with pytest.raises(SystemExit, match="--only nothing matches none of attention"):
        bench.main(["--only", "nothing"])
