"""The engine gives the tokens of plain decoding, and the same ones, bit for bit, whatever else it
computes at the time."""

import dataclasses

import jax
import numpy as np
import pytest
import tolerance
from small_models import VOCAB, config, parameters

from lm import model, precision
from lm.errors import UserError
from lm.generate import Sampling, decode, programs
from lm.generate.engine import Engine
from lm.generate.request import Request
from lm.parallel import hardware

CONTEXT, TOKENS = 64, 12
# Of log-probabilities: programs of another shape add in another order.
ATOL = tolerance.of_chain(1.0, *[48 * 4.0**2] * 4)
GREEDY = Sampling(temperature=0)
MIXED = (
    GREEDY,
    Sampling(temperature=0.8),
    Sampling(temperature=1.0, top_k=9, top_p=0.8),
    Sampling(temperature=0.7, min_p=0.05, repetition_penalty=1.3),
)
LOCAL = model.GQA(heads=4, kv_heads=2, head_dim=8, window=7)
# Everything that attention and feed-forward layers can be.
FAMILIES = {
    "window": config(attention=LOCAL),
    "alternating": config(
        layers=3,
        attention=None,
        pattern=(
            model.Block(attention=dataclasses.replace(LOCAL, sinks=model.FirstTokens(count=3))),
            model.Block(attention=dataclasses.replace(LOCAL, window=None, softcap=5.0)),
        ),
        logit_softcap=20.0,
    ),
    "sinks": config(attention=dataclasses.replace(LOCAL, sinks=model.LearnedSinks())),
    "alibi": config(attention=dataclasses.replace(LOCAL, position=model.ALiBi(), window=None)),
    "prefix": config(adapter=model.Prefix(tokens=3)),
    "lora": config(adapter=model.LoRA(rank=2)),
    "experts": config(
        ffn=model.MoE(hidden=16, experts=4, experts_per_token=2), tied=True, placement="sandwich"
    ),
}


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """64 requests of many kinds. The first ten begin alike."""
    random = np.random.default_rng(0)
    beginning = random.integers(0, VOCAB, 19).tolist()
    return [
        Request(
            prompt=(beginning if i < 10 else [])
            + random.integers(0, VOCAB, 1 + 7 * i % 30).tolist(),
            max_tokens=3 + i % TOKENS,
            sampling=MIXED[i % len(MIXED)],
            seed=2**31 + i,
            logprobs=3 if i % 5 == 0 else 0,
        )
        for i in range(64)
    ]


def engine(of: model.Model, **options) -> Engine:
    return Engine(of, **{"context": CONTEXT, "page": 8, "rows": (1, 16), **options})


def bits(outputs):
    """Everything that must not depend on the circumstances."""
    return [(each.tokens, each.logprobs, each.top, each.finished) for each in outputs]


def check_same(of: Engine, got, want):
    """Bit for bit where the engine says so, which depends on the processor; else up to rounding."""
    if of.exact:
        assert got == want
        return
    for (tokens, logprobs, _, finished), wanted in zip(got, want, strict=True):
        assert (tokens, finished) == (wanted[0], wanted[3])
        np.testing.assert_allclose(logprobs, wanted[1], rtol=0, atol=ATOL)


@pytest.fixture(scope="module")
def alone(small, requests):
    """What each request gives alone, in an engine that nobody has used."""
    one = engine(small, prefix_caching=False)
    return bits([one.generate([request])[0] for request in requests])


