"""Errors of all kernels are within their a-priori bounds, and one rounding too many is detected."""

import json

import jax.numpy as jnp
import pytest

from kernels_pallas.tools import errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [errors.attention, errors.paged_attention, errors.grouped_matmul, errors.quantized,
     errors.cross_entropy],
    ids=lambda kernel: kernel.__name__,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_errors_are_within_their_bounds(kernel, dtype):
    for row in kernel(dtype):
        assert 0 <= row["error"] <= row["bound"], row


@pytest.mark.slow
@pytest.mark.parametrize("eight_bits", [jnp.int8, jnp.float8_e4m3fn])
def test_errors_with_eight_bit_pages_are_within_their_bounds(eight_bits):
    for row in errors.paged_attention(jnp.float32, eight_bits):
        assert row["error"] <= row["bound"], row


def test_one_rounding_too_many_is_detected():
    """Results rounded to bfloat16 exceed the bound of float32."""
    want = [errors.normal(0, 64, 64)]
    rounded = [want[0].astype(jnp.bfloat16)]
    (row,) = errors.rows(
        "sum", "cpu", jnp.float32, rounded, want, {"y": errors.bound(jnp.float32, 1, 64)}
    )
    assert row["error"] > 100 * row["bound"]
    (row,) = errors.rows(
        "sum", "cpu", jnp.bfloat16, rounded, want, {"y": errors.bound(jnp.bfloat16, 1, 64)}
    )
    assert 0 < row["error"] <= row["bound"]


def test_the_command_writes_its_rows(monkeypatch, tmp_path, capsys):
    row = {"kernel": "sum", "error": 1e-7, "bound": 1e-6}
    monkeypatch.setattr(errors, "measured", lambda: iter([row]))
    errors.main(["--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert "kernel" in capsys.readouterr().out
