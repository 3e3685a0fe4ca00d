"""Benchmarks each kernel against its reference and the kernels that JAX ships.

    python -m kernels_pallas.tools.bench [--only WORD ...] [--json FILE]

On a TPU or GPU: times them, and prints the share of the chip's lower bound in that time. The lower
bound is arithmetic at the bf16 peak or one read or write of each array, whichever takes longer.
Without an accelerator: compiles them for the TPUs in --chips, which needs libtpu but no TPU, and
prints their memory. With --cpu: times the CPU implementation of attention against einsums.

On a GPU, `--only attention` compares with cuDNN and, where PyTorch with CUDA is installed, with
PyTorch's flash attention, in a few minutes; `--only hopper` times our own Hopper kernels.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kernels_pallas
from kernels_pallas import quantized_matmul

BF16, F32 = jnp.bfloat16, jnp.float32
# Chip -> (a topology that libtpu describes, part of the device kind, bf16 FLOP/s, memory bytes/s),
# per device, from the vendors' pages. A device of tpu7x is one core, half a chip.
CHIPS = {
    "v5e": ("v5e:2x2", "TPU v5 lite", 197e12, 819e9),
    "v5p": ("v5p:2x2x1", "TPU v5", 459e12, 2765e9),
    "v6e": ("v6e:2x2", "TPU v6 lite", 918e12, 1638e9),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x", 1153e12, 3690e9),
    "h100": (None, "H100", 989e12, 3352e9),
    "h200": (None, "H200", 989e12, 4800e9),
}
TPUS = [name for name, chip in CHIPS.items() if chip[0]]
ADVICE = 'install it with: pip install "jax[tpu]"'


class Case(NamedTuple):
    """One benchmark: `make()` returns the arguments, `forms` maps names to the compared functions.

    `ours` is the first form; `flops` are the operations of one call.
    """

    name: str
    size: str
    make: Callable[[], tuple[jax.Array, ...]]
    forms: dict[str, "Callable[..., Any] | Process"]
    flops: float


class Process(NamedTuple):
    """A form timed in a separate Python process: the module, run with the arguments, prints the
    seconds per call."""

    module: str
    arguments: tuple[Any, ...]

    def seconds(self) -> float:
        command = [sys.executable, "-m", self.module, *map(str, self.arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return float(done.stdout.split()[-1])


def normal(seed: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, F32).astype(dtype)


def attention(length: int, backward: bool) -> Case:
    """Causal, 32 query heads on 8, head width 128."""
    b, n, k, h = 4, 32, 8, 128

    def make():
        return tuple(normal(i, b, length, heads, h) for i, heads in enumerate((n, k, k)))

    def splash(q, k, v):
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as kernel,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask as mask,
        )

        each = mask.MultiHeadMask([mask.CausalMask((length, length)) for _ in range(n)])
        size = min(1024, length)
        blocks = kernel.BlockSizes(
            **{f"block_{name}": size for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv")},
            block_kv_dkv_compute=size,
            use_fused_bwd_kernel=True,
        )
        run = kernel.make_splash_mha(each, block_sizes=blocks, head_shards=1, q_seq_shards=1)
        q, k, v = (x.swapaxes(1, 2) for x in (q * h**-0.5, k, v))
        return jax.vmap(run)(q, k, v).swapaxes(1, 2)

    def jax_nn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    forms = {"ours": kernels_pallas.flash_attention, "splash": splash, "jax.nn": jax_nn}
    if backward:
        forms = {name: gradients(form, 3) for name, form in forms.items()}
    flops = 2 * b * n * length**2 * h * (3.5 if backward else 1)
    name = "attention, gradients" if backward else "attention"
    return Case(name, f"B {b} T {length} N {n} K {k} H {h}", make, forms, flops)


def attention_on_gpu(
    length: int, backward: bool, document: int | None = None, hopper: bool = False
) -> Case:
    """16k tokens, causal, 32 query heads on 8, head width 128, in rows of `length`.

    Each row is one document, or documents of `document` tokens. cuDNN through jax.nn does not
    support documents; its time there is that of the full causal triangle, with another result.
    With `hopper`, times only our own Hopper kernels.
    """
    b, n, k, h = 16_384 // length, 32, 8, 128

    def make():
        arrays = [normal(i, b, length, heads, h) for i, heads in enumerate((n, k, k))]
        ids = jnp.broadcast_to(jnp.arange(length) // document, (b, length)) if document else None
        return *arrays, ids

    def ours(q, k, v, ids, implementation=None):
        return kernels_pallas.flash_attention(
            q, k, v, segment_ids=ids, implementation=implementation
        )

    def jax_nn(q, k, v, ids, implementation):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    cudnn = functools.partial(jax_nn, implementation="cudnn")
    forms = {"ours": ours, "cuDNN, no documents" if document else "cuDNN": cudnn}
    if hopper:
        forms = {"ours": functools.partial(ours, implementation="hopper")}
    elif not document and length == 4096:  # for longer rows the T x T scores do not fit
        forms["jax.nn, XLA"] = functools.partial(jax_nn, implementation="xla")
    if backward:
        forms = {name: gradients(form, 3) for name, form in forms.items()}
    if not document and not hopper and importlib.util.find_spec("torch"):
        sizes = b, length, n, k, h, "gradients" if backward else "forward"
        forms["PyTorch, flash"] = Process("kernels_pallas.tools.bench_torch", sizes)
    name = "hopper kernels" if hopper else "attention"
    name += f", documents of {document}" if document else ""
    flops = 2 * b * n * length * (document or length) * h * (3.5 if backward else 1)
    name += ", gradients" if backward else ""
    return Case(name, f"B {b} T {length} N {n} K {k} H {h}", make, forms, flops)


def einsum_attention(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array) -> jax.Array:
    """Causal attention in einsums, without a kernel; full scores in float32."""
    b, t, n, h = q_btnh.shape
    q_btkgh = q_btnh.reshape(b, t, k_bskh.shape[2], -1, h)
    s = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh, preferred_element_type=F32) * h**-0.5
    s = jnp.where(jnp.tril(jnp.ones((t, t), bool)), s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1).astype(v_bskh.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", p, v_bskh, preferred_element_type=F32)
    return out.reshape(b, t, n, h).astype(q_btnh.dtype)


def attention_on_cpu(length: int, dtype: Any, backward: bool) -> Case:
    """Causal, 4 query heads on 2, head width 64; operations are counted as for einsum attention."""
    b, n, k, h = 1, 4, 2, 64

    def make():
        heads = enumerate((n, k, k))
        return tuple(normal(i, b, length, count, h, dtype=dtype) for i, count in heads)

    def jax_nn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    forms = {"ours": kernels_pallas.flash_attention, "einsum": einsum_attention, "jax.nn": jax_nn}
    if backward:
        forms = {name: gradients(form, 3) for name, form in forms.items()}
    name = f"attention on CPU, {jnp.dtype(dtype).name}" + (", gradients" if backward else "")
    flops = 4 * b * n * length**2 * h * (3.5 if backward else 1)
    return Case(name, f"B {b} T {length} N {n} K {k} H {h}", make, forms, flops)


def paged_attention(dtype: Any, length: int = 4096) -> Case:
    """One new token for each of 32 sequences of `length` / 2 to `length` tokens."""
    b, n, k, h, slots = 32, 32, 8, 128, 128
    width = length // slots
    lengths = np.random.default_rng(0).integers(length // 2, length, b).astype(np.int32)

    def make():
        table = jax.random.permutation(jax.random.key(9), b * width).reshape(b, width)
        pages = (normal(i, b * width, k, slots, h, dtype=dtype) for i in (1, 2))
        return normal(0, b, 1, n, h), *pages, table, jnp.asarray(lengths)

    def ours(*arrays, implementation=None):
        scales = {}
        if dtype != BF16:
            ones = jnp.ones(arrays[1].shape[:3])
            scales = {"k_scales_pks": ones, "v_scales_pks": ones}
        return kernels_pallas.paged_attention(*arrays, **scales, implementation=implementation)

    def shipped(q, k, v, table, lengths):
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as jax_kernel

        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        return jax_kernel(q[:, 0], k, v, lengths, table, pages_per_compute_block=8)

    forms = {"ours": ours, "reference": functools.partial(ours, implementation="reference")}
    if dtype == BF16:
        forms["jax, its layout copied"] = shipped
    name = f"paged attention, {jnp.dtype(dtype).name}"
    flops = 4 * int(lengths.sum()) * n * h
    return Case(name, f"B {b} lengths to {length} N {n} K {k} H {h}", make, forms, flops)


def grouped_matmul(m: int, d: int, f: int, e: int, backward: bool) -> Case:
    """Grouped matmul with groups of uneven size."""
    shares = np.random.default_rng(1).dirichlet(np.full(e, 8.0))
    sizes = np.random.default_rng(0).multinomial(m, shares).astype(np.int32)

    def make():
        return normal(0, m, d), normal(1, e, d, f), jnp.asarray(sizes)

    def megablox(x, w, sizes):
        from jax.experimental.pallas.ops.tpu.megablox import ops

        return ops.gmm(x, w, sizes, BF16, (512, 1024, 1024))

    forms = {
        "ours": kernels_pallas.grouped_matmul,
        "ragged_dot": jax.lax.ragged_dot,
        "megablox": megablox,
    }
    if backward:
        forms = {name: gradients(form, 2) for name, form in forms.items()}
    name = "grouped matmul, gradients" if backward else "grouped matmul"
    flops = 2 * m * d * f * (3 if backward else 1)
    return Case(name, f"M {m} D {d} F {f} E {e}", make, forms, flops)


def cross_entropy(tokens: int, d: int, v: int) -> Case:
    """Cross-entropy with gradients."""
    from kernels_pallas.cross_entropy import reference

    def make():
        targets = jax.random.randint(jax.random.key(2), (4, tokens // 4), 0, v)
        weights = jnp.ones(targets.shape)
        return normal(0, 4, tokens // 4, d), normal(1, d, v), targets, weights

    forms = {"ours": kernels_pallas.cross_entropy, "reference": reference.cross_entropy}
    forms = {
        name: jax.grad(lambda *a, form=form: form(*a)[0], (0, 1)) for name, form in forms.items()
    }
    size, flops = f"tokens {tokens} D {d} V {v}", 6 * tokens * d * v
    return Case("cross entropy, gradients", size, make, forms, flops)


def few_bits(m: int, d: int, f: int, bits: int) -> Case:
    def make():
        w = normal(1, d, f)
        return normal(0, m, d), quantized_matmul.pack(w, bits=bits)

    def run(x, packed, implementation=None):
        return quantized_matmul.packed_matmul(x, packed, implementation=implementation)

    forms = {"ours": run, "reference": functools.partial(run, implementation="reference")}
    return Case(f"matmul, {bits} bits", f"M {m} D {d} F {f}", make, forms, 2 * m * d * f)


def eight_bits(m: int, d: int, f: int) -> Case:
    def make():
        return normal(0, m, d), *quantized_matmul.quantize_int8(normal(1, d, f))

    def run(*arrays, implementation=None):
        return quantized_matmul.int8_matmul(*arrays, implementation=implementation)

    forms = {"ours": run, "reference": functools.partial(run, implementation="reference")}
    return Case("matmul, 8 by 8 bits", f"M {m} D {d} F {f}", make, forms, 2 * m * d * f)


def gradients(form: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A function that returns value and gradients with respect to the first `count` arguments."""

    def run(*arrays):
        y, pull = jax.vjp(lambda *a: form(*a, *arrays[count:]), *arrays[:count])
        return y, *pull(y)

    return run


