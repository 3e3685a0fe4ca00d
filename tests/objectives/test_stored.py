"""Numbers of frozen models that are computed before training equal those of each step."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices
from packed_pairs import CONFIG, documents, in_rows, init, pack
from stored_runs import STEPS, distill, dpo, stored
from tiny_experiments import losses

import lm
from lm import model, training
from lm import stored as stored_module
from lm.data.batch import extend
from lm.errors import UserError
from lm.folders import models_of
from lm.objectives import DPO, JSD, KTO, Distill, ForwardKL
from lm.objectives.divergence import Options, divergence_sums, top_k
from lm.parallel import hardware
from lm.program import assemble
from lm.stored import Stored

ROOT = Path(__file__).parents[2]
OBJECTIVES = {
    "dpo": DPO(),
    "kto": KTO(),
    "forward": Distill(teacher="x", top_k=5, divergence=ForwardKL(), temperature=1.7, chunk=16),
    "jsd": Distill(teacher="x", top_k=5, divergence=JSD(beta=0.3), cross_entropy=0.3),
}
STUDENT = dataclasses.replace(CONFIG, layers=1)
TEACHER = dataclasses.replace(CONFIG, vocab=64, dim=24, layers=1)


# ---- Objectives


@pytest.fixture(scope="module")
def both():
    """{name: (loss, loss with stored numbers)}."""
    batch = pack(in_rows(documents(12), 4), 40)

    @jax.jit
    def compute(student, reference, teacher):
        frozen = {
            "reference": model.Model(STUDENT, reference),
            "teacher": model.Model(TEACHER, teacher),
        }
        results = {}
        for name, objective in OBJECTIVES.items():
            numbers = dataclasses.replace(objective, stored=True).precompute(STUDENT, batch, frozen)
            apply = model.Model(STUDENT, student)
            results[name] = (
                objective.loss(apply, batch, None, frozen),
                objective.loss(apply, extend(batch, numbers), None, {}),
            )
        return results

    return compute(init(0, STUDENT), init(1, STUDENT), init(2, TEACHER))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_with_stored_numbers_are_the_same(both, name):
    loss, with_stored = both[name]
    assert loss.total > 0.1
    # The same operations in the same order, up to what XLA fuses.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *both[name])
    assert loss.metrics.keys() == with_stored.metrics.keys()


def test_stored_fields_are_what_precompute_returns():
    batch = pack(in_rows(documents(4), 2), 20)
    frozen = {
        "reference": model.Model(STUDENT, model.shapes(STUDENT)),
        "teacher": model.Model(TEACHER, model.shapes(TEACHER)),
    }
    for objective in OBJECTIVES.values():
        assert objective.stored_fields() == {} and objective.loss_models() == objective.models()
        objective = dataclasses.replace(objective, stored=True)
        shapes = jax.eval_shape(partial(objective.precompute, STUDENT, batch), frozen)
        declared = objective.stored_fields().items()
        assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
            name: ((2, 20, *each.shape), each.base) for name, each in declared
        }
        assert objective.loss_models() == {}


def test_equally_probable_tokens():
    """The teacher's third and fourth most probable tokens are equal."""
    options = Options(ForwardKL(), top_k=3)
    hidden = jnp.eye(5)[None, :1], jnp.array([[3.0, 1.0, 2.0, 1.0, 0.0, -1.0]] * 5)
    student = jnp.ones((1, 1, 2)), jnp.linspace(-1, 1, 12).reshape(2, 6)
    tokens = jnp.array([[4]]), jnp.ones((1, 1))
    top = top_k(options, *hidden)
    assert sorted(top.ids_btk[0, 0].tolist())[:2] == [0, 2]
    want = divergence_sums(options, student, hidden, *tokens)
    got = divergence_sums(options, student, top, *tokens)
    assert got.loss == pytest.approx(float(want.loss), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        ({"top_k": 60}, {}, r"objective\.top_k=60 below model\.vocab=60"),
        ({"top_k": 8}, {"vocab": 70}, r"model\.vocab=70, and a teacher with as many .* has 64;"),
    ],
)
def test_a_vocabulary_that_cannot_be_stored_is_refused(make, config, message):
    config = dataclasses.replace(STUDENT, **({"vocab": 60} | config))
    objective = Distill(teacher="x", stored=True, **make)
    with pytest.raises(UserError, match=message):
        objective.precompute(config, None, {"teacher": model.Model(TEACHER, None)})


