"""The generation engine's programs on abstract arrays: shapes and shardings of weights and pages on
the devices of a slice that nobody has."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lm import model, precision
from lm.generate import pages, programs
from lm.model import Model, Paged
from lm.parallel import sharding
from lm.planning import compiled

# Tokens. The paged attention kernel copies page by page, and with one head per device takes twice
# the time with pages of 32.
PAGE = 128

Counts = tuple[tuple[Any, int], ...]  # (reach, pages) of each reach


class Engine(NamedTuple):
    """The engine's model and the setting of its cache.

    model    with arrays of shapes and shardings only
    context  most tokens of a sequence
    dtype    of the cache
    """

    model: Model
    context: int
    dtype: str
    page: int = PAGE

    @classmethod
    def of(
        cls,
        config: model.Config,
        compute: str,
        mesh: sharding.AnyMesh,
        context: int,
        dtype: str | None = None,
        page: int = PAGE,
    ) -> "Engine":
        """With weights in the dtype `compute`. On a mesh of one device, with unstacked layers."""
        shapes = jax.eval_shape(partial(precision.cast, dtype=compute), model.shapes(config))
        if mesh.size > 1:
            where = sharding.weight_shardings(model.axes(config), shapes, mesh)
            weights = Model(config, jax.tree.map(_placed, shapes, where), mesh=mesh)
        else:
            one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
            weights = jax.eval_shape(model.unstacked, Model(config, shapes))
            weights = jax.tree.map(lambda x: _placed(x, one), weights)
        return cls(weights, context, dtype or compute, page)

    def caches(self, counts: Counts) -> Any:
        """Abstract caches with these numbers of pages, placed as `programs.empty` does."""
        mesh, rules = self.model.mesh, sharding.UNSPLIT_SEQUENCE
        ways = 1 if mesh is None else mesh.shape["tensor"]
        make = partial(model.init_pages, self.model.config, dict(counts), self.page, ways=ways)

        def placed(x: jax.ShapeDtypeStruct, rank: int) -> jax.ShapeDtypeStruct:
            if mesh is None:
                return _placed(x, self._weight.sharding)
            heads = x.ndim - rank + 1  # after the stack and the pages
            axes = ["kv_heads" if i == heads else "norm" for i in range(x.ndim)]
            return _placed(x, NamedSharding(mesh, rules.activation(axes, x.shape, mesh)))

        def of_layer(cache: Paged) -> Paged:
            scales = tuple(placed(x, 3) for x in cache.scales)
            return replace(cache, k=placed(cache.k, 4), v=placed(cache.v, 4), scales=scales)

        caches = jax.eval_shape(lambda: make(jnp.dtype(self.dtype)))
        return jax.tree.map(of_layer, caches, is_leaf=_is_paged)

    @property
    def _weight(self) -> jax.ShapeDtypeStruct:
        return jax.tree.leaves(self.model.params)[0]

    def arguments(self, rows: int, caches: Any) -> tuple[Model, Any, programs.Batch]:
        """Abstract arguments of `programs.forward`."""
        where = self._weight.sharding
        if self.model.mesh is not None:
            where = sharding.replicated(self.model.mesh)
        tables = len(model.reaches(self.model.config)), rows, -(-self.context // self.page)
        batch = (jax.ShapeDtypeStruct(x, jnp.int32, sharding=where) for x in ((rows, 4), tables))
        return self.model, caches, programs.Batch(*batch)

    def counts(self, tokens: int, rows: int) -> Counts:
        """Pages for `tokens`, as the engine allocates them, with steps of up to `rows`."""
        sizes = {"page": self.page, "context": self.context, "rows": rows}
        reaches = model.reaches(self.model.config)
        return tuple((reach, pages.needed(reach, tokens, **sizes)) for reach in reaches)

    def page_bytes(self) -> dict[Any, int]:
        """{reach: bytes per device of a page in all layers of that reach}."""
        sizes: dict[Any, int] = {}
        caches = self.caches(tuple((reach, 1) for reach in model.reaches(self.model.config)))
        for cache in jax.tree.leaves(caches, is_leaf=_is_paged):
            sizes[cache.reach] = sizes.get(cache.reach, 0) + compiled.nbytes(cache)
        return sizes

    def fitting(self, space: float, rows: int) -> int:
        """Most tokens whose pages take at most `space` bytes per device; 0 if not one sequence."""
        sizes = self.page_bytes()

        def fits(count: int) -> bool:
            counts = self.counts(count * self.page, rows)
            return sum(sizes[reach] * number for reach, number in counts) <= space

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * self.page if low * self.page >= self.context else 0


def _is_paged(x: Any) -> bool:
    return isinstance(x, Paged)


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
