"""Device meshes, sharding, pipeline parallelism and multi-host runs. See README.md.

mesh         Mesh and Place, which an experiment declares
sharding     maps logical axis names to mesh axes
pipeline     pipeline parallelism over the mesh axis `pipe`
distributed  multi-host initialization, barriers, agreement
peers        ends all processes of a run when one of them ends
hardware     peak rates of chips, and the measured matmul rate
"""

from lm.parallel.mesh import AXES, Mesh, Place

__all__ = ["AXES", "Mesh", "Place"]
