"""The conductor. `train` plays an Experiment from raw text to a finished run, `load` opens a run.

A run lies in WORKDIR/NAME/ (the README names its files). Prepared text lies in WORKDIR/data/ and is
shared by all runs that read the same text with the same tokenizer.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from lm import checkpoint, data, evals, generate, hf, model, optim, terminal, training, trees
from lm.data.batch import Batch
from lm.errors import UserError
from lm.experiment import MAY_CHANGE, Experiment, differences, from_json, identity, to_json
from lm.parallel import distributed, hardware, sharding
from lm.parallel.mesh import Mesh, Place, choose
from lm.precision import Precision

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


def train(
    experiment: Experiment,
    *,
    on: str | None = None,
    mesh: Mesh | None = None,
    workdir: str | os.PathLike = "runs",
) -> "Run":
    """Trains into WORKDIR/NAME/, or goes on where an earlier call was stopped or killed.

    Args:
        on: one of the experiment's places; default: the first that fits this machine.
        mesh: in place of that place's own mesh.

    Raises UserError for what the user can mend, before anything is compiled where that is possible.
    """
    distributed.initialize()
    use_compilation_cache()
    program = assemble(experiment, on, mesh)
    folder = epath.Path(workdir) / experiment.name
    written = _read_declaration(folder)
    _check_same(folder, written, experiment)
    begin = None if written or experiment.start is None else Start(experiment)
    steps = program.schedule.steps
    with checkpoint.Store(folder / "checkpoints", experiment.save) as store:
        distributed.check_shared(folder, store.latest())
        if (store.latest() or 0) >= steps:
            return _say_complete(load(folder), steps)
        prepared = prepare(experiment, workdir)
        _check_same_text(folder, written, prepared)
        origin = begin.origin if begin else (written or {}).get("origin")
        _write_declaration(folder, program, prepared, origin)
        outcome, stopped = _play(program, prepared, store, folder)
    run = Run(
        folder=folder,
        experiment=experiment,
        tokenizer=prepared.tokenizer,
        params=outcome.state.params,
        step=outcome.step,
        stopped=stopped,
        mesh=program.mesh,
    )
    _finish(run, prepared)
    return run


def _play(
    program: "Program", prepared: data.Prepared, store: checkpoint.Store, folder: epath.Path
) -> tuple[training.Outcome, str | None]:
    """The loop, from the newest checkpoint or from the beginning; and what stopped it early."""
    experiment, steps = program.experiment, program.schedule.steps
    start = store.latest() or 0
    if start and distributed.is_main():
        terminal.note(f"Resuming {folder} from step {start} of {steps}.")
    state = store.restore(program.abstract) if start else _first_state(program)
    loader = prepared.loader(experiment.batch, experiment.seed)

    def batch(step: int) -> Batch:
        sequences = experiment.batch.sequences_at(step)
        return program.put(lambda rows: loader.batch(step, rows), sequences)

    writers = experiment.log.writers(
        folder,
        name=experiment.name,
        after=start,
        steps=steps,
        declaration=to_json(experiment),
    )
    rates = training.Rates(
        tokens_before=experiment.batch.tokens_before,
        flops_per_token=model.train_flops(experiment.model, experiment.batch.length),
        peak_flops=hardware.machine_flops(program.mesh, experiment.precision.compute),
        bytes_per_token=loader.bytes_per_token,
    )
    batches = contextlib.closing(data.prefetch(batch, start, steps))
    with training.Stopper() as stopper, batches as ahead:
        outcome = training.loop(
            state,
            program.step,
            ahead,
            start=start,
            steps=steps,
            rates=rates,
            evaluators=_evaluators(program, prepared),
            writers=writers,
            store=store,
            stopper=stopper,
        )
    for writer in writers:
        writer.close()
    return outcome, stopper.cause if outcome.stopped else None


def _first_state(program: "Program") -> training.State:
    """Before the first step: fresh weights, or those of `experiment.start`; born sharded."""
    e = program.experiment
    if e.start is None:
        return program.init()
    params = Start(e).params(program.shardings.params)
    return training.init_state_from(params, program.transformation, e.precision, program.shardings)


class Start:
    """What `experiment.start` names: a run folder or a Hugging Face folder. Opening it checks that
    its weights are those of `experiment.model`.

    origin  the config.json and generation_config.json that the weights came with, if they did
    """

    def __init__(self, experiment: Experiment):
        self._experiment, folder = experiment, epath.Path(str(experiment.start))
        written = _read_declaration(folder)
        self._pretrained = None if written else _pretrained(folder)
        self.origin = written.get("origin") if written else _origin(self._pretrained)
        there = _declared(folder, written).model if written else self._pretrained.config
        self._folder = folder
        self._check_fits(there)

    def params(self, shardings: Any) -> Any:
        """The weights, in the run's storage format."""
        stored = self._experiment.precision.params
        if self._pretrained:
            return self._pretrained.params(shardings, stored)
        params = checkpoint.Store(self._folder / "checkpoints").restore_params(None, shardings)
        return self._experiment.precision.to_params(params)

    def _check_fits(self, there: model.Config) -> None:
        sizes = [trees.flatten(model.shapes(c)) for c in (self._experiment.model, there)]
        for path in dict.fromkeys([*sizes[0], *sizes[1]]):
            here, found = (
                "absent" if path not in flat else str(list(flat[path].shape)) for flat in sizes
            )
            if here != found:
                raise UserError(
                    f"start={str(self._folder)!r} holds another model: {path} is {found} there "
                    f"and {here} here; declare model=run.load_declaration(start).model."
                )


