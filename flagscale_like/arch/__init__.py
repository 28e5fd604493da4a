"""The shape of a model, and what follows from it.

`parameters(arch)` lists a model's parameters. Initialisation, muP, monitors, the planner, checkpoints and the Hugging Face
families read this table, and ask for a parameter's `role` instead of matching its name.
"""

from flagscale_like.arch.base import Frozen, whole_number
from flagscale_like.arch.blocks import Block, GatedFeedForward, GroupedQueryAttention, Layer, counted_keys, groups_on
from flagscale_like.arch.experts import Experts, MixtureOfExperts, active
from flagscale_like.arch.latent_attention import LatentAttention, MultiLatentAttention
from flagscale_like.arch.model import ModelArch, adapter_parameters, parameters, parameters_by_name
from flagscale_like.arch.position import SCALING_FIELDS, Position, RopeScaling
from flagscale_like.arch.table import (
    EMBEDDING_NAME,
    OUTPUT_NAME,
    VOCAB_MULTIPLE,
    Parameter,
    Role,
    is_adapter,
    padded_rows,
)

__all__ = [
    "EMBEDDING_NAME",
    "OUTPUT_NAME",
    "SCALING_FIELDS",
    "VOCAB_MULTIPLE",
    "Block",
    "Experts",
    "Frozen",
    "GatedFeedForward",
    "GroupedQueryAttention",
    "LatentAttention",
    "Layer",
    "MixtureOfExperts",
    "ModelArch",
    "MultiLatentAttention",
    "Parameter",
    "Position",
    "Role",
    "RopeScaling",
    "active",
    "adapter_parameters",
    "counted_keys",
    "groups_on",
    "is_adapter",
    "padded_rows",
    "parameters",
    "parameters_by_name",
    "whole_number",
]
