"""Methods as they are typed: `METHOD[/LAYOUT[/int8]][:NAME=VALUE,...]`.

    snapkv    ada-snapkv/packed    ada-snapkv/packed/int8    snapkv/padded:window=64,kernel=5
    prefixkv:profile=FILE

Benchmarks, plans and evaluations read methods alike.
"""

import contextlib
import dataclasses
from typing import Any

from kvjax.calibrate import read_profile
from kvjax.config import CompressionConfig, ConfigError

FORM = "METHOD[/LAYOUT[/int8]][:NAME=VALUE,...]"


def parse_methods(text: str) -> tuple[str, ...]:
    """The methods of a list with commas: `NAME=VALUE` belongs to the method before it."""
    found: list[str] = []
    for part in filter(None, text.split(",")):
        setting = "=" in part and ":" not in part
        if setting and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


def parse_method(text: str, budget: int | float | None, **settings: Any) -> CompressionConfig:
    """The config of a method as it is typed, at a budget.

    Args:
      text: see above. A profile is the name of a file; {evicted} in it is replaced by the fraction
        that the budget evicts, as in its authors' prefixkv_llava-v1.5-7b_{evicted}.json.
      budget: of all methods but `full`.
      settings: of every method, where it has none of its own.

    Raises:
      ConfigError: another form, a setting that there is not, a profile that cannot be read.
    """
    before, _, after = text.partition(":")
    method, *short = before.split("/")
    if len(short) > 2:
        raise ConfigError(f"method={text!r}, expected {FORM}")
    own: dict[str, Any] = dict(zip(("layout", "quantize"), short, strict=False))
    # What stands behind a slash has no second spelling.
    known = {field.name for field in dataclasses.fields(CompressionConfig)}
    known -= {"method", "budget", "layout", "quantize"}
    for setting in filter(None, after.split(",")):
        name, equals, value = setting.partition("=")
        if name not in known or not equals:
            raise ConfigError(f"{text!r} has {setting!r}, expected NAME=VALUE of a setting")
        own[name] = _profile(value, budget) if name == "profile" else _plain(value)
    return CompressionConfig.named(method, budget, **(settings | own))


def spelled(config: CompressionConfig) -> str:
    """A method with its layout and its entries' dtype where they are set, as they are typed."""
    parts = [config.method, config.layout, config.quantize]
    return "/".join(part for part in parts if part)


def _plain(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _profile(path: str, budget: int | float | None) -> tuple[float, ...]:
    if "{evicted}" in path:
        if not isinstance(budget, float):
            raise ConfigError(f"profile={path!r} needs budgets in per cent, got {budget!r}")
        path = path.replace("{evicted}", f"{1 - budget:.1f}")
    try:
        return read_profile(path)
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read ({error.strerror})") from None
