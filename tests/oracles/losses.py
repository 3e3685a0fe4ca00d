"""Losses, their metrics and gradients, computed by TRL's own trainers in float32.

Keys of the recorded arrays: NAME/loss, NAME/METRIC, NAME/grad/WEIGHT for some weights, and
NAME/norms, the norms of the gradients of all weights in the order of their names.
"""

from pathlib import Path
from typing import Any

import conversations
import numpy as np
import tiny
import torch
from conversations import options
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

TEMPLATE = "plain"
WHOLE = (  # whose gradients are recorded whole
    "model.norm.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "score.weight",
)
BETA = 0.5
# TRL calls label smoothing of DPO (arXiv:2305.18290 with smoothed labels) "aot" with one pair in a
# batch; its "robust" is the unbiased form of arXiv:2403.00409, and its "sigmoid" ignores it.
DPO = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "smoothed": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
}
# One pair in a batch, and the mean over batches. TRL's "sft" is a mean over all tokens of a batch.
ONE_BY_ONE = ("smoothed", "sigmoid_sft")
KTO = {
    "kto": {},
    "kto_weighted": {"desirable_weight": 0.5, "undesirable_weight": 1.5},
}
MARGIN = 0.5
AGREE = 1e-5  # TRL's two divergences, with each other
REWARD = {
    "reward": {},
    "reward_centered": {"center_rewards_coefficient": 0.1},
    "reward_margin": {},
}

Arrays = dict[str, np.ndarray]


def record(policy: Path, reference: Path, scratch: Path) -> dict[str, Arrays]:
    """The arrays of each file."""
    return {
        "sft": sft(policy, scratch),
        "preference": preference(policy, reference, scratch)
        | unpaired(policy, reference, scratch)
        | simpo(policy, scratch),
        "reward": reward(scratch),
        "distill": distill(policy, reference),
    }


def gradients(loss: torch.Tensor, model: Any, name: str, whole: Any = WHOLE) -> Arrays:
    """The loss and its gradients; those named in `whole` completely, or all that are not of the
    vocabulary if it is None."""
    model.zero_grad()
    loss.backward()
    arrays = {f"{name}/loss": loss.detach().numpy()}
    grads = {weight: param.grad.numpy() for weight, param in model.named_parameters()}
    for weight, grad in grads.items():
        if weight in whole if whole is not None else len(grad) != tiny.VOCAB:
            arrays[f"{name}/grad/{weight}"] = grad.copy()
    norms = [np.linalg.norm(grads[weight]) for weight in sorted(grads)]
    return {**arrays, f"{name}/norms": np.float32(norms)}


def metrics(trainer: Any, name: str, *keys: str) -> Arrays:
    """What the trainer would log."""
    logged = trainer._metrics["train"]
    return {f"{name}/{key}": np.float32(logged[key][-1]) for key in keys}


def inputs_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The whole data set as one batch."""
    return trainer.data_collator(list(trainer.train_dataset))


def numpy_of(batch: dict[str, Any], prefix: str) -> Arrays:
    """Recorded inputs; integers in as few bytes as they need."""
    arrays = {f"{prefix}/{name}": x.numpy() for name, x in batch.items()}
    small = np.iinfo(np.int16).max
    return {
        k: x.astype(np.int16 if x.max() <= small else np.int32) if x.dtype.kind in "iu" else x
        for k, x in arrays.items()
    }


def sft(policy: Path, scratch: Path) -> Arrays:
    """Log-probability of every token, and the loss on the assistant's messages."""
    talks = [conversations.messages(t, s) for t in (1, 2, 3) for s in (False, True)]
    arrays = {}
    for name, folder in (
        ("sft", policy),
        ("sft_tied", tiny.write_model(scratch / "tied", tied=True)),
    ):
        trainer = SFTTrainer(
            model=conversations.model(folder),
            args=SFTConfig(**options(scratch, assistant_only_loss=True)),
            train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
            processing_class=conversations.tokenizer(TEMPLATE),
        )
        batch = inputs_of(trainer)
        arrays |= numpy_of(batch, "batch")
        every = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model = trainer.model.train()
        with torch.no_grad():
            output = model(**{**batch, "labels": every}, fused_lm_head=True)
        arrays[f"{name}/log_probs"] = output.log_probs.numpy()
        loss = trainer.compute_loss(model, dict(batch))
        whole = None if name == "sft" else ("model.embed_tokens.weight",)
        arrays |= gradients(loss, model, name, whole)
    return arrays


