"""The text of an experiment as token shards, prepared once and shared by all runs that read it."""

import hashlib
import json
import os
from pathlib import Path

from lm import data, terminal
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
