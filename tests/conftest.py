"""What every test shares: the CPU, one folder of compiled programs, and which tests are asked for.

The programs are found by their content, so the folder also serves the next session and the
processes that tests start.
"""

import gc
import getpass
import importlib.metadata
import os
import tempfile
import time

import pytest

FOR_EVERY_PLATFORM = ("kernels", "aot", "planning")  # folders whose tests lower for TPUs and GPUs
PROCESSES = 4  # at most; each takes up to 4 GB of memory
LAST = ("test_every_axis.py", "test_places.py")  # the longest
BEGAN = time.monotonic()

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"lm-tests-{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most of the time of the tests is compilation; without optimizations it takes a quarter.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests programs as users compile them.
quick = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
if quick:
    flags = "--xla_cpu_parallel_codegen_split_count=1"
    # XLA aborts on a flag that it does not know; later versions do not have this one.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax  # noqa: E402  after its environment

from kernels_pallas import dispatch  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--minutes", type=float, help="slow tests not begun by then are skipped")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs the whole suite in several processes (pytest-xdist); -n 0 runs it in one."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    asked = config.option.numprocesses is not None or config.option.usepdb
    if whole and not asked and "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses = min(os.cpu_count() or 1, PROCESSES)
        if config.option.dist == "no":
            config.option.dist = "loadfile"  # fixtures of a module are made once
            config.option.loadscopereorder = False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")
    config.addinivalue_line("markers", "browser: needs Chromium; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # So that `--minutes` cuts off nothing else, and places before anything.
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)
    # `-m slow` and `path::name` ask for a test by hand, and get it.
    if config.getoption("--slow") or config.getoption("-m"):
        return
    if any("::" in argument for argument in config.args):
        return
    for item in items:
        for name in ("slow", "browser"):
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{name}: runs with --slow"))


def pytest_collection_finish() -> None:
    """Collects garbage less often: tracing makes many objects, among the many that stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes and item.get_closest_marker("slow") and time.monotonic() - BEGAN > 60 * minutes:
        # The name makes each reason another, so that -rs lists the tests one by one.
        pytest.skip(f"{item.nodeid} is slow, and the {minutes:g} minutes are over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Traces and compiles for the CPU, quickly; in FOR_EVERY_PLATFORM as users do, also in the
    processes that a test starts."""
    as_users = item.path.parent.name in FOR_EVERY_PLATFORM
    with pytest.MonkeyPatch.context() as patch, dispatch.only(None if as_users else "cpu"):
        if as_users:
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", quick and not as_users)
        return (yield)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of the tiny experiment (tiny_experiments.Trained). To change it, `copy` it."""
    from tiny_experiments import trained

    return trained(tmp_path_factory.mktemp("tiny"))
