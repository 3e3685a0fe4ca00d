"""The smallest experiment that is a whole one, and text for it."""

import random
from pathlib import Path

from lm import checkpoint, data, evals, model, optim, train
from lm.experiment import Experiment
from lm.mesh import Mesh, Place

STEPS, LENGTH = 8, 32

_WORDS = "the tree of light and a stone in its river by night under one sky".split()


def texts(count: int = 40, seed: int = 0) -> tuple[str, ...]:
    """Different documents of a few lines."""
    draw = random.Random(seed)

    def line() -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(3, 9)))

    return tuple("\n".join(line() for _ in range(draw.randint(2, 8))) for _ in range(count))


def write_texts(folder: Path, count: int = 40, seed: int = 0) -> str:
    """The same as files; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(texts(count, seed)):
        (folder / f"{index:03d}.txt").write_text(text)
    return str(folder / "*.txt")


def config(**fields) -> model.Config:
    parts = dict(
        vocab=320,
        dim=16,
        layers=2,
        attention=model.GQA(heads=2, kv_heads=1, head_dim=8, position=model.RoPE()),
        ffn=model.SwiGLU(hidden=32),
    )
    return model.Config(**(parts | fields))


def experiment(**fields) -> Experiment:
    parts = dict(
        name="tiny",
        model=config(),
        data=data.Documents(texts=texts(), held_out=0.1),
        tokenizer=data.SentencePiece(vocab=320),
        batch=data.BatchShape(sequences=4, length=LENGTH),
        optimizer=optim.AdamW(clip_norm=1.0),
        schedule=optim.WSD(peak=1e-2, warmup=1, decay=0.5, steps=STEPS),
        evals=(evals.Perplexity(every=4),),
        save=checkpoint.Save(every=4),
        log=train.Log(every=2),
        places={"cpu": Place(mesh=Mesh())},
    )
    return Experiment(**(parts | fields))
