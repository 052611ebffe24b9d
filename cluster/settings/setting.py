"""The declaration of a setting: its default, its help, its bounds, and what it shapes: tokens, a
tokenizer or a run."""

from enum import Flag, auto
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic.functional_validators import field_validator

from cluster.settings.amounts import is_whole_number, whole_number


class Shapes(Flag):
    """The things that a setting of the data or the training shapes."""

    NOTHING = 0
    STORE = auto()  # the token store: its value is part of the store's key
    # The tokenizer that is trained on the corpus: its value is part of the tokenizer's key
    TOKENIZER = auto()
    # A store or a tokenizer, whose key takes what it stands for, in a line of its own
    BY_ITSELF = auto()
    RUN = auto()  # the run: one that was begun with another value is not resumed


def setting(default: Any, about: str, **bounds: Any) -> Any:
    """Declares a setting that shapes neither tokens nor weights; `about` is its help, with its
    unit."""
    return Field(default=default, description=about, **bounds)


def shaping(default: Any, about: str, *, shapes: Shapes, **bounds: Any) -> Any:
    """Declares a setting of a tree of which each says what it shapes."""
    return Field(
        default=default, description=about, json_schema_extra={"shapes": shapes.value}, **bounds
    )


class Settings(BaseModel):
    """The base of every branch: frozen, and refusing unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _counted(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads a number with a unit where a count or bytes are meant."""
        name = str(info.field_name)
        if not isinstance(value, str) or not is_whole_number(cls.model_fields[name].annotation):
            return value
        number = whole_number(value, is_bytes=name.endswith("_bytes"))
        return value if number is None else number


class ShapingSettings(Settings):
    """The base of a branch whose settings may shape tokens or weights: each has to say so, or its
    class is refused."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        silent = [name for name, info in cls.model_fields.items() if _shapes(info) is None]
        if silent:
            raise TypeError(
                f"{cls.__name__}: {', '.join(silent)} must say what it shapes; declare it by `shaping`"
            )


def names_shaping(branch: type[ShapingSettings], what: Shapes) -> set[str]:
    """Returns the names of the branch's settings that shape this."""
    names = set()
    for name, info in branch.model_fields.items():
        shapes = _shapes(info)
        assert shapes is not None, "the branch's class was refused otherwise"
        if what in shapes:
            names.add(name)
    return names


def _shapes(info: FieldInfo) -> Shapes | None:
    extra = info.json_schema_extra
    return Shapes(extra["shapes"]) if isinstance(extra, dict) and "shapes" in extra else None
