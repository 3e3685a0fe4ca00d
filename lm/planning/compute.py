"""Work of a compiled program on one device: FLOPs of matmuls and memory traffic, with loops
multiplied out."""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.planning.hlo import HBM, Instruction, Program

# Operations that move no data: views of other results, control flow, waits.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "call-start", "partition-id", "after-all", "opt-barrier", "iota"}
_LINKS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINKS += ("ragged-all-to-all",)


class Work(NamedTuple):
    """Work of one device in a step.

    flops    of matmuls outside custom kernels
    nbytes   read from and written to HBM
    seconds  sum over instructions, each limited by FLOPs or memory bandwidth
    kernels  {name: number of calls} of custom kernels
    """

    flops: float
    nbytes: float
    seconds: float
    kernels: dict[str, int]


def work(
    program: Program, flops_rate: float, bytes_rate: float, sparse: Sequence[str] = ()
) -> Work:
    """Work of one device in a step, at these rates per second. `sparse` are names of kernels that
    access only parts of their operands; their memory traffic is left out."""
    flops = nbytes = seconds = 0.0
    kernels: dict[str, int] = {}
    for each, computation, times, top in program.executed():
        if not top or each.op in _FREE or each.op.startswith(_LINKS) or each.op.endswith("-done"):
            continue
        operations = _flops(program, computation, each)
        traffic = _traffic(program, computation, each)
        if 'custom_call_target="tpu_custom_call"' in each.rest:
            name = re.sub(r"[.\d]+$", "", each.name)
            kernels[name] = kernels.get(name, 0) + times
            traffic = 0.0 if name in sparse else traffic
        flops += times * operations
        nbytes += times * traffic
        seconds += times * max(operations / flops_rate, traffic / bytes_rate)
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
    by_name = program.by_name[computation]
    operands = [by_name[name].arrays[0].shape for name in each.operands[:2] if name in by_name]
    if len(operands) < 2:
        return 0.0
    if each.op == "dot":
        contracting = _indices(each.attribute("lhs_contracting_dims"))
        contracted = math.prod(operands[0][i] for i in contracting)
        return 2.0 * math.prod(each.arrays[0].shape) * contracted
    return _convolution(each, *operands)


def _convolution(each: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """FLOPs of a convolution, as which TPUs express matmuls. A batched matmul is a convolution with
    a dilated window, of which only the elements that overlap count."""
    lhs, kernel, out = re.match(r"(\w+)_(\w+)->(\w+)", each.attribute("dim_labels")).groups()
    result = each.arrays[0].shape
    pairs = 1.0
    window = _window(each.attribute("window"))
    for i, label in enumerate(sorted(c for c in out if c.isdigit())):
        size, width = result[out.index(label)], right[kernel.index(label)]
        input_size = left[lhs.index(label)]
        pairs *= _pairs(size, input_size, width, *(window[key][i] for key in _WINDOW))
    features = result[out.index("f")] * right[kernel.index("i")]
    return 2.0 * result[out.index("b")] * features * pairs


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _window(text: str | None) -> dict[str, list[int]]:
    """Parses the attribute `window`: a number per spatial dimension for each of _WINDOW."""
    sizes = re.search(r"\bsize=([\dx]+)", text or "")
    rank = len(sizes.group(1).split("x")) if sizes else 0
    window = {}
    for key in _WINDOW:
        match = re.search(rf"\b{key}=([\dx_\-]+)", text or "")
        parts = match.group(1).split("x") if match else ["0_0" if key == "pad" else "1"] * rank
        window[key] = [int(part.split("_")[0]) for part in parts]
    return window


@functools.lru_cache(maxsize=4096)
def _pairs(
    size: int, input_size: int, width: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Number of pairs (index of the result, index of the window) that read an element of the input
    rather than padding or a gap, in one dimension."""
    at = np.arange(size)[:, None] * stride - pad + np.arange(width)[None, :] * rhs_dilate
    last = (input_size - 1) * lhs_dilate
    return int(((at >= 0) & (at <= last) & (at % lhs_dilate == 0)).sum())


def _traffic(program: Program, computation: str, each: Instruction) -> float:
    """Bytes that an instruction reads from and writes to HBM. Of an operand that a fusion only
    slices, the slice counts."""
    by_name = program.by_name[computation]
    if each.op.endswith("-start"):
        return 2.0 * min((a.nbytes for a in each.arrays if a.nbytes), default=0)
    writes = sum(a.nbytes for a in each.arrays if a.space == HBM)
    reads = 0.0
    slices = _sliced(program, each)
    for index, name in enumerate(each.operands):
        arrays = by_name[name].arrays if name in by_name else ()
        whole = sum(a.nbytes for a in arrays if a.space == HBM)
        reads += min(whole, slices.get(index, whole))
    if each.op == "dynamic-update-slice" or "dynamic-update-slice" in each.name:
        # In place: the largest operand is the updated array, the others are read and written.
        operands = [by_name[name] for name in each.operands if name in by_name]
        sizes = sorted(sum(a.nbytes for a in operand.arrays) for operand in operands)
        return 2.0 * sum(sizes[:-1])
    return writes + reads


def _sliced(program: Program, each: Instruction) -> dict[int, float]:
    """{index of operand: bytes} of operands of which only slices are read."""
    if each.op in _SLICES:
        return {0: sum(a.nbytes for a in each.arrays)}
    if each.op != "fusion" or not each.called:
        return {}
    body = program.computations.get(each.called[0], [])
    sizes: dict[int, float] = {}
    for inner in body:
        if inner.op != "parameter":
            continue
        nbytes = _slices_of(program, body, inner.name)
        if nbytes is not None:
            sizes[int(re.match(r"(\d+)\)", inner.rest).group(1))] = nbytes
    return sizes


_SLICES = ("dynamic-slice", "slice", "gather")


def _slices_of(program: Program, body: Sequence[Instruction], name: str) -> float | None:
    """Bytes of all slices that a fusion reads of an array, under other names and in fusions inside
    it too; None where it reads the whole."""
    total = 0.0
    readers = [each for each in body if name in each.operands]
    for each in readers:
        nbytes: float | None = None
        if each.op == "bitcast":
            nbytes = _slices_of(program, body, each.name)
        elif each.op in _SLICES or each.op == "fusion":
            sizes = _sliced(program, each)
            uses = [i for i, operand in enumerate(each.operands) if operand == name]
            if all(i in sizes for i in uses):
                nbytes = sum(sizes[i] for i in uses)
        if nbytes is None:
            return None
        total += nbytes
    return total if readers else None


def _indices(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]
