"""Devices: which there are, how they form a mesh, and which holds which part of an array.

mesh         Mesh and Place: what an experiment declares
sharding     logical axis names to mesh axes
pipeline     pipeline parallelism over the mesh axis `pipe`
distributed  several hosts: start-up, barriers, agreement
peers        ends all processes of a run when one ends
hardware     peak rates of chips, and the measured matmul rate
"""

from lm.parallel.mesh import AXES, Mesh, Place

__all__ = ["AXES", "Mesh", "Place"]