def _pretrained(folder: epath.Path) -> hf.Pretrained:
    if not hf.is_pretrained(folder):
        raise UserError(
            f"{folder} is neither a run folder (it has no experiment.json) nor a Hugging Face "
            "folder (it has no config.json)."
        )
    return hf.Pretrained(folder)


def _origin(pretrained: hf.Pretrained) -> dict[str, Any]:
    return {"config": pretrained.given, "generation_config": pretrained.generation}


def _evaluators(program: "Program", prepared: data.Prepared) -> list[training.Evaluator]:
    """One per entry of `experiment.evals`, over the held-out text of its sources."""
    experiment = program.experiment

    def evaluator(declared: evals.Perplexity) -> training.Evaluator:
        sources = prepared.held_out if declared.source is None else (declared.source,)
        sequences = declared.sequences or experiment.batch.sequences_at(0)
        held_out = [
            prepared.evaluation(source, experiment.batch.length, sequences) for source in sources
        ]

        def run(step: int, params: Any) -> list[evals.Result]:
            results = []
            for evaluation in held_out:
                results += evals.evaluate(
                    experiment.model,
                    params,
                    evaluation,
                    step=step,
                    batches=declared.batches,
                    precision=experiment.precision,
                    mesh=program.mesh,
                )
            return results

        return training.Evaluator(declared.every, run)

    return [evaluator(declared) for declared in experiment.evals]


@dataclasses.dataclass(frozen=True)
class Program:
    """What an experiment compiles to at a place. Making one allocates nothing."""

    experiment: Experiment
    place_name: str
    place: Place
    mesh: jax.sharding.Mesh
    rules: sharding.Rules
    schedule: Any  # with every duration in steps
    transformation: Any
    shardings: training.State
    abstract: training.State
    step: Any  # jitted (state, batch) -> (state, metrics); the state is donated

    def init(self) -> training.State:
        """The state before the first step, born sharded."""
        e = self.experiment
        return training.init_state(
            *(e.model, self.transformation, e.precision, e.seed, self.mesh, self.rules),
            offload=self.place.offload,
        )

    def abstract_batch(self) -> Batch:
        """Shapes, formats and places of a full batch, without any data."""
        batch = self.experiment.batch
        where = sharding.batch_sharding(self.mesh)
        formats = {"weights": jax.numpy.float32}
        return Batch(
            *(
                jax.ShapeDtypeStruct(
                    (batch.sequences, batch.length),
                    formats.get(name, jax.numpy.int32),
                    sharding=where,
                )
                for name in Batch._fields
            )
        )

    def put(self, rows: Callable[[slice], Batch], sequences: int) -> Batch:
        """The global batch on the devices; each process reads only the rows that its own hold."""
        shape = (sequences, self.experiment.batch.length)
        where = sharding.batch_sharding(self.mesh)
        indices = where.addressable_devices_indices_map(shape).values()
        read = {span: rows(slice(*span)) for span in {_span(i, sequences) for i in indices}}

        def place(field: int) -> jax.Array:
            return jax.make_array_from_callback(
                shape, where, lambda index: read[_span(index, sequences)][field][:, index[1]]
            )

        return Batch(*(place(field) for field in range(len(Batch._fields))))


