"""Tabulates the error of each kernel against its float32 reference, beside an a-priori bound.

    python -m kernels_pallas.tools.errors [--json FILE]

TPU kernels run in interpret mode, with uninitialized memory set to NaN. Errors and bounds are
relative to the largest element of the reference. The bound of an output counts roundings: `steps`
roundings to the dtype (unit roundoff u = 2**-8 for bfloat16, 2**-24 for float32), and float32 sums
of n numbers, whose roundings of either sign accumulate to about 2**-24 * sqrt(n), once in the
kernel and once in the reference. The exponential amplifies errors of a score by the size of the
score: attention multiplies sums and roundings of scores by the largest score.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas
from kernels_pallas import quantized_matmul
from kernels_pallas.attention import reference as attention_reference
from kernels_pallas.cross_entropy import reference as cross_entropy_reference
from kernels_pallas.tools.bench import print_row, report

F32, BF16 = jnp.float32, jnp.bfloat16
UNIT = {F32: 2.0**-24, BF16: 2.0**-8}
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


def normal(seed: int, *shape: int, dtype: Any = F32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def bound(dtype: Any, steps: float, *sums: float) -> float:
    """Relative error bound of `steps` roundings to dtype and of float32 sums of so many numbers."""
    return steps * UNIT[dtype] + 2 * UNIT[F32] * (1 + sum(map(math.sqrt, sums)))


def rows(
    kernel: str, form: str, dtype: Any, got: Any, want: Any, bounds: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Yields one row per output."""
    for a, b, (name, most) in zip(got, want, bounds.items(), strict=True):
        a, b = np.float32(a), np.float32(b)
        error = float(np.abs(a - b).max() / np.abs(b).max())
        row = {"kernel": kernel, "form": form, "dtype": jnp.dtype(dtype).name, "output": name}
        yield row | {"error": float(f"{error:.1e}"), "bound": float(f"{most:.1e}")}


def gradients(function: Callable[..., Any], count: int, toward: int) -> Callable[..., Any]:
    """A function that returns outputs and gradients with respect to the first `count` arguments,
    pulled back from fixed random cotangents with seed `toward`."""

    def run(*arrays):
        out, pull = jax.vjp(lambda *a: function(*a, *arrays[count:]), *arrays[:count])
        dout = jax.tree.map(lambda x: normal(toward, *x.shape, dtype=x.dtype), out)
        return *jax.tree.leaves(out), *pull(dout)

    return jax.jit(run)


