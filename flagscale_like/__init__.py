"""flagscale_like: 3D-parallel pretraining of language models on megatron-core."""

import logging
import sys
import warnings
from types import ModuleType

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

# megatron-core decorates its fusions with torch.compile while it loads, which loads inductor: seconds of every start. No
# configuration of ours runs one of these fusions (model/build.py turns them off), so the decorator does nothing here.
if "megatron.core.jit" not in sys.modules:
    _jit = ModuleType("megatron.core.jit")
    _jit.jit_fuser = _jit.noop_decorator = lambda function: function
    sys.modules["megatron.core.jit"] = _jit
