"""Models made at random: nested containers, skips, ties, views, several outputs, dtypes, reuse, foreign reads."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

WIDTH = 4
MORE = 3 if os.environ.get("FXPIPE_FUZZ") else 0  # lines of a model
KINDS = (
    *("linear", "linear", "norm", "reused", "tied", "read", "act", "identity", "view", "split", "add", "narrow"),
    *("embed", "buffer", "block", "block"),
)


@dataclasses.dataclass(frozen=True)
class Op:
    """One line of a forward: what is done, with which earlier values, modules, and lines inside of it."""

    kind: str
    first: int
    second: int
    module: int
    inside: tuple[Op, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is cut, and how it is run."""

    ops: tuple[Op, ...]
    container: str
    frozen: tuple[int, ...]
    output: str
    stages: int
    microbatches: int
    schedule: str
    grain: str
    steps: int


def _ops(depth: int) -> st.SearchStrategy[tuple[Op, ...]]:
    kinds = st.sampled_from(KINDS if depth else [kind for kind in KINDS if kind != "block"])
    number = st.integers(0, 7)
    inside = _ops(depth - 1) if depth else st.just(())
    one = st.builds(
        lambda kind, first, second, module, inner: Op(kind, first, second, module, inner if kind == "block" else ()),
        *(kinds, number, number, number, inside),
    )
    return st.lists(one, min_size=2 if depth else 1, max_size=(4 if depth else 2) + MORE).map(tuple)


CASES = st.builds(
    Case,
    _ops(1),
    st.sampled_from(["ModuleList", "ModuleDict", "attributes"]),
    st.lists(st.integers(0, 12), max_size=2).map(tuple),
    st.sampled_from(["tensor", "tuple", "dict", "loss"]),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["GPipe", "GPipe", "1F1B"]),
    st.sampled_from(["block", "op", "auto"]),
    st.integers(1, 2),
)


class Shared:
    """What modules of a model may be reused, tied to and read from, in the order in which they were made."""

    def __init__(self) -> None:
        self.linears: list[nn.Linear] = []


class Block(nn.Module):
    """Runs lines; its modules lie in a container, and those of others are reached as the lines say."""

    def __init__(self, ops: tuple[Op, ...], container: str, shared: Shared) -> None:
        super().__init__()
        self.ops, self.container = ops, container
        self.foreign: dict[int, tuple[nn.Module, ...]] = {}  # a tuple: not registered here
        made = {index: self._make(index, op, shared) for index, op in enumerate(ops)}
        found = {index: module for index, module in made.items() if module is not None}
        self.places = {index: place for place, index in enumerate(found)}
        if container == "ModuleList":
            self.parts = nn.ModuleList(found.values())
        elif container == "ModuleDict":
            self.parts = nn.ModuleDict({f"part{place}": module for place, module in enumerate(found.values())})
        else:
            for place, module in enumerate(found.values()):
                setattr(self, f"part{place}", module)

    def _make(self, index: int, op: Op, shared: Shared) -> nn.Module | None:
        if op.kind in ("linear", "tied", "narrow"):
            layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float32 if op.kind == "narrow" else torch.float64)
            wide = [other for other in shared.linears if other.weight.dtype == layer.weight.dtype]
            if op.kind == "tied" and wide:
                layer.weight = wide[op.module % len(wide)].weight
            shared.linears.append(layer)
            return layer
        if op.kind in ("reused", "read") and shared.linears:
            self.foreign[index] = (shared.linears[op.module % len(shared.linears)],)
        if op.kind == "norm":
            return nn.LayerNorm(WIDTH, dtype=torch.float64)
        if op.kind == "act":
            return (nn.Tanh(), nn.GELU(), nn.Dropout(0.0))[op.module % 3]
        if op.kind == "identity":
            return nn.Identity()
        if op.kind == "embed":
            return nn.Embedding(8, WIDTH, dtype=torch.float64)
        if op.kind == "buffer":
            self.register_buffer(f"scale{index}", torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
        if op.kind == "block":
            return Block(op.inside, self.container, shared)
        return None

    def part(self, index: int) -> nn.Module:
        place = self.places[index]
        if self.container == "ModuleList":
            return self.parts[place]
        return self.parts[f"part{place}"] if self.container == "ModuleDict" else getattr(self, f"part{place}")

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = [x]
        for index, op in enumerate(self.ops):
            one, other = values[-1 - op.first % min(len(values), 3)], values[-1 - op.second % len(values)]
            values.append(torch.tanh(self.line(index, op, one, other, ids)))
        return values[-1], values[len(values) // 2]

    def line(self, index: int, op: Op, one: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if op.kind in ("linear", "tied", "norm", "act", "identity"):
            return self.part(index)(one)
        if op.kind == "narrow":
            return self.part(index)(one.float()).double()
        if op.kind in ("reused", "read"):
            if index not in self.foreign:
                return one * 0.5
            (layer,) = self.foreign[index]
            narrow = layer.weight.dtype == torch.float32
            given = one.float() if narrow else one
            if op.kind == "reused":
                return layer(given).double()
            return F.linear(given, layer.weight.T if op.second % 2 else layer.weight).double() + layer.bias
        if op.kind == "view":
            return (one.view(-1, 2, WIDTH // 2).transpose(1, 2) * 1.5).reshape(-1, WIDTH) + other
        if op.kind == "split":
            left, right = one.chunk(2, dim=1)
            return torch.cat([right, left * other[:, : WIDTH // 2]], dim=1)
        if op.kind == "embed":
            return one + self.part(index)(ids)
        if op.kind == "buffer":
            return one * getattr(self, f"scale{index}")
        if op.kind == "block":
            out, middle = self.part(index)(one, ids)
            return out + middle
        return one + other


class RandomModel(nn.Module):
    """A model of random lines between a first and a last layer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        shared = Shared()
        shared.linears.append(self.first)
        self.body = Block(case.ops, case.container, shared)
        self.last = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.output = case.output

    def forward(self, x: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor | None = None):
        out, middle = self.body(self.first(x), ids)
        out = self.last(out) + middle
        if self.output == "loss":
            return F.mse_loss(out, labels), out
        return {"tensor": out, "tuple": (out, middle), "dict": {"out": out, "middle": middle}}[self.output]


def loss_fn(output, target: torch.Tensor) -> torch.Tensor:
    """The loss of any form of output."""
    parts = (
        [output] if isinstance(output, torch.Tensor) else list(output.values() if isinstance(output, dict) else output)
    )
    return sum((F.mse_loss(part, target) for part in parts), start=torch.zeros((), dtype=torch.float64))


def build(case: Case) -> RandomModel:
    """Make the model, the same each time, some of it frozen."""
    torch.manual_seed(0)
    model = RandomModel(case)
    modules = [module for module in model.body.modules() if list(module.parameters(recurse=False))]
    for index in case.frozen:
        if modules:
            modules[index % len(modules)].requires_grad_(False)
    model.first.requires_grad_(True)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eight samples, whole numbers for embeddings, and a target."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, torch.randint(0, 8, (8,), generator=generator), y
