"""A complete experiment small enough for tests, and text to train it on."""

import contextlib
import dataclasses
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from lm import checkpoint, data, evals, model, optim, training
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place

STEPS, LENGTH = 8, 32

_LINE = "the tree of light and a stone in its river by night under one sky"


def texts(count: int = 40, seed: int = 0) -> tuple[str, ...]:
    """Returns distinct documents of a few lines each."""
    draw, words = random.Random(seed), _LINE.split()

    def line() -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, 9)))

    return tuple("\n".join(line() for _ in range(draw.randint(2, 8))) for _ in range(count))


def write_texts(folder: Path, count: int = 40, seed: int = 0) -> str:
    """Writes `texts` to files in `folder`; returns a glob pattern that matches them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(texts(count, seed)):
        (folder / f"{index:03d}.txt").write_text(text)
    return str(folder / "*.txt")


def config(**fields) -> model.Config:
    attention = model.GQA(heads=2, kv_heads=1, head_dim=8, position=model.RoPE())
    base = model.Config(
        vocab=320, dim=16, layers=2, attention=attention, ffn=model.SwiGLU(hidden=32)
    )
    return dataclasses.replace(base, **fields)


def experiment(**fields) -> Experiment:
    base = Experiment(
        name="tiny",
        model=config(),
        data=data.Documents(texts=texts(), held_out=0.1),
        tokenizer=data.SentencePiece(vocab=320),
        batch=data.BatchShape(sequences=4, length=LENGTH),
        optimizer=optim.AdamW(clip_norm=1.0),
        schedule=optim.WSD(peak=1e-2, warmup=1, decay=0.5, steps=STEPS),
        evals=(evals.Perplexity(every=4),),
        save=checkpoint.Save(every=4),
        log=training.Log(every=2),
        places={"cpu": Place(mesh=Mesh())},
    )
    return dataclasses.replace(base, **fields)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Result of training the tiny experiment on text files with `lm.main.main`.

    Attributes:
      home: folder that contains texts/ and runs/.
      declare: function that returns the experiment, like `experiment` in an experiment file.
      folder: run folder.
      out: captured stdout.
      err: captured stderr.
    """

    home: Path
    declare: Callable[[], Experiment]
    folder: Path
    out: str
    err: str

    def copy(self, to: Path) -> Path:
        """Copies runs/ into `to`, for tests that modify it; returns the copy."""
        shutil.copytree(self.home / "runs", to / "runs")
        return to / "runs"


def trained(home: Path) -> Trained:
    """Writes text files to `home` and trains the tiny experiment on them."""
    declared = experiment(data=data.Text(path=write_texts(home / "texts"), held_out=0.1))

    def declare() -> Experiment:
        return declared

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(declare, ["--workdir", str(home / "runs")])
    return Trained(home, declare, home / "runs" / "tiny", out.getvalue(), err.getvalue())


def losses(folder: Path) -> list[float]:
    """Returns the losses in metrics.jsonl; checks that each step is logged exactly once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
