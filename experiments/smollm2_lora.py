"""Fine-tunes SmolLM2-135M-Instruct on your own conversations with LoRA.

    python -m experiments.smollm2_lora --set start=models/SmolLM2 --set data.path=chats.jsonl

`start` is the model's Hugging Face folder; `data.path` holds conversations in one of the shapes of
`data.Chat`: messages, prompt and completion, question and answer, and others. For another model,
copy this file and take `model=replace(runs.load_declaration(FOLDER).model, adapter=ADAPTER)`.

Only the adapter is trained: 4.9 million weights of 139 million. Talk to the result, or export it:
the adapter as a PEFT folder, or the whole model.

    python -m lm chat runs/smollm2_lora
    python -m lm export runs/smollm2_lora adapter
    python -m lm export runs/smollm2_lora merged --merge
"""

from lm import checkpoint, data, evals, model, optim
from lm.experiment import Experiment
from lm.main import main
from lm.parallel.mesh import Mesh, Place

ADAPTER = model.LoRA(rank=16, alpha=32.0, dropout=0.05)


def experiment() -> Experiment:
    """Trains an adapter for --set start=FOLDER on --set data.path=FILE."""
    return Experiment(
        name="smollm2_lora",
        start="models/SmolLM2",
        model=model.Config(
            vocab=49_152,
            dim=576,
            layers=30,
            attention=model.GQA(
                heads=9, kv_heads=3, head_dim=64, position=model.RoPE(theta=100_000)
            ),
            ffn=model.SwiGLU(hidden=1536),
            norm=model.RMSNormConfig(eps=1e-5),
            tied=True,
            adapter=ADAPTER,
        ),
        data=data.Chat(path="chats.jsonl", held_out=0.05),
        tokenizer=None,  # that of `start`
        batch=data.BatchShape(sequences=4, length=512),
        optimizer=optim.AdamW(clip_norm=1.0),
        schedule=optim.Linear(peak=5e-4, warmup=0.05, steps=200),
        evals=(evals.Perplexity(every=50, batches=25),),
        save=checkpoint.Save(every=50),
        places={"single": Place(mesh=Mesh())},
    )


if __name__ == "__main__":
    main(experiment)
