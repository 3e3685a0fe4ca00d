"""A run whose model is a single vector, small enough to be killed and resumed many times.

python tiny_run.py FOLDER STEPS SAVE_EVERY SECONDS_PER_STEP
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import trees
from lm.checkpoint import Save, Store
from lm.training.guard import Stopper
from lm.training.loop import Evaluation, Outcome, Rates, loop
from lm.training.metrics import Log

OPTIMIZER = optax.adam(0.05)
RATES = Rates(
    tokens_before=lambda step: 32 * step,
    flops_per_token=6.0,
    peak_flops=1e9,
    bytes_per_token=2.0,
)


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


@dataclasses.dataclass
class Result:
    name: str
    value: float
    stderr: float | None = None
    count: int = 1


def init() -> State:
    params = {"w": jnp.ones(8)}
    return State(jnp.int32(0), params, OPTIMIZER.init(params))


@jax.jit
def _loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(params["w"] - batch))


def _update(state: State, batch: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(_loss)(state.params, batch)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    norm = trees.global_norm(grads)
    metrics = {"loss": loss, "nll": loss, "grad_norm": norm}
    metrics["skipped"] = jnp.float32(~jnp.isfinite(norm))
    return State(state.step + 1, params, opt_state), metrics


update = jax.jit(_update, donate_argnums=0)


def batches(start: int, seconds: float = 0.0) -> Iterator[jax.Array]:
    """Yields batches without end, from the 0-based step `start` on."""
    step = start
    while True:
        time.sleep(seconds)
        yield jax.random.normal(jax.random.key(step), (8,))
        step += 1


def evaluate(step: int, params: Any) -> list[Result]:
    return [Result("zeros/loss", float(_loss(params, jnp.zeros(8))))]


def run(
    folder: Path,
    steps: int,
    save: Save,
    *,
    stopper: Stopper | None = None,
    seconds: float = 0.0,
    log: Log | None = None,
    eval_every: int = 5,
    evaluate_first: bool = False,
    feed: Any = batches,
) -> Outcome:
    """Starts or resumes training in `folder`, in the same way as a real run."""
    with Store(folder / "checkpoints", save) as store:
        start = store.latest() or 0
        state = init() if start == 0 else store.restore(jax.eval_shape(init), start)
        writers = (log or Log(every=10)).writers(
            folder, name="tiny", after=start, steps=steps, declaration={"steps": steps}
        )
        outcome = loop(
            state,
            update,
            feed(start, seconds) if seconds else feed(start),
            start=start,
            steps=steps,
            rates=RATES,
            evaluations=[Evaluation(eval_every, evaluate)],
            evaluate_first=evaluate_first,
            writers=writers,
            store=store,
            metadata={"name": "tiny"},
            stopper=stopper,
        )
        for writer in writers:
            writer.close()
    return outcome


if __name__ == "__main__":
    with Stopper() as stopper:
        outcome = run(
            Path(sys.argv[1]),
            int(sys.argv[2]),
            Save(every=int(sys.argv[3]), keep_last=2),
            stopper=stopper,
            seconds=float(sys.argv[4]),
        )
    print(f"{stopper.cause} at step {outcome.step}" if outcome.stopped else "complete")
