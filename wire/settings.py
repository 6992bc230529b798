"""Configuration: TOML text in, one validated model out, or one line naming file, key and what to write.

Parsed once, at the edge. The models carry docstrings with units; an unknown key is an error.
"""

from __future__ import annotations

import json
import tomllib
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from crossedge.wire.errors import ConfigError


class Settings(BaseModel):
    """The base of every configuration model: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Model = TypeVar("Model", bound=BaseModel)


def parse_settings(text: str, file: str, model: type[Model]) -> Model:
    """Return the validated model of a TOML text.

    Args:
        text: the file's content.
        file: its name, for the message.
        model: what it must be.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type or value; it names the first such key.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(file, "(whole file)", f"TOML ({error})") from error
    try:
        # The JSON mode is strict about numbers and strings, yet makes paths of strings and tuples of lists.
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        if first["type"] == "extra_forbidden":
            known = ", ".join(known_keys(model, first["loc"][:-1]))
            raise ConfigError(file, key, f"a known key ({known})") from error
        if first["type"] == "missing":
            raise ConfigError(file, key, "a value, and there is none") from error
        wanted = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise ConfigError(file, key, f"{wanted}, got {first['input']!r:.60}") from error


def known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that a model (or the model nested at a location) takes, sorted."""
    current: type[BaseModel] = model
    for part in location:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        nested = _models_in(field.annotation) if field else []
        if not nested:
            return sorted(current.model_fields)
        current = nested[0]
    return sorted(field.alias or name for name, field in current.model_fields.items())


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for part in getattr(annotation, "__args__", ()):
        found += _models_in(part)
    return found
