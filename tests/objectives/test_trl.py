"""Losses, gradients and metrics equal those of TRL 1.16 (tests/oracles), in float32, on a model
whose weights are read from a Hugging Face folder.

TRL pads each document into a row of its own; here several are packed into a row.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

import lm
from lm import model, objectives, trees
from lm.data.batch import Batch
from lm.hf import families, tensors
from lm.objectives import DPO, IPO, JSD, KTO, ForwardKL, ReverseKL, SimPO
from lm.objectives.token_losses import token_logps

BETA = 0.5  # of what was recorded
PAIRED = {
    "sigmoid": DPO(beta=BETA),
    "smoothed": DPO(beta=BETA, label_smoothing=0.1),
    "sigmoid_norm": DPO(beta=BETA, normalize_length=True),
    "sigmoid_sft": DPO(beta=BETA, sft_weight=0.2),
    "ipo": IPO(beta=BETA),
    "simpo": SimPO(beta=2.0, gamma=1.0),
}
UNPAIRED = {
    "kto": KTO(beta=BETA),
    "kto_weighted": KTO(beta=BETA, desirable_weight=0.5, undesirable_weight=1.5),
}
REWARD = {
    "reward": objectives.RewardModel(),
    "reward_margin": objectives.RewardModel(margin=0.5),
    "reward_centered": objectives.RewardModel(center=0.1),
}
DISTILL = {  # beta and temperature
    "jsd_0_1": objectives.Distill(teacher="there", divergence=ForwardKL()),
    "jsd_0.1_1": objectives.Distill(teacher="there", divergence=JSD(beta=0.1)),
    "jsd_0.1_2": objectives.Distill(teacher="there", divergence=JSD(beta=0.1), temperature=2.0),
    "jsd_0.5_2": objectives.Distill(teacher="there", divergence=JSD(beta=0.5), temperature=2.0),
    "jsd_1_1": objectives.Distill(teacher="there", divergence=ReverseKL()),
    "jsd_1_2": objectives.Distill(teacher="there", divergence=ReverseKL(), temperature=2.0),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(seed, tied): the policy (0) or the reference model and teacher (1), as a Run."""
    to = tmp_path_factory.mktemp("trl")

    @functools.cache
    def make(seed=0, tied=False):
        return lm.load(tiny.write_model(to / f"{seed}_{tied}", seed, tied))

    return make


def pack(documents, per_row):
    """Documents (ids, weights) packed into rows. The last token of a document is an input too, as
    in TRL: it has the target 0 with weight 0."""
    rows = [documents[i : i + per_row] for i in range(0, len(documents), per_row)]
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    arrays = [np.zeros((len(rows), length), np.int32) for _ in Batch._fields]
    batch = Batch(*arrays)._replace(weights=np.zeros((len(rows), length), np.float32))
    for b, row in enumerate(rows):
        at = 0
        for segment, (ids, weights) in enumerate(row, start=1):
            place = b, slice(at, at := at + len(ids))
            batch.tokens[place] = ids
            batch.targets[place] = [*ids[1:], 0]
            batch.weights[place] = [*weights[1:], 0]
            batch.segments[place] = segment
            batch.positions[place] = np.arange(len(ids))
    return batch


def documents(recorded, prefix, mask, kl=""):
    """The documents of a padded batch: (ids, weights of the mask)."""
    arrays = (recorded[f"{prefix}/{kl}{name}"] for name in ("input_ids", "attention_mask"))
    return [
        (ids[real > 0].tolist(), weights[real > 0].tolist())
        for ids, real, weights in zip(*arrays, mask, strict=True)
    ]


def alternating(first, second):
    return [document for pair in zip(first, second, strict=True) for document in pair]


