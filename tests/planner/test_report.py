"""The tables of docs/planner.md are the planner's."""

import subprocess
import sys

import pytest

from benchmarks.planner.report import activation_table
from tests.harness import REPOSITORY


def test_the_pages_activation_table_is_the_planners():
    assert activation_table() in (REPOSITORY / "docs" / "planner.md").read_text(encoding="utf-8")


@pytest.mark.soak
def test_the_whole_page_is_the_planners():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planner.report", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
