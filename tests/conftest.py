"""What every test shares: the CPU, one folder of compiled programs, and which tests are asked for.

The programs are found by their content, so the folder also serves the next session and the
processes that tests start.
"""

import getpass
import os
import tempfile
import time

import pytest

LAST = ("test_every_axis.py", "test_places.py")  # the longest
BEGAN = time.monotonic()

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"lm-tests-{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--minutes", type=float, help="slow tests not begun by then are skipped")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # So that `--minutes` cuts off nothing else, and places before anything.
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)
    # `-m slow` and `path::name` ask for a test by hand, and get it.
    if config.getoption("--slow") or config.getoption("-m"):
        return
    if any("::" in argument for argument in config.args):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes and item.get_closest_marker("slow") and time.monotonic() - BEGAN > 60 * minutes:
        # The name makes each reason another, so that -rs lists the tests one by one.
        pytest.skip(f"{item.nodeid} is slow, and the {minutes:g} minutes are over")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of the tiny experiment (tiny_experiments.Trained). To change it, `copy` it."""
    from tiny_experiments import trained

    return trained(tmp_path_factory.mktemp("tiny"))
