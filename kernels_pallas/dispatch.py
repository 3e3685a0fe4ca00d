"""Which form of a kernel runs: the one of the platform that the program is lowered for.

So a program compiled ahead of time for a TPU on a machine without one holds the TPU's kernels.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

log = logging.getLogger(__name__)

NAMES = ("tpu", "gpu", "hopper", "reference")


def on_platform(
    implementation: str | None,
    *arrays: Any,
    reference: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    hopper: Callable[..., Any] | None = None,
) -> Any:
    """Calls one form with `arrays` (pytrees): the platform's, where it has none `reference`, or
    whatever the platform the one that `implementation` names. "gpu" is CUDA; "hopper", for GPUs of
    that generation, is no platform's own and runs only where it is named.

    Raises:
      ValueError: for an unknown name, or that of a form which this kernel does not have.
    """
    forms = {"tpu": tpu, "gpu": gpu, "hopper": hopper, "reference": reference}
    if implementation is None:
        platforms = {"tpu": tpu, "cuda": gpu, "cpu": cpu}
        own = {platform: form for platform, form in platforms.items() if form is not None}
        return jax.lax.platform_dependent(*arrays, default=reference, **own)
    if forms.get(implementation) is None:
        have = ", ".join(repr(name) for name in NAMES if forms[name] is not None)
        raise ValueError(
            f"implementation={implementation!r} is not one of {have}; None takes the platform's."
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
    """Says once, in the log, which form of a kernel was chosen."""
    by_platform = f"on TPUs {tpu}, on GPUs {gpu}, else {others}"
    log.info("%s: %s", kernel, implementation or by_platform)
