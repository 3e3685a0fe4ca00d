"""Selects the implementation of a kernel by the platform that the program is lowered for.

A program compiled ahead of time for TPU on a machine without one therefore contains TPU kernels.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

log = logging.getLogger(__name__)

NAMES = ("tpu", "gpu", "hopper", "reference")

_only: contextvars.ContextVar[str | None] = contextvars.ContextVar("only", default=None)


@contextlib.contextmanager
def only(platform: str | None) -> Iterator[None]:
    """Context in which programs are traced for one platform, "tpu", "cuda" or "cpu", and must not
    be lowered for another. It saves tracing the implementations of the others, half of the time or
    more. On CPUs the numbers stay the same bit for bit; for TPUs, activation checkpointing may
    compute attention twice. None: traces for all platforms."""
    token = _only.set(platform)
    try:
        yield
    finally:
        _only.reset(token)


def on_platform(
    implementation: str | None,
    *arrays: Any,
    reference: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    hopper: Callable[..., Any] | None = None,
) -> Any:
    """Calls one implementation with `arrays` (pytrees).

    Args:
      implementation: "tpu", "gpu" (CUDA), "hopper" or "reference" selects one on any platform. None
        selects the platform's, or `reference` where the platform has none; never `hopper`.
      arrays: arguments of the implementation.
      reference, tpu, gpu, cpu, hopper: the implementations that this kernel has.

    Raises:
      ValueError: the name is unknown, or this kernel has no such implementation.
    """
    forms = {"tpu": tpu, "gpu": gpu, "hopper": hopper, "reference": reference}
    if implementation is None:
        platforms = {"tpu": tpu, "cuda": gpu, "cpu": cpu}
        available = {platform: form for platform, form in platforms.items() if form is not None}
        if platform := _only.get():
            return available.get(platform, reference)(*arrays)
        return jax.lax.platform_dependent(*arrays, default=reference, **available)
    if forms.get(implementation) is None:
        names = ", ".join(repr(name) for name in NAMES if forms[name] is not None)
        raise ValueError(
            f"implementation={implementation!r} is not one of {names}; None selects the platform's."
        )
    return forms[implementation](*arrays)


@functools.cache
def announce(
    kernel: str,
    implementation: str | None,
    tpu: str = "the Mosaic kernel",
    gpu: str = "plain JAX",
    others: str = "plain JAX",
) -> None:
    """Logs once which implementation of a kernel was selected."""
    by_platform = f"on TPUs {tpu}, on GPUs {gpu}, else {others}"
    log.info("%s: %s", kernel, implementation or by_platform)
