"""flagscale_like: 3D-parallel pretraining of language models on megatron-core."""

__version__ = "0.1.0"
