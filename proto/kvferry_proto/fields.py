"""Field types that the messages of all three sockets share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from kvferry_proto.errors import ADVICE, Code, Fault, FerryError
from kvferry_proto.states import Mode, Role, StallReason, State

TOKENS_MAX = 1 << 40
Tokens = Annotated[int, Field(ge=0, le=TOKENS_MAX)]
TransferId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
Attempt = Annotated[int, Field(ge=0, le=1 << 31)]
Call = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
BootId = Annotated[str, Field(min_length=16, max_length=32, pattern=r"^[0-9a-f]+$")]
Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, Field(max_length=1024)]
TRACEPARENT_CHARS_MAX = 128
# W3C trace context; one that is not is ignored, as they ask for, by who makes traces of it.
Traceparent = Annotated[str, Field(max_length=TRACEPARENT_CHARS_MAX)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-]+$")]


@dataclass(frozen=True, eq=False)  # so it can be hashed, which `|` needs
class After:
    """Annotation: a value has to pass ``first`` before it gets to its own type.

    For what strictness does not cover: an enum takes its wire value only where strictness is off,
    and then it takes True, "3" and b"sink" too; a strict float takes any int.
    """

    first: CoreSchema

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Chain the two; no Python runs when a value is read."""
        return core_schema.chain_schema([self.first, handler(source)])


INT = After(core_schema.int_schema(strict=True))
STR = After(core_schema.str_schema(strict=True))
FLOAT = After(core_schema.is_instance_schema(float))

AuxValue = (
    Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
    | Annotated[float, FLOAT]
    | (Annotated[str, Field(max_length=1 << 16)] | Annotated[bytes, Field(max_length=1 << 16)])
)
AUX_BYTES_MAX = 1 << 18  # of all values together: one transfer's always fit into a frame


def _bounded(aux: dict[str, Any]) -> dict[str, Any]:
    values = [value for value in aux.values() if isinstance(value, str | bytes)]
    size = sum(len(v.encode() if isinstance(v, str) else v) for v in values)
    if size > AUX_BYTES_MAX:
        raise ValueError(f"aux values of {size} bytes are over {AUX_BYTES_MAX} in all")
    return aux


Aux = Annotated[dict[Name, AuxValue], Field(max_length=64), AfterValidator(_bounded)]
WireState = Annotated[State, Field(strict=False), INT]
WireRole = Annotated[Role, Field(strict=False), STR]
WireMode = Annotated[Mode, Field(strict=False), STR]
WireStall = Annotated[StallReason, Field(strict=False), STR]


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple"):
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            _fail_fast(part)


class Message(BaseModel):
    """Strict: "3" is not 3. Unknown fields are skipped, so that a newer peer may add some."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", use_enum_values=False, allow_inf_nan=False
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let every list stop at its first bad item: an error costs far more than the item."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @classmethod
    def model_construct(  # type: ignore[override]  # mypy's plugin makes one of its own beside it
        cls, _fields_set: set[str] | None = None, **values: Any
    ) -> Self:
        """Build one of our own values, unchecked.

        pydantic's goes through the fields one by one, for aliases and private ones that no message
        has: that made it a tenth of what a handoff costs to decide.
        """
        fixed, factories = _defaults(cls)
        fields = fixed | values
        for name, factory in factories:
            if name not in values:
                fields[name] = factory()
        made = cls.__new__(cls)
        object.__setattr__(made, "__dict__", fields)
        given = set(values) if _fields_set is None else _fields_set
        object.__setattr__(made, "__pydantic_fields_set__", given)
        object.__setattr__(made, "__pydantic_extra__", None)
        object.__setattr__(made, "__pydantic_private__", None)
        return made


@cache
def _defaults(
    kind: type[Message],
) -> tuple[dict[str, Any], tuple[tuple[str, Callable[[], Any]], ...]]:
    """The defaults that all may share, and what makes the others."""
    fixed: dict[str, Any] = {}
    factories: list[tuple[str, Callable[[], Any]]] = []
    for name, field in kind.model_fields.items():
        if field.default_factory is not None:
            factories.append((name, cast(Callable[[], Any], field.default_factory)))
        elif not field.is_required():
            fixed[name] = field.default
    return fixed, tuple(factories)


class ErrorInfo(Message):
    """An error as it travels: the code is stable, the words are for people."""

    code: Annotated[str, Field(max_length=64)]
    fault: Annotated[str, Field(max_length=16)]
    message: Text
    remedy: Text
    retry_after_s: Annotated[float, Field(ge=0)] | None = None

    @classmethod
    def of_error(cls, error: FerryError) -> "ErrorInfo":
        """What an exception says."""
        return cls.of(error.code, error.message, error.retry_after_s)

    @classmethod
    def of(cls, code: Code, message: str, retry_after_s: float | None = None) -> "ErrorInfo":
        """Build one with the fault and the remedy that belong to the code."""
        advice = ADVICE[code]
        return cls(
            code=code.value,
            fault=advice.fault.value,
            message=message.encode(errors="replace").decode()[:1024],  # a path may hold any byte
            remedy=advice.remedy,
            retry_after_s=retry_after_s,
        )

    def raised(self) -> FerryError:
        """The exception of this error; a code that we do not know becomes ``internal``."""
        known = self.code in Code.__members__.values()
        code = Code(self.code) if known else Code.INTERNAL
        message = self.message if known else f"{self.code}: {self.message}"
        return FerryError(code, message, self.retry_after_s)


__all__ = [
    "AUX_BYTES_MAX", "Attempt", "Aux", "BootId", "Call", "Count", "ErrorInfo", "Fault", "Message", "Name", "Text", "Tokens",
    "TransferId", "WireMode", "WireRole", "WireStall", "WireState",
]  # fmt: skip
