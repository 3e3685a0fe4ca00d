"""Perplexity over packed, padded and sharded batches matches a float64 reference computed from each
document alone."""

import json
import math
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices

from lm import model
from lm.data.batch import Batch
from lm.errors import UserError
from lm.evals import Perplexity, perplexity
from lm.evals.result import ratio

HERE = os.path.dirname(__file__)
VOCAB, LENGTH = 48, 16
CONFIG = model.Config(
    vocab=VOCAB,
    dim=16,
    layers=2,
    attention=model.GQA(heads=2, kv_heads=2, head_dim=8),
    ffn=model.SwiGLU(hidden=32),
    logit_softcap=20.0,
    embed_std=1.0,
)
# Document lengths including begin and end tokens. No document is longer than a sequence, so each
# has its full context in any packing.
LENGTHS = (5, 9, 3, 12, 2, 17, 7, 4, 11, 6)


def documents(lengths=LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(4)
    return [random.integers(0, VOCAB, n) for n in lengths]


class Packed:
    """Packs the documents in order into sequences, as many as fit, with `sequences` per batch."""

    name = "test:held_out"

    def __init__(self, documents: list[np.ndarray], sequences: int):
        self.tokens_d = np.array([len(d) - 1 for d in documents])
        self.bytes_d = 3 * self.tokens_d + 1
        self.rows: list[list[int]] = [[]]
        self.documents, self.sequences = documents, sequences
        for i, tokens in enumerate(self.tokens_d):
            if sum(self.tokens_d[j] for j in self.rows[-1]) + tokens > LENGTH:
                self.rows.append([])
            self.rows[-1].append(i)

    def __iter__(self):
        for first in range(0, len(self.rows), self.sequences):
            shape = self.sequences, LENGTH
            integers = [np.zeros(shape, np.int32) for _ in range(4)]
            tokens, targets, segments, positions = integers
            weights, documents_bt = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
            for b, row in enumerate(self.rows[first : first + self.sequences]):
                at = 0
                for segment, i in enumerate(row):
                    document = self.documents[i]
                    place = b, slice(at, at := at + len(document) - 1)
                    tokens[place], targets[place] = document[:-1], document[1:]
                    segments[place], positions[place] = segment + 1, np.arange(len(document) - 1)
                    weights[place], documents_bt[place] = 1, i
            yield Batch(tokens, targets, weights, segments, positions), documents_bt


@pytest.fixture(scope="module")
def params():
    return jax.jit(model.init, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def nll_d(params) -> np.ndarray:
    """Negative log-likelihood of each document alone, from the logits in float64."""

    @jax.jit
    def logits(tokens_bt):
        return model.Model(CONFIG, params).logits(model.Model(CONFIG, params)(tokens_bt).hidden_btd)

    sums = []
    for document in documents():
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(document) - 1] = document[:-1]
        z_tv = np.asarray(logits(jnp.asarray(padded)), np.float64)[0, : len(document) - 1]
        lse_t = np.log(np.exp(z_tv).sum(-1))
        sums.append((lse_t - z_tv[np.arange(len(z_tv)), document[1:]]).sum())
    return np.array(sums)


def by_measure(results) -> dict[str, tuple[float, float | None, int]]:
    return {r.name.rpartition("/")[2]: (r.value, r.stderr, r.count) for r in results}


def test_results_match_a_float64_reference(params, nll_d):
    evaluation = Packed(documents(), 3)
    results = perplexity(model.Model(CONFIG, params), evaluation, step=7)
    assert {r.step for r in results} == {7}
    assert results[0].name == "test:held_out/loss"
    got = by_measure(results)
    loss, error = ratio(nll_d, evaluation.tokens_d)
    tokens = int(evaluation.tokens_d.sum())
    # float32 logits of about 10 are accurate to 1e-6, and a loss is a mean over them.
    assert got["loss"] == pytest.approx((loss, error, tokens), rel=1e-5)
    assert got["perplexity"] == pytest.approx(
        (math.exp(loss), math.exp(loss) * error, tokens), rel=1e-4
    )
    bits, bits_error = ratio(nll_d / math.log(2), evaluation.bytes_d)
    assert got["bits_per_byte"] == pytest.approx((bits, bits_error, tokens), rel=1e-5)
    total_bits = got["loss"][0] * tokens / math.log(2)
    assert got["bits_per_byte"][0] == pytest.approx(
        total_bits / evaluation.bytes_d.sum(), rel=1e-12
    )


@pytest.mark.parametrize("sequences", [1, 2, 8])
def test_results_do_not_depend_on_the_batch_size(params, sequences):
    expected = by_measure(perplexity(model.Model(CONFIG, params), Packed(documents(), 3)))
    got = by_measure(perplexity(model.Model(CONFIG, params), Packed(documents(), sequences)))
    for measure, values in expected.items():
        assert got[measure] == pytest.approx(values, rel=1e-5)


def test_batch_limit_counts_only_the_evaluated_documents(params, nll_d):
    evaluation = Packed(documents(), 2)
    met = [i for row in evaluation.rows[:2] for i in row]
    got = by_measure(perplexity(model.Model(CONFIG, params), evaluation, batches=1))
    tokens_d, bytes_d = evaluation.tokens_d[met], evaluation.bytes_d[met]
    assert got["loss"] == pytest.approx((*ratio(nll_d[met], tokens_d), tokens_d.sum()), rel=1e-5)
    bits = nll_d[met].sum() / math.log(2) / bytes_d.sum()
    assert got["bits_per_byte"][0] == pytest.approx(bits, rel=1e-5)


def test_partial_document_counts_its_share_of_the_bytes(params):
    evaluation = Packed(documents(), 4)
    whole = by_measure(perplexity(model.Model(CONFIG, params), evaluation))
    evaluation.tokens_d = 2 * evaluation.tokens_d  # as if the other half came in later batches
    evaluation.bytes_d = 2 * evaluation.bytes_d
    assert by_measure(perplexity(model.Model(CONFIG, params), evaluation)) == whole


def test_single_document_is_clustered_by_sequence(params):
    evaluation = Packed(documents([17] * 4), 2)

    class OneDocument:
        name = "book"
        tokens_d, bytes_d = evaluation.tokens_d.sum()[None], evaluation.bytes_d.sum()[None]

        def __iter__(self):
            return ((batch, np.minimum(documents_bt, 0)) for batch, documents_bt in evaluation)

    expected = by_measure(perplexity(model.Model(CONFIG, params), evaluation))
    got = by_measure(perplexity(model.Model(CONFIG, params), OneDocument()))
    for measure, values in expected.items():
        assert got[measure] == pytest.approx(values, rel=1e-12)
    single = perplexity(model.Model(CONFIG, params), Packed(documents([17]), 2))
    assert [r.stderr for r in single] == [None] * 3


def test_repeated_evaluations_compile_once(params, monkeypatch):
    traces = 0
    forward = model.Model.__call__

    def counting(*arguments, **options):
        nonlocal traces
        traces += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(model.Model, "__call__", counting)
    for scale in (1.0, 0.5, 0.25):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, params)
        perplexity(model.Model(CONFIG, scaled), Packed(documents(), 5))
    assert traces == 1


