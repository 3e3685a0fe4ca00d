"""Mixtral 8x7B (arXiv:2401.04088): eight experts a layer, two of them for each token.

    python -m experiments.mixtral_8x7b plan --on v5p-128

Asks: is expert parallelism faster than FSDP alone at this size?

Answer: by plan, on v5p-128, no: modelled MFU is 52 % on fsdp=8, expert=8 and 56 % on fsdp=64, which
takes 64 GB per chip instead of 26 (lm/planning/README.md). No pod has run it yet.
"""

from lm import checkpoint, data, evals, model, objectives, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place
from lm.precision import BF16

DIM, HIDDEN, LAYERS, VOCAB = 4096, 14_336, 32, 32_000
EXPERTS, ACTIVE = 8, 2
HEADS, KV_HEADS = 32, 8  # of width 128

# 46.7 billion parameters, 12.9 active per token: 32 layers of 8 x 176 million in experts and 42
# million in attention.
SEQUENCES, LENGTH = 512, 4096  # 2.1 million tokens a step
BUDGET = 1e12
STEPS = round(BUDGET / (SEQUENCES * LENGTH))  # 476,837

# State is 12 bytes per parameter, 560 GB: 8.8 GB per device on 64. With expert parallelism the
# experts are all-gathered over fewer devices: over fsdp=8 of 64, not over 64.
PLACES = {
    "v5p-128": Place(mesh=Mesh(fsdp=8, expert=8), microbatches=4, remat="block"),  # 2 each
    "v5e-256": Place(
        mesh=Mesh(fsdp=256), microbatches=2, remat="block"
    ),  # no ragged all-to-all on v5e-256
    "v6e-256": Place(mesh=Mesh(fsdp=32, expert=8), microbatches=2, remat="block"),
    "tpu7x-128": Place(mesh=Mesh(fsdp=16, expert=8), microbatches=4, remat="block"),
    # Debugging, on 8 chips, and on 4 with 47 GB of moments per device in host memory.
    "tpu7x-16": Place(mesh=Mesh(fsdp=8, expert=2), microbatches=32, remat="block"),
    "tpu7x-8": Place(
        mesh=Mesh(fsdp=4, expert=2),
        microbatches=64,
        remat="block",
        accumulate="bfloat16",
        offload=("optimizer",),
    ),
}


def experiment() -> Experiment:
    """The published shape; no token is dropped."""
    return Experiment(
        name="mixtral_8x7b",
        seed=0,
        model=model.Config(
            vocab=VOCAB,
            dim=DIM,
            layers=LAYERS,
            norm=model.RMSNormConfig(eps=1e-5),
            attention=model.GQA(
                heads=HEADS, kv_heads=KV_HEADS, head_dim=128, position=model.RoPE(theta=1e6)
            ),
            ffn=model.MoE(
                experts=EXPERTS,
                experts_per_token=ACTIVE,
                hidden=HIDDEN,
                # Over the batch it would take a second forward pass with gradient accumulation.
                balance=model.LoadBalance(weight=0.02, over="sequence"),
                z_loss=1e-3,
            ),
        ),
        data=data.Tfds("c4/en", data_dir="gs://my-bucket/tfds", held_out=0.0001),
        tokenizer=data.SentencePiece(vocab=VOCAB),
        batch=data.BatchShape(sequences=SEQUENCES, length=LENGTH),
        objective=objectives.NextToken(z_loss=1e-4),
        optimizer=optim.AdamW(b2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=optim.WarmupCosine(peak=3e-4, warmup=2_000, steps=STEPS),
        precision=BF16,
        evals=(evals.Perplexity(every=2_000),),
        save=checkpoint.Save(every=500, keep_last=2),
        places=PLACES,
    )


if __name__ == "__main__":
    main(experiment)
