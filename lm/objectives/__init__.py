"""What a training step minimizes. Each objective is a value with one pure `loss`.

next_token  cross-entropy of the next token
"""

from lm.objectives.next_token import Loss, NextToken

__all__ = ["Loss", "NextToken"]
