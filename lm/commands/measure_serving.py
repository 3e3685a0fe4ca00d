"""Measures the generation engine: throughput and latency of requests that arrive at random times,
and the speed of greedy decoding beside `lm.generate.decode`."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import generate, model, runs, terminal
from lm.commands import measure
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel import sharding
from lm.parallel.mesh import Mesh
from lm.program import use_compilation_cache

CONTEXT = 256  # most tokens of a prompt and its continuation
SHORTEST = 8  # fewest tokens of a prompt, and of a continuation
AT_ONCE = (1, 7, 64)
ROUNDS = 3  # of the engine and plain decoding, by turns
GREEDY = generate.Sampling(temperature=0)


class Arrival(NamedTuple):
    """A request: seconds after the start of the measurement, the prompt, and how many tokens to
    generate."""

    seconds: float
    prompt: list[int]
    max_tokens: int


class Served(NamedTuple):
    """A continuation, and when each of its tokens came, in seconds after the request arrived."""

    tokens: list[int]
    seconds: list[float]


def workload(
    vocab: int, *, requests: int, rate: float, seed: int, context: int = CONTEXT
) -> list[Arrival]:
    """Random requests with Poisson arrivals, `rate` a second on average; the first comes at once.

    The lengths of prompts and continuations have uniformly distributed logarithms, from 8 (or fewer
    in a short context) to half of the context.
    """
    random = np.random.default_rng(seed)
    longest = context // 2
    shortest = min(SHORTEST, longest)
    gaps = random.exponential(1 / rate, requests)
    seconds = np.cumsum(gaps) - gaps[0]
    lengths = np.exp(random.uniform(math.log(shortest), math.log(longest), (requests, 2)))
    return [
        Arrival(float(at), random.integers(0, vocab, prompt).tolist(), int(output))
        for at, (prompt, output) in zip(seconds, np.rint(lengths).astype(int), strict=True)
    ]


def serve(engine: generate.Engine, arrivals: Sequence[Arrival]) -> list[Served]:
    """Answers requests greedily as they arrive, in real time. Raises UserError for logits that are
    not finite."""
    answers = [Served([], []) for _ in arrivals]
    numbers: dict[Any, int] = {}
    arrived, start = 0, time.perf_counter()
    while arrived < len(arrivals) or not engine.idle:
        now = time.perf_counter() - start
        while arrived < len(arrivals) and arrivals[arrived].seconds <= now:
            numbers[engine.add(_request(arrivals[arrived]))] = arrived
            arrived += 1
        if engine.idle:
            time.sleep(max(0.0, arrivals[arrived].seconds - now))
            continue
        changed = engine.step()
        now = time.perf_counter() - start
        for job in changed:
            if job.result.finished == "error":
                raise UserError("The model's logits are not finite; there is nothing to measure.")
            tokens, seconds = answers[numbers[job]]
            new = job.result.tokens[len(tokens) :]
            tokens.extend(new)
            seconds.extend([now - arrivals[numbers[job]].seconds] * len(new))
    return answers


def _request(arrival: Arrival) -> generate.Request:
    return generate.Request(prompt=arrival.prompt, max_tokens=arrival.max_tokens, sampling=GREEDY)


def latencies(arrivals: Sequence[Arrival], answers: Sequence[Served]) -> dict[str, Any]:
    """Tokens per second from the first arrival to the last token; the median and the 99th
    percentile over requests of the seconds to the first token, and of those per later token."""
    ends = [each.seconds + answer.seconds[-1] for each, answer in zip(arrivals, answers)]
    seconds, tokens = max(ends), sum(len(answer.tokens) for answer in answers)
    first = [answer.seconds[0] for answer in answers]
    each = [
        (answer.seconds[-1] - answer.seconds[0]) / (len(answer.tokens) - 1)
        for answer in answers
        if len(answer.tokens) > 1
    ]
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "seconds_to_first_token": _percentiles(first),
        "seconds_per_token": _percentiles(each),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 99)}


def serving(
    target: str | Experiment,
    *,
    mesh: Mesh | None = None,
    requests: int = 64,
    rate: float = 16.0,
    seed: int = 0,
    exact: bool | None = None,
) -> dict[str, Any]:
    """Measures the engine on a run folder, a Hugging Face folder, or an experiment with random
    weights.

    `tokens_per_second` counts generated tokens. With `at_once`, that many requests of the same
    lengths arrive together; `same_tokens` says whether the continuations of a prompt were equal
    each time.
    """
    name, apply, length = _model(target, mesh)
    context = min(CONTEXT, length)
    if context < 4:
        raise UserError(f"{name} has a sequence length of {length}; bench serve needs 4 at least.")
    start = time.perf_counter()
    # Random prompts begin alike only where a measurement repeats one.
    engine = generate.Engine(apply, context=context, prefix_caching=False, exact=exact)
    ready = time.perf_counter() - start
    arrivals = workload(
        apply.config.vocab, requests=requests, rate=rate, seed=seed, context=context
    )
    serve(engine, [arrivals[0]._replace(max_tokens=1)])
    to_first = measure.seconds_since_start()
    answers = serve(engine, arrivals)
    together, same = _together(engine, seed)
    return {
        "model": name,
        "device": jax.devices()[0].device_kind,
        "devices": 1 if apply.mesh is None else apply.mesh.size,
        "rows": engine.rows,
        "exact": engine.exact,
        "start_to_first_token_seconds": to_first,
        "engine_start_seconds": ready,
        "requests": requests,
        "requests_per_second": rate,
        "prompt_tokens": sum(len(each.prompt) for each in arrivals),
        "generated_tokens": sum(len(answer.tokens) for answer in answers),
        **latencies(arrivals, answers),
        "at_once_tokens_per_second": together,
        "same_tokens": same,
        "alone": _alone(engine, apply, seed),
        "peak_memory_bytes": measure.peak_memory(),
    }


def _model(target: str | Experiment, mesh: Mesh | None) -> tuple[str, model.Model, int]:
    """(name, model, sequence length of training)."""
    if not isinstance(target, Experiment):
        run = runs.load(target, mesh=mesh)
        return str(target), run.apply.cast(), run.experiment.batch.length
    use_compilation_cache()
    config, built = target.model, mesh.build() if mesh else None
    shardings = None
    if built is not None:
        axes, shapes = model.axes(config), model.shapes(config)
        shardings = sharding.weight_shardings(axes, shapes, built)
    init = jax.jit(model.init, static_argnums=0, out_shardings=shardings)
    params = init(config, jax.random.key(target.seed))
    apply = model.Model(config, params, built, target.precision).cast()
    return target.name, apply, target.batch.length


def _same_lengths(engine: generate.Engine, count: int, seed: int) -> list[Arrival]:
    """Requests that arrive together, with a quarter of the context each to read and to generate."""
    random = np.random.default_rng([seed, 1])
    size = (count, engine.context // 4)
    prompts = random.integers(0, engine.model.config.vocab, size).tolist()
    return [Arrival(0.0, prompt, size[1]) for prompt in prompts]


def _together(engine: generate.Engine, seed: int) -> tuple[dict[str, float], bool]:
    """(tokens per second by the number of requests at once, whether the tokens were the same)."""
    arrivals = _same_lengths(engine, max(AT_ONCE), seed)
    rates, tokens = {}, {}
    for count in AT_ONCE:
        answers = serve(engine, arrivals[:count])
        rates[str(count)] = latencies(arrivals[:count], answers)["tokens_per_second"]
        tokens[count] = [answer.tokens for answer in answers]
    return rates, all(tokens[max(AT_ONCE)][:count] == tokens[count] for count in AT_ONCE)


def _alone(engine: generate.Engine, apply: model.Model, seed: int) -> dict[str, Any]:
    """Tokens per second of one request at a time, by turns with plain decoding: medians."""
    rates: dict[str, list[float]] = {"engine": [], "plain": []}
    same = True
    for round_ in range(ROUNDS + 1):  # the first compiles, and is not counted
        (arrival,) = _same_lengths(engine, 1, seed + round_)
        seconds, tokens = {}, {}
        start = time.perf_counter()
        (answer,) = serve(engine, [arrival])
        seconds["engine"], tokens["engine"] = time.perf_counter() - start, answer.tokens
        start = time.perf_counter()
        (plain,) = generate.decode.generate(
            apply,
            [arrival.prompt],
            context=engine.context,
            max_tokens=arrival.max_tokens,
            sampling=GREEDY,
        )
        seconds["plain"], tokens["plain"] = time.perf_counter() - start, plain.tokens
        same &= tokens["engine"] == tokens["plain"]
        for name in rates if round_ else ():
            rates[name].append(arrival.max_tokens / seconds[name])
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "engine_tokens_per_second": medians["engine"],
        "plain_tokens_per_second": medians["plain"],
        "engine_over_plain": medians["engine"] / medians["plain"],
        "same_tokens": same,
    }


def serving_text(measured: dict[str, Any]) -> str:
    """The measurements of `serving` as a table."""
    m, alone = measured, measured["alone"]

    def milliseconds(percentiles: dict[str, float] | None) -> str:
        if percentiles is None:
            return "-"
        return " / ".join(f"{1000 * value:,.0f} ms" for value in percentiles.values())

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    rows = [
        ("start to first token", terminal.duration(m["start_to_first_token_seconds"])),
        ("of it, the engine", terminal.duration(m["engine_start_seconds"])),
        (
            f"{m['requests']} requests, {m['requests_per_second']:g} a second",
            f"{m['prompt_tokens']:,} + {m['generated_tokens']:,} tokens",
        ),
        ("tokens per second", f"{m['tokens_per_second']:,.1f}"),
        ("to the first token, p50 / p99", milliseconds(m["seconds_to_first_token"])),
        ("per later token, p50 / p99", milliseconds(m["seconds_per_token"])),
        *(
            (f"tokens per second, {count} at once", f"{rate:,.1f}")
            for count, rate in m["at_once_tokens_per_second"].items()
        ),
        ("the same tokens each time", yes(m["same_tokens"])),
        ("plain decoding, 1 at once", f"{alone['plain_tokens_per_second']:,.1f}"),
        ("the engine by turns with it", f"{alone['engine_tokens_per_second']:,.1f}"),
        ("engine over plain", f"{alone['engine_over_plain']:.2f}"),
        ("the same tokens as plain", yes(alone["same_tokens"])),
        ("peak memory", terminal.size(m["peak_memory_bytes"])),
    ]
    return terminal.table((f"{m['model']} on {m['devices']} x {m['device']}", ""), rows)