def test_stored_distillation_needs_top_k():
    with pytest.raises(UserError, match=r"objective\.stored=True .*; set objective\.top_k=64\."):
        Distill(teacher="x", stored=True)


# ---- Runs


class Killed(Exception):
    pass


def train(declared, home: Path) -> str:
    """Returns what it printed to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        lm.train(declared, workdir=home)
    return err.getvalue()


def evaluated(folder: Path) -> dict[str, float]:
    """Results of the last evaluation."""
    lines = training.read_lines(folder / "eval.jsonl")
    return {line["name"]: line["value"] for line in lines if line["step"] == STEPS}


def check_same(home: Path, name: str) -> None:
    """A run and the one with stored numbers have the same losses and held-out results."""
    ours, theirs = home / f"{name}_stored", home / name
    # Rounding of float32 in another program, over some updates of Adam.
    assert losses(ours) == pytest.approx(losses(theirs), rel=0, abs=1e-6)
    assert evaluated(ours) == pytest.approx(evaluated(theirs), rel=0, abs=1e-6)
    assert len(evaluated(ours)) >= 3


@contextlib.contextmanager
def killed_at(step: int):
    """Ends a run when it reads the batch of this step, which is after the checkpoint before it."""
    batch = Stored.batch

    def read(self, at, rows):
        if at == step:
            raise Killed
        return batch(self, at, rows)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stored, "batch", read)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Iterator[Path]:
    """A folder with a teacher, and both runs without stored numbers."""
    home = tmp_path_factory.mktemp("stored")
    shutil.copytree(tiny.folder, home / "teacher")
    shutil.copy(tiny.folder / "tokenizer.model", home)
    with pytest.MonkeyPatch.context() as patch:
        # They take half of the time of such short runs.
        patch.setattr(hardware, "matmul_flops", lambda *_: 1e12)
        patch.setattr(training, "plot_loss", lambda *_, **__: None)
        for declare in (dpo, distill):
            train(declare(home), home)
        yield home


@pytest.fixture
def parts(monkeypatch) -> list[str]:
    """Parts of one batch; the names of those that are written."""
    written, write = [], Stored._write

    def noted(self, name, *rest):
        write(self, name, *rest)
        written.append(name)

    monkeypatch.setattr(stored_module, "PART_BATCHES", 1)
    monkeypatch.setattr(Stored, "_write", noted)
    return written


def test_dpo_with_a_stored_reference(home, parts):
    """Resumed with an evaluation that the run began without: its numbers are computed then, from
    the weights that the run began with."""
    declared = stored(dpo(home))
    without = dataclasses.replace(declared, evals=())
    with killed_at(4):
        train(without, home)
    folder = home / "dpo_stored"
    (numbers,) = (np.load(path) for path in sorted(folder.glob("stored/train/*0.npy")))
    assert parts and all(name.startswith("train/") for name in parts)
    assert numbers.dtype.names == ("reference_logp",)
    assert numbers["reference_logp"].shape == (4, 64)
    assert not (folder / "frozen").exists()

    parts.clear()
    train(declared, home)
    assert parts and all(name.startswith("held_out/preferences/") for name in parts)
    check_same(home, "dpo")


@pytest.mark.slow
def test_a_run_killed_while_it_stores_and_later_without_its_teacher(home, parts, monkeypatch):
    declared = stored(distill(home))
    folder = home / "distill_stored"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        write = Stored._write

        def first_three(self, name, *rest):
            if len(parts) == 3:
                (folder / "stored" / f"{name}.npy").write_bytes(b"half of it")
                raise Killed
            write(self, name, *rest)

        patch.setattr(Stored, "_write", first_three)
        train(declared, home)
    assert parts == ["train/00000", "train/00001", "train/00002"]

    # A part of other weights is computed again; the others are kept.
    marker = folder / "stored" / "train" / "00001.json"
    facts = json.loads(marker.read_text())
    marker.write_text(json.dumps(facts | {"models": {"teacher": 1}}))
    parts.clear()
    with killed_at(4):
        train(declared, home)
    assert parts[:2] == ["train/00001", "train/00003"]
    assert sorted({name.rpartition("/")[0] for name in parts}) == ["held_out/documents", "train"]

    # Once it has begun, the teacher must stay the same.
    lost, right = folder / "stored" / "train" / "00002.npy", marker.read_text()
    shutil.move(lost, home / "elsewhere.npy")
    marker.write_text(json.dumps(facts | {"models": {"teacher": 1}}))
    with pytest.raises(UserError, match=r"objective\.teacher=.* has changed since the run was"):
        train(declared, home)
    marker.write_text(right)
    shutil.move(home / "elsewhere.npy", lost)

    shutil.move(home / "teacher", home / "elsewhere")
    train(declared, home)
    shutil.move(home / "elsewhere", home / "teacher")
    check_same(home, "distill")


def test_training_does_not_hold_the_models(home):
    for declare in (dpo, distill):
        plain, declared = declare(home), stored(declare(home))
        assert training.MODELS in assemble(plain, models=models_of(plain)).abstract[1]
        gone = dataclasses.replace(declared, places=plain.places)
        program = assemble(gone, models=models_of(gone))
        assert program.models == {} and program.abstract[1] == {}


def test_a_teacher_with_another_tokenizer_is_refused(home):
    declared = dataclasses.replace(stored(distill(home)), name="other")
    declared = dataclasses.replace(
        declared, objective=dataclasses.replace(declared.objective, teacher=str(home / "dpo"))
    )
    with pytest.raises(UserError, match=r"objective\.teacher=.* another tokenizer"):
        train(declared, home)
    assert not (home / "other" / "experiment.json").exists()


# ---- Meshes and processes


def start(home: Path, *words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("stored_runs.py")), str(home), *words],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two_processes(home: Path, *words: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {
        "XLA_FLAGS": virtual_devices.flags(4),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    return [start(home, *words, **shared, JAX_PROCESS_ID=str(index)) for index in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("dpo", "data=2,fsdp=2,tensor=2"), ("distill", "fsdp=2,context=2,tensor=2")],
)
def test_two_processes_on_a_mesh_store_what_one_device_does(home, name, mesh):
    ended = [(p.communicate(timeout=600)[0], p.returncode) for p in two_processes(home, name, mesh)]
    assert [code for _, code in ended] == [0, 0], ended[0][0][-3000:]
    ours, theirs = home / "runs" / mesh / f"{name}_stored", home / name
    # The order of float32 sums differs, over updates of Adam.
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    assert evaluated(ours) == pytest.approx(evaluated(theirs), rel=1e-3, abs=1e-4)
    assert "storing" in ended[0][0] and "storing" not in ended[1][0]


@pytest.mark.slow
def test_killed_while_it_stores_and_while_it_trains(home):
    run = home / "runs" / "data=1" / "distill_stored"
    metrics = run / "metrics.jsonl"

    def kill_when(reached: Callable[[], bool]) -> None:
        process = start(home, "distill", "data=1")
        while not reached():
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    kill_when(lambda: len(list(run.glob("stored/train/*.npy"))) > 3)
    assert not metrics.exists(), "it was killed before the first update"
    kill_when(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 2)
    shutil.move(home / "teacher", home / "elsewhere")
    process = start(home, "distill", "data=1")
    said = process.communicate(timeout=600)[0]
    shutil.move(home / "elsewhere", home / "teacher")
    assert process.returncode == 0, said[-3000:]
    assert losses(run) == pytest.approx(losses(home / "distill"), rel=0, abs=1e-6)
