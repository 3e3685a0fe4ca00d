"""What a training step minimizes. Each objective is a value with one pure `loss`.

objective     the base class `Objective`, and `Loss`
next_token    cross-entropy of the next token
preference    DPO, IPO, SimPO on pairs of completions; KTO on single ones
reward        reward model, on pairs
distill       distillation from a teacher
on_policy     answers that the model in training writes itself
divergence    divergences of a student from its teacher
token_losses  what they share: per-token losses on any mesh, sums over documents
"""

from lm.objectives.distill import Distill
from lm.objectives.divergence import JSD, Divergence, ForwardKL, ReverseKL
from lm.objectives.next_token import NextToken
from lm.objectives.objective import START, ExampleObjective, Examples, Frozen, Loss, Objective
from lm.objectives.preference import DPO, IPO, KTO, Comparison, Completion, Preference, SimPO
from lm.objectives.reward import RewardModel

__all__ = [
    "DPO",
    "IPO",
    "JSD",
    "KTO",
    "START",
    "Comparison",
    "Completion",
    "Distill",
    "Divergence",
    "ExampleObjective",
    "Examples",
    "ForwardKL",
    "Frozen",
    "Loss",
    "NextToken",
    "Objective",
    "Preference",
    "ReverseKL",
    "RewardModel",
    "SimPO",
]
