"""Imports Hugging Face folders as runs and exports runs as Hugging Face folders.

Both write to a temporary folder and rename it when it is complete. An export is first read back and
compared.
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

from lm import checkpoint, data, hf, model, terminal, training, trees
from lm.errors import UserError
from lm.experiment import Stage, check_folder_name, describe
from lm.folders import RunFolder, write_facts
from lm.hf import families
from lm.parallel import distributed, sharding
from lm.parallel.mesh import Mesh
from lm.precision import STORAGE, cast
from lm.runs import Run, load

SHARD_BYTES = 5 * 10**9  # of a safetensors file, as the Hugging Face Hub's tools write them


def import_run(
    source: str | os.PathLike, folder: str | os.PathLike, *, mesh: Mesh | None = None
) -> Run:
    """Makes a run folder from a Hugging Face folder: a declaration, the tokenizer, and the weights
    as the checkpoint of step 0. On a `mesh` each process reads and writes its devices' shards.

    Raises UserError if `folder` exists, or if the model is not supported.
    """
    target = _new(folder)
    try:
        check_folder_name(target.name)
    except UserError as error:
        raise UserError(f"{folder} cannot be a run's folder: {error}") from None
    if not hf.is_pretrained(source) and (epath.Path(source) / "experiment.json").exists():
        raise UserError(f"{source} is already a run; copy or export it.")
    run = load(source, mesh=mesh)
    tokenizer = data.TokenizerFile(path=str(folder))
    experiment = dataclasses.replace(run.experiment, name=target.name, tokenizer=tokenizer)
    with _complete(target) as temporary:
        with checkpoint.Store(temporary / "checkpoints", checkpoint.Save(every=1)) as store:
            store.save(0, {"params": run.params})
        if distributed.is_main():
            if run.tokenizer is not None:
                run.tokenizer.save(temporary)
            origin = RunFolder.existing(source).origin
            facts = {"data": {"fingerprint": None, "counts": {}}, "origin": origin}
            write_facts(temporary, experiment, facts)
    return dataclasses.replace(run, folder=target, experiment=experiment)


def _new(folder: str | os.PathLike) -> epath.Path:
    """The path of a folder to be made. Raises UserError if it exists and is not empty, or cannot be
    made."""
    target = epath.Path(str(folder).rstrip("/"))
    if "://" not in str(target):
        data.check_can_be_made(target)
        if Path(target).resolve() == Path.cwd():
            raise UserError(f"{folder!r} names the current folder; name another one.")
        if Path(target).is_symlink():  # a folder cannot be renamed to a link
            target = epath.Path(Path(target).resolve())  # epath's own does not follow links
    if not target.name:
        raise UserError(f"{folder!r} names no folder.")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists; delete it, or choose another name.")
    return target


@contextlib.contextmanager
def _complete(target: epath.Path) -> Iterator[epath.Path]:
    """A temporary folder to write into. It is renamed to `target` at the end, and deleted if
    anything fails. A bucket has no rename: there it is `target` from the start."""
    hidden = target.parent / f".{target.name}.lm-partial"  # a name that nobody chooses
    temporary = target if "://" in str(target) else hidden
    main = distributed.is_main()
    if main:
        if temporary.exists():
            temporary.rmtree()  # of a process that was killed
        temporary.mkdir(parents=True, exist_ok=True)
    distributed.barrier("temporary folder made")
    try:
        yield temporary
    except BaseException:
        if main:
            temporary.rmtree(missing_ok=True)
        raise
    distributed.barrier("folder complete")
    if main and temporary != target:
        if target.exists():
            target.rmdir()
        temporary.replace(target)
    distributed.barrier("folder renamed")


def export_run(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str | None = None,
    merge: bool = False,
    shard_bytes: int = SHARD_BYTES,
    mesh: Mesh | None = None,
) -> Path:
    """Writes a run as a Hugging Face folder that transformers loads. Reads it back and compares the
    weights, bit for bit, and the logits. Quantized weights are written dense.

    An adapter becomes a PEFT folder, beside the Hugging Face folder that the run started from.

    Args:
      step: of the checkpoint; None: the newest.
      merge: writes the whole model instead, with the adapter merged into its weights.
      dtype: "float32" or "bfloat16", of the exported weights; None: the run's own.
      shard_bytes: the largest size of a file.

    Raises UserError if `folder` exists, or if no supported Hugging Face family computes the model.
    """
    if dtype is not None and dtype not in STORAGE:
        raise UserError(f"dtype={dtype!r} is not known; use {' or '.join(STORAGE)}.")
    if "://" in str(folder):
        raise UserError(f"{folder}: an export goes to a local folder; copy it from there.")
    target = _new(folder)
    run, facts = load(source, step=step, mesh=mesh), _facts(source)
    origin = facts.get("origin") or {"config": {}, "generation_config": {}}
    length = _length(run, origin)
    adapter = run.experiment.model.adapter
    if adapter is not None and not merge:
        return _export_adapter(run, target, length, origin, mesh)
    if adapter is None and merge:
        raise UserError(f"{source} has no adapter to merge; export it without --merge.")
    run = _merged(run)
    family, fields = families.write(run.experiment.model, length, origin["config"])
    if dtype is not None:
        run = dataclasses.replace(run, params=cast(run.params, dtype))
    with _complete(target) as temporary:
        hf.write_pretrained(Path(temporary), family, run.experiment.model, run.params, shard_bytes)
        if distributed.is_main():
            _write_texts(Path(temporary), run, facts, origin, fields, length)
        distributed.barrier("exported")
        _check(temporary, run, mesh)
    return Path(target)


def _merged(run: Run) -> Run:
    """The run with dense weights that compute the same, without an adapter."""
    config = run.experiment.model
    if config.adapter is None and config.quant is None:
        return run
    params = model.merge(config, run.params)
    config = dataclasses.replace(config, adapter=None, quant=None)
    return dataclasses.replace(
        run, params=params, experiment=dataclasses.replace(run.experiment, model=config)
    )


def _export_adapter(
    run: Run, target: epath.Path, length: int, origin: dict[str, Any], mesh: Mesh | None
) -> Path:
    """Writes the adapter of a run as a PEFT folder, and compares its logits."""
    e = run.experiment
    base = e.start if isinstance(e.start, str) else None
    if base is not None and hf.is_adapter(base):
        base = hf.base_of(base)
    if base is None or not hf.is_pretrained(base):
        raise UserError(
            f"{run.folder} did not start from a Hugging Face folder, which PEFT would load beside "
            "the adapter; export the whole model with --merge."
        )
    plain = dataclasses.replace(e.model, adapter=None, quant=None)
    family, _ = families.write(plain, length, origin["config"])
    weights = {
        path: np.asarray(_replicated(x, run.mesh))
        for path, x in model.adapter_weights(e.model, run.params).items()
    }
    with _complete(target) as temporary:
        if distributed.is_main():
            hf.write_adapter(Path(temporary), family, e.model, weights, os.path.abspath(base))
            if run.tokenizer is not None:
                run.tokenizer.save(temporary)
        distributed.barrier("exported")
        exported = load(temporary, mesh=mesh, compute=e.precision.compute)
        _check_logits(exported, run)
    return Path(target)


def _facts(source: str | os.PathLike) -> dict[str, Any]:
    """Contents of experiment.json; of a Hugging Face folder, its origin."""
    folder = RunFolder.existing(source)
    return folder.facts or {"origin": folder.origin}


def _length(run: Run, origin: dict[str, Any]) -> int:
    return max(run.experiment.batch.length, origin["config"].get("max_position_embeddings") or 0)


def _write_texts(
    folder: Path,
    run: Run,
    facts: dict[str, Any],
    origin: dict[str, Any],
    fields: dict[str, Any],
    length: int,
) -> None:
    """Writes all files but the weights."""
    tokens = _special_tokens(run, origin)
    dtypes = {x.dtype.name for x in jax.tree.leaves(run.params)}
    config = {
        **fields,
        **tokens,
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        "use_cache": True,
    }
    _write_json(folder / hf.CONFIG, config)
    generation = origin["generation_config"] or {"_from_model_config": True, **tokens}
    _write_json(folder / hf.GENERATION, generation)
    if run.tokenizer is not None:
        for name, content in hf.export_files(run.tokenizer, length).items():
            if name != hf.GENERATION:
                (folder / name).write_bytes(content)
    card = data.replace_surrogates(model_card(run, facts, config))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(terminal.finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(data.replace_surrogates(text) + "\n", encoding="utf-8")


def _special_tokens(run: Run, origin: dict[str, Any]) -> dict[str, Any]:
    names = [f"{role}_token_id" for role in ("bos", "eos", "pad")]
    if origin["config"] or run.tokenizer is None:
        return {name: origin["config"].get(name) for name in names}
    return {name: getattr(run.tokenizer, name.removesuffix("_token_id")) for name in names}


def _check(folder: epath.Path, run: Run, mesh: Mesh | None) -> None:
    """Reads an export back. Raises UserError unless the weights are equal bit for bit, and the
    logits up to rounding."""
    config = run.experiment.model
    exported = load(folder, mesh=mesh, compute=run.experiment.precision.compute)
    params = exported.params
    if model.shapes(exported.experiment.model) != model.shapes(config):
        # The same layers, stacked differently: read them in the run's stacking.
        shardings = jax.tree.map(lambda x: x.sharding, run.params)
        params = hf.Pretrained(folder).params(shardings, config=config)
    for path, x in trees.flatten(run.params).items():
        if not _same(x, trees.flatten(params)[path]):
            raise UserError(
                f"The export failed: {path} differs when it is read back. Please report it."
            )
    _check_logits(exported, run)


def _check_logits(exported: Run, run: Run) -> None:
    """Raises UserError unless two runs give the same logits up to rounding."""
    tokens_bt = np.random.default_rng(0).integers(0, run.experiment.model.vocab, (1, 32))
    exported_logits, logits = (_logits(each, tokens_bt) for each in (exported, run))
    if not np.isfinite(logits).all():
        raise UserError(
            "The model's logits are not finite: its weights are not, or arithmetic overflows. "
            "Export an earlier checkpoint (--step)."
        )
    if not np.allclose(exported_logits, logits, rtol=0, atol=1e-4 * np.abs(logits).max()):
        raise UserError("The export failed: its logits differ from the run's. Please report it.")


def _logits(run: Run, tokens_bt: np.ndarray) -> np.ndarray:
    is_scalar = run.experiment.model.head == "scalar"
    computed = run.values(tokens_bt) if is_scalar else run.logits(tokens_bt)
    return np.asarray(_replicated(computed, run.mesh))


def _replicated(x: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    if mesh is None:
        return x
    return jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(x)


@jax.jit
def _same(a: jax.Array, b: jax.Array) -> jax.Array:
    bits = f"uint{8 * a.dtype.itemsize}"
    return a.dtype == b.dtype and jnp.all(a.view(bits) == b.view(bits))


def model_card(run: Run, facts: dict[str, Any], config: dict[str, Any]) -> str:
    """The README.md of an export: model, data, training and evaluation."""
    e, count = run.experiment, model.parameter_count(run.experiment.model)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {e.name}",
        f"A {config['architectures'][0]} with {count.total:,} parameters"
        + (f", {count.active:,} of them active" if count.active != count.total else "")
        + f", after {run.step:,} updates.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```",
        "## Data",
        _data_table(facts),
        "## Training",
        *_training(run),
        "## Evaluation",
        _evaluation_table(run),
        f"The experiment, as lm {facts.get('git') or ''} recorded it:",
        f"```text\n{describe(e)}\n```",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _data_table(facts: dict[str, Any]) -> str:
    counts = facts.get("data", {}).get("counts", {})
    if not counts:
        return "None: the weights were imported."
    rows = [
        f"| {name} | {c['documents']:,} | {c['tokens']:,} | {c['bytes']:,} |"
        for name, c in counts.items()
    ]
    return "\n".join(["| text | documents | tokens | bytes |", "|---|---|---|---|", *rows])


def _training(run: Run) -> Iterator[str]:
    e = run.experiment
    if e.start is not None:
        start = e.start.name if isinstance(e.start, Stage) else epath.Path(e.start).name
        yield f"Started from the weights of {start}."
    if run.step:
        yield (
            f"{run.step:,} updates, {e.batch.tokens_before(run.step):,} tokens in sequences of "
            f"{e.batch.length:,}; {type(e.optimizer).__name__}, {type(e.schedule).__name__} with a "
            f"peak of {e.schedule.peak:g}; weights in {e.precision.params}, arithmetic in "
            f"{e.precision.compute}; seed {e.seed}."
        )


def _evaluation_table(run: Run) -> str:
    path = run.folder / "eval.jsonl"
    lines = training.read_lines(path) if path.exists() else []
    lines = [line for line in lines if line["step"] == run.step]
    if not lines:
        return "None."
    rows = []
    for line in lines:
        value, error = (
            "" if line[name] is None else f"{line[name]:.4f}" for name in ("value", "stderr")
        )
        rows.append(f"| {line['name']} | {value} | {error} | {line['count']:,} |")
    head = ["| measure | value | standard error | tokens |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])
