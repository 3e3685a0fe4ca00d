"""XLA_FLAGS of the processes that tests start."""

import os


def flags(count: int, *more: str) -> str:
    """For `count` virtual CPU devices, beside the flags of this process."""
    ours = os.environ.get("XLA_FLAGS", "")
    return " ".join([ours, f"--xla_force_host_platform_device_count={count}", *more]).strip()
