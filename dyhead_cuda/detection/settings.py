"""Settings that are kept as JSON: what the configurations of models, data and training share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

S = TypeVar("S", bound="Settings")


class Settings:
    """Mixin of frozen dataclasses whose fields JSON can hold."""

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as JSON has them: lists for tuples."""
        values = asdict(self)  # type: ignore[call-overload]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that need not be given, by name."""
        found = {}
        for member in fields(cls):  # type: ignore[arg-type]
            if member.default is not MISSING:
                found[member.name] = member.default
            elif member.default_factory is not MISSING:
                found[member.name] = member.default_factory()
        return found

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
        """The settings that :meth:`to_dict` gave; names that are left out have their defaults.

        Raises:
            ValueError: unknown or missing names, or values that the class refuses.
        """
        members = fields(cls)  # type: ignore[arg-type]
        known = [member.name for member in members]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"expected {cls.__name__} settings among {known}, got {unknown}")
        missing = sorted(set(known) - set(cls.defaults()) - set(values))
        if missing:
            raise ValueError(f"expected {cls.__name__} settings {missing}, which are missing")
        return cls(**values)
