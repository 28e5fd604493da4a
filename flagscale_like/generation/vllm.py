"""VllmEngine: texts drawn by vLLM, which gets the trainer's weights through its own interface for weight transfer.

Written for vLLM 0.32, whose trainer side is WeightTransferTrainerFactory.trainer_init(init_info, client, source), and then
send_weights() for each update: it calls init, start, update (once for each bucket) and finish on the inference side, here
through LlmClient. The backend is `ipc`: vLLM runs in the rank's own process, on its device. Ranks that only draw (rl.apart)
have a vLLM each, too: with them it runs on other devices than those that learn.

Not yet run on a GPU: the tests run it against a stand-in that records what is asked of vLLM's interface.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flagscale_like.arch import ModelArch
from flagscale_like.errors import ConfigError, DataError, PlatformError
from flagscale_like.generation.hf_weights import WeightSpec, weight_specs
from flagscale_like.generation.manifest import checked_weights
from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.generation.sampling import check_sampling
from flagscale_like.runtime.parallel import ParallelContext

BUCKET_BYTES = 512 << 20  # of the weights under way at a time
OLDEST = (0, 32)  # the first vLLM version with this interface that was read


def _module(name: str = "") -> ModuleType:
    """A module of vLLM.

    Raises:
        PlatformError: it is not installed, or is older than what this was written for.
    """
    try:
        found = importlib.import_module("vllm")
        version = tuple(int(part) for part in found.__version__.split(".")[:2])
        module = importlib.import_module(f"vllm.{name}") if name else found
    except ImportError as error:
        raise PlatformError(
            f"rl.rollout.engine vllm needs vLLM ({error}): pip install 'flagscale_like[vllm]', or use engine own or refit"
        ) from None
    if version < OLDEST:
        raise PlatformError(
            f"vLLM {found.__version__} is installed, whose interface for weight transfer is another one: install "
            f"{OLDEST[0]}.{OLDEST[1]} or later"
        )
    return module


def check_installed() -> None:
    """Refuse to begin without vLLM.

    Raises:
        PlatformError: it is not installed, or is older than what this was written for.
    """
    _module("distributed.weight_transfer")


class LlmClient:
    """The four calls of a weight update, made to a vLLM LLM in this process; vLLM's VLLMWeightSyncClient."""

    def __init__(self, llm: Any) -> None:
        self.llm, self._requests = llm, _module("distributed.weight_transfer.base")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the channel, once."""
        self.llm.init_weight_transfer_engine(self._requests.WeightTransferInitRequest(init_info=init_info))

    def start_weight_update(self) -> None:
        """An update begins."""
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """A bucket of weights."""
        self.llm.update_weights(self._requests.WeightTransferUpdateRequest(update_info=update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All weights are there."""
        self.llm.finish_weight_update()


def _source(specs: Sequence[WeightSpec], weights: Callable[[], Iterable[tuple[str, Tensor]]]) -> Any:
    """vLLM's WeightSource: what is announced, and a pass over the weights, which are checked against it."""
    base = _module("distributed.weight_transfer")

    class Source(base.WeightSource):
        def metadata(self) -> list[Any]:
            return [base.ParamMeta(spec.name, spec.dtype, spec.shape) for spec in specs]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return checked_weights(weights(), specs)

    return Source()