def interpreted(function: Callable[..., Any], *arrays: Any) -> Any:
    """Calls `function` with TPU kernels in interpret mode."""
    try:
        with pltpu.force_tpu_interpret_mode(STRICT):
            return jax.tree.map(np.asarray, function(*arrays))
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def exactly(arrays: Any) -> list[jax.Array]:
    """The arrays with floating-point dtypes converted to float32."""
    return [x.astype(F32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]


def attention(dtype: Any, length: int = 256, n: int = 4, k: int = 2, h: int = 64):
    arrays = [normal(i, 1, length, heads, h, dtype=dtype) for i, heads in enumerate((n, k, k))]
    q, key, _ = exactly(arrays)
    largest = float(jnp.abs(jnp.einsum("btkgh,bskh->bkgts", _by_group(q, k), key)).max()) * h**-0.5
    # Terms of a score's sum, amplified by the largest score.
    score = h * largest**2
    bounds = {
        # Roundings of weights and result; of scaled queries, amplified by the score.
        "out": bound(dtype, 2 + largest, length, score),
        "lse": bound(dtype, largest, length, score),
        # Also of the gradients of the scores, which are differences of two sums over the values.
        "dq": bound(dtype, 4 + largest, length, score, h, h),
        "dk": bound(dtype, 4 + largest, length, score, h, h),
        "dv": bound(dtype, 2 + largest, length, score),
    }
    want = gradients(attention_reference.flash_attention, 3, 9)(*exactly(arrays))

    def ours(implementation):
        def run(*a):
            return kernels_pallas.flash_attention(
                *a, return_lse=True, implementation=implementation
            )

        return gradients(run, 3, 9)

    yield from rows("attention", "tpu", dtype, interpreted(ours("tpu"), *arrays), want, bounds)
    yield from rows("attention", "blocks", dtype, ours("reference")(*arrays), want, bounds)


def _by_group(q_btnh, kv_heads):
    b, t, n, h = q_btnh.shape
    return q_btnh.reshape(b, t, kv_heads, n // kv_heads, h)


def paged_attention(dtype: Any, eight_bits: Any = None):
    b, n, k, h, slots, width = 2, 4, 2, 64, 128, 4
    q = normal(0, b, 1, n, h, dtype=dtype)
    pages = [normal(i, b * width, k, slots, h, dtype=dtype) for i in (1, 2)]
    scales = {}
    if eight_bits:
        pages = [(32 * page).astype(eight_bits) for page in pages]
        ones = jnp.full(pages[0].shape[:3], 1 / 32)
        scales = {"k_scales_pks": ones, "v_scales_pks": ones}
    lengths = jnp.array([slots * width, 200])
    table = jax.random.permutation(jax.random.key(3), b * width).reshape(b, width)

    def run(implementation, q, *pages):
        call = {"implementation": implementation, **scales}
        return [kernels_pallas.paged_attention(q, *pages, table, lengths, **call)]

    got = interpreted(lambda *a: run("tpu", *a), q, *pages)
    exact = pages if eight_bits else exactly(pages)
    want = run("reference", q.astype(F32), *exact)
    largest = 4.0  # scaled scores of normal queries and keys; one in 20,000 is larger
    bounds = {"out": bound(dtype, 2 + largest, slots * width, h * largest**2)}
    kernel = "paged attention" + (f", {jnp.dtype(eight_bits).name} pages" if eight_bits else "")
    yield from rows(kernel, "tpu", dtype, got, want, bounds)


def grouped_matmul(dtype: Any):
    m, d, f, e = 256, 256, 128, 3
    sizes = jnp.array([100, 0, 156])
    arrays = normal(0, m, d, dtype=dtype), normal(1, e, d, f, dtype=dtype), sizes

    def ours(implementation):
        def run(*a):
            return kernels_pallas.grouped_matmul(*a, implementation=implementation)

        return gradients(run, 2, 9)

    want = ours("reference")(*exactly(arrays))
    bounds = {"y": bound(dtype, 1, d), "dx": bound(dtype, 1, f), "dw": bound(dtype, 1, m)}
    yield from rows("grouped matmul", "tpu", dtype, interpreted(ours("tpu"), *arrays), want, bounds)
    yield from rows("grouped matmul", "cpu", dtype, ours(None)(*arrays), want, bounds)


def quantized(dtype: Any):
    d, f = 1024, 256
    w = normal(1, d, f)

    def compare(kernel, function, x, weights, steps):
        got = interpreted(lambda x: [function(x, *weights, implementation="tpu")], x)
        want = [function(x.astype(F32), *weights, implementation="reference")]
        return rows(kernel, "tpu", dtype, got, want, {"y": bound(dtype, steps, d)})

    for bits in (4, 3):
        # With more than 128 rows the unpacked weights are rounded to the dtype of x.
        for m, steps in ((16, 1), (256, 2)):
            x = normal(0, m, d, dtype=dtype)
            kernel = f"{bits} bits, {m} rows"
            packed = quantized_matmul.pack(w, bits=bits)
            yield from compare(kernel, quantized_matmul.packed_matmul, x, (packed,), steps)
    x = normal(0, 16, d, dtype=dtype)
    weights = quantized_matmul.quantize_int8(w)
    yield from compare("8 by 8 bits", quantized_matmul.int8_matmul, x, weights, 1)


def cross_entropy(dtype: Any):
    b, t, d, v = 2, 128, 128, 1024
    targets = jax.random.randint(jax.random.key(2), (b, t), 0, v)
    arrays = normal(0, b, t, d, dtype=dtype), normal(1, d, v, dtype=dtype) / 4, targets
    arrays = *(x.astype(dtype) for x in arrays[:2]), targets, jnp.ones((b, t))

    def run(function):
        return gradients(lambda *a: function(*a)[0], 2, 9)

    got = run(kernels_pallas.cross_entropy)(*arrays)
    want = run(cross_entropy_reference.cross_entropy)(*exactly(arrays))
    # Logits stay in float32; gradients of logits and results are rounded.
    logits = d * 9.0
    bounds = {
        "loss": bound(F32, 0, logits, v, b * t),
        "dx": bound(dtype, 2, logits, v),
        "dw": bound(dtype, 2, logits, b * t),
    }
    yield from rows("cross entropy", "any", dtype, got, want, bounds)


def measured() -> Iterator[dict[str, Any]]:
    """Yields the rows of all kernels and dtypes."""
    for dtype in (F32, BF16):
        for kernel in (attention, paged_attention, grouped_matmul, quantized, cross_entropy):
            yield from kernel(dtype)
        for eight_bits in (jnp.int8, jnp.float8_e4m3fn):
            yield from paged_attention(dtype, eight_bits)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.tools.errors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args(arguments)
    results = []
    for row in measured():
        print_row(row)
        results.append(row)
    report(results, options.json)


if __name__ == "__main__":
    main()
