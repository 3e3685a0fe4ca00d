"""Compiles each declared place and compares memory and collectives with its stored text.

    python tests/aot/test_places.py --write llama3_8b:v6e-256    compiles one place, stores its text
    python tests/aot/test_places.py --write                      all places of all experiments

Both print the rows of the table in lm/planning/README.md. Compiling takes one to several minutes
per place. The first line of each text therefore names jax, libtpu and a hash of the program
(canonical StableHLO); the test compiles only where one of them has changed. The code that reads a
compiled program, lm/planning, is not part of the hash: tests/planning/test_reading.py and the
places in ALWAYS, which are compiled in every run, cover it.
"""

import hashlib
import importlib
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import experiment_files
import jax
import pytest

from lm import planning, program, terminal
from lm.experiment import Experiment
from lm.planning import compiled, slices

ROOT = Path(__file__).parent.parent.parent
KEPT = Path(__file__).parent / "places"
VERSIONS = f"jax {version('jax')}, libtpu {version('libtpu') if compiled.available() else 'none'}"
ALWAYS = ("llama3_8b:v5p-8", "llama3_8b:v6e-256")


def declared() -> list[str]:
    """'llama3_8b:v5p-64', ... of every experiment."""
    return [
        f"{name}:{place}"
        for name in experiment_files.NAMES
        for place in getattr(experiment(name), "places", ())  # a recipe has stages instead
        if slices.NAME.fullmatch(place)
    ]


def path_of(name: str) -> Path:
    """Returns the file of the stored text."""
    return KEPT / f"{name.replace(':', '@')}.txt"


def kept_text(name: str) -> str:
    """Returns the stored text, or '' if there is none."""
    return path_of(name).read_text() if path_of(name).exists() else ""


def experiment(name: str) -> Experiment:
    return importlib.import_module(f"experiments.{name}").experiment()


def table_row(plan: planning.Plan) -> str:
    """Returns a table row. Lists collectives that take more than 1 % of the time on the links."""
    size = terminal.size
    link_seconds = sum(each["seconds"] for each in plan["collectives"])
    collectives = "; ".join(
        f"{each['kind']} {each['axes']} {each['count']:,} x, {size(each['nbytes'])}"
        for each in plan["collectives"]
        if each["seconds"] > 0.01 * link_seconds
    )
    cells = (
        f"{plan['experiment']} {plan['place']}",
        f"{plan['mesh']}; {plan['microbatches']}; {plan['remat']}",
        f"{size(plan['peak_bytes_per_device'])} of {size(plan['capacity_bytes_per_device'])}",
        collectives,
        terminal.duration(plan["step_seconds"]),
        f"{100 * plan['model_flops_utilization']:.0f} %",
        terminal.duration(plan["compile_seconds"]),
    )
    return f"| {' | '.join(cells)} |"


def first_line(name: str) -> str:
    """Returns the compiler versions and the hash of the program."""
    # Pallas kernels carry the file and line of their source unless tracebacks are off.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    name, _, place = name.partition(":")
    e = experiment(name)
    devices = compiled.describe(slices.find(place))
    assembled = program.assemble_at(e, place, e.places[place], devices)
    text = assembled.lower().as_text()
    digest = hashlib.sha256(canonical(text).encode()).hexdigest()[:16]
    return f"{VERSIONS}, program {digest}"


_NAMES = re.compile(r'\bjax\.result_info = "[^"]*"|(?<=\bmodule )@[\w.$\-]+')
_SYMBOL = re.compile(r'(custom_call )?@([\w.$\-]+|"[^"]*")')


def canonical(stablehlo: str) -> str:
    """Makes the text of a lowered program independent of the names of Python functions: removes the
    names of the module and of results, and numbers symbols in order of appearance. Custom-call
    targets stay."""
    numbers: dict[str, int] = {}

    def renumber(match: re.Match) -> str:
        target, symbol = match.groups()
        return match.group() if target else f"@{numbers.setdefault(symbol, len(numbers))}"

    return _SYMBOL.sub(renumber, _NAMES.sub("", stablehlo))


