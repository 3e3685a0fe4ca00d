"""A small language model of your own text files.

    python -m experiments.text --set data.path='books/*.txt'

`data.path` is a file, a glob, a URL, or several of them: ('a.txt','b.txt'). A fraction of the
documents (of a single file, its end) is held out for validation. A tokenizer is trained on the
rest. Copy this file to start an experiment of your own.
"""

from lm import checkpoint, data, evals, model, objectives, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place

VOCAB = 4096
SEQUENCES, LENGTH, STEPS = 16, 256, 500  # 4,096 tokens a step, 2 million in all


def experiment() -> Experiment:
    """Trains a small Llama-style model on --set data.path=FILES."""
    return Experiment(
        name="text",
        seed=0,
        model=model.Config(
            vocab=VOCAB,
            dim=256,
            layers=4,
            attention=model.GQA(
                heads=8, kv_heads=4, head_dim=32, position=model.RoPE(theta=10_000)
            ),
            ffn=model.SwiGLU(hidden=704),
        ),
        data=data.Text(path="*.txt", held_out=0.05),
        tokenizer=data.SentencePiece(vocab=VOCAB, kind="bpe"),
        batch=data.BatchShape(sequences=SEQUENCES, length=LENGTH),
        objective=objectives.NextToken(z_loss=1e-4),
        optimizer=optim.AdamW(b2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=optim.WSD(peak=2e-3, warmup=0.05, decay=0.3, steps=STEPS),
        evals=(evals.Perplexity(every=250),),
        save=checkpoint.Save(every=100),
        places={"single": Place(mesh=Mesh())},
    )


if __name__ == "__main__":
    main(experiment)
