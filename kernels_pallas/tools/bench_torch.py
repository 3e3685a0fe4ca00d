"""Times PyTorch's flash attention. `kernels_pallas.tools.bench` runs it in a separate process:

    python -m kernels_pallas.tools.bench_torch 4 4096 32 8 128 gradients

Arguments: rows, length, query heads, key/value heads, head width, and `forward` or `gradients`.
Prints the seconds per call.
"""

import math
import sys
import time


def seconds(sizes: list[int], backward: bool, device: str, repeats: int = 10) -> float:
    """Seconds per causal call: the best of three runs of `repeats`, after one warm-up call, as in
    `bench.timed`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attend

    b, t, n, k, h = sizes
    torch.manual_seed(0)
    # In memory [B, T, heads, H] as for our kernels, transposed as a view for PyTorch.
    q, k, v = (
        torch.randn(b, t, heads, h, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (n, k, k)
    )
    q, k, v = (x.requires_grad_(backward) for x in (q, k, v))

    def call():
        out = attend(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, (q, k, v), out.detach()) if backward else out

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    best = math.inf
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        call()
        synchronize()
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            synchronize()
            best = min(best, (time.perf_counter() - start) / repeats)
    return best


if __name__ == "__main__":
    *sizes, direction = sys.argv[1:]
    print(seconds([int(size) for size in sizes], direction == "gradients", "cuda"))
