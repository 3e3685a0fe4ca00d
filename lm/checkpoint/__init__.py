"""Checkpoints of a run: saved with Orbax, restored on any mesh (store)."""

from lm.checkpoint.store import Save, Store, checksums

__all__ = ["Save", "Store", "checksums"]