class VllmEngine:
    """A generation engine on a vLLM LLM; see generation.rollout.GenerationEngine.

    Each rank has an LLM of its own, on its device. The ranks that share a model divide the prompts, and all get all
    rollouts, once the last one has ended.

    Args:
        llm: a vllm.LLM; see open_llm().
        arch: the policy's; its family names the weights.
        dtype: of the weights that vLLM holds.
        room: the most tokens of a text with its prompt: vLLM's max_model_len.

    Attributes:
        version: of the weights; -1 before the first load(), and after sleep().
    """

    at_once = has_copy = True

    def __init__(self, llm: Any, arch: ModelArch, ctx: ParallelContext, *, dtype: torch.dtype, room: int) -> None:
        self.llm, self.ctx, self.room, self.version, self.vocab_size = llm, ctx, room, -1, arch.vocab_size
        self._weights: Iterable[tuple[str, Tensor]] = ()
        self._asleep, self._whole = False, False
        factory = _module("distributed.weight_transfer").WeightTransferTrainerFactory
        self._trainer = factory.trainer_init(
            init_info=_module("distributed.weight_transfer.ipc_engine").IPCTrainerInitInfo(
                rank=0,  # each rank sends to the LLM on its own device, and is the sender there
                packed=True,
                packed_buffer_size_bytes=BUCKET_BYTES,
            ),
            client=LlmClient(llm),
            source=_source(weight_specs(arch, dtype), lambda: self._weights),
        )

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand new weights over, in the family's order (hf_weights gives it). All ranks call it.

        After sleep(), vLLM's room for weights comes back first, and that for keys and values with wake(): both at once, and
        the trainer's copies, would need the most memory.

        Raises:
            CheckpointError: a weight is missing, unknown, comes twice or has another shape. vLLM then holds a mixture of two
                versions, in an update that is not finished: this engine generates nothing any more.
        """
        if self._asleep:
            self.llm.wake_up(tags=["weights"])
        self._whole, self._weights = False, weights
        try:
            self._trainer.send_weights()
        finally:
            self._weights = ()
        self.llm.reset_prefix_cache()  # keys and values of the last weights
        self._whole, self.version = True, version

    def sleep(self) -> None:
        """Give back the memory of weights, keys and values: the next weights come with load()."""
        if not self._asleep:
            self.llm.sleep(level=2)
        self._asleep, self._whole, self.version = True, False, -1

    def wake(self) -> None:
        """Be ready to generate again, after load().

        Raises:
            ConfigError: no weights were loaded since sleep().
        """
        if self._asleep:
            self._check_weights()
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    def _check_weights(self) -> None:
        if not self._whole:
            raise ConfigError(
                "vLLM has no whole weights: load() comes first, after sleep() and after a failed load() too"
            )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Rollout]:
        """Draw the rollouts of all prompts; they come once all have ended, in the order of prompts and samples.

        The seed of each text is made of the sampling's, the prompt's number and the sample's. vLLM's numbers depend on what
        else is in the batch, so that a text may come out differently with others beside it.

        Raises:
            ConfigError: a prompt leaves no room, no weights are loaded, a number of the sampling is out of its range, or
                top-k or top-p is asked for with a temperature: vLLM gives one log-probability a token, and the trainer
                compares with that of the whole distribution.
            DataError: vLLM gave a text up.
        """
        self._check_weights()
        check_sampling(sampling, self.vocab_size)
        if self._asleep:
            raise ConfigError("vLLM is asleep: wake() comes before generate()")
        if sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k):
            raise ConfigError(
                f"engine vllm gives no log-probabilities without top_p ({sampling.top_p:g}) and top_k ({sampling.top_k}), "
                "which the trainer compares with: use top_p 1 and top_k 0, or engine own or refit"
            )
        for prompt in prompts:
            if not 0 < len(prompt.ids) < self.room:
                raise ConfigError(
                    f"prompt {prompt.number} has {len(prompt.ids)} tokens: 1 to {self.room - 1} fit rl.rollout's room"
                )
        texts = [(prompt, sample) for prompt in prompts for sample in range(prompt.samples)]
        ranks = [rank for rank, dp in enumerate(self.ctx.gather(self.ctx.dp_rank)) if dp == self.ctx.dp_rank]
        mine = range(ranks.index(self.ctx.rank), len(texts), len(ranks))
        own = dict(zip(mine, self._draw([texts[n] for n in mine], sampling), strict=True))
        everyones = self.ctx.gather(own)
        found: Mapping[int, Rollout] = {n: rollout for rank in ranks for n, rollout in everyones[rank].items()}
        return iter([found[n] for n in range(len(texts))])

    def _draw(self, texts: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Rollout]:
        if not texts:
            return []
        requests = [{"prompt_token_ids": list(prompt.ids)} for prompt, _ in texts]
        options = [self._options(prompt, sample, sampling) for prompt, sample in texts]
        outputs = self.llm.generate(requests, options, use_tqdm=False)
        return [self._rollout(*text, output) for text, output in zip(texts, outputs, strict=True)]

    def _options(self, prompt: Prompt, sample: int, sampling: Sampling) -> Any:
        words = f"{sampling.seed} {prompt.number} {sample}".encode()
        return _module().SamplingParams(
            n=1,
            temperature=sampling.temperature,
            max_tokens=min(sampling.max_new_tokens, self.room - len(prompt.ids)),
            seed=int.from_bytes(hashlib.sha256(words).digest()[:7], "big"),
            stop_token_ids=list(sampling.stop),
            stop=list(sampling.stop_strings),
            include_stop_str_in_output=True,
            ignore_eos=True,  # what ends a text is in `stop`
            detokenize=bool(sampling.stop_strings),
            logprobs=0,  # of the drawn token
        )

    def _rollout(self, prompt: Prompt, sample: int, output: Any) -> Rollout:
        (text,) = output.outputs
        if text.finish_reason not in ("stop", "length"):
            raise DataError(f"vLLM gave up a text of prompt {prompt.number}: finish_reason is {text.finish_reason!r}")
        ids = [int(token) for token in text.token_ids]
        logprobs = [float(step[token].logprob) for token, step in zip(ids, text.logprobs, strict=True)]
        return Rollout(
            prompt.number, sample, prompt.ids, ids, logprobs, list(logprobs), text.finish_reason, self.version
        )


def open_llm(folder: str, *, room: int, dtype: torch.dtype, memory: float, seed: int = 0) -> Any:
    """A vLLM LLM for a model whose weights come later.

    Args:
        folder: with config.json and the tokenizer of the model; its weights are not read.
        room: the most tokens of a text with its prompt.
        memory: the share of the device that it may take.

    Raises:
        PlatformError: vLLM is not installed.
    """
    return _module().LLM(
        model=folder,
        load_format="dummy",
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=room,
        gpu_memory_utilization=memory,
        enable_sleep_mode=True,
        logprobs_mode="processed_logprobs",
        weight_transfer_config=_module("config").WeightTransferConfig(backend="ipc"),
        seed=seed,
    )
