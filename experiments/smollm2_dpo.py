"""Fine-tunes SmolLM2-135M-Instruct on your own preference pairs with LoRA: first on the preferred
answers (SFT), then on the pairs (DPO).

    python -m experiments.smollm2_dpo --set sft.start=models/SmolLM2

`sft.start` is the model's Hugging Face folder. Both stages read `pairs.jsonl`, or what `--set
sft.data.path=FILE --set dpo.data.path=FILE` names; each line is an object such as
{"prompt": ..., "chosen": ..., "rejected": ...}: see `data.Preferences`. The reference of DPO is the
SFT stage. Both stages train one adapter, so beside the model they take little memory.

    python -m lm chat runs/smollm2_dpo/dpo
    python -m lm export runs/smollm2_dpo/dpo merged --merge
"""

from dataclasses import replace

from experiments import smollm2_lora
from lm import data, evals, objectives, optim
from lm.experiment import Experiment, Stage
from lm.main import main
from lm.recipe import Recipe


def sft() -> Experiment:
    """Learns to answer as the preferred answers do."""
    return replace(
        smollm2_lora.experiment(),
        name="sft",
        data=data.Chat(path="pairs.jsonl", held_out=0.05),
        batch=data.BatchShape(sequences=4, length=256),
        schedule=optim.Linear(peak=5e-4, warmup=0.1, steps=40),
        evals=(evals.Perplexity(every=20),),
    )


def dpo() -> Experiment:
    """Learns to prefer them to the rejected ones."""
    return replace(
        sft(),
        name="dpo",
        start=Stage("sft"),
        data=data.Preferences(path="pairs.jsonl", held_out=0.05),
        batch=data.BatchShape(sequences=4, length=256, packing=data.Pairs()),
        objective=objectives.DPO(beta=0.1),
        schedule=optim.Linear(peak=1e-4, warmup=0.1, steps=40),
        evals=(evals.Validation(every=10),),
    )


def experiment() -> Recipe:
    """Prefers the better of two answers, on pairs in --set sft.data.path=FILE and
    --set dpo.data.path=FILE."""
    return Recipe(name="smollm2_dpo", stages=(sft(), dpo()))


if __name__ == "__main__":
    main(experiment)