def cases(gpu: bool = False) -> list[Case]:
    """All cases, at the sizes of a model of a few billion parameters."""
    first, last = [attention(4096, backward) for backward in (False, True)], []
    if gpu:
        # The Hopper kernels come last: they have never run on a GPU and may hang.
        first, last = (
            [
                attention_on_gpu(length, backward, document, hopper)
                for document in (None, 1024)
                for length in (4096, 16_384)
                for backward in (False, True)
            ]
            for hopper in (False, True)
        )
    return [
        *first,
        *(paged_attention(dtype) for dtype in (BF16, jnp.int8)),
        *(grouped_matmul(16_384, 2048, 1408, 64, backward) for backward in (False, True)),
        *(grouped_matmul(8192, 4096, 14_336, 8, backward) for backward in (False, True)),
        cross_entropy(16_384, 4096, 131_072),
        *(eight_bits(m, 4096, 14_336) for m in (16, 4096)),
        *(few_bits(m, 4096, 14_336, bits) for m in (16, 4096) for bits in (4, 3)),
        *last,
    ]


def cases_on_cpu() -> list[Case]:
    return [
        attention_on_cpu(length, dtype, backward)
        for length in (256, 2048, 8192)
        for dtype in (F32, BF16)
        for backward in (False, True)
    ]


