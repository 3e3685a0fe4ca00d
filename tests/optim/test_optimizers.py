"""Each optimizer against its formula in numpy, properties of all optimizers, and user-defined
optimizers of an experiment file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import optim, trees
from lm.errors import UserError
from lm.optim.layout import Layout, decays, is_hidden_matrix
from lm.optim.muon import orthogonalize
from lm.parallel import sharding
from lm.parallel.mesh import Mesh

RATE = 0.01
# An embedding, an output projection, stacked query projections, stacked experts, stacked norms and
# a stacked balancing bias.
AXES = {
    "embed": ("vocab", "embed"),
    "unembed": ("embed", "vocab"),
    "blocks": {
        "q": ("layers", "embed", "heads", "head"),
        "up": ("layers", "expert", "embed", "mlp"),
        "scale": ("layers", "norm"),
        "bias": ("layers", "router"),
    },
}
SHAPES = {
    "embed": (7, 4),
    "unembed": (4, 7),
    "blocks": {"q": (2, 4, 3, 2), "up": (2, 3, 4, 5), "scale": (2, 4), "bias": (2, 3)},
}
MATRICES = ("embed", "unembed", "q", "up")

ALL = [
    optim.AdamW(weight_decay=0.1),
    optim.SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
    optim.Lion(weight_decay=0.1),
    optim.Adafactor(weight_decay=0.1, factor_above=2, parameter_scale=1e-3),
    optim.LAMB(weight_decay=0.1),
    optim.Muon(weight_decay=0.1),
]
each = pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)


def draw(seed):
    """Random parameters with the shapes above."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: random.normal(size=s).astype(np.float32),
        SHAPES,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def run(optimizer, params, gradients, axes=AXES, schedule=lambda step: RATE * (step + 1)):
    """Applies one update per gradient and returns the parameters. The learning rate is RATE times
    1, 2, 3, ..."""
    transformation = optimizer.build(schedule, axes)
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params, step=jnp.int32(step))
        params = optax.apply_updates(params, updates)
    return params


def run_numpy(params, gradients, rule, weight_decay):
    """`run` in numpy. rule(g, p, memory, t, name, decay) -> update direction of one leaf; t = 1, 2,
    3."""

    def leaf(path, p, *gs):
        name, memory, p = path[-1].key, {}, p.astype(np.float64)
        for t, g in enumerate(gs, 1):
            u = rule(g.astype(np.float64), p, memory, t, name, weight_decay * (name in MATRICES))
            p = p - RATE * t * u
        return p

    return jax.tree_util.tree_map_with_path(leaf, params, *gradients)


def adam(b1, b2, eps):
    def rule(g, p, memory, t, name, decay):
        memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g**2
        m, v = memory["m"] / (1 - b1**t), memory["v"] / (1 - b2**t)
        return m / (np.sqrt(v) + eps) + decay * p

    return rule


def sgd(g, p, memory, t, name, decay):
    memory["m"] = 0.9 * memory.get("m", 0) + g
    return g + 0.9 * memory["m"] + decay * p


def lion(g, p, memory, t, name, decay):
    m = memory.get("m", 0)
    memory["m"] = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * g) + decay * p


def inside(name):
    """The axes of a single weight within a stack of layers or experts."""
    return {"q": (1, 2, 3), "up": (2, 3), "scale": (1,), "bias": (1,)}.get(name, (0, 1))


def adafactor(g, p, memory, t, name, decay):
    keep = 1 - t**-0.8
    square = g**2 + 1e-30
    if name in MATRICES:
        rows, columns = {"q": ((1,), (2, 3)), "up": ((2,), (3,))}.get(name, ((0,), (1,)))
        memory["r"] = keep * memory.get("r", 0) + (1 - keep) * square.mean(columns, keepdims=True)
        memory["c"] = keep * memory.get("c", 0) + (1 - keep) * square.mean(rows, keepdims=True)
        v = memory["r"] * memory["c"] / memory["r"].mean(rows, keepdims=True)
    else:
        v = memory["v"] = keep * memory.get("v", 0) + (1 - keep) * square
    u = g / np.sqrt(v)
    u = u / np.maximum(1, np.sqrt(np.mean(u**2, inside(name), keepdims=True)))
    u = u * np.maximum(1e-3, np.sqrt(np.mean(p**2, inside(name), keepdims=True)))
    return u + decay * p


