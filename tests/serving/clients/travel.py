"""What agents of several libraries are asked for."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Trip(BaseModel):
    """A trip to one city. Other fields are forbidden: a random model may write them without end."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Vienna", "Graz"]
    days: int = Field(ge=1, le=7)