def timed(case: Case, form: Callable[..., Any], repeats: int = 10) -> float:
    """Seconds per call: the best of three runs of `repeats` calls, after one that compiles."""
    arrays, call = case.make(), jax.jit(form)
    jax.block_until_ready(call(*arrays))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            out = call(*arrays)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def side_by_side(case: Case, rounds: int = 200, seconds: float = 20.0) -> list[dict[str, Any]]:
    """Times the forms on this machine's CPU in turns, one call each per round; returns their rows.

    A row has the median milliseconds of wall time and of processor time (which other load on the
    machine stretches less), the median ratios of both to einsum in the same round, and MiB of
    temporaries as XLA reports them. Stops after `seconds`, but not before three rounds.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = case.make()
        programs = {name: jax.jit(f).lower(*arrays).compile() for name, f in case.forms.items()}
        times = {name: [] for name in programs}
        first = time.perf_counter()
        while len(times["ours"]) <= 3 or (
            len(times["ours"]) <= rounds and time.perf_counter() - first < seconds
        ):
            for name, program in programs.items():
                start = np.array([time.perf_counter(), time.process_time()])
                jax.block_until_ready(program(*arrays))
                times[name].append([time.perf_counter(), time.process_time()] - start)
    # The first call of each is a warm-up.
    times = {name: np.array(each[1:]) for name, each in times.items()}
    results = []
    for name, program in programs.items():
        ms, processor_ms = 1e3 * np.median(times[name], 0)
        ratio, processor_ratio = np.median(times[name] / times["einsum"], 0)
        row = {"kernel": case.name, "size": case.size, "form": name, "chip": "cpu"}
        row |= {"rounds": len(times[name]), "ms": round(float(ms), 3)}
        row |= {"of_einsum": round(float(ratio), 3), "processor_ms": round(float(processor_ms), 3)}
        row |= {"processor_of_einsum": round(float(processor_ratio), 3)}
        row["temporaries_mib"] = round(program.memory_analysis().temp_size_in_bytes / 2**20, 1)
        results.append(row)
    return results


def floor(case: Case, chip: str) -> float:
    """Lower bound of the seconds per call on a chip, from arithmetic and memory traffic."""
    _, _, rate, bandwidth = CHIPS[chip]
    inputs = jax.eval_shape(case.make)
    arrays = jax.tree.leaves((inputs, jax.eval_shape(case.forms["ours"], *inputs)))
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return max(case.flops / rate, moved / bandwidth)


def described(chip: str) -> Any:
    """One device of a TPU that this machine does not have, for ahead-of-time compilation."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]