def _span(index: tuple[slice, ...], rows: int) -> tuple[int, int]:
    start, stop, _ = index[0].indices(rows)
    return start, stop


def assemble(experiment: Experiment, on: str | None = None, mesh: Mesh | None = None) -> Program:
    """The program of an experiment at a place. Raises UserError where this machine cannot be it."""
    name, place = choose(experiment.places, on, mesh)
    return assemble_at(experiment, name, place)


def assemble_at(
    experiment: Experiment, name: str, place: Place, devices: Sequence[jax.Device] | None = None
) -> Program:
    """The program at this place, on `devices` (default: this machine's), which may be those of a
    machine that is only described."""
    experiment.check_place(place)
    built, rules = place.mesh.build(devices), sharding.rules_at(place)
    e = experiment
    schedule = e.schedule.resolve(e.batch)
    transformation = e.optimizer.build(schedule.at, model.axes(e.model))
    shardings = training.state_shardings(
        e.model, transformation, e.precision, built, rules, place.offload
    )
    step = training.make_step(
        e.model,
        e.objective,
        e.optimizer,
        schedule.at,
        e.precision,
        microbatches=place.microbatches,
        circular_repeats=place.circular_repeats,
        remat=place.remat,
        accumulate=place.accumulate,
        offload=place.offload,
        seed=e.seed,
    )
    return Program(
        experiment=e,
        place_name=name,
        place=place,
        mesh=built,
        rules=rules,
        schedule=schedule,
        transformation=transformation,
        shardings=shardings,
        abstract=training.abstract_state(e.model, transformation, e.precision, shardings),
        step=training.compile_step(step, shardings, built, rules),
    )


