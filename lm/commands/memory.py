"""Says in a sentence that a device ran out of memory."""

import re

# On CPUs and GPUs: "Out of memory allocating 123 bytes", "... trying to allocate 1.2GiB".
_REQUEST = re.compile(r"(?:allocat\w*|request for) ([\d.]+ ?(?:bytes|[KMGT]i?B?))\b")
# By the TPU compiler: "Used 21.31G of 15.75G hbm."
_USED = re.compile(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) (\w+)")


def sentence(error: BaseException) -> str | None:
    """What was needed and what is available; None if `error` is not JAX's RESOURCE_EXHAUSTED."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    if used := _USED.search(message):
        return f"out of memory: the program needs {used[1]} of {used[2]} {used[3]}."
    request = _REQUEST.search(message)
    needed = f": an array needs {_bytes(request[1])}" if request else ""
    available = _available()
    return f"out of memory{needed}{f', {available}' if available else ''}."


def _bytes(words: str) -> str:
    from lm import terminal

    number, _, unit = words.partition(" ")
    return terminal.size(float(number)) if unit == "bytes" else words


def _available() -> str | None:
    """'8.4 GB of memory are free' on a CPU, 'the device has 16 GB' elsewhere, if known."""
    import jax
    import psutil

    from lm import terminal

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return f"{terminal.size(psutil.virtual_memory().available)} of memory are free"
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f"the device has {terminal.size(limit)}" if limit else None
