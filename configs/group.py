"""The base of every group of keys."""

from pydantic import BaseModel, ConfigDict


class Group(BaseModel):
    """A group of keys: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