def lamb(g, p, memory, t, name, decay):
    u = adam(0.9, 0.999, 1e-6)(g, p, memory, t, name, decay)
    u_norm, p_norm = (np.sqrt(np.sum(x**2, inside(name), keepdims=True)) for x in (u, p))
    return u * p_norm / u_norm


def muon(g, p, memory, t, name, decay):
    if name not in ("q", "up"):
        return adam(0.9, 0.95, 1e-8)(g, p, memory, t, name, decay)
    memory["m"] = 0.95 * memory.get("m", 0) + g
    x = 0.95 * memory["m"] + g
    stack = x.reshape((2, 4, 6) if name == "q" else (6, 4, 5))
    for i, matrix in enumerate(stack):
        y = matrix / np.linalg.norm(matrix)
        for _ in range(5):
            a = y @ y.T
            y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
        stack[i] = 0.2 * np.sqrt(max(matrix.shape)) * y
    return stack.reshape(x.shape) + decay * p


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    list(zip(ALL, (adam(0.9, 0.999, 1e-8), sgd, lion, adafactor, lamb, muon), strict=True)),
    ids=lambda o: type(o).__name__,
)
def test_three_steps_match_the_formula(optimizer, rule):
    params, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
    expected = run_numpy(params, gradients, rule, 0.1)
    # float32 against float64: errors of a few units in the last place over three steps;
    # Newton-Schulz amplifies them by up to 3.4**5.
    rtol = 1e-3 if isinstance(optimizer, optim.Muon) else 2e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        run(optimizer, params, gradients),
        expected,
    )


def slice_of(tree, layer):
    return jax.tree.map(lambda x: x[layer], tree)


@each
def test_stacked_layers_update_like_separate_layers(optimizer):
    params, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
    stacked = run(optimizer, params, gradients)["blocks"]
    axes = {name: a[1:] for name, a in AXES["blocks"].items()}
    for layer in range(2):
        one, *ones = (slice_of(tree["blocks"], layer) for tree in (params, *gradients))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            slice_of(stacked, layer),
            run(optimizer, one, ones, axes),
        )


@each
def test_balancing_bias_is_not_updated(optimizer):
    params = draw(0)
    gradients = [draw(seed) for seed in (1, 2, 3)]
    for gradient in gradients:
        gradient["blocks"]["bias"] = np.zeros((2, 3), np.float32)
    after = run(optimizer, params, gradients)
    np.testing.assert_array_equal(after["blocks"]["bias"], params["blocks"]["bias"])
    assert not np.array_equal(after["blocks"]["scale"], params["blocks"]["scale"])


@each
def test_zero_gradients_decay_only_the_matrices(optimizer):
    params = draw(0)
    after = run(optimizer, params, [jax.tree.map(np.zeros_like, params)])
    np.testing.assert_array_equal(after["blocks"]["scale"], params["blocks"]["scale"])
    # LAMB scales the decay to the matrix's norm; the others apply learning rate times decay.
    share = 1 - RATE * (1 if isinstance(optimizer, optim.LAMB) else 0.1)
    np.testing.assert_allclose(after["blocks"]["q"], params["blocks"]["q"] * share, rtol=1e-5)


@each
def test_optimizer_descends_on_a_quadratic(optimizer):
    goal, params = draw(0), draw(1)

    def distance(params):
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, goal)
        return sum(jax.tree.leaves(squares))

    before = distance(params)
    transformation = optimizer.build(lambda step: 0.02, AXES)
    state = transformation.init(params)

    @jax.jit
    def advance(params, state):
        updates, state = transformation.update(
            jax.grad(distance)(params), state, params, step=jnp.int32(0)
        )
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = advance(params, state)
    assert distance(params) < 0.5 * before


