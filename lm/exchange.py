"""Models from Hugging Face folders into runs, and runs out again as Hugging Face folders.

What is written stands aside until it is whole, and an export is read back and compared before it
gets its name.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import checkpoint, data, hf, model, run, training, trees
from lm.errors import UserError
from lm.experiment import describe
from lm.hf import families
from lm.parallel import distributed, sharding
from lm.parallel.mesh import Mesh
from lm.precision import STORAGE, cast

SHARD_BYTES = 5 * 10**9  # of a file, as the Hub's tools have it


def import_run(
    source: str | os.PathLike, folder: str | os.PathLike, *, mesh: Mesh | None = None
) -> "run.Run":
    """Makes a run folder from a Hugging Face folder: its declaration, tokenizer and weights, these
    as a checkpoint of step 0. On a `mesh` each process reads and writes the parts of its devices.

    Raises UserError for a folder that exists, or that no run can be made from.
    """
    target = _free(folder)
    if not hf.is_pretrained(source) and (epath.Path(source) / "experiment.json").exists():
        raise UserError(f"{source} is a run already; copy it, or export it.")
    given = run.load(source, mesh=mesh)
    tokenizer = data.TokenizerFile(path=str(folder))
    experiment = dataclasses.replace(given.experiment, name=target.name, tokenizer=tokenizer)
    with _aside(target) as aside:
        with checkpoint.Store(aside / "checkpoints", checkpoint.Save(every=1)) as store:
            store.save(0, {"params": given.params})
        if distributed.is_main():
            if given.tokenizer is not None:
                given.tokenizer.save(aside)
            facts = {"data": {"fingerprint": None, "counts": {}}, **run.read_facts(source)}
            run.write_facts(aside, experiment, facts)
    return dataclasses.replace(given, folder=target, experiment=experiment)


def _free(folder: str | os.PathLike) -> epath.Path:
    """Where a folder will lie. Raises UserError where something lies already."""
    target = epath.Path(str(folder).rstrip("/"))
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists; delete it, or choose another name.")
    return target


@contextlib.contextmanager
def _aside(target: epath.Path) -> Iterator[epath.Path]:
    """An empty folder to write into. It gets the name `target` when all is done, and is deleted
    when something fails. In a bucket, where nothing can be renamed, it has the name at once."""
    aside = target if "://" in str(target) else target.parent / f"{target.name}.partial"
    main = distributed.is_main()
    if main:
        if aside.exists():
            aside.rmtree()  # what a killed call left behind
        aside.mkdir(parents=True, exist_ok=True)
    distributed.barrier("room made")
    try:
        yield aside
    except BaseException:
        if main:
            aside.rmtree(missing_ok=True)
        raise
    distributed.barrier("all written")
    if main and aside != target:
        if target.exists():
            target.rmdir()
        aside.replace(target)
    distributed.barrier("named")


def export_run(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    mesh: Mesh | None = None,
) -> Path:
    """Writes a run as a Hugging Face folder, as transformers loads it, and reads it back:
    weights bit for bit, the model by its logits.

    Args:
        step: of the checkpoint; default: the newest.
        dtype: "float32" or "bfloat16", to store the weights in; default: as the run stores them.
        shard_bytes: of a file, at most.

    Raises UserError for a folder that exists, and for a model that no architecture there computes.
    """
    if dtype is not None and dtype not in STORAGE:
        raise UserError(f"dtype={dtype!r} is not known; take {' or '.join(STORAGE)}.")
    if "://" in str(folder):
        raise UserError(f"{folder}: write the export to a local folder, and copy that.")
    target = _free(folder)
    given, facts = run.load(source, step=step, mesh=mesh), run.read_facts(source)
    origin = facts.get("origin") or {"config": {}, "generation_config": {}}
    length = _length(given, origin)
    family, fields = families.write(given.experiment.model, length, origin["config"])
    if dtype is not None:
        given = dataclasses.replace(given, params=cast(given.params, dtype))
    with _aside(target) as aside:
        hf.write_pretrained(Path(aside), family, given.experiment.model, given.params, shard_bytes)
        if distributed.is_main():
            _write_texts(Path(aside), given, facts, origin, fields, length)
        distributed.barrier("exported")
        _check(aside, given, mesh)
    return Path(target)


def _length(given: "run.Run", origin: dict[str, Any]) -> int:
    return max(given.experiment.batch.length, origin["config"].get("max_position_embeddings") or 0)


def _write_texts(
    folder: Path,
    given: "run.Run",
    facts: dict[str, Any],
    origin: dict[str, Any],
    fields: dict[str, Any],
    length: int,
) -> None:
    """All files but the weights."""
    tokens = _special_tokens(given, origin)
    formats = {x.dtype.name for x in jax.tree.leaves(given.params)}
    config = {
        **fields,
        **tokens,
        "torch_dtype": formats.pop() if len(formats) == 1 else "float32",
        "use_cache": True,
    }
    _write_json(folder / hf.CONFIG, config)
    generation = origin["generation_config"] or {"_from_model_config": True, **tokens}
    _write_json(folder / hf.GENERATION, generation)
    if given.tokenizer is not None:
        for name, content in hf.export_files(given.tokenizer, length).items():
            if name != hf.GENERATION:
                (folder / name).write_bytes(content)
    (folder / "README.md").write_text(card(given, facts, config))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _special_tokens(given: "run.Run", origin: dict[str, Any]) -> dict[str, Any]:
    names = [f"{role}_token_id" for role in ("bos", "eos", "pad")]
    if origin["config"] or given.tokenizer is None:
        return {name: origin["config"].get(name) for name in names}
    return {name: getattr(given.tokenizer, name.removesuffix("_token_id")) for name in names}


def _check(folder: epath.Path, given: "run.Run", mesh: Mesh | None) -> None:
    """Reads an export back: each weight must be the same, bit for bit, and so must the logits be,
    up to the rounding of sums."""
    config = given.experiment.model
    again = run.load(folder, mesh=mesh, compute=given.experiment.precision.compute)
    tokens_bt = np.random.default_rng(0).integers(0, config.vocab, (1, 32))
    found, wanted = (_logits(each, tokens_bt) for each in (again, given))
    params = again.params
    if model.shapes(again.experiment.model) != model.shapes(config):  # stacked in another way
        where = jax.tree.map(lambda x: x.sharding, given.params)
        params = hf.Pretrained(folder).params(where, config=config)
    for path, x in trees.flatten(given.params).items():
        if not _same(x, trees.flatten(params)[path]):
            raise UserError(f"The export does not read back as it was written: {path} differs.")
    if not np.allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()):
        raise UserError("The export does not compute the logits of the run; please report it.")


def _logits(given: "run.Run", tokens_bt: np.ndarray) -> np.ndarray:
    z_btv = given.logits(tokens_bt)
    if given.mesh is not None:
        z_btv = jax.jit(lambda z: z, out_shardings=sharding.replicated(given.mesh))(z_btv)
    return np.asarray(z_btv)


@jax.jit
def _same(a: jax.Array, b: jax.Array) -> jax.Array:
    bits = f"uint{8 * a.dtype.itemsize}"
    return a.dtype == b.dtype and jnp.all(a.view(bits) == b.view(bits))


def card(given: "run.Run", facts: dict[str, Any], config: dict[str, Any]) -> str:
    """The model card: what it is, its data, its recipe and how it did."""
    e, count = given.experiment, model.parameter_count(given.experiment.model)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {e.name}",
        f"A {config['architectures'][0]} of {count.total:,} parameters"
        + (f", {count.active:,} of them active" if count.active != count.total else "")
        + f", after {given.step:,} updates.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```",
        "## Data",
        _data_table(facts),
        "## Recipe",
        *_recipe(given),
        "## Evaluation",
        _evaluation_table(given),
        f"The declaration, as lm {facts.get('git') or ''} wrote it:",
        f"```text\n{describe(e)}\n```",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _data_table(facts: dict[str, Any]) -> str:
    counts = facts.get("data", {}).get("counts", {})
    if not counts:
        return "None here: the weights were imported."
    rows = [
        f"| {name} | {c['documents']:,} | {c['tokens']:,} | {c['bytes']:,} |"
        for name, c in counts.items()
    ]
    return "\n".join(["| text | documents | tokens | bytes |", "|---|---|---|---|", *rows])


def _recipe(given: "run.Run") -> Iterator[str]:
    e = given.experiment
    if e.start is not None:
        yield f"Began with the weights of {epath.Path(e.start).name}."
    if given.step:
        yield (
            f"{given.step:,} updates, {e.batch.tokens_before(given.step):,} tokens in sequences of "
            f"{e.batch.length:,}; {type(e.optimizer).__name__}, {type(e.schedule).__name__} with a "
            f"peak of {e.schedule.peak:g}; weights in {e.precision.params}, arithmetic in "
            f"{e.precision.compute}; seed {e.seed}."
        )


def _evaluation_table(given: "run.Run") -> str:
    path = given.folder / "eval.jsonl"
    lines = training.read_lines(path) if path.exists() else []
    found = [line for line in lines if line["step"] == given.step]
    if not found:
        return "None yet."
    rows = []
    for line in found:
        error = "" if line["stderr"] is None else f"{line['stderr']:.4f}"
        rows.append(f"| {line['name']} | {line['value']:.4f} | {error} | {line['count']:,} |")
    head = ["| measure | value | standard error | tokens |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])
