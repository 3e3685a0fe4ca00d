"""Llama 3 8B, extended from 4,096 to 131,072 tokens of context in the last stage of pre-training
(arXiv:2407.21783, section 3.4.2), on your own long documents.

    python -m experiments.long_context_8b plan --on v5p-64
    python -m experiments.long_context_8b --on v5p-64 --workdir gs://my-bucket/runs

Asks: what does a sequence cost that exceeds the memory of a chip, with context parallelism?

Answer: lm/planning/README.md has the plans; no pod has run it yet.
"""

import dataclasses

from experiments import llama3_8b
from lm import data, evals, model, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place

SEQUENCES, LENGTH = 32, 131_072  # 4.2 million tokens a step, as in llama3_8b
BUDGET = 20e9  # tokens of this stage
STEPS = round(BUDGET / (SEQUENCES * LENGTH))  # 4,768

# A token attends to 65,536 others on average. Attention of a layer takes 4 x 32 x 128 x 65,536 =
# 1.07 billion FLOPs per token forward, its weights 2 x 218 million: attention is 71 % of the work,
# and a token costs 3.2 times as much as at 4,096.
#
# A layer's input is 1.07 GB per sequence, 34 GB in 32 layers with remat "block". With context=4 a
# device saves 8.6 GB of them. Ring attention sends its 33 MB of keys and values of a layer
# (32,768 x 2 x 8 x 128 x 2 bytes) to the next device while it computes with the current ones:
# 4 x 32 x 128 x 32,768^2 FLOPs, half of them masked, 20 ms on a v5p; the link takes 0.7 ms. Weights
# are sharded over fsdp alone and replicated over context.
# Sequences per device and micro-batch: 32 / fsdp / microbatches.
PLACES = {
    "v5p-64": Place(mesh=Mesh(fsdp=8, context=4), microbatches=4, remat="block"),  # 12 GB of state
    "v5e-256": Place(mesh=Mesh(fsdp=32, context=8), remat="block"),  # 3 GB of state
    "v6e-256": Place(mesh=Mesh(fsdp=32, context=8), remat="block"),
    "tpu7x-128": Place(mesh=Mesh(fsdp=16, context=8), microbatches=2, remat="block"),  # 64 chips
    # Debugging, on 4 chips: 16 GB of weights per chip, 32 GB of moments in host memory.
    "v5p-8": Place(
        mesh=Mesh(fsdp=2, context=2), microbatches=16, remat="block", offload=("optimizer",)
    ),
}


def experiment() -> Experiment:
    """The 8B with a larger RoPE base, starting from the weights of `llama3_8b`."""
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
