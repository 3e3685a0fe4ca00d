"""What a GPU gets, read from programs lowered for CUDA on a machine without one: cuDNN's attention
where its options suffice, plain JAX for the rest and for every other kernel; and our own kernels
where they are asked for by name."""

import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import kernels_pallas
from kernels_pallas import dispatch, flash_attention, quantized_matmul
from kernels_pallas.attention import cudnn, op

B, T, N, K, H = 2, 1024, 4, 2, 64
BF16 = jnp.bfloat16


@pytest.fixture
def found(monkeypatch):
    """A machine on which JAX finds cuDNN 9.10: JAX asks this one function."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def shapes(t=T, s=T, h=H, dtype=BF16):
    return [
        jax.ShapeDtypeStruct((B, length, n, h), dtype) for length, n in ((t, N), (s, K), (s, K))
    ]


def lowered(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def both_ways(options, arrays):
    """The program of output and gradients."""

    def run(*arrays):
        out, pull = jax.vjp(lambda *a: flash_attention(*a, **options), *arrays)
        return out, pull(out)

    return lowered(run, *arrays)


def calls(text):
    return re.findall(r"custom_call @(__cudnn\$\w+)", text)


CUDNN = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, BF16, {"mask_type": "CAUSAL", "fmha_scale": H**-0.5}),
        ({}, jnp.float16, {"mask_type": "CAUSAL"}),
        ({"causal": False}, BF16, {"mask_type": "NO_MASK"}),
        ({"window": 100, "scale": 0.5}, BF16, {"sliding_window_length": 100, "fmha_scale": 0.5}),
    ],
)  # fmt: skip
def test_cudnn_gets_what_it_can(found, options, dtype, expected):
    text = both_ways(options, shapes(dtype=dtype))
    assert calls(text) == CUDNN
    for config in re.findall(r'backend_config = "(.*?)"[,}]', text):
        said = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert {name: said[name] for name in expected} == expected


def test_keys_of_another_length_go_to_cudnn(found):
    assert calls(both_ways({"causal": False}, shapes(t=512))) == CUDNN


IDS = np.ones((B, T), np.int32)
LACKING = {
    "segment_ids": {"segment_ids": IDS},
    "positions": {"positions": np.cumsum(IDS, 1) - 1},
    "prefix": {"prefix": 5},
    "sinks": {"sinks": np.ones(N, np.float32)},
    "alibi": {"alibi": np.ones(N, np.float32)},
    "sink_tokens": {"window": 9, "sink_tokens": 2},
    "softcap": {"softcap": 30.0},
    "return_lse": {"return_lse": True},
}


@pytest.mark.parametrize("name", LACKING)
def test_what_cudnn_lacks_is_plain_and_without_the_square(found, name):
    text = both_ways(LACKING[name], shapes())
    assert calls(text) == [] and "dot_general" in text
    assert f"{T}x{T}" not in text
    with pytest.raises(ValueError, match=f"implementation='gpu' has no {name}; leave"):
        flash_attention(*shapes(), implementation="gpu", **LACKING[name])


OURS = "mosaic_gpu"


@pytest.mark.parametrize("options", [{}, {"segment_ids": IDS, "softcap": 30.0, "window": 100}])
def test_our_kernels_are_taken_by_name_alone(found, options):
    assert OURS not in both_ways(options, shapes())
    text = both_ways(options | {"implementation": "hopper"}, shapes())
    assert len(re.findall(rf"custom_call @{OURS}\w*", text)) == 3  # forward, queries, keys
    assert calls(text) == []


def test_our_kernels_are_for_hopper(found, monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(cudnn.jax, "devices", lambda: [Ampere()])
    with pytest.raises(ValueError, match=r"no GPUs of compute capability 8.0 \(9.0, Hopper's\)"):
        flash_attention(*shapes(), implementation="hopper")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (shapes(dtype=jnp.float32), r"no float32 \(bfloat16 and float16\)"),
        (shapes(h=20), r"no heads of 20 \(multiples of 8 up to 128\)"),
        (shapes(h=192), r"no heads of 192 \(multiples of 8 up to 128\)"),
        ([*shapes()[:2], shapes(h=32)[2]], "no values of another width"),
        ([*shapes()[:2], shapes(dtype=jnp.float32)[2]], "in several dtypes"),
    ],
)
def test_arrays_that_cudnn_refuses_are_plain(found, arrays, words):
    assert calls(lowered(flash_attention, *arrays)) == []
    with pytest.raises(ValueError, match=words):
        flash_attention(*arrays, implementation="gpu")


def test_hopper_takes_wider_heads(found, monkeypatch):
    class Hopper:
        compute_capability = "9.0"

    monkeypatch.setattr(cudnn.jax, "devices", lambda: [Hopper()])
    options = op.Options(True, None, 0, None, 1.0)
    extras = op.Extras(*[None] * len(op.Extras._fields))
    assert cudnn.lacks(*shapes(h=256), extras, options, False) is None
    assert "up to 256" in cudnn.lacks(*shapes(h=264), extras, options, False)


def test_without_cudnn_it_is_plain():
    assert calls(both_ways({}, shapes())) == []
    with pytest.raises(ValueError, match="has no cuDNN on this machine .*jax.cuda12"):
        flash_attention(*shapes(), implementation="gpu")


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5, "scale": 0.3}])
def test_what_is_asked_of_cudnn_means_the_same(found, monkeypatch, options):
    """jax.nn's form for XLA takes the same arguments: it must give what ours gives."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, toward = (jax.random.normal(r, (B, 24, n, 8)) for r, n in zip(keys, (N, K, K, N)))
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **o: asked(*a, **{**o, "implementation": "xla"})
    )
    with_defaults = {"causal": True, "window": None, "scale": 8**-0.5} | options
    chosen = op.Options(sink_tokens=0, softcap=None, **with_defaults)

    @jax.jit
    def both(q, k, v, toward):
        forms = (
            lambda *a: cudnn.attention(*a, options=chosen),
            lambda *a: flash_attention(*a, implementation="reference", **options),
        )
        pairs = [jax.vjp(form, q, k, v) for form in forms]
        return [(out, *pull(toward)) for out, pull in pairs]

    for got, want in zip(*both(q, k, v, toward), strict=True):
        # float32 sums of 24 numbers of size 1, in another order
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_with_cudnn_the_cpu_keeps_its_own_form(found):
    """On a machine with both, what is lowered for the CPU gives the same and takes no more memory,
    also under scan and checkpoint."""
    shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes()]

    def loss(implementation, q, k, v):
        def layer(q, _):
            return flash_attention(q, k, v, implementation=implementation), None

        q, _ = jax.lax.scan(jax.checkpoint(layer), q, None, length=2)
        return jnp.sum(q.astype(jnp.float32) ** 2)

    def temporaries(implementation):
        step = jax.jit(jax.grad(lambda *a: loss(implementation, *a), (0, 1, 2)))
        return step.lower(*shape).compile().memory_analysis().temp_size_in_bytes

    # "reference" is the same form in larger blocks.
    assert temporaries(None) < 1.1 * temporaries("reference")


