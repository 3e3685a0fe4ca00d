"""Distillation losses equal their formulas over full logits, computed in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_pairs import CONFIG, VOCAB, documents, in_rows, init, pack

from lm import model, objectives
from lm.errors import UserError
from lm.objectives import JSD, Distill, ForwardKL, ReverseKL
from lm.objectives.divergence import Options, divergence_sums

B, T, D, E, V = 3, 7, 8, 5, 23
DIVERGENCES = (ForwardKL(), ReverseKL(), JSD(beta=0.5), JSD(beta=0.1))
WIDER = dataclasses.replace(CONFIG, vocab=VOCAB + 3, dim=24, layers=1)


def by_hand(divergence, p, q):
    """Sum over the last axis, for probabilities p of the teacher and q of the student."""

    def kl(a, b):
        return np.sum(np.where(a > 0, a * (np.log(np.maximum(a, 1e-300)) - np.log(b)), 0), axis=-1)

    if isinstance(divergence, JSD):
        beta = divergence.beta
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return kl(p, q) if isinstance(divergence, ForwardKL) else kl(q, p)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def inputs():
    random = np.random.default_rng(0)
    x, w = random.normal(size=(B, T, D)), random.normal(size=(D, V))
    y, u = random.normal(size=(B, T, E)), random.normal(size=(E, V))
    targets, weights = random.integers(0, V, (B, T)), random.uniform(size=(B, T))
    return (x, w), (y, u), targets, weights * (np.arange(T) % 3 > 0)


def float32(x):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), x)


@jax.jit
def run(student, teacher, targets, weights):
    """{divergence and top_k: sums}, with several chunks."""
    results = {}
    for divergence in DIVERGENCES:
        for top_k in (None, 4):
            options = Options(
                divergence, temperature=1.7, cross_entropy=0.3, top_k=top_k, softcaps=(3.0, None)
            )._replace(chunk=3)
            results[f"{divergence} {top_k}"] = divergence_sums(
                options, student, teacher, targets, weights
            )
    return results


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_divergence_of_each_token(divergence, top_k):
    (x, w), (y, u), targets, weights = inputs()
    sums = run(float32((x, w)), float32((y, u)), targets, float32(weights))[f"{divergence} {top_k}"]
    z = 3 * np.tanh(x @ w / 3)
    p, q = softmax(y @ u / 1.7), softmax(z / 1.7)
    if top_k is not None:
        order = np.argsort(-p, axis=-1)
        p, q = (np.take_along_axis(a, order, axis=-1) for a in (p, q))
        p, q = (np.concatenate([a[..., :4], a[..., 4:].sum(-1, keepdims=True)], -1) for a in (p, q))
    want = by_hand(divergence, p, q)
    nll = -np.log(np.take_along_axis(softmax(z), targets[..., None], axis=-1)[..., 0])
    # float32 sums of 23 terms of order one.
    np.testing.assert_allclose(sums.divergence_bt, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sums.nll_bt, nll, rtol=0, atol=1e-5)
    assert sums.loss == pytest.approx(np.sum(weights * (want + 0.3 * nll)), rel=1e-5)


def test_gradients_equal_those_of_automatic_differentiation():
    student, teacher, targets, weights = inputs()
    options = Options(JSD(beta=0.3), temperature=0.8, cross_entropy=0.2, top_k=5, chunk=3)

    def chunked(student):
        return divergence_sums(options, student, float32(teacher), targets, weights).loss

    def plain(student):
        q, p = (jax.nn.log_softmax((x @ w) / 0.8) for x, w in (student, float32(teacher)))
        order = jnp.argsort(-p, axis=-1)
        q, p = (jnp.take_along_axis(a, order, axis=-1) for a in (q, p))
        rest = (jnp.log(jnp.exp(a[..., 5:]).sum(-1, keepdims=True)) for a in (p, q))
        p, q = (jnp.concatenate([a[..., :5], r], -1) for a, r in zip((p, q), rest))
        hot = jax.nn.one_hot(targets, V)
        nll = -jnp.sum(hot * jax.nn.log_softmax(student[0] @ student[1]), axis=-1)
        return jnp.sum(weights * (options.divergence.term(p, q).sum(-1) + 0.2 * nll))

    scaled = (lambda s: 2.5 * chunked(s), lambda s: 2.5 * plain(s))
    got, want = (jax.jit(jax.grad(function))(float32(student)) for function in scaled)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@functools.cache
def batch():
    return pack(in_rows(documents(12), 4), 40)


@functools.cache
def weights():
    """Of the student and of the teacher."""
    return init(0), init(1, WIDER)


def losses(objective, data, student=None, frozen=None):
    teacher = frozen or model.Model(WIDER, weights()[1])
    apply = model.Model(CONFIG, student or weights()[0])
    return objective.loss(apply, data, None, {"teacher": teacher})


def test_a_teacher_with_another_width_and_padded_vocabulary():
    """The teacher's logits beyond the student's vocabulary do not enter."""
    objective = Distill(teacher="runs/big", cross_entropy=0.5, chunk=16)

    @jax.jit
    def both(student, data):
        loss = losses(objective, data, student)
        logits = []
        for apply in (model.Model(CONFIG, student), model.Model(WIDER, weights()[1])):
            output = apply(data.tokens, segments_bt=data.segments, positions_bt=data.positions)
            logits.append(apply.logits(output.hidden_btd)[..., :VOCAB])
        teacher = model.Model(WIDER, weights()[1])
        examples = objective.examples(
            model.Model(CONFIG, student), data, None, {"teacher": teacher}
        )
        return loss, examples.sum(), logits

    loss, summed, logits = both(weights()[0], batch())
    z, teacher = (np.asarray(x, np.float64) for x in logits)
    divergence = by_hand(ForwardKL(), softmax(teacher), softmax(z))
    nll = -np.log(np.take_along_axis(softmax(z), batch().targets[..., None], axis=-1)[..., 0])
    counted = batch().weights
    assert loss.weight == counted.sum()
    assert loss.metrics["divergence"] == pytest.approx(np.sum(counted * divergence), rel=1e-5)
    assert loss.metrics["nll"] == pytest.approx(np.sum(counted * nll), rel=1e-5)
    assert loss.total == pytest.approx(np.sum(counted * (divergence + 0.5 * nll)), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), loss, summed)


def test_a_student_equal_to_its_teacher_has_no_loss():
    """And no gradient. A divergence is least there."""
    objective = Distill(teacher="runs/big", divergence=JSD(beta=0.5), temperature=2.0)
    frozen = model.Model(CONFIG, weights()[0])

    @jax.jit
    def gradient(student):
        return jax.value_and_grad(lambda s: losses(objective, batch(), s, frozen).total)(student)

    total, grads = gradient(weights()[0])
    assert abs(total) < 1e-4  # a sum over 40 tokens
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-4


def test_compiled_gradient_does_not_materialize_all_logits():
    def compiled(chunk):
        options = Options(ForwardKL(), chunk=chunk)
        total = lambda s, *rest: divergence_sums(options, s, *rest).loss  # noqa: E731
        shapes = ((3, 32, 8), (8, 61)), ((3, 32, 5), (5, 61)), (3, 32), (3, 32)
        arrays = jax.tree.map(
            lambda shape: jnp.zeros(
                shape, jnp.int32 if len(shape) == 2 and shape[0] == 3 else None
            ),
            shapes,
            is_leaf=lambda x: isinstance(x[0], int),
        )
        return jax.jit(jax.grad(total)).lower(*arrays).compile().as_text()

    shapes = "[3,32,61]", "[96,61]", "[61,96]", "[8,3,4,61]"
    assert not any(shape in compiled(4) for shape in shapes)
    assert any(shape in compiled(32) for shape in shapes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distill(teacher="x", divergence="jsd"), r"objective\.divergence='jsd' is not"),
        (lambda: Distill(teacher="x", temperature=0), r"objective\.temperature=0"),
        (lambda: Distill(teacher="x", top_k=0), r"objective\.top_k=0"),
        (lambda: Distill(teacher="x", chunk=-1), r"objective\.chunk=-1"),
        (lambda: Distill(teacher="x", cross_entropy=-1), r"objective\.cross_entropy=-1"),
        (lambda: JSD(beta=1), r"objective\.divergence\.beta=1 .* ReverseKL"),
        (lambda: JSD(beta=0), r"objective\.divergence\.beta=0"),
    ],
)
def test_errors_name_the_field(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_models():
    assert Distill(teacher="runs/big").models() == {"teacher": "runs/big"}
    assert objectives.NextToken().models() == {}
