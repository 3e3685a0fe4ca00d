"""Plans a run on TPU slices without having them: memory, FLOPs, collectives, time. See README.md.

slices      TPU slices by name
estimate    memory and time from the declaration alone
compiled    compiles the training step with libtpu, ahead of time
hlo         parses the compiled program
compute     FLOPs and memory traffic of its operations
links       its collectives and their time on the interconnect
report      a plan: facts about one place, as a dictionary and as text
search      searches meshes, micro-batches and remat policies
scaling     weak scaling: the same work per chip on larger slices
engine      the generation engine's programs on abstract arrays
serving     memory and speed of the generation engine
show        the resolved declaration, parameters, shardings and memory of an experiment
"""

from lm.planning.report import Plan, plan, text
from lm.planning.scaling import scaling
from lm.planning.scaling import text as scaling_text
from lm.planning.search import search
from lm.planning.search import text as search_text
from lm.planning.serving import plan as serving
from lm.planning.serving import text as serving_text

__all__ = [
    "Plan",
    "plan",
    "scaling",
    "scaling_text",
    "search",
    "search_text",
    "serving",
    "serving_text",
    "text",
]
