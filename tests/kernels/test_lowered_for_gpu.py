"""Programs lowered for CUDA on a machine without a GPU: cuDNN's attention where it supports the
options, plain JAX for other options and kernels, and our Hopper kernels if selected by name."""

import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from jax.sharding import AxisType, Mesh, PartitionSpec
from kernel_helpers import jit, normal

import kernels_pallas
from kernels_pallas import dispatch, flash_attention, quantized_matmul
from kernels_pallas.attention import cudnn, op

B, T, N, K, H = 2, 1024, 4, 2, 64
BF16 = jnp.bfloat16


@pytest.fixture
def cudnn_installed(monkeypatch):
    """Makes JAX find cuDNN 9.10."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def shapes(t=T, s=T, h=H, dtype=BF16):
    return [
        jax.ShapeDtypeStruct((B, length, n, h), dtype) for length, n in ((t, N), (s, K), (s, K))
    ]


def lowered(function, *arrays):
    return jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def lowered_with_gradients(options, arrays):
    """Text of the program of output and gradients."""

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
        pytest.param({}, jnp.float16, {"mask_type": "CAUSAL"}, marks=pytest.mark.slow),
        pytest.param({"causal": False}, BF16, {"mask_type": "NO_MASK"}, marks=pytest.mark.slow),
        ({"window": 100, "scale": 0.5}, BF16, {"sliding_window_length": 100, "fmha_scale": 0.5}),
    ],
)  # fmt: skip
def test_cudnn_runs_what_it_supports(cudnn_installed, options, dtype, expected):
    text = lowered_with_gradients(options, shapes(dtype=dtype))
    assert calls(text) == CUDNN
    for config in re.findall(r'backend_config = "(.*?)"[,}]', text):
        fields = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert {name: fields[name] for name in expected} == expected


def test_cudnn_runs_keys_of_another_length(cudnn_installed):
    assert calls(lowered_with_gradients({"causal": False}, shapes(t=512))) == CUDNN


IDS = np.ones((B, T), np.int32)
UNSUPPORTED = {
    "segment_ids": {"segment_ids": IDS},
    "positions": {"positions": np.cumsum(IDS, 1) - 1},
    "prefix": {"prefix": 5},
    "sinks": {"sinks": np.ones(N, np.float32)},
    "alibi": {"alibi": np.ones(N, np.float32)},
    "sink_tokens": {"window": 9, "sink_tokens": 2},
    "softcap": {"softcap": 30.0},
    "return_lse": {"return_lse": True},
}


QUICK = ("segment_ids", "alibi", "return_lse")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in UNSUPPORTED if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_other_options_run_in_plain_jax_without_all_scores(cudnn_installed, name):
    text = lowered_with_gradients(UNSUPPORTED[name], shapes())
    assert calls(text) == [] and "dot_general" in text
    assert f"{T}x{T}" not in text


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_rejects_other_options_with_cudnn(cudnn_installed, name):
    with pytest.raises(ValueError, match=f"'gpu' does not support {name}; omit"):
        flash_attention(*shapes(), implementation="gpu", **UNSUPPORTED[name])


HOPPER = "mosaic_gpu"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"segment_ids": IDS, "softcap": 30.0, "window": 100}])
def test_hopper_kernels_run_only_if_selected_by_name(cudnn_installed, options):
    assert HOPPER not in lowered_with_gradients(options, shapes())
    text = lowered_with_gradients(options | {"implementation": "hopper"}, shapes())
    assert len(re.findall(rf"custom_call @{HOPPER}\w*", text)) == 3  # forward, queries, keys
    assert calls(text) == []


def test_hopper_kernels_need_a_hopper_gpu(cudnn_installed, monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(cudnn.jax, "devices", lambda: [Ampere()])
    with pytest.raises(ValueError, match=r"GPUs of compute capability 8.0 \(only 9.0, Hopper\)"):
        flash_attention(*shapes(), implementation="hopper")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (shapes(dtype=jnp.float32), r"support float32 \(only bfloat16 and float16\)"),
        (shapes(h=20), r"head width 20 \(only multiples of 8 up to 128\)"),
        (shapes(h=192), r"head width 192 \(only multiples of 8 up to 128\)"),
        ([*shapes()[:2], shapes(h=32)[2]], "values of another head width"),
        ([*shapes()[:2], shapes(dtype=jnp.float32)[2]], "different dtypes of queries"),
    ],
)
def test_arrays_that_cudnn_does_not_support_run_in_plain_jax(cudnn_installed, arrays, words):
    assert calls(lowered(flash_attention, *arrays)) == []
    with pytest.raises(ValueError, match=words):
        flash_attention(*arrays, implementation="gpu")


def test_cudnn_supports_wider_heads_on_hopper(cudnn_installed, monkeypatch):
    class Hopper:
        compute_capability = "9.0"

    monkeypatch.setattr(cudnn.jax, "devices", lambda: [Hopper()])
    options = op.Options(True, None, 0, None, 1.0)
    extras = op.Extras(*[None] * len(op.Extras._fields))
    assert cudnn.unsupported(*shapes(h=256), extras, options, False) is None
    assert "up to 256" in cudnn.unsupported(*shapes(h=264), extras, options, False)


def test_without_cudnn_attention_runs_in_plain_jax():
    assert calls(lowered_with_gradients({}, shapes())) == []
    with pytest.raises(ValueError, match="does not support machines without cuDNN .*jax.cuda12"):
        flash_attention(*shapes(), implementation="gpu")


@pytest.mark.parametrize("options", [{"window": 5, "scale": 0.3}, {"causal": False}])
def test_arguments_of_the_cudnn_call_mean_the_same(cudnn_installed, monkeypatch, options):
    """jax.nn's XLA implementation takes the same arguments and must give the same results."""
    q, k, v, toward = (normal(i, B, 24, n, 8) for i, n in enumerate((N, K, K, N)))
    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, **o: attend(*a, **{**o, "implementation": "xla"}),
    )
    defaults = {"causal": True, "window": None, "scale": 8**-0.5}
    cudnn_options = op.Options(sink_tokens=0, softcap=None, **(defaults | options))

    @jit
    def both(q, k, v, toward):
        forms = (
            lambda *a: cudnn.attention(*a, options=cudnn_options),
            lambda *a: flash_attention(*a, implementation="reference", **options),
        )
        pairs = [jax.vjp(form, q, k, v) for form in forms]
        return [(out, *pull(toward)) for out, pull in pairs]

    # Scores are below 10. Sums over keys, queries and head width.
    sums = 24, 24, 8, 8, 8 * 10**2
    for got, want in zip(*both(q, k, v, toward), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance.of_chain(want, *sums))


