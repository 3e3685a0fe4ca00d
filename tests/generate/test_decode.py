"""Decoding with a KV cache, in batches and in chunks, matches the plain forward pass."""

import json
import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices
from small_models import VOCAB, config, parameters

from lm import model
from lm.errors import UserError
from lm.generate import Result, Sampling, generate, stream

GREEDY = Sampling(temperature=0)
STEPS = 12
CONTEXT = 32


def attention(**options) -> dict:
    return {"attention": model.GQA(heads=4, kv_heads=2, head_dim=8, **options)}


LOCAL_AND_GLOBAL = (
    model.Block(attention=model.GQA(heads=4, kv_heads=1, head_dim=8, window=4)),
    model.Block(attention=model.GQA(heads=4, kv_heads=4, head_dim=8)),
)
VARIANTS = {
    "gqa": {},
    "alibi": attention(position=model.ALiBi()),
    "no position": attention(position=model.NoPosition()),
    "window": attention(window=4),
    "first tokens": attention(window=4, sinks=model.FirstTokens(count=2)),
    "learned sinks": attention(sinks=model.LearnedSinks(), bias=True),
    "soft caps, tied": {**attention(softcap=5.0), "logit_softcap": 5.0, "tied": True},
    "qk norm": attention(qk_norm=model.QKNorm(norm=model.RMSNormConfig())),
    "local and global": {"attention": None, "pattern": LOCAL_AND_GLOBAL, "layers": 3},
    "experts": {"ffn": model.MoE(experts=4, experts_per_token=2, hidden=16)},
}


@partial(jax.jit, static_argnums=0)
def forward_logprobs(config, params, tokens_bt):
    hidden_btd = model.Model(config, params)(tokens_bt).hidden_btd
    return jax.nn.log_softmax(model.Model(config, params).logits(hidden_btd))


def plain_logprobs(config, params, texts: list[list[int]]) -> np.ndarray:
    """Log-probabilities without a cache, [B, CONTEXT, V]. Padding is on the right, where it does
    not affect a causal model."""
    padded = [text + [0] * (CONTEXT - len(text)) for text in texts]
    return np.asarray(forward_logprobs(config, params, jnp.array(padded)))


def uncached(config, params, prompts, steps: int) -> list[tuple[list[int], list[float]]]:
    """Greedy continuations by the plain forward pass over the whole sequence, and their
    logprobs."""
    texts, chosen = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    for _ in range(steps):
        logprobs_btv = plain_logprobs(config, params, texts)
        for i, text in enumerate(texts):
            last_v = logprobs_btv[i, len(text) - 1]
            chosen[i].append(float(last_v.max()))
            text.append(int(last_v.argmax()))
    return [(t[len(p) :], c) for t, p, c in zip(texts, prompts, chosen, strict=True)]


FAST = ("gqa", "local and global", "experts")  # the others are marked slow


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, changes in VARIANTS.items()
    ],
)
def test_greedy_decoding_matches_the_argmax_of_the_plain_forward_pass(changes, prompts):
    variant = config(**changes)
    params = parameters(variant)
    results = generate(
        model.Model(variant, params), prompts, context=CONTEXT, max_tokens=STEPS, sampling=GREEDY
    )
    for result, (tokens, logprobs) in zip(
        results, uncached(variant, params, prompts, STEPS), strict=True
    ):
        assert result.tokens == tokens
        # float32 sums in a different order: a few relative rounding errors of 1e-7 on logits of
        # about 10.
        np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)
        assert result.finished == "max_tokens"


SAMPLED = Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.001, repetition_penalty=1.2)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_row_does_not_depend_on_the_rest_of_the_batch(small, prompts, sampling):
    options = {"context": CONTEXT, "max_tokens": STEPS, "sampling": sampling}
    keys = jax.random.split(jax.random.key(5), len(prompts))
    together = generate(small, prompts, key=keys, **options)
    for i, prompt in enumerate(prompts):
        (alone,) = generate(small, [prompt], key=keys[i : i + 1], **options)
        assert alone.tokens == together[i].tokens
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=1e-4)
    backwards = generate(small, prompts[::-1], key=keys[::-1], **options)
    assert [r.tokens for r in backwards[::-1]] == [r.tokens for r in together]


def test_seed_gives_each_row_its_own_random_stream(small, prompts):
    options = {"context": CONTEXT, "max_tokens": STEPS, "sampling": Sampling(temperature=2.0)}
    same = [prompts[1]] * 3
    rows = [tuple(r.tokens) for r in generate(small, same, key=7, **options)]
    assert len(set(rows)) == 3
    assert rows == [tuple(r.tokens) for r in generate(small, same, key=7, **options)]
    assert rows != [tuple(r.tokens) for r in generate(small, same, key=8, **options)]


def test_logprobs_are_those_of_the_model_before_filtering(small, prompts):
    results = generate(small, prompts, context=CONTEXT, max_tokens=STEPS, sampling=SAMPLED)
    texts = [prompt + result.tokens for prompt, result in zip(prompts, results, strict=True)]
    logprobs_btv = plain_logprobs(small.config, small.params, texts)
    for prompt, text, result, logprobs_tv in zip(
        prompts, texts, results, logprobs_btv, strict=True
    ):
        at = np.arange(len(prompt), len(text))
        np.testing.assert_allclose(
            result.logprobs, logprobs_tv[at - 1, text[len(prompt) :]], atol=1e-4
        )


def test_stop_tokens_end_only_their_row(small, prompts):
    options = {"context": CONTEXT, "max_tokens": STEPS, "sampling": GREEDY}
    free = generate(small, prompts, **options)
    stop = free[1].tokens[4]
    stopped = generate(small, prompts, stop_tokens=[stop, VOCAB - 1], **options)
    for before, after in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(before.tokens) if token in (stop, VOCAB - 1)]
        length = ends[0] + 1 if ends else STEPS
        assert after.tokens == before.tokens[:length]
        assert after.finished == ("stop" if ends else "max_tokens")


