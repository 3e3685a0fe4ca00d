"""What is printed and drawn when training ends."""

import shlex
import sys

from etils import epath

from lm import data, evals, terminal, training
from lm.errors import UserError
from lm.parallel import distributed
from lm.runs import Run


def finish(run: Run, prepared: data.Prepared, prefix: str = "") -> None:
    """Draws the loss curve and prints results, samples and the next commands, on process 0.

    `prefix` stands before the run's paths in --set, as "midtrain." of a stage of a recipe.
    """
    # All processes generate, since all hold parts of the weights.
    samples = [] if run.stopped else _samples(run)
    if not distributed.is_main():
        return
    plot = _draw(run)
    if run.stopped:
        terminal.note(
            f"Stopped and saved at step {run.step}: {run.folder}. The same command resumes it."
        )
        return
    lines = ["", f"Trained {run.experiment.name} to step {run.step}.", *_held_out(run, prepared)]
    lines += [f"Loss curve  {plot}", f"Checkpoint  {run.folder / 'checkpoints' / str(run.step)}"]
    for sample in samples:
        lines += ["Sample", terminal.indent(sample)]
    commands = _next_commands(run, prefix)
    print("\n".join([*lines, "Next", *(f"  {command}" for command in commands)]))


def say_complete(run: Run, steps: int, prefix: str = "") -> None:
    """Prints that the run is complete, and the next commands, on process 0."""
    if not distributed.is_main():
        return
    if not (run.folder / "plots" / "loss.png").exists():
        _draw(run)  # stopped between its last checkpoint and its plot
    print(f"{run.folder} is complete at step {steps} of {steps}. Next:")
    print("\n".join(f"  {command}" for command in _next_commands(run, prefix)))
    print(f"To train it again, delete {run.folder} or add --set name=NAME.")


def _draw(run: Run) -> epath.Path:
    """Draws the loss curve from metrics.jsonl and eval.jsonl."""
    plot = run.folder / "plots" / "loss.png"
    training.plot_loss(
        run.folder / "metrics.jsonl", run.folder / "eval.jsonl", plot, run.experiment.name
    )
    return plot


def _samples(run: Run) -> list[str]:
    """The prompts of the declaration with their continuations."""
    samples = []
    for prompt in run.experiment.prompts:
        try:
            samples.append(prompt + run.generate(prompt, max_tokens=96, temperature=0.5))
        except UserError as error:  # the weights may not be finite
            samples.append(f"{prompt}... ({error})")
    return samples


def _held_out(run: Run, prepared: data.Prepared) -> list[str]:
    """Bits per byte of the last evaluation, and of xz on the same text."""
    lines = []
    for result in training.read_lines(run.folder / "eval.jsonl"):
        measured = result["name"].endswith("/bits_per_byte") and result["value"] is not None
        if result["step"] == run.step and measured:
            spread = f" ± {result['stderr']:.4f}" if result["stderr"] is not None else ""
            source = result["name"].removesuffix("/bits_per_byte")
            by_xz = evals.xz_bits_per_byte(prepared.texts(source))
            lines.append(f"Held out    {result['value']:.4f}{spread} bits per byte ({source})")
            lines.append(f"            {by_xz:.4f} by xz -9")
    return lines


def _next_commands(run: Run, prefix: str) -> list[str]:
    prompt = next(iter(run.experiment.prompts), "The")
    longer = f"{_this_command(prefix)} --set {prefix}schedule.steps={2 * run.step}"
    return [
        f'python -m lm generate {run.folder} --prompt "{prompt}" --temperature 0.8',
        f"python -m lm eval {run.folder} --data FILE",
        f"{longer}  # a new, longer run",
    ]


def _this_command(prefix: str = "") -> str:
    """The command as it was typed, without the options that name this run."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:  # a notebook
        return "python -m experiments.NAME"
    typed = sys.argv[1:]
    kept = [
        word
        for word, after in zip(typed, [*typed, ""][1:], strict=True)
        if not _names_this_run(word, prefix)
        and not (word == "--set" and _names_this_run(after, prefix))
    ]
    return shlex.join(["python", "-m", spec.name, *kept])


def _names_this_run(word: str, prefix: str) -> bool:
    return word.removeprefix("--set=").startswith((f"{prefix}schedule.steps=", "name="))
