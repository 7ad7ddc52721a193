"""One safetensors file: its header, and writing one tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fxpipe.errors import WeightsError
from fxpipe.ir.tensor import dtype_bytes

_ABOUT = "__metadata__"
"""What the format keeps beside tensors, among their names."""
_FORMAT_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
_TORCH_NAMES = {name: dtype for dtype, name in _FORMAT_NAMES.items()}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp")
"""Suffixes of files that hold pickles, which are never opened."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file says of one tensor.

    Attributes:
        name: In the file.
        dtype: torch's name, without the prefix.
        shape: Its sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data.

        >>> StoredTensor("weight", "bfloat16", (3, 2)).nbytes
        12
        """
        size = dtype_bytes(self.dtype)
        for length in self.shape:
            size *= length
        return size


def stored(name: str, tensor: torch.Tensor) -> StoredTensor:
    """Describe a tensor as a file would hold it.

    Raises:
        WeightsError: The format has no such dtype, or keeps the name for itself.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if name == _ABOUT:
        raise WeightsError(f"a tensor is named {name}, which is no name for one in safetensors\n  give it another name")
    if dtype not in _FORMAT_NAMES:
        raise WeightsError(
            f"{name} is of dtype {dtype}, which safetensors cannot hold\n  it holds {', '.join(_FORMAT_NAMES)}"
        )
    return StoredTensor(name, dtype, tuple(tensor.shape))


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """List the tensors of a file; its data is not read.

    Raises:
        WeightsError: The file is missing, a pickle, cut short, or no safetensors file.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {path}\n  copy the missing file, or download the weights again")
    if path.suffix in PICKLES or _looks_pickled(path):
        raise WeightsError(
            f"{path} holds a pickle, which can run any code when it is read\n"
            "  convert it to safetensors where it comes from (save_pretrained of transformers writes these)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = []
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = file.get_slice(name)
                kind = part.get_dtype()
                found.append(StoredTensor(name, _TORCH_NAMES.get(kind, kind), tuple(part.get_shape())))
            return tuple(found)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is no whole safetensors file: {error}\n  it may be cut short: copy or download it again"
        ) from error


def write_file(path: Path, entries: Sequence[StoredTensor], tensors: Iterable[torch.Tensor]) -> int:
    """Write a file whose tensors come one at a time, so that no more than one needs memory here.

    Args:
        path: Where to; must not exist.
        entries: All tensors, in the order in which they come.
        tensors: Their values, on any device. Taken to the end even if the disk is full: another rank may be sending.

    Returns:
        Bytes written.

    Raises:
        WeightsError: The disk is full, or a tensor is not what its entry says.
    """
    header, offset = {}, 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": _FORMAT_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps({_ABOUT: {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of eight
    failed: OSError | None = None
    with path.open("xb", buffering=0) as file:  # a buffer would fail once more when the file is closed
        waiting = iter(tensors)
        failed = _written(file, [len(text).to_bytes(8, "little"), text])
        for entry in entries:
            tensor = next(waiting)
            if stored(entry.name, tensor) != entry:
                raise WeightsError(
                    f"{entry.name} became {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} while it was "
                    f"written, and was {entry.dtype}{list(entry.shape)}\n  do not change the model during a save"
                )
            if failed is None:
                failed = _written(file, [_bytes(tensor)])
            del tensor
        try:
            os.fsync(file.fileno())
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise cannot_write(path, failed)
    return path.stat().st_size


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        WeightsError: The disk is full.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> WeightsError:
    """Say that a file cannot be written."""
    return WeightsError(
        f"cannot write {path}: {error.strerror or error}\n"
        "  give a directory with room for it that this process may write to; nothing is left of this save"
    )


def _written(file: Any, parts: Sequence[Any]) -> OSError | None:
    try:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[file.write(left) :]
    except OSError as error:
        return error
    return None


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def _looks_pickled(path: Path) -> bool:
    """A pickle starts with its protocol; torch's are in a zip archive. Safetensors: eight bytes, then an object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80")