def test_row_ends_when_the_context_is_full(small, prompts):
    context = 16
    results = generate(small, prompts, context=context, max_tokens=STEPS, sampling=GREEDY)
    free = generate(small, prompts, context=CONTEXT, max_tokens=STEPS, sampling=GREEDY)
    for prompt, result, whole in zip(prompts, results, free, strict=True):
        room = min(STEPS, context - len(prompt))
        assert result.tokens == whole.tokens[:room]
        assert result.finished == ("context" if room < STEPS else "max_tokens")


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_chunk_size_does_not_change_the_results(small, prompts, chunk):
    options = {"context": CONTEXT, "max_tokens": STEPS, "sampling": SAMPLED, "key": 2}
    whole = generate(small, prompts, **options)
    parts = list(stream(small, prompts, chunk=chunk, **options))
    assert parts[-1] == whole
    for i, part in enumerate(parts[:-1]):
        assert [r.tokens for r in part] == [r.tokens[: chunk * (i + 1)] for r in whole]
        assert all(r.finished is None for r in part)


def test_caller_can_end_rows(small, prompts):
    options = {"context": CONTEXT, "max_tokens": STEPS, "sampling": GREEDY}
    whole = generate(small, prompts, **options)
    ended: set[int] = set()
    results: list[Result] = []
    for results in stream(small, prompts, chunk=4, ended=ended, **options):  # noqa: B007
        ended.add(0)
    assert results[0] == Result(whole[0].tokens[:4], whole[0].logprobs[:4], "ended")
    assert results[1:] == whole[1:]
    for results in stream(small, prompts, chunk=4, ended=ended, **options):  # noqa: B007
        ended.update(range(3))
    assert [(len(r.tokens), r.finished) for r in results] == [(4, "ended")] * 3


def test_repeated_calls_share_compiled_programs(small, monkeypatch):
    traces = 0
    forward = model.Model.__call__

    def counting(*arguments, **options):
        nonlocal traces
        traces += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(model.Model, "__call__", counting)
    # A size that no other test uses, so that no compiled program can be reused.
    fresh = config(dim=24)
    params = parameters(fresh)
    for length in range(1, 16):
        for max_tokens, sampling in (
            (3, Sampling(temperature=0.1 * length, top_k=length)),
            (length, Sampling(temperature=3, top_k=2)),
        ):
            prompts = [[1] * length] * (3 + length % 2)
            generate(
                model.Model(fresh, params),
                prompts,
                context=64,
                max_tokens=max_tokens,
                sampling=sampling,
                stop_tokens=[60 - length],
                key=length,
            )
    # The forward pass is traced for the prefill and in the decode loop, for caches of 16 and of 32
    # slots. (JAX may trace a loop body twice to find the types of its carry.)
    assert traces <= 2 * 3


def test_invalid_prompts_raise_errors(small):
    options = {"context": 8, "max_tokens": 2}
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(small, [[1], []], **options)
    with pytest.raises(
        UserError, match=r"prompt 0 has 9 tokens.*context=8.*give a context above 9"
    ):
        generate(small, [[1] * 9], **options)
    with pytest.raises(UserError, match=f"prompt 0 has token {VOCAB}"):
        generate(small, [[VOCAB]], **options)
    with pytest.raises(UserError, match="max_tokens=0"):
        generate(small, [[1]], context=8, max_tokens=0)
    assert generate(small, [], **options) == []


def test_bfloat16_cache_gives_nearly_the_same_logprobs(small, prompts):
    options = {"context": CONTEXT, "max_tokens": STEPS, "sampling": GREEDY}
    exact = generate(small, prompts, **options)
    rounded = generate(small, prompts, cache_dtype="bfloat16", **options)
    # Keys and values keep 8 significant bits: for equal tokens, an early logprob changes by a few
    # hundredths.
    first = [
        (a.logprobs[1], b.logprobs[1])
        for a, b in zip(exact, rounded)
        if a.tokens[:2] == b.tokens[:2]
    ]
    assert first
    np.testing.assert_allclose(*zip(*first), atol=0.1)


MESH_SCRIPT = """
    import jax, json, sys
    from lm import model
    from lm.parallel import sharding
    from lm.generate import Sampling, decode, generate, stream
    from lm.parallel.mesh import Mesh
    from small_models import config, parameters

    prompts, steps, context = json.loads(sys.argv[1])
    small = config()
    params = parameters(small)
    options = dict(context=context, max_tokens=steps, sampling=Sampling(temperature=0))
    out = {"single": [r.tokens for r in generate(model.Model(small, params), prompts, **options)]}
    for text in ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"):
        mesh = Mesh.parse(text).build()
        shardings = sharding.weight_shardings(model.axes(small), model.shapes(small), mesh)
        placed = jax.device_put(params, shardings)
        parts = list(stream(model.Model(small, placed, mesh), prompts, chunk=3, **options))
        out[text] = [r.tokens for r in parts[-1]]
    out["programs"] = decode._resume._cache_size()
    print(json.dumps(out))
"""


@pytest.mark.slow
def test_generation_on_a_mesh_gives_the_same_tokens(prompts):
    script = textwrap.dedent(MESH_SCRIPT)
    flags = virtual_devices.flags(8)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([prompts, STEPS, CONTEXT])],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.path.dirname(__file__),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["data=8"] == out["fsdp=8"] == out["data=2,fsdp=2,tensor=2"] == out["single"]
    # One compiled program per mesh: the cache is returned with the sharding that it was passed in.
    assert out["programs"] == 3
