"""The engine's process: loads the checkpoint, steps while there is work, and ends when its replica
does."""

import contextlib
import json
import logging
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from prometheus_client import REGISTRY

from cluster.settings.serve import CPU_NUM_SEQS, CPU_PREFILL_TOKENS, EngineConfig
from model.files.checkpoint import load_model
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.kernels.native_library import NoNativeLibraryError
from raymill.errors import UserError
from serving.engine.block_pool import BlockPool, num_blocks_for
from serving.engine.engine import Engine
from serving.engine.kv_cache_size import (
    GIB,
    bytes_per_token,
    grammar_bytes,
    kv_cache_tokens,
    served_context,
)
from serving.engine.messages import (
    EngineFacts,
    MetricFamily,
    SequenceRequest,
    StepReport,
    encode_message,
    parse_request,
)
from serving.engine.native_runner import NativeRunner
from serving.engine.runner import LOADED_IN, Runner, with_dtype
from serving.engine.scheduler import Scheduler
from serving.engine.torch_runner import TorchRunner
from serving.engine_process.machine_memory import memory
from serving.engine_process.peer_watchdog import watch_peer
from serving.engine_process.weight_turns import WeightTurns
from serving.protocol.json_log import Process, log_in, log_uncaught, logs_json
from serving.structured.grammar import ANY_JSON_OBJECT, Grammar, GrammarKind
from serving.structured.grammar_cache import GrammarCache
from serving.structured.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from serving.engine.vllm_engine import VllmEngine  # usually in another environment

RECEIVE_BYTES = 1 << 16
HELD_S = 0.012
"""For how long reports of steps may wait for later ones. Where steps take less, the replica, the
proxy and the client wake once for several. Steps of full batches take about 14 ms on two cores:
where two of them were joined, every second token came late."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_WARM_UP_ID = 1 << 40  # of the first sequence before any client's, whose numbers begin at 0

# This module is run, and then has no name
_log = logging.getLogger("serving.engine_process.run_engine")


class Channel:
    """The blocking end of the socket between the replica and its engine process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""  # of a message that has not arrived whole
        self._held: list[Any] = []  # messages
        self._sent_s = 0.0

    def send(self, message: Any, *, at_once: bool = True) -> None:
        """Sends a message after the held ones, or else holds it too, for `HELD_S` at most if others
        follow. Reports of steps that are alike become one."""
        match self._held, message:
            case [*_, StepReport() as last], StepReport() if message.is_like(last):
                self._held[-1] = message.after(last)
            case _:
                self._held.append(message)
        now_s = time.monotonic()
        if at_once or now_s - self._sent_s >= HELD_S:
            self._connection.sendall(b"".join(map(encode_message, self._held)))
            self._held.clear()
            self._sent_s = now_s

    def first(self) -> dict[str, Any]:
        """Returns the message before all commands. Raises `EOFError` if the replica has died
        meanwhile."""
        while True:
            for message in self.receive(wait=True):
                return dict(message)

    def receive(self, *, wait: bool) -> Iterator[Any]:
        """Yields the messages that have arrived; with `wait`, blocks until some bytes have. Raises
        `EOFError` once the replica has closed its end or died, which is how this process learns
        that it is no longer needed."""
        while select.select([self._connection], [], [], None if wait else 0)[0]:
            data = self._connection.recv(RECEIVE_BYTES)
            if not data:
                raise EOFError
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from map(json.loads, lines)
            wait = False


def run_engine(engine: Engine | WeightTurns, channel: Channel) -> NoReturn:
    """Takes commands, and sends admissions before and a report after each step, until the replica
    is gone. A report waits for later ones unless a sequence begins or ends with it."""
    continuing: set[int] = set()
    while True:
        for message in channel.receive(wait=not engine.has_work):
            if "submit" in message:
                engine.submit(parse_request(message["submit"]))
            elif "weights" in message:
                assert isinstance(engine, WeightTurns)
                engine.add_weights(message["weights"], Path(message["checkpoint"]))
            elif "cancel" in message:
                engine.cancel(message["cancel"])
            else:
                channel.send({"metrics": _metrics()})
        report = engine.step(lambda admission: channel.send({"admission": admission}))
        began = {event.seq_id for event in report.events} - continuing
        continuing = {event.seq_id for event in report.events if event.finish_reason is None}
        channel.send(
            report,
            at_once=bool(began) or len(continuing) < len(report.events) or not engine.has_work,
        )


