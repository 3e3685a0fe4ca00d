"""Work of a compiled program on one chip: matrix products and bytes of main memory, with loops
multiplied out."""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.planning.hlo import Instruction, Program

# Moves no data: names for parts of other results, or waits for what was started before.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "call-start", "partition-id", "after-all", "opt-barrier", "iota"}
_LINKS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINKS += ("ragged-all-to-all",)


class Work(NamedTuple):
    """flops      of matrix products, without those inside kernels: what these do depends on what
               they are given
    nbytes     read from and written to main memory
    seconds    every instruction at the speed of what binds it, products or memory, in a row
    kernels    {name: times} of custom kernels
    """

    flops: float
    nbytes: float
    seconds: float
    kernels: dict[str, int]


def work(program: Program, flops_rate: float, bytes_rate: float) -> Work:
    """What one device does in a step, at these rates a second."""
    flops = nbytes = seconds = 0.0
    kernels: dict[str, int] = {}
    for each, computation, times, top in program.executed():
        if not top or each.op in _FREE or each.op.startswith(_LINKS) or each.op.endswith("-done"):
            continue
        own = _flops(program, computation, each)
        moved = _moved(program, computation, each)
        if 'custom_call_target="tpu_custom_call"' in each.rest:
            name = re.sub(r"[.\d]+$", "", each.name)
            kernels[name] = kernels.get(name, 0) + times
        flops += times * own
        nbytes += times * moved
        seconds += times * max(own / flops_rate, moved / bytes_rate)
    return Work(flops, nbytes, seconds, kernels)


def _flops(program: Program, computation: str, each: Instruction) -> float:
    if each.op == "fusion":
        return sum(
            _flops(program, called, inner)
            for called in each.called
            for inner in program.computations.get(called, [])
        )
    if each.op not in ("convolution", "dot"):
        return 0.0
    known = program.by_name[computation]
    operands = [known[name].arrays[0].shape for name in each.operands[:2] if name in known]
    if len(operands) < 2:
        return 0.0
    if each.op == "dot":
        summed = _indices(each.attribute("lhs_contracting_dims"))
        return 2.0 * math.prod(each.arrays[0].shape) * math.prod(operands[0][i] for i in summed)
    return _convolution(each, *operands)


def _convolution(each: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """TPUs have products as convolutions; those of a batch are windows with gaps, of which only
    the pairs that meet count."""
    lhs, kernel, out = re.match(r"(\w+)_(\w+)->(\w+)", each.attribute("dim_labels")).groups()
    result = each.arrays[0].shape
    pairs = 1.0
    window = _window(each.attribute("window"))
    for i, label in enumerate(sorted(c for c in out if c.isdigit())):
        size, width = result[out.index(label)], right[kernel.index(label)]
        given = left[lhs.index(label)]
        pairs *= _pairs(size, given, width, *(window[key][i] for key in _WINDOW))
    features = result[out.index("f")] * right[kernel.index("i")]
    return 2.0 * result[out.index("b")] * features * pairs


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _window(text: str | None) -> dict[str, list[int]]:
    sizes = re.search(r"\bsize=([\dx]+)", text or "")
    rank = len(sizes.group(1).split("x")) if sizes else 0
    window = {}
    for key in _WINDOW:
        found = re.search(rf"\b{key}=([\dx_\-]+)", text or "")
        parts = found.group(1).split("x") if found else ["0_0" if key == "pad" else "1"] * rank
        window[key] = [int(part.split("_")[0]) for part in parts]
    return window


@functools.lru_cache(maxsize=4096)
def _pairs(size: int, given: int, width: int, stride: int, pad: int, gap: int, step: int) -> int:
    """How many (place in the result, place in the window) meet an element that is there."""
    at = np.arange(size)[:, None] * stride - pad + np.arange(width)[None, :] * step
    return int(((at >= 0) & (at <= (given - 1) * gap) & (at % gap == 0)).sum())


def _moved(program: Program, computation: str, each: Instruction) -> float:
    """Bytes in main memory that it reads and writes. Of what a fusion only slices, the slice."""
    known = program.by_name[computation]
    if each.op.endswith("-start"):
        return 2.0 * min((a.nbytes for a in each.arrays if a.nbytes), default=0)
    written = sum(a.nbytes for a in each.arrays if a.space == 0)
    read = 0.0
    inside = _sliced(program, each)
    for index, name in enumerate(each.operands):
        arrays = known[name].arrays if name in known else ()
        whole = sum(a.nbytes for a in arrays if a.space == 0)
        read += min(whole, inside.get(index, whole))
    if each.op == "dynamic-update-slice" or "dynamic-update-slice" in each.name:
        # In place: what is written is as large as the rest of what is read.
        small = sorted(sum(a.nbytes for a in known[n].arrays) for n in each.operands if n in known)
        return 2.0 * sum(small[:-1])
    return written + read


def _sliced(program: Program, each: Instruction) -> dict[int, float]:
    """{operand: bytes} of the operands of which only slices are read."""
    if each.op in _SLICES:
        return {0: sum(a.nbytes for a in each.arrays)}
    if each.op != "fusion" or not each.called:
        return {}
    body = program.computations.get(each.called[0], [])
    sizes: dict[int, float] = {}
    for inner in body:
        if inner.op != "parameter":
            continue
        read = _slices_of(program, body, inner.name)
        if read is not None:
            sizes[int(re.match(r"(\d+)\)", inner.rest).group(1))] = read
    return sizes


_SLICES = ("dynamic-slice", "slice", "gather")


def _slices_of(program: Program, body: Sequence[Instruction], name: str) -> float | None:
    """Bytes of all slices that a fusion reads of an array, under other names and in fusions inside
    it too; None where it reads the whole."""
    total = 0.0
    readers = [each for each in body if name in each.operands]
    for each in readers:
        inside: float | None = None
        if each.op == "bitcast":
            inside = _slices_of(program, body, each.name)
        elif each.op in _SLICES or each.op == "fusion":
            sizes = _sliced(program, each)
            places = [i for i, operand in enumerate(each.operands) if operand == name]
            if all(i in sizes for i in places):
                inside = sum(sizes[i] for i in places)
        if inside is None:
            return None
        total += inside
    return total if readers else None


def _indices(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]
