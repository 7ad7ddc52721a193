"""Hardware from a TOML file, or from whatever ``hardware=`` was given."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from fxpipe.errors import PlanError
from fxpipe.ir.hardware import Hardware

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_BYTES = {f"{prefix}B": factor for prefix, factor in {**_PREFIX, **_BINARY}.items()}
_UNITS = {
    "FLOP/s": {f"{prefix}FLOP{tail}": factor for prefix, factor in _PREFIX.items() for tail in ("/s", "S")},
    "bytes/s": {
        **{f"{unit}/s": factor for unit, factor in _BYTES.items()},
        **{f"{prefix}{bit}": factor / 8 for prefix, factor in _PREFIX.items() for bit in ("bit/s", "b/s")},
    },
    "bytes": _BYTES,
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
}
_QUANTITY = {
    "flops": "FLOP/s",
    "memory_bandwidth": "bytes/s",
    "link_bandwidth": "bytes/s",
    "internode_bandwidth": "bytes/s",
    "memory": "bytes",
    "link_latency": "seconds",
    "internode_latency": "seconds",
}
# A bare number outside these bounds was almost surely meant in another unit: memory = 80, link_latency = 5.
_PLAUSIBLE = {"FLOP/s": (1e6, 1e20), "bytes/s": (1e4, 1e18), "bytes": (1e6, 1e16), "seconds": (0.0, 1.0)}


def resolve_hardware(hardware: Hardware | str | os.PathLike[str]) -> Hardware:
    """Give the ``Hardware`` that a user named: a value, a preset's name, or the path of a TOML file.

    Raises:
        PlanError: It is none of these, or the file is wrong.

    >>> resolve_hardware("l4").memory
    24000000000.0
    """
    if isinstance(hardware, Hardware):
        return hardware
    if isinstance(hardware, str | os.PathLike) and str(hardware).endswith(".toml"):
        return read_hardware(hardware)
    return Hardware.preset(hardware)  # type: ignore[arg-type]  # preset refuses what is not a known name


def read_hardware(path: str | os.PathLike[str]) -> Hardware:
    """Read a ``Hardware`` from a TOML file.

    The file has the fields of ``Hardware`` at its top: numbers in FLOP/s, bytes, bytes/s and seconds, or texts with a
    unit (``"80 GB"``, ``"400 Gbit/s"``, ``"5 us"``, ``"989 TFLOP/s"``, ``"inf"``), ``flops`` as a table by dtype.
    ``base = "h100"`` takes from that preset what the file leaves out.

    Raises:
        PlanError: No such file, not TOML, an unknown field, or a value without a plausible unit; all faults at once.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"cannot read hardware file {str(path)!r}: {error.strerror}\n  give the path of a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"hardware file {str(path)!r} is not TOML: {error}\n  see https://toml.io") from error
    base = data.pop("base", None)
    fields = [field.name for field in dataclasses.fields(Hardware)]
    unknown = sorted(set(data) - set(fields))
    faults = [f"unknown field {name!r} (known: base, {', '.join(fields)})" for name in unknown]
    values: dict[str, Any] = {} if base is None else _fields_of(Hardware.preset(base))
    values["name"] = Path(path).stem
    for name, value in data.items():
        if name in unknown:
            continue
        if name == "flops":
            rates = value if isinstance(value, dict) else {"flops": None}
            values[name] = {dtype: _number(f"flops.{dtype}", rate, faults) for dtype, rate in rates.items()}
        else:
            values[name] = _number(name, value, faults) if name in _QUANTITY else value
    missing = [name for name in ("flops", "memory_bandwidth", "memory") if name not in values]
    faults += [f"{name!r} is missing ({_QUANTITY[name]})" for name in missing]
    if faults:
        raise PlanError(f"hardware file {str(path)!r}: " + "; ".join(faults) + "\n  correct the file")
    return Hardware(**values)


def _fields_of(hardware: Hardware) -> dict[str, Any]:
    return {field.name: getattr(hardware, field.name) for field in dataclasses.fields(hardware)}


def _number(name: str, value: object, faults: list[str]) -> float:
    """Read one quantity in its base unit; what is wrong with it goes to ``faults``."""
    quantity = _QUANTITY[name.split(".")[0]]
    units = _UNITS[quantity]
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?|inf)\s*(\S*)\s*", value)
        if match and (match[2] in units or match[1] == "inf"):
            return float(match[1]) * units.get(match[2], 1.0)
        faults.append(f"{name} = {value!r} has no unit of {quantity} (one of {', '.join(list(units)[:6])}, …)")
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        faults.append(f"{name} = {value!r} is not a number of {quantity}")
        return 1.0
    least, most = _PLAUSIBLE[quantity]
    if not least <= value <= most and value != float("inf"):
        faults.append(f'{name} = {value!r} {quantity} is implausible; write the unit, as in "{value} {list(units)[4]}"')
    return float(value)