def compiled(case: Case, form: Callable[..., Any], device: Any) -> dict[str, Any]:
    """Compiles for `device`. Returns MiB of temporaries, MiB of vector memory in the largest kernel
    and KiB of code."""
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(case.make),
    )
    with jax.set_mesh(mesh):  # kernels choose their block sizes by the chip of the mesh
        program = jax.jit(form).lower(*placed).compile()
    memory = program.memory_analysis()
    scoped = re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', program.as_text())
    vector = [int(n) for each in scoped for n in re.findall(r'"size":"(\d+)"', each)]
    return {
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "vmem_mib": round(max(vector, default=0) / 2**20, 1),
        "code_kib": round(memory.generated_code_size_in_bytes / 2**10, 1),
    }


def rows(chosen: list[Case], chips: list[str], accelerator: str | None) -> list[dict[str, Any]]:
    """Rows of each form of each case: timed on this machine's accelerator, if there is one, else
    compiled for `chips`."""
    results = []
    for case in chosen:
        for chip in [accelerator] if accelerator else chips:
            for name, form in case.forms.items():
                row = {"kernel": case.name, "size": case.size, "form": name, "chip": chip}
                try:
                    if accelerator:
                        in_process = isinstance(form, Process)
                        seconds = form.seconds() if in_process else timed(case, form)
                        share = floor(case, accelerator) / seconds
                        row |= {"ms": round(1e3 * seconds, 3), "share_of_floor": round(share, 3)}
                    else:
                        row |= compiled(case, form, described(chip))
                except Exception as error:  # the form does not support this chip or size
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                print_row(row)
                results.append(row)
    return results


