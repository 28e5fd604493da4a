"""Programs that some tests need and pip does not install. In CI, where .ci/run installs them, a missing one is a failure."""

import os
import shutil
from typing import NoReturn

import pytest


def find_program(*names: str) -> str:
    """The path of the first of these programs that is installed; without one the test skips, in CI it fails."""
    for name in names:
        if path := shutil.which(name):
            return path
    missing(
        f"none of {', '.join(names)} is installed; see .ci/run" if len(names) > 1 else f"{names[0]} is not installed"
    )


def missing(reason: str) -> NoReturn:
    """End a test that cannot run here: a skip on a developer's machine, a failure in CI (the variable CI is set)."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}: nothing is skipped in CI", pytrace=False)
    pytest.skip(reason)
