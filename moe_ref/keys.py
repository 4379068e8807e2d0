"""Typed reads of GGUF metadata; every complaint names the whole key, what was found and what is accepted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from moe_ref.architectures import READ_BY, REQUIRED


class ConfigError(ValueError):
    """Metadata that is missing, contradictory, or asks for something not supported; names the key."""


class Keys:
    """The ``{arch}.*`` keys of one file, but for those that the architecture does not read: a warning names these."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        ignored = {f"{architecture}.{key}" for key, readers in READ_BY.items() if architecture not in readers}
        for name in (n for n in ignored & set(metadata) if metadata[n] is False or metadata[n] != 0):  # 0 says: none
            warnings.warn(f"{name}: {metadata[name]!r} has no effect for {architecture}, as in llama.cpp", stacklevel=2)
        self.metadata = {name: value for name, value in metadata.items() if name not in ignored}
        self.architecture = architecture

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def number(self, key: str, kind: type, default: Any = None, least: float = 1) -> Any:
        """One ``kind`` of at least ``least``; ``default`` if absent, and None says that it must be there."""
        return self._checked(f"{self.architecture}.{key}", self._value(key, default), kind, least)

    def per_layer(self, key: str, count: int, default: Any = None, least: float = 1) -> list[int]:
        """``count`` whole numbers: those of an array, or one number for all layers."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if not _is_array(value):
            return [self.number(key, int, default, least)] * count
        if len(value) != count:
            raise ConfigError(f"{name}: {len(value)} values for {count} layers")
        return [self._checked(name, item, int, least) for item in value]

    def flags(self, key: str, count: int) -> list[bool] | None:
        """``count`` booleans of an array; None if the key is absent or a number."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name)
        if not _is_array(value):
            return None
        if len(value) < count or not all(item in (0, 1) for item in value):
            raise ConfigError(f"{name}: expected {count} booleans, found {list(value)[:8]}")
        return [bool(item) for item in list(value)[:count]]

    def numbers(self, key: str) -> list[int]:
        """All whole numbers of an array; empty if absent."""
        name = f"{self.architecture}.{key}"
        value = self._value(key, [])
        if not _is_array(value):
            raise ConfigError(f"{name}: expected an array, found {value!r}")
        return [self._checked(name, item, int, 0) for item in value]

    def choice(self, key: str, names: Mapping[Any, Any], default: Any = None) -> Any:
        """The meaning in ``names`` of the key's value; ``default`` (None: required) if absent."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name)
        if value is None and default is not None:
            return default
        if _is_array(value) or value not in names:
            accepted = ", ".join(map(repr, names))
            raise ConfigError(f"{name}: {'missing' if value is None else repr(value)}; supported: {accepted}")
        return names[value]

    def refuse_unless(self, key: str, accepted: tuple[Any, ...]) -> None:
        """Raise ConfigError for a value of an optional key that is none of ``accepted``."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, accepted[0])
        if _is_array(value) or value not in accepted:
            shown = list(value) if _is_array(value) else value
            raise ConfigError(f"{name}: {shown!r} is not supported; supported: {', '.join(map(repr, accepted))}")

    def _value(self, key: str, default: Any) -> Any:
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, None if self.architecture in REQUIRED.get(key, ()) else default)
        if value is None:
            raise ConfigError(f"{name}: missing, and {self.architecture} cannot run without it")
        return value

    def _checked(self, name: str, value: Any, kind: type, least: float) -> Any:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name}: expected one number, found {type(value).__name__}")
        if not least <= value < 2**40:  # false for NaN too
            raise ConfigError(f"{name}: {value} is out of range (at least {least})")
        if kind is int and value != int(value):
            raise ConfigError(f"{name}: expected a whole number, found {value}")
        return kind(value)


def _is_array(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)
