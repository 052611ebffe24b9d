"""Runs vLLM instead of the engine, with the same checkpoint and the same messages, and therefore the same API.

It runs in the engine's process, with a Python whose environment has vLLM (`engine.vllm_python`). Written for vLLM 0.32
and its V1 engine. Differences from our engine: sampled text depends on what shares a step; NaN logits go unnoticed;
vLLM decides how long a sequence waits for room in the cache, and may put a running one back.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.errors import UserError
from model.hf_config import read_config
from model.sampling_params import SamplingParams
from serving.engine.messages import Admission, Candidates, FinishReason, SequenceRequest, StepReport, TokenEvent

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process already belongs to the engine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise all replicas take the same cores
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere

import vllm
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
SPARE_BLOCKS = 8  # vLLM keeps one for itself and cuts off the last
BLOCK_TOKENS = 128  # vLLM's largest, on CPUs


class VllmEngine:
    """The same interface as `Engine`."""

    def __init__(self, checkpoint: Path, config: EngineConfig, *, eos_id: int | None) -> None:
        """Raises `UserError` for settings that vLLM does not have."""
        if config.dtype not in NUMBER_BYTES:
            raise UserError(f"engine.dtype={config.dtype} is not vLLM's; expected float32 or bfloat16")
        shape = read_config(checkpoint)
        self._eos_id = eos_id
        self._requests: dict[int, SequenceRequest] = {}
        self._started: set[int] = set()  # those that have a token
        arguments = vllm.EngineArgs(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            dtype=config.dtype,
            max_model_len=shape.n_positions,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(config.prefill_tokens_per_step + config.max_num_seqs, shape.n_positions),
            max_logprobs=-1,
            enable_prefix_caching=config.prefix_cache,
            kv_cache_memory_bytes=_cache_bytes(shape, config),
            generation_config="vllm",  # no defaults from the checkpoint's folder
            disable_log_stats=True,
            seed=0,
        )
        self._engine = LLMEngine.from_engine_args(arguments)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def submit(self, request: SequenceRequest) -> None:
        self._requests[request.seq_id] = request
        prompt: Any = {"prompt_token_ids": request.prompt_ids}
        self._engine.add_request(str(request.seq_id), prompt, self._params(request))

    def cancel(self, seq_id: int) -> None:
        """Ends a sequence. It is no error if the sequence has finished meanwhile."""
        if self._requests.pop(seq_id, None) is not None:
            self._started.discard(seq_id)
            self._engine.abort_request([str(seq_id)])

    def step(self, on_admission: Callable[[Admission], None] | None = None) -> StepReport:
        """Runs a step. vLLM reports an admission only together with the first token."""
        outputs = self._engine.step() if self._requests else []
        events: list[TokenEvent] = []
        admitted: list[int] = []
        num_prompt_tokens = 0
        for output in outputs:
            request = self._requests.get(int(output.request_id))
            if request is None:  # cancelled
                continue
            if request.seq_id not in self._started:
                self._started.add(request.seq_id)
                admitted.append(request.seq_id)
                num_prompt_tokens += len(request.prompt_ids)
            events += self._events(request, output)
        scheduler = self._engine.engine_core.engine_core.scheduler
        num_running, num_waiting = len(scheduler.running), len(scheduler.waiting)
        if on_admission is not None and admitted:
            on_admission(Admission(admitted, num_running, num_waiting))
        return StepReport(
            events,
            num_running=num_running,
            num_waiting=num_waiting,
            kv_cache_usage=round(scheduler.kv_cache_manager.usage, 4),
            num_prompt_tokens=num_prompt_tokens,
        )

    def _params(self, request: SequenceRequest) -> Any:
        sampling: SamplingParams = request.sampling
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            seed=sampling.seed,
            max_tokens=max(request.max_tokens, 1),  # 0 is not allowed; see `_events`
            ignore_eos=request.ignore_eos,
            stop_token_ids=[] if request.ignore_eos or self._eos_id is None else [self._eos_id],
            logprobs=request.num_logprobs,
            prompt_logprobs=(request.num_logprobs or 0) if request.prompt_logprobs else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _events(self, request: SequenceRequest, output: Any) -> list[TokenEvent]:
        """Returns a sequence's new tokens; the first comes with the prompt's log-probabilities, if asked for."""
        [choice] = output.outputs
        reason = {None: None, "stop": FinishReason.STOP, "length": FinishReason.LENGTH}.get(
            choice.finish_reason, FinishReason.ERROR
        )
        of_prompt = None
        if request.prompt_logprobs and output.prompt_logprobs:
            of_prompt = [
                None if candidates is None else _candidates(candidates, token_id, request.num_logprobs or 0)
                for token_id, candidates in zip(request.prompt_ids, output.prompt_logprobs, strict=True)
            ]
        events = []
        if request.max_tokens == 0:
            events.append(TokenEvent(request.seq_id, None, FinishReason.LENGTH, None, of_prompt))
        for index, token_id in enumerate(choice.token_ids if request.max_tokens > 0 else []):
            logprobs = None
            if request.num_logprobs is not None:
                logprobs = _candidates(choice.logprobs[index], token_id, request.num_logprobs)
            finish_reason = reason if index + 1 == len(choice.token_ids) else None
            events.append(TokenEvent(request.seq_id, token_id, finish_reason, logprobs, of_prompt))
            of_prompt = None
        if reason is FinishReason.ERROR and not choice.token_ids:
            events.append(TokenEvent(request.seq_id, None, reason, None, None))
        if events and events[-1].finish_reason is not None:
            self._requests.pop(request.seq_id)
            self._started.discard(request.seq_id)
        return events


def _candidates(entries: dict[int, Any], token_id: int, num_top: int) -> Candidates:
    """Converts vLLM's entries: the token itself, and the others by rank."""
    ranked = sorted((entry.rank, other, entry.logprob) for other, entry in entries.items() if entry.rank <= num_top)
    return Candidates(entries[token_id].logprob, [(other, logprob) for _, other, logprob in ranked])


def _cache_bytes(shape: GPTConfig, config: EngineConfig) -> int | None:
    """Returns room for as many tokens as our engine has. None, on a GPU without a setting, lets vLLM decide."""
    if config.kv_cache_tokens is None and config.device == "cuda":
        return None
    num_tokens = config.kv_cache_tokens or config.max_num_seqs * shape.n_positions
    num_blocks = -(-num_tokens // BLOCK_TOKENS) + SPARE_BLOCKS
    return num_blocks * BLOCK_TOKENS * 2 * shape.n_layer * shape.n_embd * NUMBER_BYTES[config.dtype]
