"""10,000 requests that Schemathesis makes from the service's own OpenAPI description, to running workers.

The check is the one of the tests, which asks 1,000: each valid request is answered, each invalid one is refused with a
sentence, and the same process still answers rightly at the end. A case that is not ends the benchmark with its request.
"""

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from benchmarks.measure import Result

CASES = 10_000
ROOT = Path(__file__).parent.parent
TEST = "tests/test_deployment_service_cases.py::test_generated_requests_each_get_their_status"


def run(quick: bool) -> Result:
    """How many were asked, and how many of them were answered wrongly."""
    cases = 500 if quick else CASES
    table = ROOT / "build" / "verification_of_cases.json"  # not the one that lessons read
    environment = {**os.environ, "SERVICE_CASES": str(cases), "VERIFICATION_TABLE": str(table)}
    start = perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3_600)
    if done.returncode:
        raise AssertionError(f"a request was answered wrongly:\n{done.stdout[-4000:]}")
    rows = [{"requests": cases, "seconds": round(perf_counter() - start, 1)}]
    return Result({"wrong_answers": 0.0, "requests": float(cases)}, 0.0, {"wrong_answers": 0}, rows)