def _metrics() -> list[MetricFamily]:
    """Returns vLLM's own metrics, which it keeps in this process. Our engine has none: its replica
    counts."""
    return [
        MetricFamily(
            family.name,
            family.type,
            family.documentation,
            [sample[:3] for sample in family.samples],
        )
        for family in REGISTRY.collect()
        if family.name.startswith("vllm:")
    ]


def _load_engine(
    checkpoint: Path, config: EngineConfig, *, eos_id: int | None, threads: int
) -> tuple[Engine | WeightTurns, EngineFacts]:
    """Loads the engine. Raises `UserError` for an unusable checkpoint or setting."""
    if config.runs_vllm:
        if config.batch_invariant:
            os.environ["VLLM_BATCH_INVARIANT"] = "1"  # read while vLLM is imported
        if logs_json():
            os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # its lines go the way of ours
            logging.getLogger("vllm").setLevel(logging.INFO)
        try:
            from serving.engine.vllm_engine import VllmEngine  # noqa: PLC0415  (usually in another environment)
        except ImportError as error:
            raise UserError(
                f"vLLM is to compute, but {sys.executable} cannot import it: {error}; name the Python of its "
                "environment in engine.vllm_python"
            ) from None
        vllm_engine = VllmEngine(checkpoint, config, eos_id=eos_id)
        warm_up(vllm_engine, has_grammars=eos_id is not None)
        return WeightTurns(vllm_engine, checkpoint), vllm_engine.facts
    config = with_dtype(config, checkpoint)
    # The replica got the folder from `resolve_checkpoint`, which verified it.
    model = load_model(checkpoint, dtype=LOADED_IN[config.dtype], verify=False)
    grammars = None
    if eos_id is not None:
        vocabulary = partial(vocabulary_of, checkpoint)
        grammars = GrammarCache(vocabulary, most_bytes=grammar_bytes(memory()))
    engine = build_engine(model, config, eos_id=eos_id, threads=threads, grammars=grammars)
    facts = EngineFacts(config.dtype, *_sizes(config), embeds=True, is_portable=engine.is_portable)
    return engine, facts


def warm_up(engine: "Engine | WeightTurns | VllmEngine", *, has_grammars: bool = False) -> None:
    """Runs a sequence of each kind, so that what is compiled at its first use is compiled before
    this engine takes requests: a health check would end an engine whose step takes that long."""
    drawn = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=5, min_p=0.01, seed=1, repetition_penalty=1.1
    )
    for number, sampling in enumerate(
        (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0), drawn)
    ):
        for num_logprobs in (None, 1):
            seq_id = _WARM_UP_ID + 2 * number + (num_logprobs or 0)
            request = SequenceRequest(
                seq_id,
                [0, 0, 0],
                2,
                sampling,
                True,
                num_logprobs=num_logprobs,
                num_prompt_logprobs=num_logprobs,
            )
            engine.submit(request)
    if has_grammars:
        any_object = Grammar(GrammarKind.JSON_SCHEMA, ANY_JSON_OBJECT)
        engine.submit(SequenceRequest(_WARM_UP_ID - 1, [0, 0, 0], 2, drawn, grammar=any_object))
    while engine.has_work:
        engine.step()


def _sizes(config: EngineConfig) -> tuple[int, int]:
    """Returns the number of sequences that are decoded together, and of prompt tokens that a step
    reads."""
    return config.max_num_seqs or CPU_NUM_SEQS, config.prefill_tokens_per_step or CPU_PREFILL_TOKENS