def print_row(row: dict[str, Any]) -> None:
    """Prints a row to stderr as soon as it is measured."""
    print("  ".join(str(value) for value in row.values()), file=sys.stderr)


def rows_on_cpu(chosen: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in chosen:
        results += side_by_side(case)
        for row in results[-len(case.forms) :]:
            print_row(row)
    return results


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a table with aligned columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def this_chip() -> str | None:
    """Name in CHIPS of this machine's accelerator; None if there is none."""
    if jax.default_backend() == "cpu":
        return None
    kind = jax.devices()[0].device_kind
    matching = [name for name, chip in CHIPS.items() if chip[1].lower() in kind.lower()]
    if not matching:
        sys.exit(
            f"kernels_pallas.tools.bench: no peak rates for {kind!r}; add it to CHIPS, which has "
            f"{', '.join(CHIPS)}."
        )
    return max(matching, key=lambda name: len(CHIPS[name][1]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(TPUS)
    parser.add_argument(
        "--chips",
        nargs="+",
        choices=TPUS,
        default=TPUS,
        metavar="CHIP",
        help=f"TPUs to compile for if there is no accelerator: {names}",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="time attention on this machine's CPU against einsums"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="kernels with a WORD in their name"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args(arguments)
    # Leave GPU memory to the separate processes; JAX preallocates most of it by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu = not options.cpu and jax.default_backend() == "gpu"
    every = cases_on_cpu() if options.cpu else cases(gpu)
    chosen = [c for c in every if not options.only or any(w in c.name for w in options.only)]
    if not chosen:
        names = ", ".join(sorted({case.name for case in every}))
        sys.exit(
            f"kernels_pallas.tools.bench: --only {' '.join(options.only)} matches none of {names}."
        )
    accelerator = None if options.cpu else this_chip()
    if accelerator is None and not options.cpu:
        try:
            import libtpu  # noqa: F401
        except ImportError:
            sys.exit(
                "kernels_pallas.tools.bench: this machine has neither a TPU nor a GPU, and without "
                f"libtpu it cannot compile for a TPU; {ADVICE}"
            )
    results = rows_on_cpu(chosen) if options.cpu else rows(chosen, options.chips, accelerator)
    report(results, options.json)


def report(rows: list[dict[str, Any]], path: str | None) -> None:
    """Prints the table of rows; also writes them to `path` as JSON unless that is None."""
    print(table(rows))
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