def use_compilation_cache() -> None:
    """Keeps compiled programs for later: in JAX_COMPILATION_CACHE_DIR, or ~/.cache/lm/jax."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(_cache() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lm"


def prepare(experiment: Experiment, workdir: str | os.PathLike = "runs") -> data.Prepared:
    """The experiment's text as token shards, made now or found in WORKDIR/data/.

    Where WORKDIR is a bucket, each host keeps its own copy under ~/.cache/lm/data: what is made
    from the same text is the same, byte for byte.
    """
    parent = _cache() / "data" if "://" in str(workdir) else Path(workdir) / "data"
    recipe = json.dumps(data.recipe(experiment.data, experiment.tokenizer), sort_keys=True)
    folder = parent / hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def make() -> data.Prepared:
        show = terminal.progress if distributed.is_main() else None
        return data.prepare(experiment.data, experiment.tokenizer, folder, progress=show)

    if distributed.is_main():
        prepared = make()
    distributed.barrier("data prepared")
    return prepared if distributed.is_main() else make()


@dataclasses.dataclass(kw_only=True)
class Run:
    """A trained model and its folder.

    folder      where it lies
    experiment  what was declared
    tokenizer   text to ids and back; None for a Hugging Face folder without one
    params      nested dict of arrays
    step        updates that `params` have seen
    stopped     the signal that ended training early, if one did
    mesh        the jax mesh on which `params` lie; None for one device
    """

    folder: epath.Path
    experiment: Experiment
    tokenizer: data.Tokenizer | None
    params: dict[str, Any]
    step: int
    stopped: str | None = None
    mesh: jax.sharding.Mesh | None = None

    def logits(self, tokens_bt: Any) -> jax.Array:
        """[B, T] token ids -> [B, T, V] float32 logits of what follows each."""
        tokens_bt = np.asarray(tokens_bt, np.int32)
        ways = 1 if self.mesh is None else sharding.batch_ways(self.mesh)
        padding = ((0, -len(tokens_bt) % ways), (0, 0))
        logits_btv = _logits(
            self._compute_params(),
            np.pad(tokens_bt, padding),
            config=self.experiment.model,
            mesh=self.mesh,
        )
        return logits_btv[: len(tokens_bt)]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 64,
        context: int | None = None,
        temperature: float = 0.8,
        sampling: generate.Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> Any:
        """What follows each prompt: a string for a string, a list for a list.

        Args:
            context: most tokens of prompt and continuation; default: the length trained at.
            temperature: 0 takes the likeliest token; `sampling` in its place has all choices.
            stop: texts that end a continuation; they are left out of it.
            stream: called with (row, piece of text) as it comes.

        Raises UserError for a prompt longer than `context`.
        """
        texts = generate.generate_text(
            self.experiment.model,
            self._compute_params(),
            self._speaking(),
            [prompts] if isinstance(prompts, str) else list(prompts),
            context=context or self.experiment.batch.length,
            max_tokens=max_tokens,
            sampling=sampling or generate.Sampling(temperature=temperature),
            stop=stop,
            key=seed,
            stream=stream,
            mesh=self.mesh,
        )
        return texts[0].text if isinstance(prompts, str) else [text.text for text in texts]

    def evaluate(self, source: Any = None, *, context: int | None = None) -> list[evals.Result]:
        """Loss, perplexity and bits per byte with their standard errors.

        Args:
            source: a path or glob of text files, or one of lm.data's sources; None takes the
                held-out text of the run's own data.
            context: tokens of a sequence; default: the length trained at, at most 4,096.
        """
        e = self.experiment
        length, sequences = context or min(e.batch.length, 4096), e.batch.sequences_at(0)
        if source is None and e.data == NO_TEXT:
            raise UserError(f"{self.folder} came without text; name some, as in --data FILE.")
        if source is None:
            prepared = prepare(e, self.folder.parent)
            _check_same_text(self.folder, _read_declaration(self.folder), prepared)
            found = [prepared.evaluation(name, length, sequences) for name in prepared.held_out]
        else:
            source = data.Text(path=str(source)) if isinstance(source, str | Path) else source
            found = [data.evaluation(source, self._speaking(), length, sequences)]
        return [
            result
            for evaluation in found
            for result in evals.evaluate(
                e.model,
                self.params,
                evaluation,
                step=self.step,
                precision=e.precision,
                mesh=self.mesh,
            )
        ]

    def _speaking(self) -> data.Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"{self.folder} has neither tokenizer.json nor tokenizer.model.")
        return self.tokenizer

    def _compute_params(self) -> Any:
        return self.experiment.precision.to_compute(self.params)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _logits(
    params: Any, tokens_bt: jax.Array, *, config: model.Config, mesh: jax.sharding.Mesh | None
) -> jax.Array:
    # A static mesh, for jit would not notice a change of the surrounding `use`.
    with contextlib.nullcontext() if mesh is None else sharding.use(mesh, sharding.WHOLE_ROWS):
        hidden_btd = model.forward(config, params, tokens_bt).hidden_btd
        return model.logits(config, params, hidden_btd)


def load(
    folder: str | os.PathLike,
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
    compute: str | None = None,
) -> Run:
    """Opens a run folder or a Hugging Face folder, on one device or a mesh.

    Args:
        step: of the checkpoint; default: the newest. A Hugging Face folder has only step 0.
        compute: "float32" or "bfloat16", the arithmetic; default: that of the declaration, which
            for a Hugging Face folder is float32. The weights stay in the format they are stored in.

    Raises UserError where there is neither, no such checkpoint, or a damaged one.
    """
    folder = epath.Path(folder)
    experiment = load_declaration(folder)
    if compute is not None:
        precision = dataclasses.replace(experiment.precision, compute=compute, loss_scale=None)
        experiment = dataclasses.replace(experiment, precision=precision)
    use_compilation_cache()
    built = mesh.build() if mesh else None
    axes, shapes = model.axes(experiment.model), model.shapes(experiment.model)
    where = sharding.weight_shardings(axes, shapes, built) if built else None
    if _read_declaration(folder) is None:
        step, params = 0, hf.Pretrained(folder).params(where)
    else:
        store = checkpoint.Store(folder / "checkpoints")
        step = store.latest() if step is None else step
        if step is None:
            raise UserError(
                f"{folder} has no checkpoint yet; it was stopped before its first save."
            )
        params = store.restore_params(step, where)
    return Run(
        folder=folder,
        experiment=experiment,
        tokenizer=data.load_tokenizer(folder) if data.has_tokenizer(folder) else None,
        params=params,
        step=step,
        mesh=built,
    )


# The text of a model that was not trained here.
NO_TEXT = data.Documents(texts=(), held_out=0.0)


def load_declaration(folder: str | os.PathLike) -> Experiment:
    """The experiment that a run folder was made by; of a Hugging Face folder one that starts from
    it, to be given data and a schedule with dataclasses.replace."""
    folder = epath.Path(folder)
    written = _read_declaration(folder)
    if written is not None:
        return _declared(folder, written)
    found = _pretrained(folder)
    stored = found.stored()
    return Experiment(
        name=re.sub(r"[^A-Za-z0-9._+=,-]", "-", folder.name).lstrip("._+=,-") or "pretrained",
        start=str(folder),
        model=found.config,
        data=NO_TEXT,
        tokenizer=data.TokenizerFile(path=str(folder)),
        batch=data.BatchShape(sequences=1, length=found.length),
        optimizer=optim.AdamW(clip_norm=1.0),
        schedule=optim.Constant(peak=1e-5, steps=1),
        precision=Precision(params="bfloat16" if stored == {"bfloat16"} else "float32"),
    )


def _declared(folder: epath.Path, written: dict[str, Any]) -> Experiment:
    try:
        return from_json(written["experiment"])
    except UserError as refusal:
        raise UserError(f"{folder / 'experiment.json'}: {refusal}") from None


def _read_declaration(folder: epath.Path) -> dict[str, Any] | None:
    path = folder / "experiment.json"
    if not path.exists():
        return None
    try:
        written = json.loads(path.read_text())
    except ValueError:
        written = None
    if not isinstance(written, dict) or not written.keys() >= {"experiment", "data"}:
        raise UserError(
            f"{path} is damaged: it holds no declaration. Restore it, or delete {folder}."
        )
    return written


def _check_same(folder: epath.Path, written: dict[str, Any] | None, now: Experiment) -> None:
    if written is None:
        return
    before = _declared(folder, written)
    if identity(before) != identity(now):
        free = {name: getattr(now, name) for name in MAY_CHANGE}
        changed = "; ".join(differences(dataclasses.replace(before, **free), now))
        raise UserError(
            f"{folder} was begun with another declaration ({changed}). Give this one another name "
            "with --set name=NAME, or another --workdir."
        )


def _check_same_text(
    folder: epath.Path, written: dict[str, Any] | None, prepared: data.Prepared
) -> None:
    if written is not None and written["data"]["fingerprint"] != prepared.fingerprint:
        raise UserError(
            f"The text has changed since {folder} was begun. Bring back the files as they were, or "
            "begin another run with --set name=NAME."
        )


def _write_declaration(
    folder: epath.Path, program: Program, prepared: data.Prepared, origin: dict[str, Any] | None
) -> None:
    """experiment.json and the tokenizer: with the checkpoints, all that a run needs later."""
    if not distributed.is_main():
        return
    counts = {
        f"{name}:{split}": dataclasses.asdict(count)
        for (name, split), count in prepared.counts.items()
    }
    facts = {
        "data": {"fingerprint": prepared.fingerprint, "counts": counts},
        "place": {"name": program.place_name, "mesh": str(program.place.mesh)},
        "devices": [device.device_kind for device in program.mesh.devices.flat],
    }
    write_facts(folder, program.experiment, facts | ({"origin": origin} if origin else {}))
    prepared.tokenizer.save(folder)


def write_facts(folder: epath.Path, experiment: Experiment, facts: dict[str, Any]) -> None:
    """experiment.json: the declaration, these facts, and by what it was made."""
    made_by = {
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": _git_revision(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / "experiment.json.new"
    written = {"experiment": to_json(experiment), **facts, **made_by}
    aside.write_text(json.dumps(written, indent=1) + "\n")
    aside.replace(folder / "experiment.json")


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """What experiment.json holds beside the declaration; of a Hugging Face folder, its origin."""
    folder = epath.Path(folder)
    return _read_declaration(folder) or {"origin": _origin(_pretrained(folder))}


def _git_revision() -> str | None:
    """Of the code that runs, with '+' where it has uncommitted changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _finish(run: Run, prepared: data.Prepared) -> None:
    """What a person is told when the loop has ended."""
    samples = [] if run.stopped else _samples(run)  # by all processes, as all hold the weights
    if not distributed.is_main():
        return
    plot = _draw(run)
    if run.stopped:
        terminal.note(
            f"Stopped and saved at step {run.step}: {run.folder}. "
            "The same command goes on from there."
        )
        return
    lines = ["", f"Trained {run.experiment.name} to step {run.step}.", *_held_out(run, prepared)]
    lines += [f"Loss curve  {plot}", f"Checkpoint  {run.folder / 'checkpoints' / str(run.step)}"]
    for sample in samples:
        lines += ["Sample", terminal.indent(sample)]
    print("\n".join([*lines, "Next", *(f"  {command}" for command in _next_commands(run))]))


