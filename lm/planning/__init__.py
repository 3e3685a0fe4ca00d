"""Plans a run on TPU pods that are not at hand: memory, FLOPs, collectives, time.

slices      TPU slices by name
estimate    memory and time from the declaration alone
compiled    compiles the real training step with libtpu
hlo         parses the compiled program
compute     FLOPs and bytes of its operations
links       its collectives and their time on the torus
search      searches meshes, micro-batches and remat policies
scaling     weak scaling: the same work per chip on larger slices
report      a plan as text
"""

from lm.planning.report import Plan, plan, text
from lm.planning.scaling import scaling
from lm.planning.scaling import text as scaling_text
from lm.planning.search import search
from lm.planning.search import text as search_text

__all__ = ["Plan", "plan", "scaling", "scaling_text", "search", "search_text", "text"]
