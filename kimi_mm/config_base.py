"""What all configs share: strict conversion between frozen dataclasses, plain dictionaries and YAML."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kimi_mm.errors import UserError

C = TypeVar("C", bound="Config")


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs: strict conversion from and to plain dictionaries and YAML."""

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any], where: str = "") -> C:
        """Builds the config from nested dictionaries.

        Args:
            values: plain YAML/JSON values, keys equal to field names.
            where: dotted path or file name that error messages start with.

        Raises:
            ConfigError: on an unknown key (names the nearest one) or a value of the wrong type.
        """
        place = where or cls.__name__
        if not isinstance(values, dict):
            raise ConfigError(f"{place}: expected a mapping of keys, got {type(values).__name__}.")
        hints = typing.get_type_hints(cls)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(sorted(known))}."
                raise ConfigError(f"{place}: unknown key '{key}'.{hint}")
        parsed = {key: _parse(hints[key], value, f"{place}.{key}") for key, value in values.items()}
        missing = [
            name
            for name, f in known.items()
            if name not in parsed and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{place}: missing key '{missing[0]}'.")
        try:
            return cls(**parsed)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values; `None` fields are kept, tuples become lists."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """Reads a YAML (or JSON) file; errors start with the file's name."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from None
        return cls.from_dict(values or {}, where=str(path))

    def to_yaml(self) -> str:
        """Returns the YAML text that `from_yaml` reads back to an equal config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100)

    def replace(self: C, **changes: Any) -> C:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}='{value}' must be one of {', '.join(allowed)}.")


def positive(config: Config) -> None:
    """Raises ConfigError when a number of the config is not above 0."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, (int, float)) and value <= 0:
            raise ConfigError(f"{f.name}={value} must be above 0.")


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        return _parse(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}.")
        return tuple(_parse(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}.")
        item_hint = typing.get_args(hint)[1]
        return {str(key): _parse(item_hint, item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_dict(value, where)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
