"""A composed configuration as nested dataclasses, with every mismatch and broken rule named. Torch-free."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config import ConfigError

T = TypeVar("T")
# The type of a field holds its rule: Literal[...] names the choices, the number below is the least value.
AtLeast0 = Annotated[int, 0]
AtLeast1 = Annotated[int, 1]
NotNegative = Annotated[float, 0]


def typed(cls: type[T], cfg: Any) -> T:
    """`cfg` as an instance of the dataclass `cls`, values converted by OmegaConf.

    Unlike OmegaConf's own merge, one ConfigError reports every unknown, missing and mistyped key.
    """
    problems: list[str] = []
    instance = _typed(cls, cfg, "", problems)
    if problems:
        raise ConfigError(problems)
    return instance


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The same dictionaries and lists with every text that is a value changed."""
    if isinstance(value, dict):
        return {key: each_text(of, change) for key, of in value.items()}
    if isinstance(value, list):
        return [each_text(of, change) for of in value]
    return change(value) if isinstance(value, str) else value


def literal(value: Any) -> Any:
    """Plain data in which OmegaConf resolves nothing: each ${ is escaped, after twice its backslashes."""
    return each_text(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def value_problems(config: Any, path: str = "") -> list[str]:
    """Every field of a dataclass, nested ones included, that breaks the rule of its type, one line each."""
    found = []
    for key, hint in get_type_hints(type(config), include_extras=True).items():
        name, value = f"{path}{key}", getattr(config, key)
        if is_dataclass(value):
            found += value_problems(value, f"{name}.")
        elif isinstance(value, dict):
            named = ((f"{name}.{of}.", item) for of, item in value.items() if is_dataclass(item))
            found += [problem for place, item in named for problem in value_problems(item, place)]
        elif get_origin(hint) is Literal and value not in get_args(hint):
            found.append(f"{name}={value} is unknown; use {', '.join(get_args(hint))}")
        elif get_origin(hint) is Annotated and not value >= (least := get_args(hint)[1]):  # or NaN
            found.append(f"{name}={value} is below {least}; use {least} or more")
    return found


def similar(key: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` for a key close to a known one, else nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _typed(cls: Any, cfg: Any, path: str, problems: list[str]) -> Any:
    """An instance of `cls`, or None if one of its keys is missing; appends to `problems`."""
    if not isinstance(cfg, DictConfig):
        problems.append(f"{path.rstrip('.') or 'the configuration'}={_shown(cfg)} must be a group of keys")
        return None
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    optional = {field.name for field in fields(cls) if field.default is not MISSING}
    unknown = [str(key) for key in cfg if str(key) not in known]
    problems += [f"{path}{_shown(key)} is unknown{similar(key, known)}; remove it" for key in unknown]
    values: dict[str, Any] = {}
    for key in known:
        if key not in cfg or OmegaConf.is_missing(cfg, key):
            if key not in optional:
                problems.append(f"{path}{key} has no value; give {path}{key}=...")
            continue
        try:
            hint, value = hints[key], cfg[key]
        except OmegaConfBaseException as error:  # of an interpolation
            problems.append(_unresolved(f"{path}{key}", error))
            values[key] = None
            continue
        inner: Any = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        if inner and get_origin(hint) is dict and isinstance(value, DictConfig):
            names: list[Any] = list(value)
            values[key] = {
                str(name): _typed(inner, _item(value, name), f"{path}{key}.{name}.", problems)
                for name in names
            }
        elif inner and (value is not None or inner is hint):
            values[key] = _typed(inner, value, f"{path}{key}.", problems)
        else:
            values[key] = _leaf(hint, value, f"{path}{key}", problems)
    return cls(**values) if values.keys() | optional == set(known) else None


def _item(group: DictConfig, name: Any) -> Any:
    """The value of a key, or the key's text if it has none or its interpolation fails."""
    try:
        return group[name]
    except OmegaConfBaseException:
        return group._get_node(name)


def _leaf(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """One value, converted by OmegaConf to its declared type."""
    hint = str if get_origin(hint) is Literal else hint
    try:
        if OmegaConf.is_config(value):  # its interpolations belong to the whole configuration
            value = OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        problems.append(_unresolved(path, error))
        return None
    # a float is judged when it has its type: the text "nan" of a name comes as a number
    if faults := [] if isinstance(value, float) else list(_faults(value, path)):
        problems += faults
        return None
    try:
        node = _node(hint)
        node.value = literal(value)  # a text that was resolved already
        found = OmegaConf.to_object(node).value  # type: ignore[union-attr]
    except OmegaConfBaseException:
        problems.append(f"{path}={_shown(value)} must be of type {getattr(hint, '__name__', hint)}")
        return None
    problems += _faults(found, path)  # such as the text "nan" for a number
    return found


@cache
def _node(hint: Any) -> Any:
    """A place for values of one type; OmegaConf takes most of its time to make it."""
    return OmegaConf.structured(make_dataclass("Leaf", [("value", hint)]))


def _faults(value: Any, path: str) -> Iterator[str]:
    """What no key may hold, one line each: Python would take it, and fail later."""
    law = ""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _faults(key, f"{path}: the key")
            yield from _faults(item, f"{path}.{_shown(key)}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _faults(item, f"{path}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        law = "must be a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        law = "must be a number of 64 bits"
    elif value == "???":  # OmegaConf reads it as missing
        law = "has no value; give it one"
    elif isinstance(value, str) and ("\0" in value or not is_text(value)):
        law = "must be text in UTF-8 without null characters"
    if law:
        yield f"{path}={_shown(value)} {law}"


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; a file name or an argument of other bytes cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _unresolved(path: str, error: OmegaConfBaseException) -> str:
    """The line about an interpolation at or below a key that fails."""
    return f"{error.full_key or path} cannot be resolved ({_shown(error)}); give it a value"


def _shown(value: Any) -> str:
    """A value for a message: on one line, and not too long."""
    huge = isinstance(value, int) and not -(2**63) <= value < 2**63  # has perhaps too many digits for str
    text = hex(value) if huge else str(value)
    line = text.partition("\n")[0][:100]
    return line if line == text else f"{line}..."
