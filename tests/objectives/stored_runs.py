"""Tiny runs of DPO and distillation, with and without stored numbers.

python stored_runs.py HOME dpo|distill MESH ...     trains the one with stored numbers on each mesh,
                                                    into HOME/runs/MESH/
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tiny_experiments import config, experiment, texts

import lm
from lm import checkpoint, data, evals, objectives, optim
from lm import stored as lm_stored
from lm.experiment import Experiment
from lm.parallel.mesh import Mesh

STEPS = 6
WORDS = ("light", "stone", "night", "tree")


def base(**fields) -> Experiment:
    return experiment(
        data=data.Documents(texts=texts(), held_out=0.1),
        schedule=optim.Constant(peak=1e-2, steps=STEPS),
        save=checkpoint.Save(every=2),
        evals=(evals.Validation(every=STEPS),),
        **fields,
    )


def dpo(home: Path) -> Experiment:
    """From fresh weights, which are also the reference. Two epochs."""
    path = home / "pairs.jsonl"
    if not path.exists():  # its time of change is part of the fingerprint of the data
        records = [
            {"prompt": f"the {word} {i}", "chosen": f"a {word}", "rejected": f"by a {word} river"}
            for i in range(10)
            for word in WORDS
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return replace(
        base(
            name="dpo",
            model=config(vocab=330, layers=1),
            tokenizer=data.SentencePiece(vocab=330, symbols=data.CHAT_SYMBOLS),
            batch=data.BatchShape(sequences=4, length=64, packing=data.Pairs()),
            objective=objectives.DPO(),
        ),
        data=data.Preferences(str(path), held_out=0.2),
    )


def distill(home: Path) -> Experiment:
    """Of the teacher in HOME/teacher, with the tokenizer HOME/tokenizer.model."""
    return base(
        name="distill",
        model=config(layers=1),
        tokenizer=data.TokenizerFile(path=str(home / "tokenizer.model")),
        objective=objectives.Distill(
            teacher=str(home / "teacher"), top_k=8, temperature=1.3, cross_entropy=0.1
        ),
    )


def stored(declared: Experiment) -> Experiment:
    return replace(
        declared,
        name=f"{declared.name}_stored",
        objective=replace(declared.objective, stored=True),
    )


if __name__ == "__main__":
    home, name, meshes = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    lm_stored.PART_BATCHES = 1
    declared = stored({"dpo": dpo, "distill": distill}[name](home))
    for mesh in meshes:
        lm.train(declared, mesh=Mesh.parse(mesh), workdir=home / "runs" / mesh)
