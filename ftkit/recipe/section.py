"""What all sections of a recipe share: their base class and kinds of values."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")
ListOf = Annotated[tuple[Item, ...], Field(strict=False)]
"""A YAML list, kept as a tuple. Only the container is converted: its items are as strict as everything else."""
Auto = Literal["auto"]
NonEmpty = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
StepsOrShare = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0.0, lt=1.0)]
"""Optimizer steps as a whole number, or a share of the run below 1."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced, nothing changes after validation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
