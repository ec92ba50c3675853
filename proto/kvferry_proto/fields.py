"""Field types that the messages of all three sockets share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kvferry_proto.errors import ADVICE, Code, Fault, FerryError
from kvferry_proto.states import Mode, Role, StallReason, State

TOKENS_MAX = 1 << 40
Tokens = Annotated[int, Field(ge=0, le=TOKENS_MAX)]
TransferId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
Attempt = Annotated[int, Field(ge=0, le=1 << 31)]
Call = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
BootId = Annotated[str, Field(min_length=16, max_length=32, pattern=r"^[0-9a-f]+$")]
Text = Annotated[str, Field(max_length=1024)]
AuxValue = (
    Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
    | float
    | (Annotated[str, Field(max_length=1 << 16)] | Annotated[bytes, Field(max_length=1 << 16)])
)
Aux = Annotated[dict[str, AuxValue], Field(max_length=64)]
# Strict models take an enum's wire value only where strictness is off.
WireState = Annotated[State, Field(strict=False)]
WireRole = Annotated[Role, Field(strict=False)]
WireMode = Annotated[Mode, Field(strict=False)]
WireStall = Annotated[StallReason, Field(strict=False)]


class Message(BaseModel):
    """Strict: "3" is not 3. Unknown fields are skipped, so that a newer peer may add some."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", use_enum_values=False)


class ErrorInfo(Message):
    """An error as it travels: the code is stable, the words are for people."""

    code: Annotated[str, Field(max_length=64)]
    fault: Annotated[str, Field(max_length=16)]
    message: Text
    remedy: Text

    @classmethod
    def of(cls, code: Code, message: str) -> "ErrorInfo":
        """Build one with the fault and the remedy that belong to the code."""
        advice = ADVICE[code]
        return cls(
            code=code.value,
            fault=advice.fault.value,
            message=message[:1024],
            remedy=advice.remedy,
        )

    def raised(self) -> FerryError:
        """The exception of this error; a code that we do not know becomes ``internal``."""
        known = self.code in Code.__members__.values()
        code = Code(self.code) if known else Code.INTERNAL
        return FerryError(code, self.message if known else f"{self.code}: {self.message}")


__all__ = [
    "Attempt", "Aux", "BootId", "Call", "ErrorInfo", "Fault", "Message", "Text", "Tokens",
    "TransferId", "WireMode", "WireRole", "WireStall", "WireState",
]  # fmt: skip
