"""`Model`: config, weights, mesh and precision as one value.

Generation, evaluation and objectives take it, so that a policy, a reference, a reward and a draft
model are values of one type. It is a pytree: pass it through jax.jit, and differentiate through its
weights.
"""

import contextlib
import dataclasses
from typing import Any

import jax

from lm import trees
from lm.model.config import Config
from lm.model.layers import ForwardOptions
from lm.model.transformer import Output, Transformer, init_cache, module
from lm.parallel import sharding
from lm.precision import Precision


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that can be applied.

        model = Model(config, params)
        logits_btv = model.logits(model(tokens_bt).hidden_btd)

    Args:
      config: the declaration of the architecture.
      params: nested dict of weights, as `lm.model.init` returns it.
      mesh: the mesh that the weights are sharded over; None for one device.
      precision: formats of weights and arithmetic; None: compute in the dtype of the weights.
      options: remat, offload and pipeline of the forward pass.
    """

    config: Config
    params: Any
    mesh: jax.sharding.Mesh | None = None
    precision: Precision | None = None
    options: ForwardOptions = ForwardOptions()

    def __call__(self, tokens_bt: jax.Array, **inputs: Any) -> Output:
        """A forward pass; `inputs` as for `Transformer`. On a mesh, call it inside `on_mesh`."""
        return self.module()(tokens_bt, options=self.options, **inputs)

    def logits(self, hidden_btd: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 of hidden states [B, T, D]."""
        return self.module().logits(hidden_btd)

    def unembedding(self) -> jax.Array:
        """The output matrix w_dv."""
        return self.module().unembedding()

    def values(self, hidden_btd: jax.Array) -> jax.Array:
        """Values [B, T] in float32 of hidden states; needs config.head="scalar"."""
        return self.module().values(hidden_btd)

    def module(self) -> Transformer:
        """The Flax module, in the dtype of arithmetic."""
        params = self.params if self.precision is None else self.precision.to_compute(self.params)
        return module(self.config, params)

    def cast(self) -> "Model":
        """The model with its weights converted to the dtype of arithmetic once."""
        if self.precision is None:
            return self
        return self.replace(params=self.precision.to_compute(self.params), precision=None)

    def on_mesh(self, rules: sharding.Rules | None = None) -> contextlib.AbstractContextManager:
        """`with model.on_mesh():` applies sharding constraints of the model's mesh; does nothing on
        one device."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return sharding.use(self.mesh, rules)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Any:
        """Empty key/value caches for `batch` rows of at most `length` tokens."""
        if dtype is None:
            dtype = jax.tree.leaves(self.params, is_leaf=trees.is_leaf)[0].dtype
        return init_cache(self.config, batch, length, dtype)

    def replace(self, **fields: Any) -> "Model":
        """A copy with these fields changed."""
        return dataclasses.replace(self, **fields)


jax.tree_util.register_dataclass(Model, ["params"], ["config", "mesh", "precision", "options"])


def unstacked(model: Model) -> Model:
    """The same model with its layers one after another instead of in a scan, and a copy of its
    weights. A scan copies the weights of each layer before it uses them, which takes about half of
    the time of decoding on a CPU. Models with an adapter or quantized weights, and those on a mesh,
    stay as they are."""
    config = model.config
    layout = config.layout
    if model.mesh is not None or config.adapter is not None or config.quant is not None:
        return model
    blocks = layout.blocks
    plain = dataclasses.replace(config, prefix=blocks, pattern=blocks[:1], attention=None, ffn=None)
    kept = {name: x for name, x in model.params.items() if name not in layout.parts}

    def part(name: str) -> list[Any]:
        weights = model.params.get(name, {})
        return [weights[i] for i in sorted(weights, key=int)]

    def layer(block: Any, repeat: int) -> Any:
        return jax.tree.map(lambda x: x[repeat], block)

    repeated = [layer(x, repeat) for repeat in range(layout.repeats) for x in part("blocks")]
    layers = [*part("prefix"), *repeated, *part("suffix")]
    numbered = {str(i): layer for i, layer in enumerate(layers)}
    return model.replace(config=plain, params={**kept, "prefix": numbered})