def build_engine(
    model: GPT,
    config: EngineConfig,
    *,
    eos_id: int | None,
    threads: int,
    grammars: GrammarCache | None = None,
) -> Engine:
    """Builds the engine. Raises `UserError` for a cache that is too small for the model, and if
    kernels that must be native are missing."""
    max_num_seqs, prefill_tokens_per_step = _sizes(config)
    dtype = (
        str(model.head_weight.dtype).removeprefix("torch.")
        if config.dtype == "auto"
        else config.dtype
    )
    num_tokens = kv_cache_tokens(
        model.config,
        config,
        dtype=dtype,
        num_seqs=max_num_seqs,
        # The weights as packed by the kernels
        other_bytes=model.config.num_parameters * WEIGHT_BYTES[dtype]
        + (0 if grammars is None else grammars.memory.most_bytes),
        memory=memory(),
    )
    cache_gib = num_tokens * bytes_per_token(model.config, dtype) / GIB
    is_small = num_tokens < max_num_seqs * served_context(model.config, config.max_context)
    _log.log(
        logging.WARNING if is_small and config.kv_cache_tokens is None else logging.INFO,
        "the KV cache holds %d tokens, as memory is free for no more; they take %.2f GiB once all have been used",
        num_tokens,
        cache_gib,
    )
    pool = BlockPool(num_blocks_for(num_tokens), keep_prefixes=config.prefix_cache)
    scheduler = Scheduler(
        pool,
        max_num_seqs=max_num_seqs,
        prefill_tokens_per_step=prefill_tokens_per_step,
        eos_id=eos_id,
    )
    try:
        runner = _build_runner(model, config, num_blocks=pool.num_blocks, threads=threads)
    except (MemoryError, RuntimeError) as error:  # the kernels', and PyTorch's
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"there is no memory for the weights and a KV cache of {num_tokens} tokens, "
            f"{cache_gib:.2f} GiB: set engine.kv_cache_tokens or "
            "engine.max_context to less, or give the replica more"
        ) from error
    return Engine(runner, scheduler, grammars=grammars)


def _build_runner(model: GPT, config: EngineConfig, *, num_blocks: int, threads: int) -> Runner:
    torch.set_num_threads(threads)
    dtype = (
        str(model.head_weight.dtype).removeprefix("torch.")
        if config.dtype == "auto"
        else config.dtype
    )
    if config.kernels != "torch":
        try:
            runner = NativeRunner(model, dtype=dtype, num_blocks=num_blocks, threads=threads)
        except NoNativeLibraryError as error:
            if config.kernels == "native" or config.dtype == "int8":
                wanted = (
                    "kernels=native"
                    if config.kernels == "native"
                    else "dtype=int8 needs the native kernels"
                )
                raise UserError(f"engine.{wanted}, but {error}") from None
            _log.warning("PyTorch computes, which is slower than the native kernels: %s", error)
        else:
            # Only for sampling; two pools of threads would disturb each other
            torch.set_num_threads(1)
            return runner
    if config.dtype == "int8":
        raise UserError(
            "engine.dtype=int8 needs the native kernels; expected float32 or bfloat16 without them"
        )
    return TorchRunner(model, num_blocks=num_blocks)


def main() -> int:
    log_in(None, Process.ENGINE)
    sys.excepthook = log_uncaught
    args = json.loads(sys.argv[1])  # see `EngineClient.start`
    channel = Channel(socket.socket(fileno=args["socket"]))
    config = EngineConfig.model_validate(channel.first()["config"])
    try:
        engine, facts = _load_engine(
            Path(args["checkpoint"]), config, eos_id=args["eos_id"], threads=args["threads"]
        )
    except UserError as error:
        channel.send({"error": str(error)})
        return 1
    watch_peer(socket.socket(fileno=args["watchdog"]), peer_pid=os.getppid())
    channel.send({"ready": facts})
    with contextlib.suppress(EOFError, ConnectionError):
        run_engine(engine, channel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
