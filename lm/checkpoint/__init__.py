"""Checkpoints of a run: saved with Orbax (store), restored on any mesh."""

from lm.checkpoint.store import Save, Store

__all__ = ["Save", "Store"]
