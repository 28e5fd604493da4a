"""Packaging metadata: `flagscale_like`, and `flagscale_kernels`, which kernels/pyproject.toml builds by itself."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = "0.1.0"

setup(
    name="flagscale_like",
    version=VERSION,
    description="3D-parallel pretraining of language models on megatron-core, from a laptop CPU to a GPU cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["flagscale_like", "flagscale_like.*"]),
        *find_packages("kernels", include=["flagscale_kernels", "flagscale_kernels.*"]),
    ],
    package_dir={"flagscale_kernels": "kernels/flagscale_kernels"},
    package_data={
        "flagscale_like": ["py.typed", "training/report.html"],
        "flagscale_kernels": ["py.typed", "README.md"],
    },
    # Lower bounds are what the code needs; upper bounds stop at what has been tested. The exact set is constraints.txt.
    install_requires=[
        "torch>=2.10,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        # runtime/megatron_versions.py says which have been tested.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
        "transformers>=5.3,<6",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "sentencepiece>=0.2.3,<0.3",
        "accelerate>=1.0",
        "numpy>=1.26",
        "pyarrow>=17",
        "pydantic>=2.11,<3",
        "PyYAML>=6",
        "typer>=0.15",
        "rich>=13",
        "xxhash>=3.4",
        "zstandard>=0.23",
        "ftfy>=6.3",
        "datasketch>=2,<3",
        "psutil>=5.9",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "hypothesis>=6",
            "ruff>=0.9",
            "ty==0.0.107",  # before its first release, each version finds other things
            "gguf>=0.17",
            "compressed-tensors>=0.15",
            "peft>=0.17",
            "sentence-transformers>=5.2,<7",
            "pytrec_eval-terrier>=0.5.7",
            "faiss-cpu>=1.9",
            "lm-eval>=0.4.12,<0.5",
            "uvicorn>=0.30,<1",
            "starlette>=0.46,<2",
            "mkdocs-material>=9.5,<10",
            "wandb>=0.22",
            "mlflow-skinny>=3",
        ],
        "wandb": ["wandb>=0.22"],
        "mlflow": ["mlflow-skinny>=3"],
        "gpu": ["nvidia-ml-py>=12"],
        "rag": ["faiss-cpu>=1.9"],
        "eval": ["lm-eval>=0.4.12,<0.5"],
        "vllm": ["vllm>=0.32"],  # draws rollouts on a GPU; not in dev, and not yet run
        "serve": ["uvicorn>=0.30,<1", "starlette>=0.46,<2"],
        "quantized": ["compressed-tensors>=0.15"],  # transformers loads INT4 and INT8 folders with it
    },
    entry_points={"console_scripts": ["flagscale-like=flagscale_like.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