def test_axes_determine_which_weights_decay_and_which_are_orthogonalized():
    matrices = [
        ("embed", "heads", "head"),
        ("layers", "heads", "head", "embed"),
        ("layers", "expert", "embed", "mlp"),
        ("mlp", "embed"),
    ]
    vectors = [
        ("norm",),
        ("layers", "norm"),
        ("layers", "heads", "head"),  # a bias of the query projection
        ("heads",),  # attention sinks
        ("layers", "router"),  # a balancing bias
        ("layers", "expert", "mlp"),  # biases of experts
        ("kv_heads", "norm"),
    ]
    for axes in matrices:
        assert decays(axes) and is_hidden_matrix(axes), axes
    for axes in vectors:
        assert not decays(axes) and not is_hidden_matrix(axes), axes
    for axes in [("vocab", "embed"), ("embed", "vocab"), ("layers", "embed", "router")]:
        assert decays(axes) and not is_hidden_matrix(axes), axes
    assert not decays(("vocab", "embed"), decay_embedding=False)
    assert decays(("embed", "vocab"), decay_embedding=False)
    assert Layout.of(("layers", "expert", "embed", "mlp")) == Layout(2, (2,), (3,))
    assert Layout.of(("heads", "head", "embed")) == Layout(0, (0, 1), (2,))


@pytest.mark.parametrize("shape", [(4, 32), (32, 4), (16, 64), (3, 2, 8, 24)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    # For singular values above 1 % of the norm, the iteration ends between 0.68 and 1.13; it does
    # not converge to one.
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values = np.linalg.svd(np.asarray(orthogonalize(x)), compute_uv=False)
    assert values.min() > 0.65 and values.max() < 1.2
    scale = np.abs(orthogonalize(1e3 * x) - orthogonalize(x)).max()
    assert scale < 1e-4, "the norm of the input must not matter"


def test_muon_and_its_adam_part_take_steps_of_the_same_size():
    random = np.random.default_rng(0)
    params = {"up": np.zeros((64, 256), np.float32), "embed": np.zeros((256, 64), np.float32)}
    axes = {"up": ("embed", "mlp"), "embed": ("vocab", "embed")}
    gradients = [
        jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
        for _ in range(20)
    ]
    after = run(optim.Muon(), params, gradients, axes, schedule=lambda step: 1.0)
    before = run(optim.Muon(), params, gradients[:-1], axes, schedule=lambda step: 1.0)
    rms = {k: float(np.sqrt(np.mean((after[k] - before[k]) ** 2))) for k in params}
    # The root mean square of Adam's step on pure noise is about sqrt((1 - b1) / (1 + b1)) = 0.23.
    assert rms["up"] == pytest.approx(0.2, rel=0.2) and rms["embed"] == pytest.approx(0.2, rel=0.3)


def test_bfloat16_first_moments_change_updates_only_slightly():
    params, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
    for kind in (optim.AdamW, optim.Lion, optim.LAMB, optim.Muon, optim.SGD):
        options = {"momentum": 0.9} if kind is optim.SGD else {}
        exact = run(kind(**options), params, gradients)
        optimizer = kind(moments="bfloat16", **options)
        state = optimizer.build(lambda step: RATE, AXES).init(params)
        assert sum(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state)) == 6
        if kind is not optim.Lion:  # its sign flips where momentum rounds across zero
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0.01),
                exact,
                run(optimizer, params, gradients),
            )


