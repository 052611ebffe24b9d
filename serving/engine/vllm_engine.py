"""Runs vLLM instead of the engine, with the same checkpoint and the same messages, and therefore
the same API.

It runs in the engine's process, with a Python whose environment has vLLM (`engine.vllm_python`).
Written for vLLM 0.32 and its V1 engine. Differences from our engine: sampled text depends on what
shares a step (unless `engine.batch_invariant`); of logits that are not finite only NaN is noticed;
vLLM decides how long a sequence waits for room in the cache, and may put a running one back.
"""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cluster.settings.parser import suggestion
from cluster.settings.serve import CPU_NUM_SEQS, CPU_PREFILL_TOKENS, EngineConfig
from model.files.hf_config import linear_layer_names, read_shape
from raymill.errors import UserError
from serving.engine.grammar_rows import GrammarRows
from serving.engine.kv_cache_size import served_context
from serving.engine.messages import (
    Admission,
    Candidates,
    EngineFacts,
    FinishReason,
    SequenceRequest,
    StepReport,
    TokenEvent,
)
from serving.engine.runner import with_dtype
from serving.engine.vllm_sizes import (
    NUMBER_BYTES,
    Starts,
    batched_tokens,
    cache_bytes,
    sampling_arguments,
    spare_generators,
)
from serving.engine.vllm_weights import clear_cache, replace_weights, stored_shapes, weights_alone
from serving.structured.grammar_cache import GrammarCache
from serving.structured.token_mask import TokenMask
from serving.structured.vocabulary import vocabulary_of