def test_equals_plain_decoding(small, requests, alone):
    for i, request in enumerate(requests[:12]):
        (want,) = decode.generate(
            small,
            [request.prompt],
            context=CONTEXT,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            key=request.seed,
        )
        tokens, logprobs, _, finished = alone[i]
        assert (tokens, finished) == (want.tokens, want.finished)
        np.testing.assert_allclose(logprobs, want.logprobs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("together", [7, 64])
def test_tokens_do_not_depend_on_the_batch(small, requests, alone, together):
    shared = engine(small)
    outputs = []
    for i in range(0, len(requests), together):
        outputs += shared.generate(requests[i : i + together])
    check_same(shared, bits(outputs), alone)
    assert sum(output.cached for output in outputs) > 0


@pytest.mark.parametrize("chunk", [1, 7])
def test_tokens_do_not_depend_on_how_prompts_are_cut(small, requests, alone, chunk):
    cut = engine(small, chunk=chunk)
    check_same(cut, bits(cut.generate(requests[:20])), alone[:20])


def test_tokens_do_not_depend_on_preemption(small, requests, alone):
    """Pages for one sequence of full length, and up to 16 at once."""
    few = engine(small, cache_tokens=CONTEXT, prefix_caching=False)
    check_same(few, bits(few.generate(requests)), alone)
    assert few.scheduler.preempted >= 10


def test_arrivals_in_between(small, requests, alone):
    """A request is added after every second step; some are cancelled."""
    busy, jobs, random = engine(small), [], np.random.default_rng(1)
    for step in range(10_000):
        if step % 2 == 0 and len(jobs) < len(requests):
            jobs.append(busy.add(requests[len(jobs)]))
        if random.random() < 0.2:
            busy.cancel(jobs[-1 - random.integers(min(len(jobs), 4))])
        busy.step()
        if busy.idle and len(jobs) == len(requests):
            break
    results = bits(job.result for job in jobs)
    ended = [i for i, each in enumerate(results) if each[3] == "ended"]
    assert 3 < len(ended) < 40
    for i, (tokens, *_) in enumerate(results):
        assert tokens == alone[i][0][: len(tokens)]
        assert i in ended or len(tokens) == len(alone[i][0])
    assert all(pool.used == 0 for pool in busy.scheduler.pools.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families(family, requests):
    """Together, with cached prefixes and preemption, as plain decoding. Layers with a window give
    pages back."""
    made = model.Model(FAMILIES[family], parameters(FAMILIES[family]))
    few = engine(made, rows=(16,), cache_tokens=3 * CONTEXT)
    outputs = few.generate(requests[:12])
    wanted = decode.generate(
        made,
        [r.prompt for r in requests[:12:4]],
        context=CONTEXT,
        max_tokens=TOKENS,
        sampling=GREEDY,
    )
    for request, output, want in zip(requests[:12:4], outputs[::4], wanted, strict=True):
        assert output.tokens == want.tokens[: request.max_tokens]
        logprobs = want.logprobs[: request.max_tokens]
        np.testing.assert_allclose(output.logprobs, logprobs, rtol=0, atol=ATOL)
    again = few.generate(requests[:12])
    check_same(few, bits(again), bits(outputs))
    assert sum(each.cached for each in again) > sum(each.cached for each in outputs)
    for pool in few.scheduler.pools.values():
        assert pool.used == 0 and pool.available == pool.count


def test_layers_with_a_window_need_few_pages():
    made = model.Model(FAMILIES["alternating"], parameters(FAMILIES["alternating"]))
    few = engine(made, rows=(16,), cache_tokens=CONTEXT)
    job = few.add(Request(prompt=[1] * 16, max_tokens=48, sampling=GREEDY))
    most = dict.fromkeys(few.scheduler.pools, 0)
    while not few.idle:
        few.step()
        for reach, pool in few.scheduler.pools.items():
            most[reach] = max(most[reach], pool.used)
    assert job.result.finished == "max_tokens"
    # A page of sinks, a window of 7 tokens in up to two pages, the next token's page.
    assert most[7, 3] <= 4 and most[None] == 8


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_formats_of_pages(small, dtype, most):
    """Keys of 8 bits change log-probabilities by less than a few hundredths."""
    request = Request(prompt=list(range(40)), prompt_logprobs=True, max_tokens=1)
    exact, rounded = (
        engine(small, rows=(16,), cache_dtype=each).generate([request])[0].prompt_logprobs[1:]
        for each in ("float32", dtype)
    )
    difference = np.abs(np.subtract(exact, rounded))
    assert 0 < difference.max() < most


def test_float16(small):
    """Log-probabilities in float16 are those in float32 up to its 11 bits."""
    if not hardware.compiles("float16"):
        pytest.skip("XLA does not compile float16 for this processor")
    request = Request(prompt=list(range(40)), prompt_logprobs=True, max_tokens=4)
    half = small.replace(params=precision.cast(small.params, "float16"))
    exact, rounded = (
        engine(each, rows=(16,)).generate([request])[0].prompt_logprobs[1:]
        for each in (small, half)
    )
    difference = np.abs(np.subtract(exact, rounded))
    assert 0 < difference.max() < 0.02


def test_log_probabilities_are_those_of_the_forward_pass(small):
    prompt = np.random.default_rng(2).integers(0, VOCAB, 30).tolist()
    request = Request(prompt=prompt, max_tokens=20, logprobs=5, prompt_logprobs=True)
    (output,) = engine(small).generate([request])
    tokens = np.array([prompt + output.tokens])
    logits = small.logits(small(tokens).hidden_btd)
    want = np.asarray(jax.nn.log_softmax(logits, axis=-1))[0]
    every = want[np.arange(49), tokens[0, 1:]]
    assert output.prompt_logprobs[0] is None
    got = output.prompt_logprobs[1:] + output.logprobs
    np.testing.assert_allclose(got, every, rtol=0, atol=ATOL)
    assert output.prompt_top[0] is None
    for row, best in zip(want[:-1], output.prompt_top[1:] + output.top, strict=True):
        assert [token for token, _ in best] == np.argsort(-row)[:5].tolist()


def test_completions_of_one_prompt_share_its_pages(small):
    """The prompt is computed once, also when all are added at the same time."""
    prompt = np.random.default_rng(4).integers(0, VOCAB, 41).tolist()
    requests = [
        Request(prompt=prompt, max_tokens=4, sampling=Sampling(), index=i) for i in range(8)
    ]
    one = engine(small)
    outputs = one.generate(requests)
    assert one.computed == 41 + 7 * (41 % 8) + 8 * 3
    apart = engine(small, prefix_caching=False)
    assert bits(outputs) == bits(apart.generate(requests)) or not one.exact


def test_penalties_and_biases(small):
    prompt = [1, 2, 3]

    def run(**options):
        request = Request(prompt=prompt, max_tokens=30, sampling=GREEDY, **options)
        return engine(small).generate([request])[0].tokens

    plain = run()
    assert len(set(plain)) < 30  # some token comes twice
    assert run(presence_penalty=1e4) == run(frequency_penalty=1e4)
    assert len(set(run(presence_penalty=1e4))) == 30
    first = plain[0]
    assert run(logit_bias={first: -np.inf})[0] != first
    assert run(logit_bias={7: 1e4}) == [7] * 30
    others = [i for i in range(VOCAB) if i != first]
    chosen = run(first_tokens=others)
    assert chosen[0] != first


def test_stop_tokens(small, requests, alone):
    tokens = alone[3][0]
    request = dataclasses.replace(requests[3], stop_tokens=[tokens[2]])
    (output,) = engine(small).generate([request])
    end = tokens.index(tokens[2]) + 1
    assert (output.tokens, output.finished) == (tokens[:end], "stop")


@pytest.mark.parametrize("exact", [True, False])
def test_an_engine_knows_whether_it_is_exact(small, requests, exact):
    """Of two sizes that add in different orders it drops one, or says that it is not exact."""
    sizes = engine(small, rows=(1, 2, 16), exact=exact)
    assert sizes.exact or not exact or sizes.rows == (16,)
    assert exact or sizes.rows == (1, 2, 16)


def test_a_full_context_ends(small):
    request = Request(prompt=[1] * 60, max_tokens=50)
    (output,) = engine(small).generate([request])
    assert (len(output.tokens), output.finished) == (4, "context")


def test_programs_compile_once(small, requests):
    """No request compiles a program after the warm-up."""
    one = engine(small)
    one.warm_up()
    before = programs.forward._cache_size(), programs.draw._cache_size()
    one.generate(requests)
    options = {"frequency_penalty": 0.5, "logit_bias": {3: 1.0}, "prompt_logprobs": True}
    one.generate([dataclasses.replace(each, **options) for each in requests[:20]])
    assert (programs.forward._cache_size(), programs.draw._cache_size()) == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Request(prompt=[1], max_tokens=0), "max_tokens=0"),
        (lambda: Request(prompt=[1], logprobs=21), "logprobs=21"),
        (lambda: Request(prompt=[1], presence_penalty=float("nan")), "presence_penalty=nan"),
        (lambda: Request(prompt=[1], frequency_penalty="a"), "frequency_penalty='a'"),
        (lambda: Request(prompt=[1], logit_bias={3: float("nan")}), r"logit_bias\[3\]=nan"),
        (lambda: Request(prompt=[1], logprobs=1.5), "logprobs=1.5"),
        (lambda: Request(prompt=[1], sampling=3), "sampling=3 must be a Sampling"),
        (lambda: Request(prompt="text"), "prompt must hold token ids"),
        (lambda: Request(prompt=[1], stop_tokens=["a"]), "stop_tokens must hold token ids"),
        (lambda: Request(prompt=[1], index=-1), "index=-1"),
        (lambda: Request(prompt=[]), "prompt 0 is empty"),
        (lambda: Request(prompt=[1] * 64), "leaves no room in context=64"),
        (lambda: Request(prompt=[VOCAB]), "vocabulary ends at 63"),
        (lambda: Request(prompt=[1], logit_bias={99: 1.0}), "logit_bias has token 99"),
    ],
)
def test_bad_requests_are_refused(small, make, words):
    with pytest.raises(UserError, match=words):
        engine(small).add(make())


def test_a_bad_request_leaves_none_of_the_others_behind(small):
    one = engine(small)
    with pytest.raises(UserError, match="vocabulary ends at 63"):
        one.generate([Request(prompt=[1]), Request(prompt=[VOCAB])])
    assert one.idle


def test_bad_options_are_refused(small):
    with pytest.raises(UserError, match="cache_tokens=10 is less than context=64"):
        engine(small, cache_tokens=10)
    with pytest.raises(UserError, match="page=0"):
        engine(small, page=0)
    with pytest.raises(UserError, match="cache_dtype='int4' is not known"):
        engine(small, cache_dtype="int4")
