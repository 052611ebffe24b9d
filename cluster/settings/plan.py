"""The typed settings of `raymill plan`, beside those of the run that it plans."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from cluster.settings.run import Settings
from model.gpus import GPUS, Gpu


class PlanConfig(Settings):
    """The hardware that the run is to be computed on, with its price and its risk."""

    gpu: str = Field(default="a100", description=f"kind of GPU, one of {', '.join(GPUS)}")
    count: int | None = Field(default=None, ge=1, description="GPUs, one for each worker; scaling.max_workers if unset")
    gpus_per_node: int = Field(default=8, ge=1, description="GPUs of a node")
    mfu: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="model FLOPs utilization, the share of the GPUs' bf16 peak that the model's arithmetic uses. 0.4 "
        "is what is published for well-tuned runs (Llama 3 405B on H100: 0.38 to 0.43, PaLM on TPU v4: 0.46; GPT-3 on "
        "V100: 0.21), and is not a measurement of raymill",
    )
    sustained_tflops: float | None = Field(
        default=None,
        gt=0,
        description="TFLOP/s of each GPU, as papers report it, instead of mfu; those of activation recomputation count "
        "where recompute is set",
    )
    recompute: bool = Field(
        default=False,
        description="assume that activations are computed again in backward: 8 FLOPs for each parameter and token, not "
        "6 (raymill itself keeps them)",
    )
    price: float | None = Field(
        default=None, ge=0, description="dollars for an hour of one GPU; an assumption for each kind when unset"
    )
    network_gbit_per_s: float | None = Field(
        default=None, gt=0, description="each GPU's share of the links between nodes; usual for its kind when unset"
    )
    storage_bytes_per_s: float = Field(
        default=1e9, gt=0, description="speed at which storage takes a checkpoint, bytes per second; an assumption"
    )
    mtbf_gpu_hours: float = Field(
        default=50_000,
        gt=0,
        description="GPU-hours between failures; Llama 3 (2024) had 419 in 54 days on 16,384 GPUs: one in 50,700",
    )
    restart_s: float = Field(
        default=60,
        gt=0,
        description="seconds from a failure to the next step; an assumption (a lost worker of a small model: 4 s)",
    )
    replace_s: float = Field(
        default=600, ge=0, description="seconds until a lost node is replaced, for --simulate; an assumption"
    )
    seed: int = Field(default=0, ge=0, description="seed of the failures that --simulate draws")

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name.lower() not in GPUS:
            raise ValueError(f"{name!r} is unknown, expected one of {', '.join(GPUS)}")
        return name.lower()

    @model_validator(mode="after")
    def _below_the_peak(self) -> Self:
        peak = self.hardware.peak_flops_per_s / 1e12
        if self.sustained_tflops is not None and self.sustained_tflops > peak:
            raise ValueError(
                f"sustained_tflops={self.sustained_tflops:g} exceeds the {peak:g} TFLOP/s that one {self.gpu} can do"
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
