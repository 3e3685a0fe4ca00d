"""The smallest experiment that is a whole one, and text for it."""

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
    """Different documents of a few lines."""
    draw, words = random.Random(seed), _LINE.split()

    def line() -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, 9)))

    return tuple("\n".join(line() for _ in range(draw.randint(2, 8))) for _ in range(count))


def write_texts(folder: Path, count: int = 40, seed: int = 0) -> str:
    """The same as files; returns their glob."""
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
    """What training the tiny experiment on files left, through the door of an experiment file.

    home      holds texts/ and runs/
    declare   the experiment, as an experiment file gives it
    folder    the run's
    out, err  what was said
    """

    home: Path
    declare: Callable[[], Experiment]
    folder: Path
    out: str
    err: str

    def copy(self, to: Path) -> Path:
        """Its runs/ elsewhere, to be changed or damaged."""
        shutil.copytree(self.home / "runs", to / "runs")
        return to / "runs"


def trained(home: Path) -> Trained:
    """Texts, and the tiny experiment trained on them."""
    declared = experiment(data=data.Text(path=write_texts(home / "texts"), held_out=0.1))

    def declare() -> Experiment:
        return declared

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(declare, ["--workdir", str(home / "runs")])
    return Trained(home, declare, home / "runs" / "tiny", out.getvalue(), err.getvalue())


def losses(folder: Path) -> list[float]:
    """Of metrics.jsonl, after checking that each step is there once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