@pytest.mark.slow
def test_cudnn_does_not_change_the_program_for_cpu(cudnn_installed):
    """On a machine with cuDNN, the program for CPU takes no more memory, also under scan and
    checkpoint."""
    shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes()]

    def loss(implementation, q, k, v):
        def layer(q, _):
            return flash_attention(q, k, v, implementation=implementation), None

        q, _ = jax.lax.scan(jax.checkpoint(layer), q, None, length=2)
        return jnp.sum(q.astype(jnp.float32) ** 2)

    def temporaries(implementation):
        step = jit(jax.grad(lambda *a: loss(implementation, *a), (0, 1, 2)))
        return step.lower(*shape).compile().memory_analysis().temp_size_in_bytes

    # "reference" is the same implementation with larger blocks.
    assert temporaries(None) < 1.1 * temporaries("reference")


@pytest.mark.slow
def test_inside_shard_map(cudnn_installed):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("x")
    mapped = jax.shard_map(flash_attention, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)

    def loss(*arrays):
        return jnp.sum(mapped(*arrays).astype(jnp.float32) ** 2)

    assert calls(lowered(jax.grad(loss, (0, 1, 2)), *shapes())) == CUDNN


def test_the_implementation_is_logged_once(cudnn_installed, caplog):
    dispatch.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            jax.eval_shape(flash_attention, *shapes())
            jax.eval_shape(lambda *a: flash_attention(*a, alibi=jnp.ones(N)), *shapes())
            for name in ("grouped_int8", "paged", "int8", "int4"):
                function, arrays = OTHERS[name]
                jax.eval_shape(function, *arrays)
    kernel, plain, blocks = "on TPUs the Mosaic kernel, ", "plain JAX", "plain JAX in blocks"
    no_alibi = "(unsupported: alibi)"
    assert [record.message for record in caplog.records] == [
        f"flash_attention: {kernel}on GPUs cuDNN, else {blocks}",
        f"flash_attention: on TPUs {blocks} {no_alibi}, on GPUs {blocks} {no_alibi}, else {blocks}",
        f"grouped_matmul: {kernel}on GPUs ragged_dot, else plain JAX in tiles",
        f"paged_attention: {kernel}on GPUs {plain}, else {plain}",
        f"int8_matmul: {kernel}on GPUs {plain}, else {plain}",
        f"packed_matmul: {kernel}on GPUs {plain}, else {plain}",
    ]


def _gradients(function, count):
    """A function that returns outputs and gradients with respect to the first `count` arguments."""

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
def test_other_kernels_run_in_plain_jax(name):
    function, arrays = OTHERS[name]
    text = lowered(function, *arrays)
    assert "tpu_custom_call" not in text and "__cudnn" not in text
    assert "dot" in text