def test_adamw_compiles_to_one_fusion_per_written_array():
    """AdamW compiles to exactly one fusion per array that it writes: 10 passes over memory. A
    single fusion would take 7 (read 4, write 3)."""
    shape = (256, 128)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    transformation = optim.AdamW(weight_decay=0.1).build(lambda step: RATE, {"w": ("embed", "mlp")})

    def update(gradient, state, params):
        updates, state = transformation.update(gradient, state, params, step=jnp.int32(0))
        return state, optax.apply_updates(params, updates)

    state = jax.eval_shape(transformation.init, params)
    compiled = jax.jit(update, donate_argnums=(1, 2)).lower(params, state, params).compile()
    text = compiled.as_text()
    assert not any(f" {op}(" in text for op in ("dot", "transpose", "reduce", "while"))
    passes = compiled.cost_analysis()["bytes accessed"] / (4 * 256 * 128)
    assert passes < 10.5
    assert compiled.memory_analysis().temp_size_in_bytes < 1000, "the update is not in place"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.AdamW(b2=1.0), "optimizer.b2=1.0"),
        (lambda: optim.AdamW(weight_decay=-1), "optimizer.weight_decay=-1"),
        (lambda: optim.SGD(clip_norm=0), "optimizer.clip_norm=0"),
        (lambda: optim.SGD(nesterov=True), "optimizer.momentum"),
        (lambda: optim.Lion(moments="f16"), "optimizer.moments='f16'"),
        (lambda: optim.Muon(momentum=1.5), "optimizer.momentum=1.5"),
        (lambda: optim.Adafactor(clip_update=0), "optimizer.clip_update=0"),
    ],
)
def test_errors_for_invalid_fields_name_the_field(make, message):
    with pytest.raises(UserError, match=message):
        make()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adan(optim.Optimizer):
    """An optax transformation that this package does not provide, with three moments as its
    state."""

    b1: float = 0.98

    def direction(self, axes):
        return optax.scale_by_adan(self.b1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(optim.Optimizer):
    """Nested optax states, each without some of the parameters: momentum for matrices, Adam for the
    rest."""

    def direction(self, axes):
        labels = trees.map_with_path(lambda _, a: "matrix" if decays(a) else "vector", axes)
        return optax.multi_transform(
            {"matrix": optax.trace(0.9), "vector": optax.scale_by_adam()}, labels
        )


own = pytest.mark.parametrize(
    "optimizer", [Adan(weight_decay=0.1), Halves()], ids=lambda o: type(o).__name__
)


@own
def test_user_defined_optimizer_descends_on_a_quadratic(optimizer):
    test_optimizer_descends_on_a_quadratic(optimizer)


def test_user_defined_optimizer_matches_its_formula():
    """Decoupled weight decay and the learning rate are applied to the direction, as for built-in
    optimizers."""
    params, gradients = draw(0), [draw(1)]
    direction = optax.scale_by_adan(0.98)
    updates, _ = direction.update(gradients[0], direction.init(params), params)

    def step(path, p, u):
        decay = 0.1 * (path[-1].key in MATRICES)
        return p - RATE * (u + decay * p)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        run(Adan(weight_decay=0.1), params, gradients),
        jax.tree_util.tree_map_with_path(step, params, updates),
    )


@pytest.mark.parametrize("optimizer", [*ALL, Adan(), Halves()], ids=lambda o: type(o).__name__)
def test_optimizer_state_is_sharded_like_its_parameters(optimizer):
    """Every state leaf at a parameter's path has that parameter's sharding, except in dimensions of
    size 1."""
    sizes = {"embed": (8, 4), "unembed": (4, 8), "blocks": {**SHAPES["blocks"], "q": (2, 4, 2, 2)}}
    sizes["blocks"]["up"] = (2, 2, 4, 6)
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, "float32"), sizes, is_leaf=lambda s: isinstance(s, tuple)
    )
    mesh = Mesh(fsdp=2, expert=2, tensor=2).abstract()
    shardings = sharding.weight_shardings(AXES, params, mesh)
    transformation = optimizer.build(lambda step: RATE, AXES)
    state = jax.eval_shape(transformation.init, params)
    state_shardings = optim.state_shardings(transformation, params, shardings, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(state_shardings)
    flat_params, flat_shardings = trees.flatten(params), trees.flatten(shardings)
    sharded = 0
    for (path, leaf), leaf_sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(state_shardings), strict=True
    ):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = next((p for i in range(len(keys)) if (p := "/".join(keys[i:])) in flat_params), None)
        if name is None:
            assert leaf.shape == () and leaf_sharding.is_fully_replicated
            continue
        shards = leaf_sharding.shard_shape(leaf.shape)
        param_shards = flat_shardings[name].shard_shape(flat_params[name].shape)
        assert all(n in (m, 1) for n, m in zip(shards, param_shards, strict=True)), name
        sharded += shards != leaf.shape
    assert sharded > 0


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        optim.Optimizer()
    with pytest.raises(UserError, match="optimizer.weight_decay=-1"):
        Adan(weight_decay=-1)
