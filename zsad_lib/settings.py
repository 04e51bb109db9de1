"""Settings as fields of a dataclass, checked once by the types that the fields are declared with."""

import sys
import types
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from zsad_lib.errors import MethodError, ZsadError


@dataclass(frozen=True)
class AtLeast:
    """The smallest number that a field may hold: Annotated[int, AtLeast(1)]."""

    least: float

    def __str__(self) -> str:
        return f"of {self.least} or more"

    def holds(self, value: float) -> bool:
        return value >= self.least


@dataclass(frozen=True)
class Above:
    """The number that a field must exceed: Annotated[float, Above(0)]."""

    bound: float

    def __str__(self) -> str:
        return f"above {self.bound}"

    def holds(self, value: float) -> bool:
        return value > self.bound


Positive = Annotated[int, AtLeast(1)]
NotNegative = Annotated[float, AtLeast(0)]
AboveZero = Annotated[float, Above(0)]
WORDS = {int: "an int", float: "a float", bool: "True or False", str: "a text", types.NoneType: "None"}


def check_settings(settings: Any, error: type[ZsadError] = MethodError) -> None:
    """Refuse values that the types of the fields do not allow; whole numbers become floats where those are meant."""
    hints = get_type_hints(type(settings), include_extras=True)
    for f in (f for f in fields(settings) if f.init):
        value, kind = getattr(settings, f.name), hints[f.name]
        check_value(f.name, value, kind, error)
        if _bare(kind) is float:
            object.__setattr__(settings, f.name, float(value))  # of a frozen one, too


def check_value(name: str, value: Any, kind: Any, error: type[ZsadError] = MethodError) -> None:
    """Refuse a value that its type does not allow."""
    if not _allowed(value, kind):
        raise error(f"{name} {value!r:.80}: use {_words(kind)}")


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _allowed(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        bare, *limits = get_args(kind)
        return _allowed(value, bare) and all(limit.holds(value) for limit in limits)
    if get_origin(kind) in (Union, types.UnionType):
        return any(_allowed(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(_allowed(part, get_args(kind)[0]) for part in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # neither NaN nor too large an int
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    return type(value) is kind if kind in (bool, str, types.NoneType) else True


def _words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        bare, *limits = get_args(kind)
        return " ".join([_words(bare), *map(str, limits)])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {list(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list, each entry {_words(get_args(kind)[0])}"
    return WORDS.get(kind) or getattr(kind, "__name__", str(kind))
