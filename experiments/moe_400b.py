"""A mixture of experts with fine-grained and shared experts, as in DeepSeek-V3 (arXiv:2412.19437):
400 billion parameters, 18 billion active per token.

    python -m experiments.moe_400b plan --on v5p-512

Asks: what do memory, time and communication of such a model come to, with grouped-query attention?

Answer: lm/planning/README.md has the plans; no pod has run it yet.
"""

from lm import checkpoint, data, evals, model, objectives, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place
from lm.precision import BF16

DIM, LAYERS, DENSE, VOCAB = 5120, 60, 2, 128_256
EXPERTS, ACTIVE, HIDDEN = 256, 8, 1664  # a routed expert has 25.6 million parameters
HEADS, KV_HEADS = 40, 8  # of width 128
# The first layers are dense, as wide as the 8 routed and one shared experts of a token later.
DENSE_HIDDEN = (ACTIVE + 1) * HIDDEN  # 14,976

# 58 layers of 256 x 25.6 million are 380 billion; attention, shared experts and embeddings add 7.
SEQUENCES, LENGTH = 2048, 4096  # 8.4 million tokens a step
BUDGET = 5e12
STEPS = round(BUDGET / (SEQUENCES * LENGTH))  # 596,046

# State with a bfloat16 first moment is 10 bytes per parameter, 3.9 TB: 15 GB per device on 256. The
# experts of a layer take 13 GB in bfloat16. Every device all-gathers them, divided by the expert
# axis, over which each row is sent twice. A row is 10 KB, and a token has 8: with 8,192 tokens per
# device, 0.7 GB per layer are sent and returned, so that a large axis costs more than it saves.
PLACES = {
    "v5p-512": Place(mesh=Mesh(fsdp=128, expert=2), remat="block"),  # 8 sequences each
    "v5p-2048": Place(mesh=Mesh(fsdp=256, expert=4), remat="block"),  # 2 each
    "tpu7x-256": Place(mesh=Mesh(fsdp=128, expert=2), remat="block"),  # 128 chips, 8 each
    # Fits four slices of v6e, at a planned MFU of 8 %: communication of rows and weights dominates.
    # On v5e, with half the memory and no ragged all-to-all, no place was found (LOG.md,
    # 2026-11-26).
    "4xv6e-256": Place(mesh=Mesh(fsdp=128, expert=8), microbatches=2, remat="block"),
}


def experiment() -> Experiment:
    """Load balancing by router biases instead of an auxiliary loss; dropless."""
    return Experiment(
        name="moe_400b",
        seed=0,
        model=model.Config(
            vocab=VOCAB,
            dim=DIM,
            layers=LAYERS,
            norm=model.RMSNormConfig(eps=1e-6),
            attention=model.GQA(
                heads=HEADS,
                kv_heads=KV_HEADS,
                head_dim=128,
                position=model.RoPE(theta=500_000),
                qk_norm=model.QKNorm(norm=model.RMSNormConfig()),
            ),
            ffn=model.MoE(
                experts=EXPERTS,
                experts_per_token=ACTIVE,
                hidden=HIDDEN,
                router=model.SigmoidRouter(scale=2.5),
                shared=model.Shared(hidden=HIDDEN),
                balance=model.BiasBalance(rate=0.001),
            ),
            prefix=(model.Block(ffn=model.SwiGLU(hidden=DENSE_HIDDEN)),) * DENSE,
        ),
        data=data.Tfds("c4/en", data_dir="gs://my-bucket/tfds", held_out=0.0001),
        tokenizer=data.SentencePiece(vocab=128_000),
        batch=data.BatchShape(sequences=SEQUENCES, length=LENGTH),
        objective=objectives.NextToken(z_loss=1e-4),
        optimizer=optim.AdamW(b2=0.95, weight_decay=0.1, clip_norm=1.0, moments="bfloat16"),
        schedule=optim.WSD(peak=2.2e-4, warmup=2_000, decay=0.2, steps=STEPS),
        precision=BF16,
        evals=(evals.Perplexity(every=5_000),),
        save=checkpoint.Save(every=500, keep_last=2),
        places=PLACES,
    )


if __name__ == "__main__":
    main(experiment)
