"""Declared places, compiled: each fits, and its memory and collectives are text that is kept.

    python tests/aot/test_places.py --write llama3_8b:v6e-256     compiles, and keeps the text
    python tests/aot/test_places.py --write                       all places of all experiments

Both print the rows of the table in experiments/README.md. Compiling takes a minute or several for
each, so a text names the compiler and the program that it is of, by a hash of what is handed to the
compiler and of what reads the result. A test compiles anew where one of them is another, and always
the places in ALWAYS.
"""

import hashlib
import importlib
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

from lm import planning, run, terminal
from lm.experiment import Experiment
from lm.parallel import hardware
from lm.planning import compiled, slices

ROOT = Path(__file__).parent.parent.parent
KEPT = Path(__file__).parent / "places"
VERSIONS = f"jax {version('jax')}, libtpu {version('libtpu') if compiled.available() else 'none'}"
ALWAYS = ("llama3_8b:v5p-8", "llama3_8b:v6e-256")


def declared() -> list[str]:
    """'llama3_8b:v5p-64', ... of every experiment."""
    names = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")
    return [
        f"{name}:{place}"
        for name in names
        for place in experiment(name).places
        if slices.NAME.fullmatch(place)
    ]


def path_of(name: str) -> Path:
    """Of the text that is kept."""
    return KEPT / f"{name.replace(':', '@')}.txt"


def kept_of(name: str) -> str:
    return path_of(name).read_text() if path_of(name).exists() else ""


def experiment(name: str) -> Experiment:
    return importlib.import_module(f"experiments.{name}").experiment()


def row(told: planning.Plan) -> str:
    """Of the table: what takes a hundredth of the time on the links, or more, by name."""
    size = terminal.size
    everything = sum(each["seconds"] for each in told["collectives"])
    collectives = "; ".join(
        f"{each['kind']} {each['axes']} {each['count']:,} x, {size(each['nbytes'])}"
        for each in told["collectives"]
        if each["seconds"] > 0.01 * everything
    )
    cells = (
        f"{told['experiment']} {told['place']}",
        f"{told['mesh']}; {told['microbatches']}; {told['remat']}",
        f"{size(told['peak_bytes_per_device'])} of {size(told['capacity_bytes_per_device'])}",
        collectives,
        terminal.duration(told["step_seconds"]),
        f"{100 * told['model_flops_utilization']:.0f} %",
        terminal.duration(told["compile_seconds"]),
    )
    return f"| {' | '.join(cells)} |"


def head(name: str) -> str:
    """What a text is of: the compiler; the program, and what reads it when it is compiled."""
    # Pallas keeps in its kernels where their source lies: the folder and line are none of this.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    name, _, place = name.partition(":")
    e = experiment(name)
    devices = compiled.describe(slices.find(place))
    program = run.assemble_at(e, place, e.places[place], devices)
    text = program.step.lower(program.abstract, program.abstract_batch()).as_text()
    readers = [*sorted(Path(planning.__file__).parent.glob("*.py")), Path(hardware.__file__)]
    of = hashlib.sha256(b"".join([text.encode(), *(path.read_bytes() for path in readers)]))
    return f"{VERSIONS}, program {of.hexdigest()[:16]}"


def kept_text(told: planning.Plan) -> str:
    """What must not change unseen: that it fits, peak and arguments, modelled time, collectives."""
    lines = [
        f"{told['experiment']} on {told['place']}: mesh {told['mesh']}, "
        f"{told['microbatches']} micro-batches, remat {told['remat']}",
        f"peak {terminal.size(told['peak_bytes_per_device'])}",
        f"arguments {terminal.size(told['argument_bytes_per_device'])}",
        f"step {terminal.duration(told['step_seconds'])}",
        f"MFU {100 * told['model_flops_utilization']:.1f} %",
    ]
    for row in told["collectives"] or ():
        moved = terminal.size(row["nbytes"])
        lines.append(f"{row['kind']} {row['axes']} {row['dtype']} {row['count']} {moved}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def compiling(request):
    """By place, its process. Two at a time, each alone, since libtpu keeps hundreds of MB of every
    program."""
    test = test_a_place_compiles_and_fits_and_is_what_it_was.__name__
    items = [each for each in request.session.items if each.name.startswith(test)]
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(in_process, name) for name in (i.callspec.id for i in items)}
    pool.shutdown(cancel_futures=True)  # where time was over


def in_process(name: str) -> subprocess.CompletedProcess:
    """Prints the place's text."""
    found = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--text", name]
    return subprocess.run(command, env=found, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not compiled.available(), reason="libtpu is not installed")
@pytest.mark.parametrize("name", declared())
def test_a_place_compiles_and_fits_and_is_what_it_was(name, compiling):
    done = compiling[name].result()
    assert done.returncode == 0, done.stderr[-3000:]
    found, kept = done.stdout.splitlines(), kept_of(name).splitlines()
    assert kept, f"no text is kept; python tests/aot/test_places.py --write {name}"
    # Each compiler lays out memory in its own way.
    if kept[0].startswith(f"{VERSIONS},"):
        assert found[1:] == kept[1:]
        if found[0] != kept[0]:
            said = f"the text of {name} is of an earlier program, so it was compiled"
            warnings.warn(said, stacklevel=1)


@pytest.mark.skipif(not compiled.available(), reason="libtpu is not installed")
@pytest.mark.parametrize("name", declared())
def test_the_mesh_of_a_place_lies_on_its_torus(name):
    name, _, place = name.partition(":")
    where = slices.find(place)
    e = experiment(name)
    grid = e.places[place].mesh.build(compiled.describe(where)).devices
    assert grid.size == where.devices
    assert len({device.id for device in grid.flat}) == where.devices


def test_what_is_kept_is_declared():
    assert {*KEPT.glob("*")} <= {path_of(name) for name in declared()}


def write(names: list[str]) -> None:
    """Compiles, and keeps what fits."""
    KEPT.mkdir(exist_ok=True)
    for each in names:
        told = compile_place(each)
        if told["fits"]:
            path_of(each).write_text(f"{head(each)}\n{kept_text(told)}")
        print(row(told) if told["fits"] else told, flush=True)
    for path in {*KEPT.glob("*")} - {path_of(each) for each in declared()}:
        path.unlink()


def text_of(name: str) -> str:
    """As kept, where it is of this compiler and program; else compiled."""
    first, kept = head(name), kept_of(name)
    if name not in ALWAYS and kept.startswith(f"{first}\n"):
        return kept
    told = compile_place(name)
    return f"{first}\n{kept_text(told)}" if told["fits"] else sys.exit(str(told))


def compile_place(name: str) -> planning.Plan:
    name, _, place = name.partition(":")
    return planning.plan(experiment(name), place)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--write", *names]:
            write(names or declared())
        case ["--text", name]:
            print(text_of(name), end="")
        case _:
            sys.exit("usage: python tests/aot/test_places.py --write [EXPERIMENT:PLACE ...]")
