"""A short soak (tests/serve/soak.py); the long one runs by hand."""

import pytest
import soak


@pytest.mark.slow
def test_soak(folders):
    served = {name: folders[name] for name in ("one", "tuned")}
    seen = soak.soak(served, 300)
    assert all(seen[kind] for kind in soak.KINDS)
    assert seen["rss_grown_mb"] < 30
