"""Prints, as JSON, what the engine generates on each mesh; runs with eight virtual devices.

python engine_on_meshes.py dense|experts MESH...
"""

import dataclasses
import json
import sys

import jax
import numpy as np
from small_models import VOCAB, config, parameters

from lm import model
from lm.generate import Sampling
from lm.generate.engine import Engine
from lm.generate.request import Request
from lm.parallel import sharding
from lm.parallel.mesh import Mesh

CONFIGS = {
    "dense": config(dim=64, attention=model.GQA(heads=8, kv_heads=2, head_dim=8, window=9)),
    "experts": config(ffn=model.MoE(hidden=16, experts=4, experts_per_token=2)),
}


def requests() -> list[Request]:
    """Greedy and sampled ones."""
    random = np.random.default_rng(0)
    return [
        Request(
            prompt=random.integers(0, VOCAB, 1 + 5 * i).tolist(),
            max_tokens=9,
            sampling=Sampling(temperature=0.8 * (i % 2)),
            seed=i,
        )
        for i in range(6)
    ]


def on(of: model.Model, axes: dict[str, int]) -> model.Model:
    """The model on a mesh; {}: on one device."""
    if not axes:
        return of
    mesh = Mesh(**axes).build()
    shapes, names = model.shapes(of.config), model.axes(of.config)
    where = sharding.weight_shardings(names, shapes, mesh)
    return dataclasses.replace(of, params=jax.device_put(of.params, where), mesh=mesh)


def main() -> None:
    name, *meshes = sys.argv[1:]
    plain = model.Model(CONFIGS[name], parameters(CONFIGS[name]))
    results = {}
    for mesh in meshes:
        axes = {key: int(value) for key, _, value in (x.partition("=") for x in mesh.split())}
        # Few pages, so that some are shared and some taken away.
        engine = Engine(on(plain, axes), context=48, page=8, rows=(16,), cache_tokens=96)
        outputs = engine.generate(requests()) + engine.generate(requests()[::-1])
        results[mesh] = [(each.tokens, each.logprobs, each.cached) for each in outputs]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