# This process already belongs to the engine
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Otherwise all replicas take the same cores
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere
os.environ.setdefault("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
# oneDNN keeps kernels for 1024 shapes, and each number of tokens is one: 350 MB, and no faster
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# A fork would inherit our socket and a started CUDA
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

import vllm
import vllm.envs
from vllm.config.lora import MaxLoRARanks
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from serving.engine.vllm_grammars import FollowedGrammar, follow, prepare

LEAST_TOKENS = 1  # vLLM has no sequence that only reads; see `_events`

_RANKS = sorted(get_args(MaxLoRARanks))  # for which vLLM has room

_log = logging.getLogger(__name__)


class VllmEngine:
    """The same interface as `Engine`."""

    def __init__(self, checkpoint: Path, config: EngineConfig, *, eos_id: int | None) -> None:
        """Raises `UserError` for settings that vLLM, or this machine, does not have."""
        _require_device(config)
        config = with_dtype(config, checkpoint)
        if config.dtype not in NUMBER_BYTES:
            raise UserError(
                f"engine.dtype={config.dtype} is not vLLM's; expected float32 or bfloat16"
            )
        self._eos_id = eos_id
        self._requests: dict[int, SequenceRequest] = {}
        self._started: set[int] = set()  # those that have a token
        self._refused: set[int] = set()  # by vLLM, since the latest step
        self._not_finite: set[int] = set()  # those whose logits had NaN in the latest step
        self._has_nan_blocks = False  # in vLLM's cache, since the latest step
        self._starts = Starts()
        self._adapters: dict[int, LoRARequest] = {}  # by the number that sequences name
        self._grammars = _grammars_of(checkpoint)
        self._followed: dict[int, FollowedGrammar] = {}  # by sequence that vLLM has
        # Prompt tokens of the sequences that the latest step started
        self._looked_up = self._found = 0
        self._plans: list[Any] = []  # what vLLM's scheduler has decided in the latest step
        self._on_admission: Callable[[Admission], None] | None = None
        with weights_alone(checkpoint) as folder:
            try:
                settings = _arguments(folder, config).create_engine_config(
                    UsageContext.OPENAI_API_SERVER
                )
            except ValueError as error:
                raise UserError(
                    f"vLLM refuses its settings: {' '.join(str(error).split())}"
                ) from None
            self._engine = LLMEngine.from_vllm_config(settings)
        core = self._engine.engine_core
        self._scheduler = core.engine_core.scheduler
        core.get_output = partial(self._noticing_nan, core.get_output)
        self._scheduler.schedule = partial(self._noticing_plans, self._scheduler.schedule)
        self._vocab_size = prepare(self._scheduler, settings)
        if config.device == "cpu" and not settings.use_v2_model_runner:
            self._engine.collective_rpc(spare_generators)
        sizes = settings.scheduler_config
        self.facts = EngineFacts(
            config.dtype,
            sizes.max_num_seqs,
            sizes.max_num_batched_tokens,
            least_tokens=LEAST_TOKENS,
        )
        self._shapes = stored_shapes(checkpoint)

    def add_adapter(self, number: int, checkpoint: Path) -> None:
        """Lets sequences name an adapter of the weights that the engine was started with. vLLM reads
        its files at its first sequence."""
        self._adapters[number] = LoRARequest(f"{number}", number, str(checkpoint))

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._refused or self._grammars)

    def submit(self, request: SequenceRequest) -> None:
        """Adds a sequence, once its grammar is compiled if it has one. What vLLM refuses in it, by
        bounds of its own, ends it alone, in the next step."""
        if request.grammar is None:
            self._add(request, None)
        else:
            self._grammars.hold(request)

    def _add(self, request: SequenceRequest, compiled: Any) -> None:
        prompt: Any = {"prompt_token_ids": request.prompt_ids}
        if request.cache_scope:
            prompt["cache_salt"] = request.cache_scope
        adapter = self._adapters.get(request.weights)
        try:
            vllm_id = self._engine.add_request(
                str(request.seq_id), prompt, self._params(request), lora_request=adapter
            )
        except (ValueError, VLLMClientError) as error:
            _log.error("vLLM refuses a sequence: %s", error)
            self._refused.add(request.seq_id)
            return
        self._requests[request.seq_id] = request
        if compiled is not None:
            stop_ids = self._stop_ids(request)
            mask = TokenMask(compiled, stop_ids=stop_ids, vocab_size=self._vocab_size)
            self._followed[request.seq_id] = FollowedGrammar(mask)
            follow(self._scheduler, vllm_id, self._followed[request.seq_id])

    def cancel(self, seq_id: int) -> None:
        """Ends a sequence. It is no error if the sequence has finished meanwhile."""
        self._refused.discard(seq_id)
        self._grammars.cancel(seq_id)
        if seq_id in self._requests:
            self._forget(seq_id)
            self._engine.abort_request([str(seq_id)])

    def _forget(self, seq_id: int) -> None:
        del self._requests[seq_id]
        self._started.discard(seq_id)
        self._starts.forget(seq_id)
        self._followed.pop(seq_id, None)

    def step(self, on_admission: Callable[[Admission], None] | None = None) -> StepReport:
        """Runs a step. Calls `on_admission` with the sequences that it starts before it
        computes."""
        began_s = time.perf_counter()
        self._on_admission, self._plans = on_admission, []
        self._looked_up = self._found = 0
        if self._has_nan_blocks:
            self._forget_all_blocks()
        events = self._take_ready()
        outputs = self._engine.step() if self._requests else []
        events += [
            TokenEvent(seq_id, None, FinishReason.ERROR, None, None)
            for seq_id in sorted(self._refused)
        ]
        self._refused.clear()
        num_prompt_tokens = 0
        for output in outputs:
            request = self._requests.get(int(output.request_id))
            if request is None:  # cancelled
                continue
            if request.seq_id not in self._started:
                self._started.add(request.seq_id)
                num_prompt_tokens += len(request.prompt_ids)
            events += self._events(request, output)
        return StepReport(
            events,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._grammars),
            kv_cache_usage=round(self._scheduler.kv_cache_manager.usage, 4),
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=sum(plan.total_num_scheduled_tokens for plan in self._plans),
            num_looked_up=self._looked_up,
            num_found=self._found,
            steps_s=(round(time.perf_counter() - began_s, 6),),
        )

    def _take_ready(self) -> list[TokenEvent]:
        """Hands vLLM the sequences whose grammar is compiled. Returns the ends of those whose
        grammar cannot be."""
        if self._grammars and not self._requests:
            self._grammars.wait()
        events = []
        for request, compiled in self._grammars.take_ready():
            if compiled is None:
                events.append(TokenEvent(request.seq_id, None, FinishReason.GRAMMAR, None, None))
            else:
                self._add(request, compiled)
        return events

    def take_back(self) -> list[SequenceRequest]:
        """Returns the sequences that vLLM has not started, and forgets them."""
        waiting = {_seq_id(request.request_id) for request in self._scheduler.waiting}
        unstarted = [
            r
            for r in self._requests.values()
            if r.seq_id in waiting and r.seq_id not in self._started
        ]
        for request in unstarted:
            self.cancel(request.seq_id)
        return unstarted + self._grammars.take_back()

    def replace_weights(self, checkpoint: Path) -> None:
        """Replaces the weights in place, and forgets all that was computed with those before.
        Called without any sequence. Raises `UserError` for a checkpoint of another shape, and then
        has changed nothing."""
        if (shapes := stored_shapes(checkpoint)) != self._shapes:
            other = sorted(name for name, _ in shapes.items() ^ self._shapes.items())[0]
            raise UserError(
                f"{checkpoint}: {other} is not as in the checkpoint that the engine was started with"
            )
        core = self._engine.engine_core.engine_core
        # Steps ahead, of sequences that have ended
        while self._scheduler.has_requests() or core.batch_queue:
            self._engine.step()
        self._engine.collective_rpc(replace_weights, args=(str(checkpoint),))
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM holds blocks of the old weights")
        self._grammars = _grammars_of(checkpoint)

    def _noticing_nan(self, get_output: Callable[[], Any]) -> Any:
        """Wraps the inner half of vLLM's step, whose outer half forgets how many logits were
        NaN."""
        outputs = get_output()
        self._not_finite = {_seq_id(o.request_id) for o in outputs.outputs if o.num_nans_in_logits}
        return outputs

    def _noticing_plans(self, schedule: Callable[..., Any], *arguments: Any) -> Any:
        """Wraps vLLM's decision what a step reads, of which its outputs say nothing."""
        plan = schedule(*arguments)
        self._plans.append(plan)
        begun = {_seq_id(new.req_id): new for new in plan.scheduled_new_reqs}
        admitted = self._starts.fresh(begun)
        self._looked_up += sum(len(begun[seq_id].prompt_token_ids) for seq_id in admitted)
        num_cached = [begun[seq_id].num_computed_tokens for seq_id in admitted]
        self._found += sum(num_cached)
        if admitted and self._on_admission is not None:
            scheduler = self._scheduler
            self._on_admission(
                Admission(admitted, len(scheduler.running), len(scheduler.waiting), num_cached)
            )
        return plan

    def _forget_all_blocks(self) -> None:
        """Empties vLLM's cache after logits that were no numbers: a block that holds NaN would end
        the next sequence that gets it. Those that run read their tokens again, and so lose time and
        nothing else."""
        self._has_nan_blocks = False
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            _log.error(
                "vLLM still holds blocks with NaN, which may end the next sequence that gets one"
            )
            return
        self._engine.collective_rpc(clear_cache)

    def _stop_ids(self, request: SequenceRequest) -> list[int]:
        of_text = [] if request.ignore_eos or self._eos_id is None else [self._eos_id]
        return [*request.stop_token_ids, *of_text]

    def _params(self, request: SequenceRequest) -> Any:
        return vllm.SamplingParams(
            **sampling_arguments(request.sampling),
            max_tokens=max(request.max_tokens, LEAST_TOKENS),
            ignore_eos=request.ignore_eos,
            stop_token_ids=self._stop_ids(request),
            min_tokens=request.min_tokens,
            logprobs=request.num_logprobs,
            prompt_logprobs=request.num_prompt_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _events(self, request: SequenceRequest, output: Any) -> list[TokenEvent]:
        """Returns a sequence's new tokens; the first comes with the prompt's log-probabilities, if
        asked for."""
        if request.seq_id in self._not_finite:
            self._has_nan_blocks = True
            self.cancel(request.seq_id)
            return [TokenEvent(request.seq_id, None, FinishReason.ERROR, None, None)]
        [choice] = output.outputs
        reason = {None: None, "stop": FinishReason.STOP, "length": FinishReason.LENGTH}.get(
            choice.finish_reason, FinishReason.ERROR
        )
        followed = self._followed.get(request.seq_id)
        if reason is FinishReason.ERROR and followed is not None and not followed.has_token:
            self._forget(request.seq_id)
            return [TokenEvent(request.seq_id, None, FinishReason.GRAMMAR, None, None)]
        of_prompt = None
        if request.num_prompt_logprobs is not None and output.prompt_logprobs:
            of_prompt = [
                None
                if candidates is None
                else _candidates(candidates, token_id, request.num_prompt_logprobs)
                for token_id, candidates in zip(
                    request.prompt_ids, output.prompt_logprobs, strict=True
                )
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
            self._forget(request.seq_id)
        return events


def _grammars_of(checkpoint: Path) -> GrammarRows:
    return GrammarRows(GrammarCache(partial(vocabulary_of, checkpoint)))


def _seq_id(name: str) -> int:
    """Returns the number of a sequence; vLLM adds a random end to its requests' names."""
    return int(name.partition("-")[0])


def _candidates(entries: dict[int, Any], token_id: int, num_top: int) -> Candidates:
    """Converts vLLM's entries: the token itself, and the others by rank."""
    ranked = sorted(
        (entry.rank, other, entry.logprob)
        for other, entry in entries.items()
        if entry.rank <= num_top and entry.logprob > -math.inf  # a grammar allows no other
    )
    entry = entries[token_id]
    return Candidates(entry.logprob, [(other, logprob) for _, other, logprob in ranked], entry.rank)


def _require_device(config: EngineConfig) -> None:
    """Raises `UserError` unless this vLLM computes on the device, in the way that is asked for."""
    device = current_platform.device_type or "no device that it finds"
    if device != config.device:
        raise UserError(
            f"engine.device={config.device}, but vLLM {vllm.__version__} computes on {device} here"
        )
    if config.batch_invariant and "VLLM_BATCH_INVARIANT" not in vllm.envs.environment_variables:
        raise UserError(f"engine.batch_invariant is not in vLLM {vllm.__version__}; expected 0.32")
    if (
        config.batch_invariant
        and current_platform.is_cuda()
        and not current_platform.has_device_capability(80)
    ):
        raise UserError(
            "engine.batch_invariant needs a GPU of compute capability 8.0 or more, which this one is not"
        )


def _of_adapters(checkpoint: Path, config: EngineConfig) -> dict[str, Any]:
    """Returns vLLM's arguments for adapters. Ours adapt only the linear layers of blocks.
    Beside the head, vLLM's CPU build would end at a prompt's log-probabilities."""
    if not config.max_adapters:
        return {}
    return {
        "enable_lora": True,
        "lora_target_modules": [*linear_layer_names(checkpoint)],
        "max_loras": config.max_adapters,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= config.max_adapter_rank),
    }


def _arguments(checkpoint: Path, config: EngineConfig) -> Any:
    """Returns vLLM's arguments. Raises `UserError` for names that it does not know."""
    known = sorted(field.name for field in dataclasses.fields(vllm.EngineArgs))
    if unknown := [
        f"{name}{suggestion(name, known)}" for name in config.vllm_args if name not in known
    ]:
        raise UserError(f"engine.vllm_args: vLLM {vllm.__version__} has no argument {unknown[0]}")
    shape = read_shape(checkpoint)
    num_seqs, num_tokens = config.max_num_seqs, config.prefill_tokens_per_step
    if config.device == "cpu":
        num_seqs = num_seqs or CPU_NUM_SEQS
        num_tokens = num_tokens or CPU_PREFILL_TOKENS
    return vllm.EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        dtype=config.dtype,
        max_model_len=served_context(shape, config.max_context),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=batched_tokens(num_tokens, num_seqs, config.vllm_args),
        max_logprobs=-1,
        enable_prefix_caching=config.prefix_cache,
        kv_cache_memory_bytes=cache_bytes(shape, config, num_seqs),
        tensor_parallel_size=config.tensor_parallel_size,
        generation_config="vllm",  # no defaults from the checkpoint's folder
        seed=0,
        **_of_adapters(checkpoint, config),
        **config.vllm_args,
    )
