"Fixtures that several test files share."
import os
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")   # several processes share the cores; before torch is there

import pytest
from hypothesis import HealthCheck, settings

# the same examples for everybody, and no limit of milliseconds: a slow machine is no fault. HYPOTHESIS_PROFILE=default draws new ones
settings.register_profile("pli", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "pli"))


@pytest.fixture(scope="session", autouse=True)
def no_cache_but_our_own():
    "Stored picture features of whoever runs the tests are neither read nor written."
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PLI_CACHE"] = folder
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder of real data: `PLI_SHARED`, or `shared` beside the repository; tests that need it are skipped without."
    named = os.environ.get("PLI_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir(): pytest.skip("no folder of real data: set PLI_SHARED")
    return folder


def pytest_terminal_summary(terminalreporter):
    "How many tests drove a browser: a machine without one skips them, and that should not go unseen."
    ran = sum("browser" in report.keywords for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, []))
    skipped = sum("browser" in report.keywords for report in terminalreporter.stats.get("skipped", []))
    if ran or skipped: terminalreporter.write_line(f"browser tests: {ran} ran, {skipped} were skipped")