def pairs(recorded):
    """Two pairs a row: chosen, rejected, chosen, rejected."""
    mask = recorded.get("pairs/completion_mask", recorded["pairs/attention_mask"])
    each = documents(recorded, "pairs", mask)
    return pack(alternating(each[: len(each) // 2], each[len(each) // 2 :]), per_row=4)


def feedback(recorded):
    """Two answers a row, each with an answer to another prompt. Good ones have the weight 1, bad
    ones 2."""
    label = np.where(recorded["feedback/label"], 1, 2)[:, None]
    own = documents(recorded, "feedback", recorded["feedback/completion_mask"] * label)
    other = documents(recorded, "feedback", recorded["feedback/KL_completion_mask"], "KL_")
    return pack(alternating(own, other), per_row=4)


class Done(NamedTuple):
    """A model whose forward pass on the batch is done, so that several objectives share it."""

    config: model.Config
    hidden_btd: jax.Array
    head: jax.Array

    def __call__(self, tokens_bt, *, segments_bt, positions_bt, dropout_key=None):
        assert dropout_key is None
        return model.Output(self.hidden_btd, {}, None)

    def unembedding(self):
        return self.head

    def values(self, hidden_btd):
        return (hidden_btd @ self.head)[..., 0]


def forward(config, params, batch):
    apply = model.Model(config, params)
    output = apply(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
    head = params["score"]["w"] if config.head == "scalar" else apply.unembedding()
    return output.hidden_btd, head


def evaluate(objective_of, config, params, batch, frozen):
    """name -> (loss, metrics, gradients by their Hugging Face names), means over the batch. One
    pass forward and one backward serve all objectives."""

    @jax.jit
    def compute(params, batch, frozen):
        models = {name: Done(config, *forward(config, x, batch)) for name, x in frozen.items()}
        outputs, pull_back = jax.vjp(lambda p: forward(config, p, batch), params)

        def mean(outputs, objective):
            loss = objective.loss(Done(config, *outputs), batch, None, models)
            metrics = {name: x / loss.weight for name, x in loss.metrics.items()}
            return loss.total / loss.weight, metrics

        results = [
            jax.value_and_grad(mean, has_aux=True)(outputs, each) for each in objective_of.values()
        ]
        cotangents = jax.tree.map(lambda *x: jnp.stack(x), *(grads for _, grads in results))
        (grads,) = jax.vmap(pull_back)(cotangents)
        return [values for values, _ in results], grads

    values, grads = compute(params, batch, frozen)
    return {
        name: (*values[i], by_hf_names(config, jax.tree.map(lambda x, i=i: x[i], grads)))
        for i, name in enumerate(objective_of)
    }


def by_hf_names(config, grads):
    flat = {path: np.asarray(x) for path, x in trees.flatten(grads).items()}
    named = {"score.weight": flat.pop("score/w").T} if "score/w" in flat else {}
    described = dataclasses.replace(config, head="vocab", tied="unembed/w" not in flat)
    family, _ = families.write(described, 256)
    for part in tensors.tensor_slices(family, described):
        x = flat[part.path][part.index]
        x = x.transpose([part.order.index(axis) for axis in range(len(part.order))])
        named[part.name] = x.reshape(part.shape)
    return named


def check(recorded, name, result):
    """Loss and gradients within 1e-5 of the largest entry: sums of a few hundred float32 terms."""
    loss, _, grads = result
    assert loss == pytest.approx(float(recorded[f"{name}/loss"]), rel=1e-5)
    for key, want in recorded.items():
        if key.startswith(f"{name}/grad/"):
            close(grads[key.removeprefix(f"{name}/grad/")], want)
    norms = [np.linalg.norm(grads[weight]) for weight in sorted(grads)]
    np.testing.assert_allclose(norms, recorded[f"{name}/norms"], rtol=1e-5)


def close(ours, want):
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sft(tied, opened):
    recorded, name, run = tiny.read("sft"), "sft_tied" if tied else "sft", opened(tied=tied)
    mask = recorded["batch/labels"] != -100
    each = documents(recorded, "batch", mask)
    batch = pack(each, per_row=3)
    config = run.experiment.model

    @jax.jit
    def log_probs(params, batch):
        apply = model.Model(config, params)
        output = apply(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
        return token_logps(apply, output.hidden_btd, batch.targets)

    ours = np.asarray(log_probs(run.params, batch))
    for i, (ids, _) in enumerate(each):
        row, segment = divmod(i, 3)
        got = ours[row][batch.segments[row] == segment + 1][:-1]
        close(got, recorded[f"{name}/log_probs"][i, : len(ids) - 1])
    results = evaluate({name: objectives.NextToken()}, config, run.params, batch, {})
    check(recorded, name, results[name])


def test_preference(opened):
    recorded, policy, reference = tiny.read("preference"), opened(0), opened(1)
    config, frozen = policy.experiment.model, {"reference": reference.params}
    with_reference = {k: each for k, each in PAIRED.items() if each.models()}
    results = evaluate(with_reference, config, policy.params, pairs(recorded), frozen)
    results |= evaluate({"simpo": PAIRED["simpo"]}, config, policy.params, pairs(recorded), {})
    for name, result in results.items():
        check(recorded, name, result)
    metrics = results["sigmoid"][1]
    names = {"margin": "margins", "chosen_reward": "chosen", "rejected_reward": "rejected"}
    for ours, theirs in (names | {"accuracy": "accuracies"}).items():
        want = float(recorded[f"sigmoid/rewards/{theirs}"])
        assert metrics[ours] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("end", ["", "_swapped"])
def test_unpaired(end, opened):
    """With policy and reference swapped, the estimate of the divergence is below 0, and cut off."""
    recorded, runs = tiny.read("preference"), [opened(0), opened(1)]
    policy, reference = runs[::-1] if end else runs
    batch = feedback(recorded)
    frozen = {"reference": reference.params}
    results = evaluate(UNPAIRED, policy.experiment.model, policy.params, batch, frozen)
    for name, result in results.items():
        check(recorded, name + end, result)
        want = float(recorded[f"{name + end}/kl"])
        assert result[1]["kl"] == pytest.approx(want, rel=1e-5) and (want > 0) == (end == "")


def test_reward_model(opened):
    recorded, run = tiny.read("reward"), opened(0)
    config = dataclasses.replace(run.experiment.model, head="scalar")
    params = {name: x for name, x in run.params.items() if name != "unembed"}
    params["score"] = {"w": jnp.asarray(tiny.weights()["score.weight"].T)}
    results = evaluate(REWARD, config, params, pairs(recorded), {})
    for name, result in results.items():
        check(recorded, name, result)
        for metric in ("accuracy", "margin"):
            want = float(recorded[f"{name}/{metric}"])
            assert result[1][metric] == pytest.approx(want, rel=1e-5)
    chosen, rejected = np.split(recorded["rewards"], 2)
    metrics = results["reward"][1]
    assert metrics["chosen_reward"] == pytest.approx(chosen.mean(), rel=1e-5)
    assert metrics["rejected_reward"] == pytest.approx(rejected.mean(), rel=1e-5)


def test_distillation(opened):
    recorded, student, teacher = tiny.read("distill"), opened(0), opened(1)
    labels = recorded["batch/labels"]
    recorded["batch/attention_mask"] = recorded["batch/input_ids"] != tiny.IDS["pad_token_id"]
    batch = pack(documents(recorded, "batch", labels != -100), per_row=3)
    frozen = {"teacher": teacher.params}
    config = student.experiment.model
    for name, result in evaluate(DISTILL, config, student.params, batch, frozen).items():
        check(recorded, name, result)
