"""What is printed and drawn when training ends."""

import shlex
import sys
from typing import Any

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


def _conversations(run: Run) -> list[data.Conversations]:
    """The sources of conversations that the run was trained on; none if its tokenizer has no chat
    template."""
    try:
        data.chat_template(run.tokenizer)
    except UserError:
        return []
    sources = data.sources_of(run.experiment.data)
    return [source for source in sources if isinstance(source, data.Conversations)]


def _samples(run: Run) -> list[str]:
    """The prompts of the declaration with their continuations; with answers, if the run was trained
    on conversations."""
    chats = _conversations(run)

    def sample(prompt: str) -> str:
        if not chats:
            return prompt + run.generate(prompt, max_tokens=96, temperature=0.5)
        conversation = run.chat(system=chats[0].system, temperature=0.5)
        conversation.say(prompt, max_tokens=96)
        return "\n".join(f"{each['role']}: {each['content']}" for each in conversation.messages)

    samples = []
    for prompt in run.experiment.prompts:
        try:
            samples.append(sample(prompt))
        except UserError as error:  # the weights may not be finite
            samples.append(f"{prompt}... ({error})")
    return samples


def _held_out(run: Run, prepared: data.Prepared) -> list[str]:
    """The results of the last evaluation, without loss and perplexity where bits per byte say the
    same. Those of whole texts stand beside those of xz."""
    lines = []
    for source, results in _last_results(run).items():
        shown = []
        for measure, result in results.items():
            of_text = measure == "bits_per_byte" and source in prepared.held_out
            is_whole = of_text and not prepared.stream(source, "held_out").has_weights
            if "bits_per_byte" in results and measure in ("loss", "perplexity"):
                continue
            words = measure.replace("_", " ") + (" of answers" if of_text and not is_whole else "")
            spread = f" ± {result['stderr']:.4f}" if result["stderr"] is not None else ""
            shown.append(f"{result['value']:.4f}{spread} {words} ({source})")
            if is_whole:
                shown.append(f"{evals.xz_bits_per_byte(prepared.texts(source)):.4f} by xz -9")
        lines += [f"{'Held out' if text is shown[0] else '':12}{text}" for text in shown]
    return lines


def _last_results(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """{source: {measure: line of eval.jsonl}} of the last step."""
    sources: dict[str, dict[str, dict[str, Any]]] = {}
    for line in training.read_lines(run.folder / "eval.jsonl"):
        if line["step"] == run.step and line["value"] is not None:
            source, _, measure = line["name"].rpartition("/")
            sources.setdefault(source, {})[measure] = line
    return sources


def _next_commands(run: Run, prefix: str) -> list[str]:
    prompt = next(iter(run.experiment.prompts), "The")
    commands = []
    if run.experiment.model.head == "vocab":  # not a reward model
        if _conversations(run):
            commands.append(f"python -m lm chat {run.folder}")
        else:
            continued = f'--prompt "{prompt}" --temperature 0.8'
            commands.append(f"python -m lm generate {run.folder} {continued}")
        commands.append(f"python -m lm eval {run.folder} --data FILE")
    longer = f"{_this_command(prefix)} --set {prefix}schedule.steps={2 * run.step}"
    return [*commands, f"{longer}  # a new, longer run"]


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
