"""The settings of the way from tokens to weights."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.functional_validators import model_validator

from cluster.settings.setting import Shapes, ShapingSettings, shaping
from model.numerics import NUMERICS, Numerics, Precision

Compute = Literal["plain", "compiled", "cpu", "portable"]
"""Ways to compute a training step."""

Optimizer = Literal["adamw", "muon"]
"""The rules that update weights: `raymill.rules.rules` makes each."""


class TrainConfig(ShapingSettings):
    """The way from tokens to weights. The global batch is the same for any number of workers."""

    max_tokens: PositiveInt = shaping(
        10_000_000, "tokens to train on; never exceeded", shapes=Shapes.RUN
    )
    global_batch_size: PositiveInt = shaping(
        64, "sequences per optimizer step, over all workers", shapes=Shapes.RUN
    )
    micro_batch_size: PositiveInt = shaping(8, "sequences computed together", shapes=Shapes.RUN)
    micro_batches_per_lane: PositiveInt = shaping(
        1,
        "micro-batches that are added up in order before the exact sum takes them, as one lane: more need "
        "less memory and pass less often over the gradient. Changing it changes the bits. A lane's size "
        "divides global_batch_size",
        shapes=Shapes.RUN,
    )
    batch_ramp_tokens: NonNegativeInt = shaping(
        0,
        "tokens over which the batch grows linearly to global_batch_size; 0: full from the start",
        shapes=Shapes.RUN,
    )
    batch_ramp_start: PositiveInt | None = shaping(
        None,
        "sequences of the first step of a growing batch",
        shapes=Shapes.RUN,
    )
    seq_len: PositiveInt | None = shaping(
        None, "tokens per sequence; model.n_positions when unset", shapes=Shapes.RUN
    )
    learning_rate: PositiveFloat = shaping(6e-4, "peak learning rate", shapes=Shapes.RUN)
    schedule: Literal["cosine", "wsd"] = shaping(
        "cosine",
        "learning rate after the warm-up: cosine down to the horizon; or wsd, the peak until a last, "
        "linear stretch of cooldown_tokens down to the horizon",
        shapes=Shapes.RUN,
    )
    min_learning_rate_ratio: float = shaping(
        0.1,
        "learning rate at the horizon, as a share of the peak",
        ge=0,
        le=1,
        shapes=Shapes.RUN,
    )
    warmup_tokens: NonNegativeInt | None = shaping(
        None,
        "linear warm-up, tokens; 375M or 2% of max_tokens, the smaller, when unset",
        shapes=Shapes.RUN,
    )
    decay_tokens: PositiveInt | None = shaping(
        None,
        "horizon of the learning rate, tokens; max_tokens when unset",
        shapes=Shapes.RUN,
    )
    cooldown_tokens: PositiveInt | None = shaping(
        None,
        "end of schedule wsd, tokens; 20% of the horizon when unset",
        shapes=Shapes.RUN,
    )
    optimizer: Optimizer = shaping(
        "adamw",
        "rule that updates the weights by their gradient: adamw; or muon for the matrices of the blocks, "
        "with adamw for embeddings, head, biases and norms",
        shapes=Shapes.RUN,
    )
    weight_decay: NonNegativeFloat = shaping(
        0.1,
        "decay of matrices, decoupled from the gradient; biases and LayerNorms have none",
        shapes=Shapes.RUN,
    )
    beta1: float = shaping(0.9, "AdamW, decay of the first moment", ge=0, lt=1, shapes=Shapes.RUN)
    beta2: float = shaping(0.95, "AdamW, decay of the second moment", ge=0, lt=1, shapes=Shapes.RUN)
    momentum: float = shaping(
        0.95, "muon, decay of the momentum of matrices", ge=0, lt=1, shapes=Shapes.RUN
    )
    grad_clip: NonNegativeFloat = shaping(
        1.0, "largest norm of the summed gradient; 0 never clips", shapes=Shapes.RUN
    )
    precision: Literal["auto", Precision] = shaping(
        "auto",
        "compute precision; bf16 is autocast over fp32 master weights; auto: bf16 where the workers' "
        "processor computes it at speed when the run first starts, else fp32, and the same for the rest "
        "of the run",
        shapes=Shapes.RUN,
    )
    compute: Literal["auto", Compute] = shaping(
        "auto",
        "operations of the model: PyTorch's own (plain), these in fused kernels (compiled), some with "
        "gradients written for CPUs (cpu), or in fp32 with the same bits on every kind of processor "
        "(portable); auto: compiled on GPUs, else cpu, and plain for models of transformers",
        shapes=Shapes.RUN,
    )
    recompute: bool = shaping(
        False,
        "keep only each block's input for backward and compute the rest again: less memory, the same "
        "bits",
        shapes=Shapes.RUN,
    )
    exact: bool = shaping(
        True,
        "the same bits for any number of workers; false is stock DistributedDataParallel",
        shapes=Shapes.RUN,
    )
    seed: int = shaping(
        0, "initial weights, sample order, dropout", ge=0, lt=2**63, shapes=Shapes.RUN
    )
    init_from: str | None = shaping(
        None,
        "checkpoint, run or transformers folder to begin from, a path or URI (hf://OWNER/NAME@REVISION "
        "too); random weights when unset",
        shapes=Shapes.RUN,
    )
    lora_rank: PositiveInt | None = shaping(
        None,
        "rank of a LoRA adapter that is trained beside the weights of train.init_from, which are frozen; all "
        "weights are trained when unset",
        shapes=Shapes.RUN,
    )
    lora_alpha: PositiveInt | None = shaping(
        None,
        "what the adapter adds is multiplied by lora_alpha / lora_rank; twice the rank when unset",
        shapes=Shapes.RUN,
    )
    lora_targets: list[str] = shaping(
        [],
        "last names of the linear layers that get an adapter, such as q_proj and v_proj; all in the model's "
        "blocks when empty",
        shapes=Shapes.RUN,
    )
    max_skipped_steps: NonNegativeInt = shaping(
        3,
        "bad steps in a row that are skipped before the run is rolled back",
        shapes=Shapes.RUN,
    )
    max_rollbacks: NonNegativeInt = shaping(
        3,
        "rollbacks after which a run stops instead of rolling back",
        shapes=Shapes.RUN,
    )
    spike_factor: NonNegativeFloat = shaping(
        0.0,
        "a loss this many median absolute deviations above the median is bad; 0 is off",
        shapes=Shapes.RUN,
    )
    shuffle_window_rows: PositiveInt = shaping(
        1 << 20,
        "rows shuffled together; windows follow each other in the order of the store",
        shapes=Shapes.RUN,
    )
    document_mask: bool = shaping(
        False,
        "no token attends to another document in its row; positions restart at each document",
        shapes=Shapes.RUN,
    )
    eval_every_steps: PositiveInt = shaping(
        100,
        "steps between validations; the last step always validates",
        shapes=Shapes.RUN,
    )
    eval_max_tokens: PositiveInt = shaping(
        1_000_000,
        "validation tokens, from the front of the split",
        shapes=Shapes.RUN,
    )
    sample_prompts: list[str] = shaping(
        [],
        "prompts completed at every validation, with a fixed seed",
        shapes=Shapes.RUN,
    )
    layer_statistics_every_steps: NonNegativeInt = shaping(
        50,
        "steps between measurements of each layer's gradient, weights and update; 0 never",
        shapes=Shapes.RUN,
    )
    hash_every_steps: NonNegativeInt = shaping(
        0,
        "steps between parameter hashes in the ledger; 0 at checkpoints only",
        shapes=Shapes.RUN,
    )
    audit_every_steps: NonNegativeInt | None = shaping(
        None,
        "steps between audits, in which each worker computes a lane of another one too and all compare their "
        "copies of the state; the least that costs 1% of the time when unset; 0 never",
        shapes=Shapes.NOTHING,
    )

    @model_validator(mode="after")
    def _cooldown_fits(self) -> Self:
        if self.cooldown_tokens is None:
            return self
        if self.schedule != "wsd":
            raise ValueError(
                f"train.cooldown_tokens={self.cooldown_tokens} needs train.schedule=wsd; cosine has none"
            )
        horizon = self.decay_tokens or self.max_tokens
        warmup = self.warmup_tokens or 0
        if warmup + self.cooldown_tokens > horizon:
            raise ValueError(
                f"train.cooldown_tokens={self.cooldown_tokens} after train.warmup_tokens={warmup} exceeds the horizon "
                f"of {horizon} tokens (train.decay_tokens, or else train.max_tokens)"
            )
        return self

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> Self:
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets):
            name = "lora_alpha" if self.lora_alpha is not None else "lora_targets"
            raise ValueError(f"train.{name} is for an adapter: set train.lora_rank too")
        if self.lora_rank is not None and self.init_from is None:
            raise ValueError(
                f"train.lora_rank={self.lora_rank} trains an adapter, which needs weights to stand on: set "
                "train.init_from"
            )
        return self

    @property
    def numerics(self) -> Numerics:
        """The numbers in which the run computes, once `auto` is settled."""
        assert self.precision != "auto", "the precision is decided before a run starts"
        return NUMERICS[self.precision]

    @property
    def lane_size(self) -> int:
        """Sequences of a lane, the unit of the exact sum."""
        return self.micro_batch_size * self.micro_batches_per_lane

    @property
    def lane_in_words(self) -> str:
        lane = f"train.micro_batch_size={self.micro_batch_size}"
        several = self.micro_batches_per_lane > 1
        return (
            f"{lane} times train.micro_batches_per_lane={self.micro_batches_per_lane}"
            if several
            else lane
        )

    @model_validator(mode="after")
    def _ramp_fits(self) -> Self:
        start, lane = self.batch_ramp_start, self.lane_size
        if (start is None) != (self.batch_ramp_tokens == 0):
            raise ValueError(
                "train.batch_ramp_tokens and train.batch_ramp_start belong together; set both, or neither"
            )
        if start is not None and (start % lane or start >= self.global_batch_size):
            raise ValueError(
                f"train.batch_ramp_start={start} has to be a multiple of {self.lane_in_words}, less than "
                f"train.global_batch_size={self.global_batch_size}"
            )
        return self
