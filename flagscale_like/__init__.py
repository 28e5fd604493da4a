"""flagscale_like: 3D-parallel pretraining of language models on megatron-core."""

import logging
import warnings

__version__ = "0.1.0"

# What megatron-core would print on every rank, about choices that are made on purpose here or about its own inner workings.
# `flagscale-like doctor` says what the absence of apex and Transformer Engine costs.
for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    "full scope is deprecated",
    "If you are using transformer_engine as the transformer implementation, the core_attn",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "The pad token id in the tokenizer collides",  # only an incomplete last sample is padded, and the loss masks it
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
logging.getLogger("megatron.core").setLevel(logging.ERROR)
