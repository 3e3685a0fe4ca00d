"""The text of an experiment as token shards, prepared once and shared by all runs that read it."""

import hashlib
import json
import os
from pathlib import Path

from lm import data, evals, generate, model, terminal
from lm.errors import UserError
from lm.experiment import Experiment, Stage
from lm.parallel import distributed
from lm.program import cache_folder


def prepare(experiment: Experiment, workdir: str | os.PathLike = "runs") -> data.Prepared:
    """The token shards in WORKDIR/data/, written now if they do not exist.

    If WORKDIR is a bucket, each host keeps its own copy under ~/.cache/lm/data: the same text gives
    the same shards, byte for byte.
    """
    parent = cache_folder() / "data" if "://" in str(workdir) else Path(workdir) / "data"
    tokenizer = experiment.tokenizer
    if tokenizer is None:
        tokenizer = experiment.start
    if isinstance(tokenizer, str):
        tokenizer = data.TokenizerFile(path=tokenizer)
    if isinstance(tokenizer, Stage):
        tokenizer = data.TokenizerFile(path=os.path.join(workdir, tokenizer.name))
    recipe = json.dumps(data.recipe(experiment.data, tokenizer), sort_keys=True)
    folder = parent / hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def make() -> data.Prepared:
        progress = terminal.progress if distributed.is_main() else None
        return data.prepare(experiment.data, tokenizer, folder, progress=progress)

    if distributed.is_main():
        prepared = make()
    distributed.barrier("data prepared")
    return prepared if distributed.is_main() else make()


def check(experiment: Experiment, prepared: data.Prepared) -> None:
    """Raises UserError for what would fail only during training or after it."""
    if prepared.tokenizer.vocab > experiment.model.vocab:
        streams = [prepared.stream(name, split) for name, split in prepared.counts]
        check_token(max(stream.largest_token for stream in streams), experiment.model)
    for evaluator in experiment.evals:
        if isinstance(evaluator, evals.Validation):
            evaluator.check(experiment.objective)
        measures_text = isinstance(evaluator, evals.Perplexity | evals.Validation)
        if measures_text and not prepared.held_out:
            raise UserError(
                "evals measures held-out text, and data holds out none: set data.held_out=0.05, or "
                "leave evals out."
            )
        for source in evaluator.sources():
            prepared.check_held_out(source)
    try:
        generate.check_prompts(
            experiment.model, prepared.tokenizer, experiment.prompts, experiment.batch.length
        )
    except UserError as error:
        raise UserError(f"sample: {error}") from None


def check_token(largest: int, config: model.Config) -> None:
    """Raises UserError if text has tokens that the model does not know."""
    if largest >= config.vocab:
        raise UserError(
            f"The tokenizer gives token {largest}, and model.vocab={config.vocab} ends before it; "
            "the tokenizer is of another model."
        )