def test_invalid_arguments_raise_errors(params):
    with pytest.raises(UserError, match="test:held_out"):
        perplexity(model.Model(CONFIG, params), Packed([], 2))
    with pytest.raises(UserError, match="evals.every=0"):
        Perplexity(every=0)
    with pytest.raises(UserError, match="evals.batches=-1"):
        Perplexity(batches=-1)


SCRIPT = """
    import json
    import jax
    from lm.parallel import distributed, sharding
    from lm import model
    from lm.evals import perplexity
    from lm.parallel.mesh import Mesh
    from test_perplexity import CONFIG, Packed, by_measure, documents

    distributed.initialize()
    assert jax.process_count() == 2 and jax.device_count() == 8
    for text in ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"):
        mesh = Mesh.parse(text).build()
        shardings = sharding.weight_shardings(model.axes(CONFIG), model.shapes(CONFIG), mesh)
        init = jax.jit(model.init, static_argnums=0, out_shardings=shardings)
        params = init(CONFIG, jax.random.key(0))
        results = perplexity(model.Model(CONFIG, params, mesh), Packed(documents(), 8))
        print("results", json.dumps(by_measure(results)))
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_mesh_or_the_number_of_processes(params):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = []
    for process in range(2):
        environment = {
            **os.environ,
            "XLA_FLAGS": virtual_devices.flags(4),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([HERE, os.path.dirname(HERE)]),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
        }
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes))
    expected = by_measure(perplexity(model.Model(CONFIG, params), Packed(documents(), 8)))
    for process in running:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        lines = [line for line in out.splitlines() if line.startswith("results")]
        assert len(lines) == 3
        for line in lines:
            got = json.loads(line.removeprefix("results "))
            for measure, values in expected.items():
                assert tuple(got[measure]) == pytest.approx(values, rel=1e-5)
