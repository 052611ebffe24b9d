"""Computes the memory of data-parallel training, part by part, from a model's shape: of a GPU and of its host.

B sequences in a lane, T tokens of each, C width, F feed-forward width, V vocabulary, P values of the flat buffers.
"""

from typing import Any, get_args

from cluster.settings.run import RunConfig, batch_schedule, planned_vocabulary, seq_len, way_to_compute, with_precision
from cluster.storage.uris import open_storage
from jobs.exact.exact_reduce import lane_steps, subtrees_of_ranks
from jobs.exact.flat_layout import BLOCK, PIECE_VALUES, FlatLayout
from jobs.plan.formulas import FP32_BYTES, STATE_BYTES, num_subtrees_of_rank
from jobs.run.history import why_not_resumed
from jobs.snapshots.slots import NUM_SLOTS
from model.config import GPTConfig
from model.processor import Precision
from model.shapes import CHUNK_TOKENS, GPU_CHUNK_TOKENS, parameter_shapes

BF16_BYTES = 2

_PROCESS_BYTES = 0.5e9
"""Memory of Python, PyTorch and Ray in a worker that trains a tiny model (measured: 0.4 to 0.5 GB)."""


def layout_of(model: GPTConfig) -> FlatLayout:
    """Returns the flat layout of a model without making it: no machine may be able to hold it."""
    return FlatLayout.of(parameter_shapes(model))


def gpu_memory(config: RunConfig, layout: FlatLayout, *, world_size: int, shard_optimizer: bool) -> dict[str, float]:
    """Returns the bytes by part of the rank that holds most, at the peak of a step: the loss, or the last layer's
    backward. The GB or two that the GPU's allocator and libraries usually take are not included."""
    num_lanes = batch_schedule(config).num_lanes(1)
    owners = min(world_size, num_lanes)
    all_steps = [lane_steps(subtrees) for subtrees in subtrees_of_ranks(num_lanes, owners)]
    num_buffers = 1 + max(step.buffer for steps in all_steps for step in steps)
    bf16 = config.train.precision == "bf16"
    second = max(map(len, layout.places.values())) if way_to_compute(config) == "cpu" and num_lanes > owners else 0
    if config.train.micro_batches_per_lane > 1:
        second = layout.size  # what autograd adds the lane's micro-batches up in
    return {
        "weights": FP32_BYTES * layout.size,
        "bf16_weights": BF16_BYTES * layout.boundary if bf16 else 0,  # in autocast's cache
        "gradients": FP32_BYTES * layout.size,
        "lane_sums": FP32_BYTES * ((num_buffers - 1) * layout.size + second),
        "optimizer": 2 * FP32_BYTES * layout.size / (world_size if shard_optimizer else 1),
        "activations": activation_bytes(config),
        "logits_chunk": logits_chunk_bytes(config),
        "exchange": _received_bytes(layout, world_size=world_size, num_lanes=num_lanes),
    }


def activation_bytes(config: RunConfig) -> float:
    """Returns the bytes that forward keeps for backward of one micro-batch. With `train.recompute` that is each block's
    input, and all of one block at a time. Fused kernels may keep less."""
    model, tokens = config.model, config.train.micro_batch_size * seq_len(config)
    block, stream = block_bytes(config), FP32_BYTES * model.n_embd
    blocks = model.n_layer * stream + block if config.train.recompute else model.n_layer * block
    return float(tokens * (blocks + 2 * stream))  # the last LayerNorm's input, and the gradient of its output


def block_bytes(config: RunConfig) -> int:
    """Returns the bytes that a block keeps of each token: in fp32 the two LayerNorms' inputs and outputs, query, key
    and value, the attention's output (8 C), and the feed-forward layer before and after its activation (2 F); with bf16
    all but the LayerNorms' inputs have half the size. Attention's scores are never kept (FlashAttention), only a number
    for each head; LayerNorms keep two."""
    model, small = config.model, BF16_BYTES if config.train.precision == "bf16" else FP32_BYTES
    c, f = model.n_embd, model.ffn_width
    return 2 * c * FP32_BYTES + (6 * c + 2 * f) * small + FP32_BYTES * (model.n_head + 4) + 2 * c * bool(model.dropout)


