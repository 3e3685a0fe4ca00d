"""Llama 3 8B (arXiv:2407.21783) on a trillion tokens of C4.

    python -m experiments.llama3_8b plan --on v5p-64
    python -m experiments.llama3_8b --on v5p-64 --workdir gs://my-bucket/runs

Asks: what do memory, time and communication of an 8B come to on each generation of TPU, and does a
run confirm the plan?

Answer: lm/planning/README.md has the plans; no pod has run it yet.
"""

from lm import checkpoint, data, evals, model, objectives, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place
from lm.precision import BF16

DIM, HIDDEN, LAYERS, VOCAB = 4096, 14_336, 32, 128_256
HEADS, KV_HEADS = 32, 8  # of width 128

# 8.03 billion parameters: 2 x 0.53 in embedding and output, 32 layers of 42 million in attention
# (4096 x 128 x (32 + 8 + 8 + 32)) and 176 million in the feed-forward (3 x 4096 x 14336).
SEQUENCES, LENGTH = 1024, 4096  # 4.2 million tokens a step
BUDGET = 1e12
STEPS = round(BUDGET / (SEQUENCES * LENGTH))  # 238,419

# State is 12 bytes per parameter (float32 weight and two moments), 96 GB in total. With remat
# "block" a layer saves its input, 2 x 4096 bytes per token: 1.1 GB per sequence of 4096 tokens in
# all layers. Sequences per device and micro-batch: 1024 / devices / microbatches.
PLACES = {
    "v5p-64": Place(mesh=Mesh(fsdp=32), microbatches=8, remat="block"),  # 4 each
    "v5p-8": Place(mesh=Mesh(fsdp=4), microbatches=64, remat="block"),  # debugging: 24 GB of state
    "v5p-2048": Place(mesh=Mesh(data=4, fsdp=256), remat="dots"),  # 1 each
    "v5e-256": Place(mesh=Mesh(fsdp=256), microbatches=2, remat="block"),  # 2 each
    "2xv5e-256": Place(mesh=Mesh(data=2, fsdp=256), remat="block"),  # 2 each; two slices
    "v6e-256": Place(mesh=Mesh(fsdp=256), remat="block"),  # 4 each
    "tpu7x-128": Place(mesh=Mesh(fsdp=128), microbatches=2, remat="block"),  # 64 chips
}


def experiment() -> Experiment:
    """The published shape, AdamW with float32 state, cosine to a tenth."""
    return Experiment(
        name="llama3_8b",
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
        data=data.Tfds("c4/en", data_dir="gs://my-bucket/tfds", held_out=0.0001),
        tokenizer=data.SentencePiece(vocab=128_000),
        batch=data.BatchShape(sequences=SEQUENCES, length=LENGTH),
        objective=objectives.NextToken(z_loss=1e-4),
        optimizer=optim.AdamW(b2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=optim.WarmupCosine(peak=3e-4, warmup=2_000, steps=STEPS),
        precision=BF16,
        evals=(evals.Perplexity(every=2_000),),
        save=checkpoint.Save(every=1_000, keep_last=2),
        places=PLACES,
    )


if __name__ == "__main__":
    main(experiment)
