"""flagscale_like: 3D-parallel pretraining of language models on megatron-core."""

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
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


class _BeforeMegatron(MetaPathFinder):
    """Chooses the platform at the moment when megatron-core is first imported, which it may have to be prepared for."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "megatron.core":
            sys.meta_path.remove(self)
            importlib.import_module("flagscale_like.runtime.before_megatron").prepare()


if "megatron.core" not in sys.modules:
    sys.meta_path.insert(0, _BeforeMegatron())
