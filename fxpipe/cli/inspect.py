"""``fxpipe inspect``: what is in a checkpoint, a directory of weights or a safetensors file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fxpipe.cli.options import add_command

if TYPE_CHECKING:
    from fxpipe.runtime.weights.disk.directory import Listing
    from fxpipe.runtime.weights.disk.manifest import Entry


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "inspect",
        _run,
        help="list what is in a checkpoint or a directory of weights; reads headers only",
        examples="""
        fxpipe inspect checkpoints
        fxpipe inspect model.safetensors --json
        """,
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, a directory of them, or safetensors")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _run(options: argparse.Namespace) -> None:
    from fxpipe.runtime.weights.disk.directory import list_path

    listing = list_path(options.path)
    print(json.dumps(_data(listing), indent=1) if options.json else "\n".join(_lines(listing)))


def _data(listing: Listing) -> dict[str, Any]:
    manifest = listing.manifest
    found: dict[str, Any] = {
        "path": str(listing.path),
        "kind": listing.kind,
        "tensors": {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "files": _files(entry)}
            for name, entry in listing.entries.items()
        },
    }
    if manifest is not None:
        found.update(
            model=manifest.model,
            step=manifest.step,
            seed=manifest.seed,
            extra=manifest.extra,
            optimizer=manifest.optimizer and manifest.optimizer.kind,
            scheduler=manifest.scheduler is not None,
            state=list(manifest.state),
        )
    return found


def _lines(listing: Listing) -> list[str]:
    from fxpipe.ir.tensor import TensorMeta

    manifest, entries = listing.manifest, listing.entries
    sizes = {name: TensorMeta(entry.shape, entry.dtype).nbytes for name, entry in entries.items()}
    files = {file for entry in entries.values() for file in _files(entry)}
    lines = [
        f"{listing.path} · {listing.kind} · {len(entries)} tensors · {sum(sizes.values()):,} bytes · {len(files)} files"
    ]
    if manifest is not None:
        state = f"{manifest.optimizer.kind} ({len(manifest.state)} tensors)" if manifest.optimizer else "none"
        lines.append(
            f"model {manifest.model or 'unknown'} · step {manifest.step} · seed {manifest.seed} · optimizer {state} · "
            f"scheduler {'saved' if manifest.scheduler is not None else 'none'} · extra {json.dumps(manifest.extra)}"
        )
    width = max((len(name) for name in entries), default=0)
    for name, entry in entries.items():
        shape = " × ".join(map(str, entry.shape)) or "scalar"
        lines.append(f"{name:<{width}}  {entry.dtype:<8}  {shape:<16}  {sizes[name]:>14,}  {', '.join(_files(entry))}")
    return lines


def _files(entry: Entry) -> list[str]:
    return list(dict.fromkeys(chunk.file.name for chunk in entry.chunks))