def preference(policy: Path, reference: Path, scratch: Path) -> Arrays:
    """DPO and its relatives with a reference model."""
    arrays = {}
    for name, fields in DPO.items():
        trainer = conversations.dpo_trainer(
            TEMPLATE, policy, reference, scratch, beta=BETA, **fields
        )
        model, rows = trainer.model.train(), list(trainer.train_dataset)
        batches = [[row] for row in rows] if name in ONE_BY_ONE else [rows]
        each = [trainer.compute_loss(model, trainer.data_collator(batch)) for batch in batches]
        arrays |= gradients(torch.stack(each).mean(), model, name)
        if name == "sigmoid":
            arrays |= numpy_of(inputs_of(trainer), "pairs")
            arrays |= metrics(
                trainer,
                name,
                "rewards/chosen",
                "rewards/rejected",
                "rewards/margins",
                "rewards/accuracies",
                "logps/chosen",
                "logps/rejected",
            )
    return arrays


def unpaired(policy: Path, reference: Path, scratch: Path) -> Arrays:
    """KTO. With policy and reference exchanged ("_swapped"), the estimate of the divergence has the
    other sign, and is cut off at 0."""
    arrays = {}
    for name, fields in KTO.items():
        for end, folders in (("", (policy, reference)), ("_swapped", (reference, policy))):
            trainer = conversations.kto_trainer(TEMPLATE, *folders, scratch, beta=BETA, **fields)
            model, batch = trainer.model.train(), inputs_of(trainer)
            loss = trainer.compute_loss(model, batch)
            arrays |= numpy_of(batch, "feedback")
            arrays |= gradients(loss, model, name + end)
            arrays |= metrics(trainer, name + end, "kl", "rewards/chosen", "rewards/rejected")
    return arrays


def simpo(policy: Path, scratch: Path) -> Arrays:
    """SimPO, by TRL's CPOTrainer, on the pairs as DPOTrainer tokenizes them."""
    texts = {"prompt": ["a"], "chosen": ["a"], "rejected": ["a"]}
    fields = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}
    trainer = CPOTrainer(
        model=conversations.model(policy),
        args=CPOConfig(**options(scratch, **fields) | {"max_length": 512}),
        train_dataset=Dataset.from_dict(texts),
        processing_class=conversations.tokenizer(TEMPLATE),
    )
    batch = inputs_of(conversations.dpo_trainer(TEMPLATE, policy, policy, scratch))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    halves = {"input_ids": batch["input_ids"], "labels": labels}
    halves["attention_mask"] = batch["attention_mask"]
    count = len(labels) // 2
    inputs = {f"chosen_{k}": x[:count] for k, x in halves.items()}
    inputs |= {f"rejected_{k}": x[count:] for k, x in halves.items()}
    model = trainer.model.train()
    return gradients(trainer.compute_loss(model, inputs), model, "simpo")


def reward(scratch: Path) -> Arrays:
    """Bradley-Terry loss of a scalar head at the last token."""
    arrays, folder = {}, tiny.write_model(scratch / "reward", reward=True)
    for name, fields in REWARD.items():
        rows = conversations.pairs()
        if name == "reward_margin":
            rows = [{**row, "margin": MARGIN} for row in rows]
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(
                folder, attn_implementation="eager"
            ),
            args=RewardConfig(**options(scratch, **fields)),
            train_dataset=Dataset.from_list(rows),
            processing_class=conversations.tokenizer(TEMPLATE),
        )
        model, batch = trainer.model.train(), inputs_of(trainer)
        with torch.no_grad():
            arrays["rewards"] = (
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits[:, 0]
                .numpy()
            )
        arrays |= numpy_of(batch, "pairs")
        arrays |= gradients(trainer.compute_loss(model, dict(batch)), model, name)
        arrays |= metrics(trainer, name, "accuracy", "margin")
    return arrays


def distill(student: Path, teacher: Path) -> Arrays:
    """Generalized Jensen-Shannon divergence, GKDTrainer's loss, on the preferred answers. TRL's
    two implementations must agree."""
    rows = conversations.sft_rows(TEMPLATE, student, student, "assistant")
    length = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [2] * (length - len(row["ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (length - len(row["ids"])) for row in rows])
    arrays = numpy_of({"input_ids": ids, "labels": labels}, "batch")
    model, other = conversations.model(student), conversations.model(teacher)
    targets = labels[:, 1:]
    for beta in (0.0, 0.1, 0.5, 1.0):
        for temperature in (1.0, 2.0):
            name = f"jsd_{beta:g}_{temperature:g}"
            with torch.no_grad():
                taught = other.model(input_ids=ids).last_hidden_state[:, :-1]
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
            loss = GKDTrainer.generalized_jsd_loss(
                model.lm_head(hidden), other.lm_head(taught), targets, beta, temperature
            )
            again = _chunked_divergence_loss(
                hidden,
                taught,
                model.lm_head.weight,
                other.lm_head.weight,
                (targets != -100).int(),
                beta,
                temperature=temperature,
            )[0]
            torch.testing.assert_close(again.to(loss.dtype), loss, rtol=AGREE, atol=0)
            arrays |= gradients(loss, model, name)
    return arrays
