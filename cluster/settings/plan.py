"""The typed settings of `raymill plan`, beside the settings of the run that it plans."""

from typing import Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from cluster.settings.setting import Settings, setting
from model.hardware.gpus import GPUS, Gpu


class TraceConfig(Settings):
    """A trace of spot nodes, and what a run takes where they come and go."""

    trace: str | None = setting(
        None,
        "file of lines seconds,nodes below such a header: what the run takes and costs on such a day, instead",
    )
    workers_per_node: PositiveInt = setting(1, "workers that a node of the trace has room for")
    step_seconds: PositiveFloat | None = setting(
        None,
        "seconds of a step with scaling.max_workers, the plan's when unset; with fewer, a step takes longer as the one "
        "with most lanes has more of them",
    )
    see_s: NonNegativeFloat = setting(
        10.0, "seconds until the run sees a node that has come (scaling.resize_check_s at most)"
    )
    detect_s: NonNegativeFloat = setting(
        3.0, "seconds until a node that nobody announced to go is known to be gone"
    )
    meet_s: NonNegativeFloat = setting(
        5.0, "seconds until workers are started and have met, after any change of the nodes"
    )
    load_s: NonNegativeFloat = setting(
        1.0,
        "seconds until each has the state and the first step begins; opening_seconds of a ledger's start says yours",
    )
    has_notices: bool = setting(
        True, "nodes are announced to go, as clouds do two minutes or 25 s before"
    )


class PlanConfig(Settings):
    """The hardware that the run is to be computed on, with its price and its risk."""

    gpu: str = setting(
        "a100",
        "kind of GPU, one of h100-pcie, h100-nvl, h100, h200, b200, a100-40gb, a100, a10g, a10, l40s, l4, "
        "v100, t4, rtx-4090, rtx-3090",
    )
    count: PositiveInt | None = setting(
        None, "GPUs, one for each worker; scaling.max_workers if unset"
    )
    gpus_per_node: PositiveInt = setting(8, "GPUs of a node")
    mfu: float = setting(
        0.4,
        "model FLOPs utilization, the share of the GPUs' bf16 peak that the model's arithmetic uses. 0.4 "
        "is what is published for well-tuned runs (Llama 3 405B on H100: 0.38 to 0.43, PaLM on TPU v4: "
        "0.46; GPT-3 on V100: 0.21), and is not a measurement of raymill",
        gt=0,
        le=1,
    )
    sustained_tflops: PositiveFloat | None = setting(
        None,
        "TFLOP/s of each GPU, as papers report it, instead of mfu; those of activation recomputation "
        "count where train.recompute is set",
    )
    price: NonNegativeFloat | None = setting(
        None, "dollars for an hour of one GPU; assumed for each kind when unset"
    )
    network_gbit_per_s: PositiveFloat | None = setting(
        None,
        "each GPU's share of the links between nodes; usual for its kind when unset",
    )
    storage_bytes_per_s: PositiveFloat = setting(
        1e9, "bytes/s at which storage takes a node's data; an assumption"
    )
    mtbf_gpu_hours: PositiveFloat = setting(
        50_000,
        "GPU-hours between failures; Llama 3 (2024) had 419 in 54 days on 16,384 GPUs: one in 50,700",
    )
    restart_s: PositiveFloat = setting(
        60,
        "seconds from a failure to the next step; an assumption (a lost worker of a small model: 4 s)",
    )
    replace_s: NonNegativeFloat = setting(
        600, "seconds until a lost node is replaced, for --simulate; an assumption"
    )

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name.lower() not in GPUS:
            raise ValueError(f"{name!r} is unknown, expected one of {', '.join(GPUS)}")
        return name.lower()

    @model_validator(mode="after")
    def _below_the_peak(self) -> Self:
        given = self.sustained_tflops
        peak = self.hardware.peak_flops_per_s / 1e12
        if given is not None and given > peak:
            raise ValueError(
                f"sustained_tflops={given:g} exceeds the {peak:g} TFLOP/s that one {self.gpu} can do"
            )
        return self

    @property
    def hardware(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def network_bytes_per_s(self) -> float:
        """Returns each GPU's share of the network."""
        gbit_per_s = self.network_gbit_per_s
        return self.hardware.network_bytes_per_s if gbit_per_s is None else gbit_per_s * 1e9 / 8
