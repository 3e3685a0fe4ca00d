"""Llama 3 8B, its context stretched from 4,096 to 131,072 tokens as the last stage of pretraining
(arXiv:2407.21783, section 3.4.2), on long documents of your own.

    python -m experiments.long_context_8b plan --on v5p-64
    python -m experiments.long_context_8b --on v5p-64 --workdir gs://my-bucket/runs

Asks: what does a sequence cost that no chip could hold, split over a ring of them?

Answer: the plans are in README.md's table; no pod has run it yet.
"""

import dataclasses

from experiments import llama3_8b
from lm import data, evals, model, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place

SEQUENCES, LENGTH = 32, 131_072  # 4.2 million tokens a step, as before
BUDGET = 20e9  # tokens of this stage
STEPS = round(BUDGET / (SEQUENCES * LENGTH))  # 4,768

# A token sees 65,536 others on average. A layer's scores and values, forward, are
# 4 x 32 x 128 x 65,536 = 1.07 billion FLOPs a token, its weights 2 x 218 million: attention is 71 %
# of the work, and a token costs 3.2 times what it does at 4,096.
#
# A layer's input is 1.07 GB a sequence, 34 GB in all 32 layers under remat "block". Over
# context=4 a device keeps 8.6 GB of them, and sends its 33 MB of keys and values of a layer
# (32,768 x 2 x 8 x 128 x 2 bytes) to its neighbour while it meets those that it has:
# 4 x 32 x 128 x 32,768^2 FLOPs, half of them beyond the diagonal, 20 ms of a v5p; the link takes
# 0.7. Weights are split over fsdp alone: context devices hold copies.
# Sequences per chip and micro-batch: 32 / fsdp / microbatches.
PLACES = {
    "v5p-64": Place(mesh=Mesh(fsdp=8, context=4), microbatches=4, remat="block"),  # 12 GB of state
    "v5e-256": Place(mesh=Mesh(fsdp=32, context=8), remat="block"),  # 3 GB of state
    "v6e-256": Place(mesh=Mesh(fsdp=32, context=8), remat="block"),
    "tpu7x-128": Place(mesh=Mesh(fsdp=16, context=8), microbatches=2, remat="block"),  # 64 chips
    # Debugging, on 4 chips: 16 GB of weights a chip, 32 of moments in the host's memory.
    "v5p-8": Place(
        mesh=Mesh(fsdp=2, context=2), microbatches=16, remat="block", offload=("optimizer",)
    ),
}


def experiment() -> Experiment:
    """The 8B with slower rotations, from the weights that `llama3_8b` left."""
    base = llama3_8b.experiment()
    attention = dataclasses.replace(base.model.attention, position=model.RoPE(theta=8_000_000))
    return dataclasses.replace(
        base,
        name="long_context_8b",
        start="gs://my-bucket/runs/llama3_8b",
        model=dataclasses.replace(base.model, attention=attention),
        data=data.Mixture(
            sources={
                "long": data.Jsonl("gs://my-bucket/long/*.jsonl.zst", field="text", held_out=0.001),
                "c4": data.Tfds("c4/en", data_dir="gs://my-bucket/tfds", held_out=0.0001),
            },
            weights={"long": 0.8, "c4": 0.2},
        ),
        tokenizer=data.TokenizerFile(path="gs://my-bucket/runs/llama3_8b/tokenizer.model"),
        batch=data.BatchShape(sequences=SEQUENCES, length=LENGTH),
        schedule=optim.WarmupCosine(peak=3e-5, warmup=100, steps=STEPS),
        evals=(evals.Perplexity(every=500),),
        places=PLACES,
    )


if __name__ == "__main__":
    main(experiment)
