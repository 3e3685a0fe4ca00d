"""Every kernel's error is no larger than what arithmetic in float32 and bfloat16 explains, and the
check would see more."""

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
def test_errors_are_explained(kernel, dtype):
    for row in kernel(dtype):
        assert 0 <= row["error"] <= row["bound"], row


@pytest.mark.slow
@pytest.mark.parametrize("eight_bits", [jnp.int8, jnp.float8_e4m3fn])
def test_errors_with_pages_of_eight_bits_are_explained(eight_bits):
    for row in errors.paged_attention(jnp.float32, eight_bits):
        assert row["error"] <= row["bound"], row


def test_a_rounding_too_many_is_seen():
    """Results in bfloat16 are outside what float32 explains."""
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


def test_the_command_writes_what_it_found(monkeypatch, tmp_path, capsys):
    row = {"kernel": "sum", "error": 1e-7, "bound": 1e-6}
    monkeypatch.setattr(errors, "measured", lambda: iter([row]))
    errors.main(["--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert "kernel" in capsys.readouterr().out