def _draw(run: Run) -> epath.Path:
    """The loss curve, from what was logged."""
    plot = run.folder / "plots" / "loss.png"
    training.plot_loss(
        run.folder / "metrics.jsonl", run.folder / "eval.jsonl", plot, run.experiment.name
    )
    return plot


def _samples(run: Run) -> list[str]:
    """The prompts of the declaration, continued."""
    prompts = run.experiment.sample or ()
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    return [p + run.generate(p, max_tokens=96, temperature=0.5) for p in prompts]


def _held_out(run: Run, prepared: data.Prepared) -> list[str]:
    """Bits per byte of the last evaluation, beside what xz makes of the same text."""
    lines = []
    for result in training.read_lines(run.folder / "eval.jsonl"):
        if result["step"] == run.step and result["name"].endswith("/bits_per_byte"):
            spread = f" ± {result['stderr']:.4f}" if result["stderr"] is not None else ""
            source = result["name"].removesuffix("/bits_per_byte")
            by_xz = evals.xz_bits_per_byte(prepared.texts(source))
            lines.append(f"Held out    {result['value']:.4f}{spread} bits per byte ({source})")
            lines.append(f"            {by_xz:.4f} by xz -9")
    return lines


def _next_commands(run: Run) -> list[str]:
    prompts = run.experiment.sample
    prompt = (prompts if isinstance(prompts, str) else prompts[0]) if prompts else "The"
    return [
        f'python -m lm generate {run.folder} --prompt "{prompt}" --temperature 0.8',
        f"python -m lm eval {run.folder} --data FILE",
        f"{_this_command()} --set schedule.steps={2 * run.step}",
    ]


def _this_command() -> str:
    """As it was typed, but for the run's length and name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:  # a notebook
        return "python -m experiments.NAME"
    typed = sys.argv[1:]
    kept = [
        word
        for word, after in zip(typed, [*typed, ""][1:], strict=True)
        if not _names_this_run(word) and not (word == "--set" and _names_this_run(after))
    ]
    return shlex.join(["python", "-m", spec.name, *kept])


def _names_this_run(word: str) -> bool:
    return word.removeprefix("--set=").startswith(("schedule.steps=", "name="))


def _say_complete(run: Run, steps: int) -> Run:
    if distributed.is_main():
        if not (run.folder / "plots" / "loss.png").exists():
            _draw(run)  # stopped between its last checkpoint and its plot
        print(f"{run.folder} is complete at step {steps} of {steps}. What can be done with it:")
        print("\n".join(f"  {command}" for command in _next_commands(run)))
        print(f"To train it anew, delete {run.folder} or give --set name=NAME.")
    return run
