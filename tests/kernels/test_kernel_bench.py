"""The benchmark: its cases, rows and error messages."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from kernel_helpers import jit

from kernels_pallas.tools import bench

SMALL = bench.Case(
    "sum",
    "8",
    lambda: (jnp.ones(8),),
    {"ours": jnp.sum, "broken": lambda x: x @ jnp.ones(3)},
    8.0,
)


@functools.cache
def cases_and_floors(gpu, chip):
    """(case, lower bound in seconds) of each case, on a GPU only of attention. Traces `ours`."""
    cases = bench.cases(gpu)
    if gpu:
        cases = [case for case in cases if case.name.startswith(("attention", "hopper"))]
    return [(case, bench.floor(case, chip)) for case in cases]


@pytest.mark.parametrize(
    ("gpu", "chip"), [(False, "v5e"), pytest.param(True, "h100", marks=pytest.mark.slow)]
)
def test_our_form_of_every_case_traces(gpu, chip):
    for case, floor in cases_and_floors(gpu, chip):
        assert next(iter(case.forms)) == "ours"
        assert 0 < floor < 1


def test_a_form_that_fails_is_a_row_with_its_reason():
    ours, broken = bench.rows([SMALL], [], "v5e")
    assert ours["ms"] > 0 and 0 <= ours["share_of_floor"] < 1
    assert broken["error"].startswith("TypeError")
    assert bench.table([ours, broken]).splitlines()[0].split()[:4] == [
        "kernel", "size", "form", "chip",
    ]  # fmt: skip


def test_attention_on_a_gpu_is_compared_with_cudnn_and_pytorch(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    cases = [case for case in bench.cases(gpu=True) if case.name.startswith("attention")]
    forms = {(case.name, case.size.split()[3]): list(case.forms) for case in cases}
    for direction in ("", ", gradients"):
        name, documents = (f"attention{words}{direction}" for words in ("", ", documents of 1024"))
        assert forms[name, "4096"] == ["ours", "cuDNN", "jax.nn, XLA", "PyTorch, flash"]
        assert forms[name, "16384"] == ["ours", "cuDNN", "PyTorch, flash"]
        for length in ("4096", "16384"):
            assert forms[documents, length] == ["ours", "cuDNN, no documents"]
    last = bench.cases(gpu=True)[-8:]
    assert all(case.name.startswith("hopper") and list(case.forms) == ["ours"] for case in last)


@pytest.mark.slow
def test_arithmetic_bounds_attention_on_a_gpu():
    """So the share of the lower bound is that of the peak bf16 rate."""
    for case, floor in cases_and_floors(True, "h100"):
        assert floor == case.flops / 989e12


def test_a_form_may_run_in_a_separate_process(monkeypatch, tmp_path):
    (tmp_path / "theirs.py").write_text("import sys\nprint('ready')\nprint(float(sys.argv[1]))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    forms = {name: bench.Process("theirs", (value,)) for name, value in (("a", 0.5), ("b", "x"))}
    one, broken = bench.rows([SMALL._replace(forms=forms | SMALL.forms)], [], "h100")[:2]
    assert one["ms"] == 500
    assert broken["error"] == "RuntimeError: ValueError: could not convert string to float: 'x'"


def test_compiles_for_tpu_ahead_of_time(monkeypatch, tmp_path, capsys):
    pytest.importorskip("libtpu")
    monkeypatch.setattr(bench, "cases", lambda gpu: [SMALL])
    bench.main(["--chips", "v5e", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["form"] for row in rows] == ["ours", "broken"]
    assert rows[0]["temporaries_mib"] >= 0 and "code_kib" in capsys.readouterr().out


def test_messages_name_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(SystemExit, match=r'without libtpu it cannot compile.*pip install "jax'):
        bench.main([])
    with pytest.raises(SystemExit, match="--only nothing matches none of attention"):
        bench.main(["--only", "nothing"])


@pytest.mark.slow
def test_attention_on_cpu_is_timed_against_einsum(monkeypatch, tmp_path):
    case = bench.attention_on_cpu(64, jnp.float32, backward=False)
    arrays = case.make()
    ours, *others = (jit(form)(*arrays) for form in case.forms.values())
    for other in others:
        # Sums over 64 keys and a head width of 64, of scores below 5.
        atol = tolerance.of_chain(other, 64, 64 * 5**2)
        np.testing.assert_allclose(ours, other, rtol=0, atol=atol)
    monkeypatch.setattr(bench, "cases_on_cpu", lambda: [case])
    bench.main(["--cpu", "--only", "float32", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["form"] for row in rows] == ["ours", "einsum", "jax.nn"]
    assert rows[1]["of_einsum"] == 1 and all(row["ms"] > 0 for row in rows)
    assert {row["chip"] for row in rows} == {"cpu"}


def test_sizes_on_cpu():
    sizes = {case.size.split()[3] for case in bench.cases_on_cpu()}
    assert sizes == {"256", "2048", "8192"}
