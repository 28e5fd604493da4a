"""A wheel and an sdist hold all that a run outside the clone needs, and the image's steps are the README's."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.harness import REPOSITORY

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "flagscale_like", "kernels")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel that is made from the sdist, without the network: (wheel, names in the sdist)."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:  # a build writes beside its sources
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, source / name)
    sdist = "from setuptools.build_meta import build_sdist; print(build_sdist('..'))"
    run([sys.executable, "-c", sdist], source)
    (archive,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    run([*pip, "--wheel-dir", str(folder), str(archive)], folder)
    (wheel,) = folder.glob("*.whl")
    with tarfile.open(archive) as names:
        return wheel, [name.partition("/")[2] for name in names.getnames()]


def run(command, folder, **environment):
    found = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_the_wheel_of_the_sdist_holds_every_file_of_both_packages(built):
    wheel, in_sdist = built
    kept = {
        str(path.relative_to(root))
        for root, package in ((REPOSITORY, "flagscale_like"), (REPOSITORY / "kernels", "flagscale_kernels"))
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert kept - names == set()
    assert {name for name in names if ".dist-info/" not in name} == kept  # no tests, no benchmarks
    assert {"README.md", "LICENSE", "setup.py", "pyproject.toml"} <= set(in_sdist)


def test_the_kernels_are_a_package_by_itself_and_need_torch_and_triton_only(tmp_path):
    """Its own wheel runs an operator, Triton's interpreter included, in a process that sees nothing else of the project."""
    shutil.copytree(REPOSITORY / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    run([*pip, "--target", str(tmp_path / "installed"), str(tmp_path / "kernels")], tmp_path)
    kept = {
        str(path.relative_to(REPOSITORY / "kernels"))
        for path in (REPOSITORY / "kernels" / "flagscale_kernels").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    (metadata,) = (tmp_path / "installed").glob("*.dist-info/METADATA")
    installed = {
        str(path.relative_to(tmp_path / "installed"))
        for path in (tmp_path / "installed" / "flagscale_kernels").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert installed == kept
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    ours = (REPOSITORY / "setup.py").read_text()
    for package in ("torch", "triton"):  # the versions of the whole project's package
        (line,) = (requirement for requirement in needed if re.match(rf"{package}\b", requirement))
        wanted = re.search(rf'"{package}(>=[\d.]+),(<[\d.]+)', ours)
        assert all(bound in line for bound in wanted.groups())
    assert len(needed) == 2
    (version,) = re.findall(r"^Version: (.*)$", metadata.read_text(), re.MULTILINE)
    assert f'VERSION = "{version}"' in ours
    code = """
import sys, torch, flagscale_kernels as fk
from flagscale_kernels.compat.flash_attn import flash_attn_func
x = torch.randn(3, 16)
torch.testing.assert_close(fk.rms_norm(x, x[0], backend="triton"), fk.rms_norm_reference(x, x[0]))
flash_attn_func(*(torch.randn(1, 5, 2, 16) for _ in range(3)), causal=True)
assert not {"megatron", "transformers", "flagscale_like"} & set(sys.modules)
print(fk.__file__)
"""
    here = {"PYTHONPATH": str(tmp_path / "installed"), "TRITON_INTERPRET": "1"}
    where = run([sys.executable, "-c", code], tmp_path, **here)
    assert Path(where.strip()).is_relative_to(tmp_path / "installed")


def test_a_run_starts_from_the_unpacked_wheel_in_an_empty_folder(built, tmp_path):
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    here = {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flagscale_like"]
    run([*command, "init", "first"], tmp_path / "empty", **here)
    folder = tmp_path / "empty" / "first"
    said = run([*command, "train", "run.yaml", "train.steps=2", "optimizer.warmup_steps=0"], folder, **here)
    assert "done: step 2 of 2" in said
    assert (folder / "runs" / "first" / "checkpoints" / "step_00000002").is_dir()
    run([*command, "report", "runs/first"], folder, **here)
    assert (folder / "runs" / "first" / "report.html").is_file()
    where = run([sys.executable, "-c", "import flagscale_like; print(flagscale_like.__file__)"], folder, **here)
    assert Path(where.strip()).is_relative_to(tmp_path / "installed")


def test_the_image_is_the_one_of_the_job_and_installs_as_the_readme_does():
    text = (REPOSITORY / "launch" / "Dockerfile").read_text()
    job = yaml.safe_load((REPOSITORY / "launch" / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert f"-t {container['image']} ." in text
    assert f"WORKDIR {container['workingDir']}\n" in text
    readme = (REPOSITORY / "README.md").read_text()
    for command in ("pip install", "flagscale-like doctor"):
        assert command in readme
        assert re.search(rf"^(RUN|    &&) {command}", text, re.MULTILINE)
    extras = set(re.search(r"\.\[([\w,]+)\]", text)[1].split(","))
    assert extras <= set(re.findall(r'^        "(\w+)": \[', (REPOSITORY / "setup.py").read_text(), re.MULTILINE))
    left_out = re.findall(r"-e '\^(\w+)=='", text)
    pinned = [line.partition("==")[0] for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    assert set(left_out) == {"torch"} <= set(pinned)
    assert "triton" not in pinned  # PyPI's torch asks for one version of it: a pin of another could not be installed
