import os
import sys

# Before anything imports triton: the kernel tests run Triton's interpreter on CPU tensors. One thread a process, because
# the layouts that are compared run up to four processes on a small machine.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish(session):
    """Start the server that ranks fork from, before a test runs code that would start it with less loaded."""
    harness = sys.modules.get("tests.harness")
    if harness and session.items and not session.config.option.collectonly:
        harness.start_server()
