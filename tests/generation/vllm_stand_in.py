"""A stand-in for the parts of vLLM 0.32 that VllmEngine calls: it records the calls, and keeps the weights that it is sent.

Signatures and the order of the four phases are those of docs.vllm.ai/en/v0.32.0/training/weight_transfer/. The IPC trainer
cuts the weights into buckets of packed_buffer_size_bytes, one update_weights call for each.
"""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import transformers


@dataclasses.dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple


class WeightSource:
    pass


@dataclasses.dataclass
class WeightTransferInitRequest:
    init_info: dict


@dataclasses.dataclass
class WeightTransferUpdateRequest:
    update_info: dict


@dataclasses.dataclass
class WeightTransferConfig:
    backend: str


@dataclasses.dataclass
class IPCTrainerInitInfo:
    rank: int
    packed: bool = False
    packed_buffer_size_bytes: int = 1 << 30


class Trainer:
    def __init__(self, info, client, source):
        self.info, self.client, self.source = info, client, source

    def send_weights(self):
        self.client.start_weight_update()
        bucket, size = [], 0
        for meta, (name, tensor) in zip(self.source.metadata(), self.source, strict=True):
            assert (meta.name, meta.dtype, meta.shape) == (name, tensor.dtype, tuple(tensor.shape))
            assert tensor.is_contiguous()
            if bucket and size + tensor.nbytes > self.info.packed_buffer_size_bytes:
                self.client.update_weights({"weights": bucket})
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        self.client.update_weights({"weights": bucket})
        self.client.finish_weight_update()


class WeightTransferTrainerFactory:
    @staticmethod
    def trainer_init(init_info, *, client, source=None):
        client.init_weight_transfer_engine({"packed": init_info.packed})
        return Trainer(init_info, client, source)


@dataclasses.dataclass
class SamplingParams:
    n: int
    temperature: float
    max_tokens: int
    seed: int
    stop_token_ids: list
    stop: list
    include_stop_str_in_output: bool
    ignore_eos: bool
    detokenize: bool
    logprobs: int


class LLM:
    def __init__(self, **options):
        self.options, self.calls, self.weights = options, [], {}
        self.finish_reason = "length"

    def init_weight_transfer_engine(self, request):
        assert request.init_info["packed"]
        self.calls.append("init")

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, request):
        self.calls.append("update")
        self.weights |= {name: tensor.clone() for name, tensor in request.update_info["weights"]}

    def finish_weight_update(self):
        self.calls.append("finish")

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.weights = {}

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def generate(self, prompts, params, use_tqdm):
        """Each text by itself; a stop token ends it. Where the folder describes a model, transformers computes it."""
        found, model = [], self._model()
        for prompt, options in zip(prompts, params, strict=True):
            draw = torch.Generator().manual_seed(options.seed)
            if model is None:
                ids = torch.randint(0, 50, (options.max_tokens,), generator=draw).tolist()
                logprobs = [-float(token) for token in ids]
            else:
                ids, logprobs = continued(model, prompt["prompt_token_ids"], options, draw)
            stop = next((n for n, token in enumerate(ids) if token in options.stop_token_ids), None)
            reason = self.finish_reason if stop is None else "stop"
            ids = ids if stop is None else ids[: stop + 1]
            steps = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids, logprobs, strict=False)]
            text = SimpleNamespace(token_ids=ids, logprobs=steps, finish_reason=reason)
            found.append(SimpleNamespace(outputs=[text], prompt=prompt["prompt_token_ids"]))
        return found

    def _model(self):
        """transformers' model of the folder's config.json with the weights that were sent; None where there is no folder."""
        if not Path(self.options["model"]).is_dir():
            return None
        config = transformers.AutoConfig.from_pretrained(self.options["model"])
        assert self.options["max_model_len"] <= config.max_position_embeddings
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        assert model.load_state_dict(self.weights, strict=False).unexpected_keys == []
        transformers.AutoTokenizer.from_pretrained(self.options["model"])
        return model


@torch.no_grad()
def continued(model, prompt, options, draw):
    """Drawn tokens, the seed's alone, and their log-probabilities."""
    tokens, logprobs = list(prompt), []
    for _ in range(options.max_tokens):
        scores = (model(torch.tensor([tokens])).logits[0, -1] / options.temperature).log_softmax(-1)
        tokens.append(int(torch.multinomial(scores.exp(), 1, generator=draw)))
        logprobs.append(float(scores[tokens[-1]]))
        if tokens[-1] in options.stop_token_ids:
            break
    return tokens[len(prompt) :], logprobs


def install(version="0.32.1"):
    """Put the stand-in in the place of the package."""
    modules = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "__version__": version},
        "vllm.config": {"WeightTransferConfig": WeightTransferConfig},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {
            "ParamMeta": ParamMeta,
            "WeightSource": WeightSource,
            "WeightTransferTrainerFactory": WeightTransferTrainerFactory,
        },
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferInitRequest": WeightTransferInitRequest,
            "WeightTransferUpdateRequest": WeightTransferUpdateRequest,
        },
        "vllm.distributed.weight_transfer.ipc_engine": {"IPCTrainerInitInfo": IPCTrainerInitInfo},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        module.__path__ = []
        sys.modules[name] = module