def logits_chunk_bytes(config: RunConfig) -> float:
    """Returns the bytes of the scores (V, K) of a chunk of tokens, from which the cross-entropy makes their gradients,
    and of the head's gradient (V, C) where the activations are still there: all scores (B, T, V) never exist."""
    model, tokens = config.model, config.train.micro_batch_size * seq_len(config)
    bf16, compute = config.train.precision == "bf16", way_to_compute(config)
    small = BF16_BYTES if bf16 else FP32_BYTES
    # Fused kernels read the scores and write their gradients. Plain operations have five copies in fp32 at a time,
    # and a mask; those for CPUs write over the scores.
    each = {"compiled": 2 * small, "plain": 21 + BF16_BYTES * bf16, "cpu": FP32_BYTES + BF16_BYTES * bf16}[compute]
    head = (0 if compute == "cpu" else FP32_BYTES) + BF16_BYTES * bf16
    num_scores = model.vocab_size * min(CHUNK_TOKENS if compute == "cpu" else GPU_CHUNK_TOKENS, tokens)
    return float(each * num_scores + head * model.vocab_size * model.n_embd)


def host_memory(
    config: RunConfig, layout: FlatLayout, *, world_size: int, gpus_per_node: int, shard_optimizer: bool
) -> dict[str, float]:
    """Returns the bytes by part of a node's own memory: two slots of the state, one of them being written
    (`snapshots/slots`); with ZeRO-1, where no other node has the same, as many of another node's shares
    (`snapshots/choice`); on rank 0's node a checkpoint that is being stored and one that waits; and two pieces of each
    GPU's copies (`exact/host_copies`)."""
    state = STATE_BYTES * layout.size
    num_ranks = min(world_size, gpus_per_node)
    share = num_ranks / world_size if shard_optimizer else 1.0
    is_copied = shard_optimizer and world_size > gpus_per_node
    return {
        "snapshots": NUM_SLOTS * state * share,
        "copies_of_another_node": NUM_SLOTS * state * share * is_copied,
        "checkpoints": 2.0 * state,
        "pieces": float(2 * FP32_BYTES * PIECE_VALUES * num_ranks),
    }


def _received_bytes(layout: FlatLayout, *, world_size: int, num_lanes: int) -> float:
    """Returns the bytes of the sums that other ranks send: for one bucket, this rank's part of each."""
    if world_size == 1:
        return 0.0
    subtrees = num_subtrees_of_rank(num_lanes, world_size=world_size)
    part = -(-max(map(len, layout.buckets)) // BLOCK // world_size) * BLOCK
    return float(FP32_BYTES * part * (sum(subtrees) - min(subtrees)))


def worker_needs(config: RunConfig) -> dict[str, Any]:
    """Returns `worker_bytes` of a node's memory and `device_bytes` of a GPU's, which a worker needs, and `problems` in
    words: settings that differ from those that the run began with."""
    planned, scaling = planned_vocabulary(config), config.scaling
    shape: dict[str, Any] = {"world_size": scaling.min_workers, "shard_optimizer": scaling.shard != "none"}
    training = max(  # as precision `auto` is settled where the workers run, there must be room for either
        sum(gpu_memory(with_precision(planned, precision), layout_of(planned.model), **shape).values())
        for precision in get_args(Precision)
    )
    on_device = training if scaling.use_gpu else 0.0
    reason = why_not_resumed(open_storage(config.storage.uri).child(f"runs/{config.run_id}"), config)
    return {
        "worker_bytes": round(_PROCESS_BYTES + training - on_device),
        "device_bytes": round(on_device),
        "problems": [reason] if reason else [],
    }
