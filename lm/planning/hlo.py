"""Parses the text of a compiled TPU program: computations, and how often each instruction runs.

The text is `compiled.as_text()`: scheduled, so that instructions are in execution order, and with
layouts, from which follow sizes in memory.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
_BITS |= {"f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8, "f4e2m1fn": 4}

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Memory spaces of an array: the chip's main memory, its vector memory, the host's memory.
HBM, VMEM, HOST = 0, 1, 5

_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes without padding, as a collective moves them."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 0) // 8

    @property
    def space(self) -> int:
        """Memory space: HBM, VMEM or HOST."""
        match = re.search(r"S\((\d+)\)", self.layout)
        return int(match.group(1)) if match else HBM

    @property
    def padded(self) -> int:
        """Bytes in memory: the minor dimensions are rounded up to whole tiles."""
        order, _, tiles = self.layout.partition(":")
        first = re.match(r"T\(([\d,]+)\)", tiles)
        if not first or not self.shape:
            return self.nbytes
        minor = [int(i) for i in order.split(",") if i]
        sizes = [self.shape[i] for i in reversed(minor)]
        tile = [int(i) for i in first.group(1).split(",")]
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        for i, t in enumerate(reversed(tile), start=1):
            sizes[-i] = -(-sizes[-i] // t) * t
        return math.prod(sizes) * _BITS.get(self.dtype, 0) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@functools.lru_cache(maxsize=100_000)
def arrays(shape: str) -> tuple[Array, ...]:
    """Parses the shape of an instruction's result; tuples are flattened."""
    return tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), layout or "")
        for dtype, sizes, layout in _ARRAY.findall(shape)
        if dtype in _BITS
    )


@dataclass(frozen=True, eq=False)
class Instruction:
    """`operands` are names in the same computation; `rest` is the text after them: attributes."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def op_name(self) -> str:
        """Its origin in the program, such as 'jit(step)/while/body/dot_general'."""
        match = _OP_NAME.search(self.rest)
        return match.group(1).replace("\\'", "'") if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        branches = _BRANCHES.search(self.rest)
        names = _NAME.findall(branches.group(1)) if branches else []
        return (*_CALLED.findall(self.rest), *names)

    def attribute(self, name: str) -> str | None:
        """Value of the attribute `name=...`, braces included; None without it."""
        match = re.search(rf"\b{name}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^\s,]+)", self.rest)
        return match.group(1) if match else None


@dataclass
class Program:
    """Computations by name, and the name of the entry computation."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """{computation: {name: instruction}}."""
        return {c: {i.name: i for i in body} for c, body in self.computations.items()}

    def trips(self, loop: Instruction) -> int:
        """Trip count of a while loop: the constant in its condition."""
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest).group(1)
        bounds = [int(n) for n in self._constants(condition)]
        return max(bounds, default=1)

    def _constants(self, computation: str) -> Iterator[str]:
        for each in self.computations.get(computation, []):
            if each.op == "constant" and each.shape.startswith(("s32", "u32", "s64", "u64")):
                yield from re.findall(r"^(\d+)\)", each.rest)
            for name in each.called:
                yield from self._constants(name)

    def executed(self, computation: str | None = None, times: int = 1, top: bool = True):
        """Yields (instruction, computation, times, top) for every executed instruction.

        `times` multiplies the trip counts of surrounding loops. Of a conditional the longest branch
        counts. `top` is False inside a fusion, whose intermediate results stay out of memory, and
        in computations that run asynchronously on another core of the chip.
        """
        computation = computation or self.entry
        for each in self.computations.get(computation, []):
            yield each, computation, times, top
            if each.op == "while":
                body = re.search(r"body=%([\w.\-]+)", each.rest).group(1)
                yield from self.executed(body, times * self.trips(each), top)
            elif each.op == "conditional":
                longest = max(each.called, key=lambda name: len(self.computations.get(name, [])))
                yield from self.executed(longest, times, top)
            elif each.op in ("fusion", "async-start", "call-start"):
                for name in each.called:
                    yield from self.executed(name, times, False)
            elif each.op == "call":
                for name in each.called:
                    yield from self.executed(name, times, top)


def parse(text: str) -> Program:
    """Parses `compiled.as_text()`."""
    program = Program()
    body: list[Instruction] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            body = program.computations.setdefault(header.group(2), [])
            if header.group(1):
                program.entry = header.group(2)
        elif match := _INSTRUCTION.match(line):
            root, name, shape, op, after = match.groups()
            inside, rest = _split_at_closing(after)
            operands = () if op in ("constant", "parameter") else tuple(_NAME.findall(inside))
            rest = after if op in ("constant", "parameter") else rest
            body.append(Instruction(name, shape, op, operands, rest, bool(root)))
    return program


def _split_at_closing(text: str) -> tuple[str, str]:
    """'a, b(c)), attributes' -> ('a, b(c)', ', attributes')."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return text[: match.start()], text[match.end() :]
    return text, ""
