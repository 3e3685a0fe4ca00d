"""A training step to benchmark against other codebases; not meant to be trained to the end.

    python -m lm bench step experiments.bench_llama

Llama-style: width 384, 6 layers, 6 query and 2 key/value heads of width 64, SwiGLU 1024, an untied
vocabulary of 4096; 16 sequences of 256 tokens in float32 with AdamW and clipping at 1.0.

Asks: what fraction of the machine's own matmul rate does a whole step reach?

Answer: 53 % on two CPU cores in float32 (2026-11-20, revision 4992cbe); LOG.md has the conditions.
"""

from lm import data, model, objectives, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place


def experiment() -> Experiment:
    """The Llama-style benchmark model, on the text of the standard library."""
    return Experiment(
        name="bench_llama",
        seed=0,
        model=model.Config(
            vocab=4096,
            dim=384,
            layers=6,
            attention=model.GQA(
                heads=6, kv_heads=2, head_dim=64, position=model.RoPE(theta=10_000)
            ),
            ffn=model.SwiGLU(hidden=1024),
        ),
        data=data.StandardLibrary(),
        tokenizer=data.SentencePiece(vocab=4096, split_scripts=False),
        batch=data.BatchShape(sequences=16, length=256),
        objective=objectives.NextToken(),
        optimizer=optim.AdamW(b2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=optim.WarmupCosine(peak=1e-3, warmup=100, steps=1_000),
        places={"single": Place(mesh=Mesh())},
    )


if __name__ == "__main__":
    main(experiment)
