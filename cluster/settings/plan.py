"""The typed settings of `raymill plan`, beside those of the run that it plans."""

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from cluster.settings.run import Settings
from model.hardware.gpus import GPUS, Gpu


class PlanConfig(Settings):
    """The hardware that the run is to be computed on, with its price and its risk."""

    gpu: str = "a100"
    count: PositiveInt | None = None
    gpus_per_node: PositiveInt = 8
    mfu: float = Field(default=0.4, gt=0, le=1)
    sustained_tflops: PositiveFloat | None = None
    price: NonNegativeFloat | None = None
    network_gbit_per_s: PositiveFloat | None = None
    storage_bytes_per_s: PositiveFloat = 1e9
    mtbf_gpu_hours: PositiveFloat = 50_000
    restart_s: PositiveFloat = 60
    replace_s: NonNegativeFloat = 600

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name.lower() not in GPUS:
            raise ValueError(f"{name!r} is unknown, expected one of {', '.join(GPUS)}")
        return name.lower()

    @model_validator(mode="after")
    def _below_the_peak(self) -> Self:
        given, peak = self.sustained_tflops, self.hardware.peak_flops_per_s / 1e12
        if given is not None and given > peak:
            raise ValueError(f"sustained_tflops={given:g} exceeds the {peak:g} TFLOP/s that one {self.gpu} can do")
        return self

    @property
    def hardware(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def network_bytes_per_s(self) -> float:
        """Returns each GPU's share of the network."""
        gbit_per_s = self.network_gbit_per_s
        return self.hardware.network_bytes_per_s if gbit_per_s is None else gbit_per_s * 1e9 / 8
