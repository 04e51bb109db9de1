"""Settings as fields of a dataclass, checked once by the types that the fields are declared with."""

import math
import types
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from zsad_lib.errors import MethodError, ZsadError


@dataclass(frozen=True)
class AtLeast:
    """The smallest number that a field may hold: Annotated[int, AtLeast(1)]."""

    least: float


Positive = Annotated[int, AtLeast(1)]
NotNegative = Annotated[float, AtLeast(0)]


def check_settings(settings: Any, error: type[ZsadError] = MethodError) -> None:
    """Refuse values that the types of the fields do not allow; whole numbers become floats where those are meant."""
    hints = get_type_hints(type(settings), include_extras=True)
    for f in (f for f in fields(settings) if f.init):
        value, kind = getattr(settings, f.name), hints[f.name]
        if not _allowed(value, kind):
            raise error(f"{f.name} {value!r} is unknown or of another kind; use {_words(kind)}")
        if _bare(kind) is float:
            object.__setattr__(settings, f.name, float(value))  # of a frozen one, too


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _allowed(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        bare, *limits = get_args(kind)
        return _allowed(value, bare) and all(value >= limit.least for limit in limits)
    if get_origin(kind) in (Union, types.UnionType):
        return any(_allowed(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(_allowed(part, get_args(kind)[0]) for part in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind if kind in (int, bool, str, types.NoneType) else True


def _words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        bare, *limits = get_args(kind)
        return " and ".join([_words(bare), *(f"{limit.least} or more" for limit in limits)])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(kind))
    return f"one of {list(get_args(kind))}" if get_origin(kind) is Literal else getattr(kind, "__name__", str(kind))


def at_least(least: float, **values: float | None) -> None:
    """MethodError for a value below `least`; None is left alone."""
    for name, value in values.items():
        if value is not None and value < least:
            raise MethodError(f"{name} must be {least} or more, not {value}")
