"""msgpack maps to frozen, strictly validated models and back: the one doorway to msgpack.

A model names each field's key on the wire beside the field. A field that has its default value is not
written; a key that a model does not know is ignored, so that versions can move; a key that comes twice, a
nested bomb, an ext type or a value that the model refuses is a `WireError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, NamedTuple, TypeVar

import msgpack  # type: ignore[import-untyped]  # ships no types
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from crossedge.wire.errors import WireError

U8 = Annotated[int, Field(ge=0, le=2**8 - 1)]
U16 = Annotated[int, Field(ge=0, le=2**16 - 1)]
U32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
U48 = Annotated[int, Field(ge=0, le=2**48 - 1)]
U64 = Annotated[int, Field(ge=0, le=2**64 - 1)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Bytes8 = Annotated[bytes, Field(min_length=8, max_length=8)]
Bytes16 = Annotated[bytes, Field(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]

PADDING_KEY: Final = "_"
"""The key that no model has: what stands there is padding."""

MAX_DEPTH: Final = 6
"""How deep arrays and maps may nest."""

_PLAIN: Final = frozenset({dict, tuple, str, bytes, int, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class Key:
    """How a field goes on the wire: its key, and how its value becomes what msgpack has, where it must."""

    name: str
    pack: Callable[[Any], Any] | None = None
    unpack: Callable[[Any], Any] | None = None


class Column(NamedTuple):
    """One field of a model, as the codec needs it."""

    name: str
    key: str
    pack: Callable[[Any], Any] | None
    unpack: Callable[[Any], Any] | None
    optional: bool
    default: Any


class Fields(BaseModel):
    """A frozen model that knows its keys on the wire."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    COLUMNS: ClassVar[tuple[Column, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Read the keys once per model."""
        cls.COLUMNS = tuple(
            _column(cls.__name__, name, field)
            for name, field in cls.model_fields.items()
            if any(isinstance(item, Key) for item in field.metadata)
        )
        keys = [column.key for column in cls.COLUMNS]
        if len({*keys, PADDING_KEY, "t"}) != len(keys) + 2:
            raise TypeError(f"{cls.__name__}: two fields share a key")


AnyFields = TypeVar("AnyFields", bound=Fields)


def _column(model: str, name: str, field: FieldInfo) -> Column:
    keys = [item for item in field.metadata if isinstance(item, Key)]
    if len(keys) != 1:
        raise TypeError(f"{model}.{name}: one Key is needed")
    optional = not field.is_required()
    return Column(name, keys[0].name, keys[0].pack, keys[0].unpack, optional, field.default)


def to_map(model: Fields) -> dict[str, Any]:
    """Return the map that goes on the wire, keys in the order of the model."""
    values: dict[str, Any] = {}
    for name, key, pack, _, optional, default in model.COLUMNS:
        value = getattr(model, name)
        if optional and value == default:
            continue
        values[key] = value if pack is None else pack(value)
    return values


def from_map(model: type[AnyFields], values: Mapping[str, Any]) -> AnyFields:
    """Return the model of an untrusted map; raises only `WireError`."""
    known: dict[str, Any] = {}
    for name, key, _, unpack, _, _ in model.COLUMNS:
        if key in values:
            value = values[key]
            known[name] = value if unpack is None else unpack(value)
    try:
        return model.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError("malformed", f"{model.__name__} {where}: {first['msg']}"[:200]) from None


def dump(values: Mapping[str, Any]) -> bytes:
    """Return the msgpack bytes of a map."""
    packed: bytes = msgpack.packb(values)
    return packed


def dump_padded(values: Mapping[str, Any], size: int, limit: int) -> bytes:
    """Return the msgpack bytes of a map, grown by padding to at least `size` (a few bytes more at most)."""
    packed = dump(values)
    if len(packed) >= size:
        return packed
    overhead = 4 if size - len(packed) <= 259 else 5
    padded = dump({**values, PADDING_KEY: bytes(max(0, size - len(packed) - overhead))})
    return padded if len(padded) <= limit else packed


def load(data: bytes | memoryview, limit: int) -> dict[str, Any]:
    """Return the map in untrusted msgpack bytes; arrays become tuples. Raises only `WireError`."""
    if len(data) > limit:
        raise WireError("too-long", f"{len(data)} bytes, {limit} allowed")
    try:
        values = msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_no_ext,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError("malformed", f"not msgpack ({type(error).__name__})") from None
    if type(values) is not dict:
        raise WireError("malformed", "not a map")
    _check(values, MAX_DEPTH)
    return values


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise WireError("malformed", "a key comes twice")
    return values


def _no_ext(code: int, _: bytes) -> None:
    raise WireError("malformed", f"ext type {code}")


def _check(value: Any, depth: int) -> None:
    kind = type(value)
    if kind not in _PLAIN:
        raise WireError("malformed", "a type that is not used")
    if kind is dict or kind is tuple:
        if not depth:
            raise WireError("malformed", "nested too deep")
        for item in value.values() if kind is dict else value:
            _check(item, depth - 1)
