"""Llama 3 70B (arXiv:2407.21783) on two trillion tokens of C4 and your own text.

    python -m experiments.llama3_70b plan --on v5p-512

Asks: which meshes fit a 70B with float32 state, and what does communication cost there?

Answer: lm/planning/README.md has the plans; no pod has run it yet.
"""

from lm import checkpoint, data, evals, model, objectives, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place
from lm.precision import BF16

DIM, HIDDEN, LAYERS, VOCAB = 8192, 28_672, 80, 128_256
HEADS, KV_HEADS = 64, 8  # of width 128

# 70.6 billion parameters: 2.1 in embedding and output, 80 layers of 151 million in attention and
# 705 million in the feed-forward. A layer, which FSDP all-gathers, takes 1.7 GB in bfloat16.
SEQUENCES, LENGTH = 1024, 4096  # 4.2 million tokens a step
BUDGET = 2e12
STEPS = round(BUDGET / (SEQUENCES * LENGTH))  # 476,837

# State is 12 bytes per parameter, 847 GB: 3.3 GB per device on 256. With remat "block" a sequence
# of 4096 tokens saves 67 MB per layer, 5.4 GB in total.
PLACES = {
    "v5p-512": Place(mesh=Mesh(fsdp=256), microbatches=2, remat="block"),  # 2 sequences each
    "v5e-256": Place(mesh=Mesh(fsdp=64, tensor=4), microbatches=16, remat="block"),
    "v6e-256": Place(mesh=Mesh(fsdp=256), microbatches=2, remat="block"),
    "tpu7x-512": Place(mesh=Mesh(fsdp=512), remat="block"),  # 256 chips, 2 each
    # 3D parallelism: a pipeline stage per slice, FSDP and tensor parallelism within slices.
    "4xv5e-256": Place(
        mesh=Mesh(pipe=4, fsdp=64, tensor=4), microbatches=16, circular_repeats=4, remat="stage"
    ),
    # Debugging, on the fewest chips that fit it (8): 18 GB of weights per device, 35 GB of moments
    # in host memory.
    "tpu7x-16": Place(mesh=Mesh(fsdp=16), microbatches=64, remat="block", offload=("optimizer",)),
}


def experiment() -> Experiment:
    """The published shape, AdamW with float32 state, cosine to a tenth."""
    return Experiment(
        name="llama3_70b",
        seed=0,
        model=model.Config(
            vocab=VOCAB,
            dim=DIM,
            layers=LAYERS,
            norm=model.RMSNormConfig(eps=1e-5),
            attention=model.GQA(
                heads=HEADS, kv_heads=KV_HEADS, head_dim=128, position=model.RoPE(theta=500_000)
            ),
            ffn=model.SwiGLU(hidden=HIDDEN),
        ),
        data=data.Mixture(
            sources={
                "c4": data.Tfds("c4/en", data_dir="gs://my-bucket/tfds", held_out=0.0001),
                "own": data.Jsonl("gs://my-bucket/own/*.jsonl.zst", field="text", held_out=0.001),
            },
            weights={"c4": 0.8, "own": 0.2},
        ),
        tokenizer=data.TokenizerFile(path="gs://my-bucket/tokenizer.model"),
        batch=data.BatchShape(sequences=SEQUENCES, length=LENGTH),
        objective=objectives.NextToken(z_loss=1e-4),
        optimizer=optim.AdamW(b2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=optim.WarmupCosine(peak=1.5e-4, warmup=2_000, steps=STEPS),
        precision=BF16,
        evals=(evals.Perplexity(every=2_000),),
        save=checkpoint.Save(every=500, keep_last=2),
        places=PLACES,
    )


if __name__ == "__main__":
    main(experiment)
