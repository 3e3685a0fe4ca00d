"""Checkpoints: a run's state on disk, and back onto any mesh."""

from lm.checkpoint.store import Save, Store

__all__ = ["Save", "Store"]