def test_renaming_a_function_does_not_change_the_canonical_program():
    def lower(name, constant, output):
        def inner(x):
            return x * constant

        def outer(x):
            return {output: jax.jit(inner)(x)}

        inner.__name__, outer.__name__ = name, f"outer_{name}"
        text = jax.jit(outer).lower(jax.ShapeDtypeStruct((3,), "float32")).as_text()
        assert f"@{name}" in text and f"@jit_outer_{name}" in text and output in text
        return canonical(text)

    assert lower("a", 2.0, "first_result") == lower("b", 2.0, "second_result")
    assert lower("a", 2.0, "first_result") != lower("a", 3.0, "first_result")
    call = "stablehlo.custom_call @{}(%0) : (tensor<3xf32>) -> tensor<3xf32>"
    assert canonical(call.format("first")) != canonical(call.format("second"))


def summary(plan: planning.Plan) -> str:
    """Returns the facts to compare: peak, arguments, modelled time, collectives."""
    lines = [
        f"{plan['experiment']} on {plan['place']}: mesh {plan['mesh']}, "
        f"{plan['microbatches']} micro-batches, remat {plan['remat']}",
        f"peak {terminal.size(plan['peak_bytes_per_device'])}",
        f"arguments {terminal.size(plan['argument_bytes_per_device'])}",
        f"step {terminal.duration(plan['step_seconds'])}",
        f"MFU {100 * plan['model_flops_utilization']:.1f} %",
    ]
    for row in plan["collectives"] or ():
        moved = terminal.size(row["nbytes"])
        lines.append(f"{row['kind']} {row['axes']} {row['dtype']} {row['count']} {moved}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def compilations(request):
    """{place: future of its process}. Two run at a time, each in a separate process, since libtpu
    retains hundreds of MB of every program that it compiles."""
    test = test_a_place_compiles_to_its_stored_memory_and_collectives.__name__
    items = [each for each in request.session.items if each.name.startswith(test)]
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(in_process, name) for name in (i.callspec.id for i in items)}
    pool.shutdown(cancel_futures=True)  # after a timeout, some have not started


def in_process(name: str) -> subprocess.CompletedProcess:
    """Prints the text of a place."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, __file__, "--text", name]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not compiled.available(), reason="libtpu is not installed")
@pytest.mark.parametrize("name", declared())
def test_a_place_compiles_to_its_stored_memory_and_collectives(name, compilations):
    done = compilations[name].result()
    assert done.returncode == 0, done.stderr[-3000:]
    text, kept = done.stdout.splitlines(), kept_text(name).splitlines()
    assert kept, f"no text is stored; run: python tests/aot/test_places.py --write {name}"
    # Memory layout depends on the compiler's version.
    if kept[0].startswith(f"{VERSIONS},"):
        assert text[1:] == kept[1:]
        if text[0] != kept[0]:
            message = f"{name}: the program differs from that of the stored text; compiled again"
            warnings.warn(message, stacklevel=1)


@pytest.mark.skipif(not compiled.available(), reason="libtpu is not installed")
@pytest.mark.parametrize("name", declared())
def test_the_mesh_of_a_place_covers_its_torus(name):
    name, _, place = name.partition(":")
    tpu_slice = slices.find(place)
    e = experiment(name)
    grid = e.places[place].mesh.build(compiled.describe(tpu_slice)).devices
    assert grid.size == tpu_slice.devices
    assert len({device.id for device in grid.flat}) == tpu_slice.devices


def test_each_stored_text_belongs_to_a_declared_place():
    assert {*KEPT.glob("*")} <= {path_of(name) for name in declared()}


def write(names: list[str]) -> None:
    """Compiles places and stores the text of each one that fits."""
    KEPT.mkdir(exist_ok=True)
    for each in names:
        plan = compile_place(each)
        if plan["fits"]:
            path_of(each).write_text(f"{first_line(each)}\n{summary(plan)}")
        print(table_row(plan) if plan["fits"] else plan, flush=True)
    for path in {*KEPT.glob("*")} - {path_of(each) for each in declared()}:
        path.unlink()


def text_of(name: str) -> str:
    """Returns the stored text if compiler and program are unchanged; else compiles."""
    first, kept = first_line(name), kept_text(name)
    if name not in ALWAYS and kept.startswith(f"{first}\n"):
        return kept
    plan = compile_place(name)
    return f"{first}\n{summary(plan)}" if plan["fits"] else sys.exit(str(plan))


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
