"""The base of all request bodies."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel

from serving.protocol import harmless_fields


class Request(BaseModel):
    """The base of all request bodies: no conversion between types, no unknown field, no NaN."""

    # Fields that it lacks but accepts with these values
    harmless: ClassVar[harmless_fields.HarmlessValues] = {}
    # What to do about some of them, where their values are not harmless
    advice: ClassVar[Mapping[str, str]] = {}
    model_config = {"strict": True, "extra": "forbid", "frozen": True, "allow_inf_nan": False}
