"""What a run would take on a TPU slice that nobody has booked: memory, work, collectives, time.

    slices      slices by name
    estimate    memory and time from the declaration alone
    compiled    the real training step through libtpu's compiler
    hlo         reads the compiled text
    compute     its products and bytes
    links       its collectives, and what they cost on the torus
    search      tries meshes, micro-batches and remat
    scaling     the same work per chip on growing slices
    report      a plan as text

In a notebook `lm.plan(experiment(), on="v5p-64")` plans: this room can be called as `plan`.
"""

import sys
from types import ModuleType
from typing import Any

from lm.plan.report import Plan, plan, text
from lm.plan.scaling import scaling
from lm.plan.scaling import text as scaling_text
from lm.plan.search import search
from lm.plan.search import text as search_text

__all__ = ["Plan", "plan", "scaling", "scaling_text", "search", "search_text", "text"]


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Plan:
        return plan(*args, **options)


sys.modules[__name__].__class__ = _Room
