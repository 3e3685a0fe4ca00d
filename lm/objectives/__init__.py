"""What a training step minimizes. Each objective is a value with one pure `loss`.

objective   the base class `Objective`, and `Loss`
next_token  cross-entropy of the next token
"""

from lm.objectives.next_token import NextToken
from lm.objectives.objective import Loss, Objective

__all__ = ["Loss", "NextToken", "Objective"]
