"""An experiment file that defines its own loss, FFN block, data source, optimizer and evaluator."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lm import data, evals, experiment, main, model, objectives, optim


@dataclass(frozen=True, kw_only=True)
class Counting(data.Source):
    count: int = 40

    def read(self):
        return (" ".join(str(n * n) for n in range(i, i + 9 + i % 7)) for i in range(self.count))


@dataclass(frozen=True, kw_only=True)
class Focal(objectives.Objective):
    gamma: float = 1.0

    def loss(self, apply, batch, key, frozen):
        out = apply(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
        logp_btv = jax.nn.log_softmax(apply.logits(out.hidden_btd))
        logp_bt = jnp.take_along_axis(logp_btv, batch.targets[..., None], axis=-1)[..., 0]
        loss_bt = -((1 - jnp.exp(logp_bt)) ** self.gamma) * logp_bt
        return objectives.Loss(jnp.sum(loss_bt * batch.weights), jnp.sum(batch.weights))


class Sine(nnx.Module):
    def __init__(self, dim, hidden, rngs, init):
        self.up = model.param(rngs, (dim, hidden), ("embed", "mlp"), init.reads(dim, hidden))
        self.down = model.param(rngs, (hidden, dim), ("mlp", "embed"), init.writes(hidden, dim))

    def __call__(self, x_btd, mask_bt=None):
        h_btf = jnp.sin(model.einsum("btd,df->btf", x_btd, self.up))
        return model.einsum("btf,fd->btd", h_btf, self.down)


@dataclass(frozen=True, kw_only=True)
class SineFFN(model.FeedForwardConfig):
    hidden: int

    def build(self, dim, rngs, init):
        return Sine(dim, self.hidden, rngs, init)


@dataclass(frozen=True, kw_only=True)
class Adan(optim.Optimizer):
    def direction(self, axes):
        return optax.scale_by_adan()


@dataclass(frozen=True, kw_only=True)
class OutputNorm(evals.Evaluator):
    pause: float = 0.0  # seconds

    def evaluate(self, model, context):
        time.sleep(self.pause)
        norm = float(jnp.linalg.norm(model.unembedding()))
        return [evals.Result(step=context.step, name="norm", value=norm, stderr=None, count=1)]


def declare():
    """Focal loss on squares."""
    attention, ffn = model.GQA(heads=2, kv_heads=1, head_dim=8), SineFFN(hidden=32)
    config = model.Config(vocab=280, dim=16, layers=2, attention=attention, ffn=ffn)
    text = {"data": Counting(), "tokenizer": data.SentencePiece(vocab=280)}
    own = {"objective": Focal(), "optimizer": Adan(), "evals": (OutputNorm(every=2),), **text}
    batch, steps = data.BatchShape(sequences=4, length=32), optim.Constant(peak=1e-2, steps=16)
    return experiment.Experiment(name="stranger", model=config, batch=batch, schedule=steps, **own)


if __name__ == "__main__":
    main.main(declare)
