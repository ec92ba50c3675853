"""Wire versions. Both sides name a range; the highest common one is used."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvferry_proto.errors import Code, FerryError

Version = Annotated[int, Field(ge=1, le=65535)]


class Versions(BaseModel):
    """The wire versions one side speaks, both ends included."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    low: Version
    high: Version

    @model_validator(mode="after")
    def _is_a_range(self) -> "Versions":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


OURS = Versions(low=1, high=1)


def agree(theirs: Versions, ours: Versions = OURS) -> int:
    """Return the highest common version; raise FerryError(no_common_version) naming both."""
    best = min(ours.high, theirs.high)
    if best < max(ours.low, theirs.low):
        raise FerryError(
            Code.NO_COMMON_VERSION,
            f"we speak wire versions {ours.low} to {ours.high}, "
            f"the other side {theirs.low} to {theirs.high}",
        )
    return best