def test_inside_shard_map(found):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("x")
    mapped = jax.shard_map(flash_attention, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)

    def loss(*arrays):
        return jnp.sum(mapped(*arrays).astype(jnp.float32) ** 2)

    assert calls(lowered(jax.grad(loss, (0, 1, 2)), *shapes())) == CUDNN


def test_the_choice_is_logged_once(found, caplog):
    dispatch.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            jax.eval_shape(flash_attention, *shapes())
            jax.eval_shape(lambda *a: flash_attention(*a, alibi=jnp.ones(N)), *shapes())
            for name in ("grouped_int8", "paged", "int8", "int4"):
                function, arrays = OTHERS[name]
                jax.eval_shape(function, *arrays)
    kernel, plain, blocks = "on TPUs the Mosaic kernel, ", "plain JAX", "plain JAX in blocks"
    assert [record.message for record in caplog.records] == [
        f"flash_attention: {kernel}on GPUs cuDNN, else {blocks}",
        f"flash_attention: on TPUs {blocks} (no alibi), on GPUs {blocks} (no alibi), else {blocks}",
        f"grouped_matmul: {kernel}on GPUs ragged_dot, else plain JAX in tiles",
        f"paged_attention: {kernel}on GPUs {plain}, else {plain}",
        f"int8_matmul: {kernel}on GPUs {plain}, else {plain}",
        f"packed_matmul: {kernel}on GPUs {plain}, else {plain}",
    ]


def _gradients(function, count):
    """Output and gradients by the first `count` arguments."""

    def run(*arrays):
        out, pull = jax.vjp(lambda *a: function(*a, *arrays[count:]), *arrays[:count])
        return out, pull(out)

    return run


def array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def packed(bits):
    return jax.eval_shape(lambda w: quantized_matmul.pack(w, bits=bits), array(256, 128))


PAGES = array(16, K, 128, H)
INT32 = jnp.int32
OTHERS = {
    "grouped": (
        _gradients(kernels_pallas.grouped_matmul, 2),
        (array(64, 128), array(4, 128, 32), array(4, dtype=INT32)),
    ),
    "grouped_int8": (
        _gradients(lambda x, w, g, s: kernels_pallas.grouped_matmul(x, w, g, scales_ef=s), 1),
        (array(64, 128), array(4, 128, 32, dtype=jnp.int8), array(4, dtype=INT32), array(4, 32)),
    ),
    "paged": (
        kernels_pallas.paged_attention,
        (array(2, 1, N, H), PAGES, PAGES, array(2, 8, dtype=INT32), array(2, dtype=INT32)),
    ),
    "cross_entropy": (
        lambda *a: jax.grad(lambda *a: kernels_pallas.cross_entropy(*a)[0], (0, 1))(*a),
        (array(2, 64, 32), array(32, 512), array(2, 64, dtype=INT32), array(2, 64)),
    ),
    "int8": (
        _gradients(quantized_matmul.int8_matmul, 1),
        (array(16, 256), array(256, 128, dtype=jnp.int8), array(128, dtype=jnp.float32)),
    ),
    "int4": (_gradients(quantized_matmul.packed_matmul, 1), (array(16, 256), packed(4))),
    "int3": (_gradients(quantized_matmul.packed_matmul, 1), (array(16, 256), packed(3))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_are_plain(name):
    function, arrays = OTHERS[name]
    text = lowered(function, *arrays)
    assert "tpu_custom_call" not in text and "__cudnn" not in text
    assert "dot" in text
