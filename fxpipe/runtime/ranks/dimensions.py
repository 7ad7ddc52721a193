"""From the user's mesh to the ranks that work together: along the pipeline, over its replicas, and all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fxpipe.errors import ScheduleError
from fxpipe.ir.mesh import DATA_DIMENSIONS, num_replicas

PIPELINE = "pp"


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Who works with whom, in global ranks; the same on every rank.

    Attributes:
        pipelines: The ranks of each pipeline, in order.
        replicas: Those that hold the same stages and take different batches, by replica; empty without replicas.
        unions: Those of the pipelines that go together; empty without a mesh.
    """

    pipelines: tuple[tuple[int, ...], ...]
    replicas: tuple[tuple[int, ...], ...] = ()
    unions: tuple[tuple[int, ...], ...] = ()


def check_mesh(mesh: DeviceMesh | None, *, parallelized: bool) -> None:
    """Refuse a mesh without a pipeline, and dimensions that nothing would reduce gradients over.

    Args:
        mesh: The user's mesh.
        parallelized: Whether the user's own function divides the stages over the other dimensions.

    Raises:
        ScheduleError: Names the dimension.
    """
    if mesh is None:
        return
    names = mesh.mesh_dim_names or ()
    if PIPELINE not in names:
        raise ScheduleError(f"the mesh has the dimensions {names}\n  name one of them 'pp': the pipeline's")
    for name, size in zip(names, mesh.mesh.shape, strict=True):
        if name not in (PIPELINE, *DATA_DIMENSIONS) and size > 1 and not parallelized:
            raise ScheduleError(
                f"nothing divides the model or reduces gradients over the mesh's dimension {name!r} of size {size}\n"
                f"  pass materialize(parallelize=...) a function of a stage module that does, give the dimension to "
                f"data parallelism by naming it {DATA_DIMENSIONS[0]!r}, or leave it out: mesh['pp', 'dp']"
            )


def dimensions(mesh: DeviceMesh | None) -> Dimensions:
    """Find who works with whom; every rank of the default group calls this.

    Args:
        mesh: The user's, checked; of a slice of a larger mesh every rank has its own. None: all ranks are one pipeline.
    """
    if mesh is None:
        return Dimensions((tuple(range(dist.get_world_size())),))
    own = _of_slice(mesh)
    everywhere: list[Dimensions] = [own] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return Dimensions(
        tuple(sorted({ranks for each in everywhere for ranks in each.pipelines})),
        tuple(sorted({ranks for each in everywhere for ranks in each.replicas})),
        tuple(sorted({ranks for each in everywhere for ranks in each.unions})),
    )


def _of_slice(mesh: DeviceMesh) -> Dimensions:
    names = mesh.mesh_dim_names or ()
    data = [index for index, name in enumerate(names) if name in DATA_DIMENSIONS]
    table, pipeline = mesh.mesh, names.index(PIPELINE)
    replicas: tuple[tuple[int, ...], ...] = ()
    if num_replicas(dict(zip(names, table.shape, strict=True))) > 1:
        ends = list(range(-len(data), 0))
        replicas = _rows(table.movedim(data, ends).flatten(-len(data)))
    return Dimensions(_rows(table.movedim(pipeline, -1)), replicas, (tuple(sorted(table.flatten().tolist())),))


def _rows(table: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    rows: list[list[int]] = table.reshape(-1, table.shape[-1]).tolist()
    return tuple(map(tuple, rows))
