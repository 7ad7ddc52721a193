"""One small module for each construct that a forward may hold, and whether it is captured or refused.

Most are the body of two blocks between linear layers; a construct at the model's own level is a class.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

WIDTH, ROWS = 4, 3


@dataclasses.dataclass(frozen=True)
class Construct:
    """One case.

    Attributes:
        build: Makes the model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        refusal: A pattern of the ``CaptureError``; empty where it must be captured.
    """

    build: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    refusal: str = ""


CONSTRUCTS: dict[str, Construct] = {}


def sample(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)), generator=torch.Generator().manual_seed(seed))


class Inner(nn.Module):
    """A block with whatever a body may want."""

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("mean", torch.ones(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.plain = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cpu")
        self.array = np.arange(4.0, dtype=np.float32)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


class Plain(Inner):
    """A block of two linear layers."""

    def __init__(self) -> None:
        super().__init__(lambda self, x: self.second(self.first(x)))


class Around(nn.Module):
    """Two blocks between linear layers."""

    def __init__(self, make: Callable[[], nn.Module] = Plain) -> None:
        super().__init__()
        self.begin, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([make(), make()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


def body(function: Callable[[Any, torch.Tensor], torch.Tensor] | None = None, **options: Any) -> Any:
    """Make a function the body of two blocks."""
    if function is None:
        return functools.partial(body, **options)
    build = functools.partial(Around, functools.partial(Inner, function))
    CONSTRUCTS[function.__name__] = Construct(build, (sample(),), **options)
    return function


def block(kind: type[nn.Module] | None = None, **options: Any) -> Any:
    """Make a class the two blocks."""
    if kind is None:
        return functools.partial(block, **options)
    CONSTRUCTS[kind.__name__] = Construct(functools.partial(Around, kind), (sample(),), **options)
    return kind


def model(kind: type[nn.Module] | None = None, args: tuple[Any, ...] = (), **options: Any) -> Any:
    """Take a class as the model."""
    if kind is None:
        return functools.partial(model, args=args, **options)
    CONSTRUCTS[kind.__name__] = Construct(kind, args or (sample(),), **options)
    return kind


# --- autograd ---


class Square(torch.autograd.Function):
    """Its backward is not that of its forward, so that a lost one shows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, power: float = 2.0) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**power

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x, None


class DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class WithModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any) -> torch.Tensor:
        ctx.module = module
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * ctx.module.scale.sum().detach(), None


@body
def autograd_function(self, x):
    return self.second(Square.apply(self.first(x)))


@body
def autograd_function_in_place(self, x):
    y = self.first(x) * 1
    DoubleInPlace.apply(y)
    return self.second(y)


@body
def autograd_function_given_a_module(self, x):
    return self.second(WithModule.apply(self.first(x), self))


@body
def autograd_function_made_in_the_forward(self, x):
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return -gradient

    return self.second(Reverse.apply(self.first(x)))


@body
def no_grad_region(self, x):
    y = self.first(x)
    with torch.no_grad():
        weight = y.sigmoid() * 2
    return self.second(y * weight)


@body
def no_grad_around_a_module(self, x):
    with torch.no_grad():
        y = self.first(x)
    return self.second(x + y)


@body
def no_grad_decorator(self, x):
    @torch.no_grad()
    def squashed(y):
        return y.tanh()

    return self.second(self.first(x) * squashed(x))


@body
def enable_grad_inside_no_grad(self, x):
    with torch.no_grad():
        y = self.first(x)
        with torch.enable_grad():
            z = self.second(y)
    return z + x


@body
def set_grad_enabled_without_a_region(self, x):
    torch.set_grad_enabled(False)
    y = self.first(x)
    torch.set_grad_enabled(True)
    return self.second(y + x)


@body
def inference_region(self, x):
    y = self.first(x)
    with torch.inference_mode():
        (y.detach() * 2).sum()
    return self.second(y)


@body
def in_place_in_an_inference_region(self, x):
    y = self.first(x)
    with torch.inference_mode():
        weight = torch.zeros(WIDTH)
        weight[0] = 2
        weight.add_(1)
        out = torch.empty(WIDTH)
        torch.mul(weight, 2, out=out)
    return self.second(y) + out.clone()


@body
def autocast_region(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.first(x)
    return self.second(y.float())


@body
def autocast_switched_off_inside(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.first(x)
        with torch.autocast("cpu", enabled=False):
            z = self.second(y.float())
    return z + x


@body
def detach_and_scale(self, x):
    y = self.first(x)
    return self.second(y * 0.1 + y.detach() * 0.9)


@body
def requires_grad_set_on_a_detached_tensor(self, x):
    y = self.first(x).detach()
    y.requires_grad = True
    return self.second(y)


@body
def gradient_inside_the_forward(self, x):
    y = self.first(x)
    with torch.enable_grad():
        z = y if y.requires_grad else y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((z**2).sum(), z, create_graph=True)
    return self.second(gradient)


@body
def tensor_hook(self, x):
    y = self.first(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
    return self.second(y)


@body
def tensor_hook_that_reads_a_parameter(self, x):
    y = self.first(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * self.scale.detach().sum())
    return self.second(y)


@body
def saved_tensors_hooks(self, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor * 1, lambda tensor: tensor):
        y = self.first(x).sigmoid()
    return self.second(y)


@body
def data_of_a_parameter(self, x):
    return self.second(self.first(x) + self.scale.data * 2)


@block
class ModuleHooks(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, given, output: output * 2)
        self.first.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
        self.second.register_full_backward_hook(lambda module, given, output: (given[0] * 2,))


# --- recomputation, transforms, compiled code ---


@body
def checkpointed_function(self, x):
    return self.second(checkpoint(lambda y: self.dropout(F.gelu(self.first(y))), x, use_reentrant=False))


@body
def checkpointed_module(self, x):
    return self.second(checkpoint(self.first, x, use_reentrant=False))


@body
def checkpoint_in_a_checkpoint(self, x):
    def outer(y):
        return checkpoint(lambda z: self.first(z).relu(), y, use_reentrant=False) * 2

    return self.second(checkpoint(outer, x, use_reentrant=False))


@body
def checkpointed_sequence(self, x):
    return checkpoint_sequential(nn.Sequential(self.first, self.second), 2, x, use_reentrant=False)


@body(refusal="reentrant activation checkpointing.*\n.*use_reentrant=False")
def reentrant_checkpoint(self, x):
    return self.second(checkpoint(self.first, x, use_reentrant=True))


@body
def vmap(self, x):
    return self.second(torch.vmap(lambda row: row * 2 + row.sum())(self.first(x)))


@body
def vmap_over_a_closure(self, x):
    y = self.first(x)
    return self.second(torch.vmap(lambda row: row * y.sum())(x))


@body
def vmap_over_a_parameter(self, x):
    return torch.vmap(lambda row: F.linear(row, self.second.weight))(self.first(x))


@body
def vmap_over_a_module(self, x):
    return torch.vmap(self.second)(self.first(x))


@body
def vmap_of_a_partial(self, x):
    return self.second(torch.vmap(functools.partial(torch.mul, other=2.0))(self.first(x)))


@body
def func_grad(self, x):
    return self.second(torch.func.grad(lambda y: (y**3).sum())(self.first(x)))


@body
def func_vjp(self, x):
    y, pull_back = torch.func.vjp(torch.sin, self.first(x))
    return self.second(pull_back(y)[0])


@body
def functional_call(self, x):
    weights = {"weight": self.second.weight * 2, "bias": self.second.bias}
    return torch.func.functional_call(self.second, weights, (self.first(x),))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scripting is deprecated, and still in use

    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + torch.sigmoid(x)


@body
def scripted_function(self, x):
    return self.second(scripted(self.first(x)))


doubled = torch.compile(lambda x: x * 2 + 1, backend="eager")


@body
def compiled_function(self, x):
    return self.second(doubled(self.first(x)))


@body
def aten_operators(self, x):
    return self.second(torch.ops.aten.mul.Tensor(self.first(x), x) + torch.ops.aten.add(x, x))


@torch.library.custom_op("fxpipe_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, gradient: gradient * 2)


@body
def custom_operator(self, x):
    return self.second(twice(self.first(x)))


@body
def attention_with_a_chosen_kernel(self, x):
    y = self.first(x)[None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = F.scaled_dot_product_attention(y, y, y)
    return self.second(z[0])


@torch.library.custom_op("fxpipe_tests::by_kernel", mutates_args=())
def by_kernel(x: torch.Tensor) -> torch.Tensor:
    """As attention does, this depends on the kernels that are allowed, and on which is the first; also on a CPU."""
    factor = 0
    for kernel in torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True):
        factor = 10 * factor + int(kernel.value) + 2
    return x * factor


by_kernel.register_fake(torch.empty_like)


@body
def attention_kernels_in_a_chosen_order(self, x):
    flash, math = torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH
    total = self.first(x) + by_kernel(x.detach())
    for kernels in ([math, flash], [flash, math]):
        with torch.nn.attention.sdpa_kernel(kernels, set_priority=True):
            total = total + by_kernel(x.detach())
            with torch.nn.attention.sdpa_kernel([math, flash]):
                total = total + by_kernel(x.detach())
    return self.second(total)


# --- writes and views ---


@body
def writes_in_place(self, x):
    y = self.first(x).clone()
    y.mul_(2)
    y += 1
    y[0] = 0
    y[:, 1].add_(1)
    return self.second(y)


@body
def writes_through_a_view(self, x):
    y = self.first(x) * 1
    column, total = y[:, 0], y.sum()
    column.zero_()
    return self.second(y) + total


@body
def writes_by_a_mask(self, x):
    y = self.first(x).clone()
    y[torch.tensor([True, False, True])] = 0.5
    return self.second(y)


@body
def activation_in_place(self, x):
    return self.second(F.relu(self.first(x), inplace=True))


@body
def writes_to_out(self, x):
    with torch.no_grad():
        y = torch.empty(ROWS, WIDTH)
        torch.mul(x.detach(), 2, out=y)
        row = y[0]
        row += 5
    return self.second(self.first(x) + y)


@body
def views(self, x):
    one, other = self.first(x).chunk(2, -1)
    y = torch.cat([other, one], -1).transpose(0, 1).reshape(WIDTH, -1).t()
    return self.second(y.contiguous())


@body
def strided_view_beyond_the_tensor(self, x):
    y = self.first(x)
    rest = y[1:]
    return self.second(rest.as_strided((2, WIDTH), (WIDTH, 1), 0)).sum() + self.second(y)


@body
def buffer_in_place(self, x):
    if self.training:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
            self.count += 1
    return self.second(self.first(x) * self.mean)


@body
def buffer_by_slices(self, x):
    with torch.no_grad():
        self.mean[:] = self.mean.flip(0) + 1
    return self.second(self.first(x)) * self.mean.clone()


@body
def buffer_assigned(self, x):
    if self.training:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
    return self.second(self.first(x) * self.mean)


@body
def buffer_read_twice_around_a_write(self, x):
    before = self.mean.clone()
    with torch.no_grad():
        self.mean.copy_(0.9 * self.mean + 0.1 * self.first(x).mean(0))
    return self.second(self.mean.clone() * x + before)


@body
def parameter_in_place(self, x):
    if self.training:
        with torch.no_grad():
            self.scale.mul_(0.9)
    return self.second(self.first(x) * self.scale)


@body
def parameter_of_a_module_in_place(self, x):
    y = self.first(x)
    with torch.no_grad():
        self.second.weight.mul_(0.9)
    return self.second(y)


@body(refusal=r"writes to blocks\.0\.plain, which is no buffer .*constructs\.py:\d+\)\n.*register_buffer")
def plain_tensor_in_place(self, x):
    self.plain.add_(1)
    return self.second(self.first(x) * self.plain)


OUTSIDE = torch.ones(WIDTH)


@body(refusal=r"writes to a tensor kept outside of the model.*constructs\.py:\d+\)")
def global_tensor_in_place(self, x):
    OUTSIDE.mul_(2)
    return self.second(self.first(x) * OUTSIDE)


@model(refusal=r"writes to its input 'x' .*constructs\.py:\d+\)\n.*clone")
class WritesToItsInput(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return super().forward(x)


# --- constants, attributes, parameters ---


@body
def plain_tensor(self, x):
    return self.second(self.first(x) * self.plain)


@body
def global_tensor(self, x):
    return self.second(self.first(x) + WEIGHTS)


WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.0])


@functools.lru_cache
def table(size: int) -> torch.Tensor:
    return torch.arange(size).float() + 1


@body
def cached_table(self, x):
    return self.second(self.first(x) * table(WIDTH))


@body
def numpy_array(self, x):
    return self.second(self.first(x) * torch.from_numpy(self.array) + torch.tensor(self.array))


@body
def numbers_of_sizes(self, x):
    return self.second(self.first(x) + torch.tensor([1.0, 2.0, 3.0, float(x.shape[0])]) + x.new_full((4,), 2.0))


@body
def parameter_read_directly(self, x):
    return self.second(self.first(x) * self.scale)


@body
def weight_of_a_module(self, x):
    return F.linear(self.first(x), self.second.weight / self.second.weight.norm(dim=1, keepdim=True))


@body
def table_kept_on_self(self, x):
    if getattr(self, "mask", None) is None or self.mask.shape[0] < x.shape[0]:
        self.mask = torch.ones(x.shape[0], 1).tril()
    return self.second(self.first(x) * self.mask[: x.shape[0]])


@body
def buffer_registered_late(self, x):
    if not hasattr(self, "late"):
        self.register_buffer("late", torch.ones(WIDTH) * 3, persistent=False)
    return self.second(self.first(x) * self.late)


@body
def tensor_stored_on_self(self, x):
    self.last = self.first(x)
    return self.second(self.last * 2)


@body
def list_kept_on_self(self, x):
    if not hasattr(self, "log"):
        self.log = []
    self.log.append(x)
    return self.second(self.first(x))


@model
class StoresForInspection(Around):
    """What it keeps is never read again."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.steps = None, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = super().forward(x)
        self.steps += 1
        return self.hidden * 2


@model(refusal="sets the attribute state and reads it in the next batch")
class CarriesState(Around):
    def __init__(self) -> None:
        super().__init__()
        self.state = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.state is not None:
            x = x + self.state
        self.state = x.detach()
        return super().forward(x)


@model(refusal="sets the attribute is_ready and reads it in the next batch")
class InitializesAtFirst(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "is_ready"):
            with torch.no_grad():
                self.begin.weight.mul_(2)
            self.is_ready = True
        return super().forward(x)


@model(refusal="sets the attribute calls and reads it in the next batch")
class CountsItsCalls(Around):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.second(x)
        return self.first(x)


class Finds(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.others = [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.others[0].last


@model
class ReadsWhatAnotherBlockLeft(Around):
    def __init__(self) -> None:
        super().__init__(Leaves)
        self.blocks[1] = Finds(self.blocks[0])


class ReadsForeignWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.tables: list[nn.Module] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) @ self.tables[0].weight


@model
class ReadsAnotherModulesWeight(Around):
    def __init__(self) -> None:
        super().__init__(ReadsForeignWeight)
        for part in self.blocks:
            part.tables.append(self.end)


class ReadsWhatWasSet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.factor


@model
class SetsItsBlocks(Around):
    """Sets attributes of its blocks from outside, the same in each forward."""

    def __init__(self) -> None:
        super().__init__(ReadsWhatWasSet)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, part in enumerate(self.blocks):
            part.factor = 2.0 + index
        return super().forward(x)


class Cache:
    def __init__(self) -> None:
        self.tensor, self.used = None, 0


class UsesCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        y = self.first(x)
        if cache.tensor is not None:
            y = y + cache.tensor
        cache.tensor = y.detach()
        cache.used += 1
        return y * cache.used


@model
class PassesACache(Around):
    """An object, made in the forward, that the blocks change."""

    def __init__(self) -> None:
        super().__init__(UsesCache)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        x = self.begin(x)
        for part in self.blocks:
            x = part(x, cache)
        return self.end(x)


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        x = self.first(x)
        states.append(x)
        return x


@model
class PassesAList(Around):
    def __init__(self) -> None:
        super().__init__(Appends)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: list[torch.Tensor] = []
        x = self.begin(x)
        for part in self.blocks:
            x = part(x, states)
        return self.end(x + torch.stack(states).mean(0))


@dataclasses.dataclass
class Position:
    index: int


class ReadsAPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, position: Position) -> torch.Tensor:
        return self.first(x) * (position.index + 1)


@model
class PassesAnObjectThatItChanges(Around):
    """One object, another value at each call."""

    def __init__(self) -> None:
        super().__init__(ReadsAPosition)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = Position(0)
        x = self.begin(x)
        for index, part in enumerate(self.blocks):
            position.index = index
            x = part(x, position)
        return self.end(x)


class MarksTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x) * getattr(x, "factor", 1.0)
        y.factor = 3.0
        return y


@model
class AttributeOnATensor(Around):
    def __init__(self) -> None:
        super().__init__(MarksTensor)


@model
class ReturnsAParameter(Around):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * self.scale, self.scale, self.begin.weight


@model(refusal=r"\[1\] is the input 'x' itself.*\n.*clone")
class ReturnsItsInput(Around):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class KeepsParametersInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.weights = [nn.Parameter(torch.ones(WIDTH))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.weights[0]


@model(refusal=r"blocks\.0\.weights\[0\] takes a gradient but is no parameter.*\n.*nn\.ParameterList")
class ParametersInAPlainList(Around):
    def __init__(self) -> None:
        super().__init__(KeepsParametersInAList)


class KeepsModulesInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.parts = [nn.Linear(WIDTH, WIDTH)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[0](self.first(x))


@model(refusal=r"blocks\.0\.parts\[0\] is a Linear with parameters.*\n.*nn\.ModuleList")
class ModulesInAPlainList(Around):
    def __init__(self) -> None:
        super().__init__(KeepsModulesInAList)


@block
class ClosureOverAConstant(Inner):
    def __init__(self) -> None:
        weight = torch.full((WIDTH,), 2.0, device="cpu")
        super().__init__(lambda self, x: self.second(self.first(x)) * weight)


HIDDEN = torch.ones(WIDTH, requires_grad=True)


@body(refusal=r"takes a gradient is hidden in a closure or a global.*constructs\.py:\d+\)\n.*parameter")
def global_tensor_with_a_gradient(self, x):
    return self.second(self.first(x) * HIDDEN)


@block
class Parametrized(Plain):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.first)
        nn.utils.parametrizations.spectral_norm(self.second)


@model
class SharedBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks[1](self.norm(self.blocks[0](self.norm(x)))))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen += 1
        return self.first(x) * self.seen.clone()


@model
class BufferSharedByBlocks(Around):
    def __init__(self) -> None:
        super().__init__(Counts)
        self.blocks[1].seen = self.blocks[0].seen


@model
class ModuleCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shared = Inner(lambda self, x: self.second(self.dropout(self.first(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.shared(self.begin(self.shared(x))))


@model
class ModuleNamedLikeAnOperation(Around):
    def __init__(self) -> None:
        super().__init__()
        self.add, self.loss = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(self.loss(super().forward(x + 1) + 1)) + 1


# --- random numbers ---


@body
def random_factories(self, x):
    return self.second(self.first(x) + torch.rand(4) + torch.randn_like(x))


@body
def functional_dropout(self, x):
    return self.second(F.dropout(self.first(x), 0.5, self.training))


@body
def dropout_module(self, x):
    return self.second(self.dropout(self.first(x)))


@body
def dropout_of_a_constant(self, x):
    return self.second(self.first(x) * F.dropout(torch.ones(WIDTH), 0.5, self.training))


@body
def dropout_module_on_a_constant(self, x):
    return self.second(self.first(x) * self.dropout(torch.ones(ROWS, WIDTH)))


@body
def attention_with_dropout(self, x):
    y = self.first(x)[None]
    return self.second(F.scaled_dot_product_attention(y, y, y, dropout_p=0.2 if self.training else 0.0)[0])


@body
def random_in_place(self, x):
    mask = torch.zeros(WIDTH)
    mask.bernoulli_(0.5)
    return self.second(self.first(x) * mask)


@body
def stochastic_depth(self, x):
    y = self.second(self.first(x))
    return x + y * (torch.rand(ROWS, 1) < 0.7).float() / 0.7 if self.training else x + y


@body
def other_random_functions(self, x):
    y = F.alpha_dropout(F.rrelu(self.first(x), training=self.training), 0.3, self.training)
    return self.second(
        F.gumbel_softmax(y, hard=True) + y[torch.randperm(ROWS)] + y[torch.multinomial(torch.ones(3), 3)]
    )


@body
def python_random_inside_a_block(self, x):
    return self.second(self.first(x)) if random.random() < 0.5 else self.first(self.second(x))


@model(refusal="draws from Python's or numpy's random generator")
class PythonRandomInTheModel(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if random.random() < 0.5 else self.end(x)


@body
def torch_random_branch_inside_a_block(self, x):
    return self.second(self.first(x)) if torch.rand([]) < 0.5 else self.first(self.second(x))


@model(refusal=r"reads a random number: the path changes by chance .*constructs\.py:\d+\)\n.*leaves=")
class TorchRandomBranchInTheModel(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if torch.rand([]) < 0.5 else self.end(x)


@body
def reseeding(self, x):
    torch.manual_seed(3)
    return self.second(self.first(x) + torch.rand(4))


@body
def random_state_put_back(self, x):
    state = torch.get_rng_state()
    one = torch.rand(4)
    torch.set_rng_state(state)
    return self.second(self.first(x) + one - torch.rand(4))


@body
def forked_random_state(self, x):
    with torch.random.fork_rng(devices=[]):
        noise = torch.rand(4)
    return self.second(self.first(x) + noise)


@body
def generator_made_in_the_forward(self, x):
    numbers = torch.Generator().manual_seed(3)
    return self.second(self.first(x) + torch.rand(4, generator=numbers))


@block
class KeepsAGenerator(Inner):
    def __init__(self) -> None:
        super().__init__(lambda self, x: self.second(self.first(x) + torch.rand(4, generator=self.numbers)))
        self.numbers = torch.Generator(device="cpu").manual_seed(5)


# --- Python ---


@body
def named_tuples(self, x):
    pair = collections.namedtuple("pair", "one other")(self.first(x), x)
    best = torch.max(pair.one, dim=1)
    return self.second(pair.one * best.values[:, None] + pair.other)


@dataclasses.dataclass
class Pair:
    one: torch.Tensor
    other: torch.Tensor


@body
def dataclasses_of_tensors(self, x):
    pair = Pair(self.first(x), x)
    return self.second(pair.one + pair.other)


@body
def loop_over_a_size(self, x):
    y = self.first(x)
    for index in range(x.shape[0]):
        y = y + index * x if index % 2 else y - x
    return self.second(y)


@body
def loop_over_rows(self, x):
    return self.second(torch.stack([row * 2 for row in self.first(x)]))


@body
def unpacked_tensor(self, x):
    one, two, three = self.first(x)
    return self.second(torch.stack([one, two, three]) * one)


@body
def loop_with_a_break(self, x):
    y = self.first(x)
    for step in range(3):
        y = self.second(y)
        if step == 1:
            break
    return y


@body
def branch_on_sizes(self, x):
    y = self.first(x)
    if len(y) > 2 and y.numel() and x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu":
        return self.second(y.to(x.device, x.dtype))
    return y


@body
def modules_by_name(self, x):
    for name in ("first", "second"):
        x = getattr(self, name)(x)
    return x


@body
def exception_caught(self, x):
    try:
        y = self.first(x).view(7)
    except RuntimeError:
        y = self.first(x)
    return self.second(y)


@body
def read_inside_a_narrow_except(self, x):
    y = self.first(x)
    try:
        return self.second(x * (float(y.sum().detach()) > 0))
    except ValueError:
        return self.second(x * 3)


@body
def read_inside_a_bare_except(self, x):
    y = self.first(x)
    try:
        z = x * (float(y.sum().detach()) > 0)
    except:  # noqa: E722
        z = x * 3
    return self.second(z + y)


@body
def branch_on_values_inside_a_block(self, x):
    y = self.first(x)
    return self.second(y) if y.sum() > 0 else self.second(-y)


@body
def assertion_on_values_inside_a_block(self, x):
    y = self.first(x)
    assert not torch.isnan(y).any()
    return self.second(y)


@body
def shape_that_depends_on_values_inside_a_block(self, x):
    y = self.first(x)
    return self.second(y + (y > 0).nonzero().sum() + y[y > 0].sum())


@model(refusal=r"__bool__\(\) takes a path .*module BranchesOnValues, .*constructs\.py:\d+\)\n.*leaves=")
class BranchesOnValues(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else self.end(x)


class ReturnsANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        return self.first(x), float(x.detach().sum())


@model(refusal=r"it returns what Python read from a tensor .*constructs\.py:\d+\)")
class ReadsANumberOfABlock(Around):
    def __init__(self) -> None:
        super().__init__(ReturnsANumber)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for part in self.blocks:
            x, number = part(x)
            x = x * number
        return self.end(x)


@model(kwargs={"ids": torch.tensor([1, 5, 5])})
class ReadsIds(Around):
    """Python looks at integers that are inputs, in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = x + self.embed(ids)
        for one in ids:
            y = y + self.embed(one)
        if ids.max() > 3:
            y = y * 2
        if 5 in ids and ids.tolist()[0] == 1 and f"{ids[0]}" == "1":
            y = y + self.embed(torch.from_numpy(np.sort(ids.numpy())))
        return super().forward(y + y[ids > 2].sum())


@model(kwargs={"ids": torch.tensor([1, 5, 5])})
class SparseGradients(Around):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH, sparse=True)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.embed(ids))


@model(args=(sample(), sample(seed=2)), kwargs={"scale": 2.0, "bias": sample(seed=3)})
class Variadic(Around):
    def forward(self, *parts: torch.Tensor, scale: float = 1.0, **named: torch.Tensor) -> dict[str, Any]:
        y = sum(parts) * scale + named["bias"]
        return {"y": super().forward(y), "none": None, "number": 3, "nested": [(y * 2,), {"z": y + 1}]}


@model(kwargs={"mask": torch.ones(ROWS, 1)})
class KeywordOnly(Around):
    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None, extra: Any = None) -> Any:
        y = x if mask is None else x * mask
        return super().forward(y), [y, extra]


@model
class DictionariesOfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH)})
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(WIDTH)), "b": nn.Parameter(torch.ones(WIDTH))})
        self.shifts = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for key in self.parts:
            x = self.parts[key](x) * self.scales[key] + self.shifts[0]
        return x + self.shifts[1]


@body
def warnings_caught(self, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = self.first(x)
    return self.second(y)


@body
def default_dtype_changed(self, x):
    torch.set_default_dtype(torch.float64)
    try:
        ones = torch.ones(4)
    finally:
        torch.set_default_dtype(torch.float32)
    return self.second((self.first(x) * ones).float())


@body
def default_device_named(self, x):
    with torch.device("cpu"):
        ones = torch.ones(4)
    return self.second(self.first(x) * ones + torch.ones(4, device=x.device) + torch.ones(4, device="cpu"))


# --- operations ---


@body
def reflected_operators(self, x):
    return self.second(2 - self.first(x) ** 2 + 2 ** (-x.abs()) + 1 / (x * x + 1) + (5 // (x.detach().abs() + 1)) % 3)


@body
def properties(self, x):
    return (self.second.weight @ self.first(x).T).mT


@body
def einsum_and_stack(self, x):
    y = torch.einsum("bi,oi->bo", self.first(x), self.second.weight)
    return torch.stack([y, x, x * 2]).mean(0) + sum([y, x])


@body
def complex_numbers(self, x):
    y = torch.view_as_complex(self.first(x).reshape(ROWS, 2, 2))
    return self.second(torch.view_as_real(y * y.conj() * (1 + 0.5j)).reshape(ROWS, WIDTH))


@body
def fourier_transforms(self, x):
    y = torch.fft.irfft(torch.fft.rfft(self.first(x)) * (1 + 0.5j), n=WIDTH)
    parts = torch.stft(y.flatten(), 4, hop_length=4, window=torch.hann_window(4), return_complex=True)
    return self.second(y + parts.abs().sum())


@body
def gathers_and_scatters(self, x):
    y = self.first(x)
    values, places = y.topk(2, dim=-1)
    z = torch.zeros_like(y).scatter(-1, places, values).scatter_reduce(1, torch.tensor([[0, 1, 1, 2]] * 3), x, "sum")
    return self.second(z.index_add(0, torch.arange(3)[torch.tensor([True, False, True])], torch.ones(2, 4)))


@body
def linear_algebra(self, x):
    return self.second(torch.linalg.solve(torch.eye(4) * 2 + self.first.weight @ self.first.weight.T, x.T).T)


@body
def grids_and_buckets(self, x):
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    return self.second(self.first(x) + rows + columns) + torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])).float()


@body
def sparse_matrices(self, x):
    places = torch.tensor([[0, 1], [1, 0]])
    matrix = torch.sparse_coo_tensor(places, torch.ones(2), (3, 3), check_invariants=False)
    return self.second(torch.sparse.mm(matrix, self.first(x)))


@body
def casts(self, x):
    y = self.first(x).to(torch.bfloat16).float() + x.type(torch.FloatTensor)
    return self.second(y + x.double().to(x.dtype))


@body
def copies(self, x):
    y = self.first(x)
    return self.second(copy.copy(y) + copy.deepcopy(y.detach()))


@block
class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)[None]
        return self.attention(y, y, y)[0][0]


@block
class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.1)
        self.gru = nn.GRU(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (_, cell) = self.lstm(self.first(x)[:, None])
        return self.gru(y)[0][:, 0] + cell.sum()


@model(args=(sample(2, 3, 8, 8).to(memory_format=torch.channels_last),))
class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin, self.wide = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up, self.end = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = F.relu(self.begin(x))
        return self.end(torch.cat([kept, self.up(F.relu(self.wide(kept)))], 1))


class CompiledBlocks(Around):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = torch.compile(self.blocks[0], backend="eager")
        self.blocks[1].compile(backend="eager")


CONSTRUCTS["CompiledBlocks"] = Construct(CompiledBlocks, (sample(),))


# --- what comes back, what is written and read ---


@model
class ReturnsWhatItWroteTo(Around):
    """Tensors filled row by row, and through a view, and returned as they are."""

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        out, kept = torch.zeros(ROWS, WIDTH), torch.zeros_like(y)
        for row in range(ROWS):
            out[row] = y[row] * 2
        kept[1] = y[0]
        y[2].mul_(3)
        return out, kept, y


@model(refusal=r"__bool__\(\) takes a path that depends on values")
class BranchesOnAMaskThatItFilled(Around):
    """The mask is made of constants, and filled with what is not known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(ROWS, dtype=torch.bool)
        mask[:] = self.begin(x)[:, 0] > 0
        return super().forward(x) if mask.any() else self.end(x)


@model(refusal=r"tolist\(\) takes a path that depends on values")
class ListsAMaskThatItFilled(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(ROWS, dtype=torch.bool)
        mask.view(-1)[:] = self.begin(x)[:, 0] > 0
        return super().forward(x) * sum(mask.tolist())


@body
def branch_on_a_filled_mask_inside_a_block(self, x):
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[:] = x[:, 0] < 100
    return self.second(self.first(x)) if mask.any() else self.first(x)


@model
class DataOfAParameterAssigned(Around):
    """As momentum encoders do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.end.weight.data = self.end.weight.data * 0.5
        self.begin.weight.data *= 2
        return super().forward(x)


@model(refusal="writes to its input 'x'")
class WritesToAViewOfItsInput(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[2:5].add_(1)
        return super().forward(x)


@body
def detached_in_place(self, x):
    return self.second(self.first(x).detach_()) + x.data + self.second(x).data


@body
def out_is_a_buffer(self, x):
    with torch.no_grad():
        torch.mul(self.mean, 2, out=self.mean)
    return self.second(self.first(x)) * self.mean


@model
class BufferRegisteredAnew(Around):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decay", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.register_buffer("decay", self.decay * 0.9)
        return super().forward(x) * self.decay


@model
class SetsAndDeletesAttributes(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = self.begin(x)
        self.both = [self.hidden, x]
        y = super().forward(self.hidden) + self.both[1]
        del self.hidden, self.both
        return y


@model
class TiesInTheForward(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.end.weight = self.begin.weight
        return super().forward(x)


@model(refusal="changes requires_grad of blocks.0.scale")
class FreezesInTheForward(Around):
    def __init__(self) -> None:
        super().__init__(lambda: Inner(lambda self, x: self.second(self.first(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for parameter in self.blocks[0].parameters():
            parameter.requires_grad_(False)
        return super().forward(x)


@model
class SwitchesABlockToEvaluation(Around):
    def __init__(self) -> None:
        super().__init__(lambda: Inner(lambda self, x: self.dropout(self.second(self.first(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.blocks[0].eval()
        return super().forward(x)


@model(refusal="copies end.weight")
class CopiesAModule(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return copy.deepcopy(self.end)(super().forward(x))


@body
def module_sent_to_a_device(self, x):
    self.first.to(x.device)
    return self.second.to("cpu")(self.first(x))


@model(refusal="converts end.weight to float64")
class ConvertsAModule(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end.double()(super().forward(x).double())


@model(refusal=r"item\(\) takes a path")
class ReadsAParameter(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.end.bias[0].item()


@model(refusal=r"equal\(\) takes a path")
class ComparesValues(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if torch.equal(x, x * 2) else self.end(x)


@model(refusal="that takes a gradient is hidden")
class ParameterMadeInTheForward(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * nn.Parameter(torch.ones(WIDTH))


# --- hooks ---


@model
class HookThatIsRemoved(Around):
    """It never runs: it is gone before the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        handle = x.register_hook(lambda gradient: gradient * 2)
        y = super().forward(x)
        handle.remove()
        return y


@model
class HookThatIsAMethod(Around):
    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, torch.Tensor] = {}
        self.blocks[0].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.features["x"] = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.features["x"].mean()


@model(refusal="a hook of blocks.0 holds a HookWithAClosure of the model in its closure")
class HookWithAClosure(Around):
    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, torch.Tensor] = {}
        self.blocks[0].register_forward_hook(lambda module, args, output: self.features.update(x=output))


@block
class HooksThatChangeArgumentsAndOutput(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, output: output * 2)
        self.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.register_forward_hook(lambda module, args, output: output - 1)


# --- paths and shapes that depend on values ---


class Selects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.first(x)[:, 0] > 0.1]


@model(refusal="the shape of what it returns depends on values")
class SelectsRows(Around):
    def __init__(self) -> None:
        super().__init__(Selects)


@block
class RoutesRows(nn.Module):
    """What it returns takes a gradient on one path, and none on the path of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        rows = (self.gate(x).abs().sum(-1) > 0.01).nonzero()[:, 0]
        return out.index_add(0, rows, self.expert(x[rows])) if len(rows) else out


@model(kwargs={"lengths": torch.tensor([2, 3, 1])})
class PackedSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin, self.end = nn.Linear(1, WIDTH), nn.Linear(2 * WIDTH, 1)
        self.recurrences = nn.ModuleList([nn.LSTM(WIDTH, WIDTH, bidirectional=True), nn.GRU(2 * WIDTH, 2 * WIDTH)])

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        hidden = self.begin(x[..., None])
        packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        for recurrence in self.recurrences:
            packed, _ = recurrence(packed)
        padded, counts = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        return self.end(padded) / counts.sum()


@model(kwargs={"ids": torch.tensor([[1, 2, 2], [3, 0, 1], [2, 2, 3]])})
class PositionsOfIds(Around):
    """Rows, counts and lists that depend on integers: each is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.where(ids == 2)
        x = x.index_add(0, rows, self.embed(columns))
        unique, places = ids.unique(return_inverse=True)
        x = x + self.embed(unique)[places].sum(1)
        for kept in ([number for number in row if number != 2] for row in ids.tolist()):
            x = x + self.embed(torch.tensor(kept, dtype=torch.long)).sum(0)
        if 3 in ids:
            x = x * int(np.asarray(ids).max())
        return super().forward(x)[:, : int((ids > 1).sum(1).max())] + self.embed(ids[ids > 0]).sum()


@model
class Distributions(Around):
    """They look at their arguments' values to complain, and for nothing else."""

    def forward(self, x: torch.Tensor) -> Any:
        normal = torch.distributions.Normal(self.begin(x), self.end(x).exp())
        standard = torch.distributions.Normal(torch.zeros(WIDTH), torch.ones(WIDTH))
        chosen = torch.distributions.Categorical(logits=super().forward(normal.rsample()))
        return chosen.log_prob(chosen.sample()), torch.distributions.kl_divergence(normal, standard)


# --- Python around modules ---


@model
class SlicesOfLists(Around):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.steps[:2](super().forward(x))
        for layer in (*self.steps[2:], *self.blocks[::-1]):
            x = layer(x)
        return x


@model
class GeneratorsOfModules(Around):
    def layers(self) -> Any:
        yield self.begin
        yield from self.blocks
        yield self.end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = [x := layer(x) for layer in self.layers()]
        return torch.stack(tuple(state * 2 for state in states)).sum(0)


@block
class OwnCall(Plain):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) * 2


@model
class CallsForwardDirectly(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin.forward(x)
        for inner in self.blocks:
            x = inner.forward(x)
        return self.end(x)


class Box:
    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside

    def __add__(self, other: Box) -> Box:
        return Box(self.inside + other.inside)


@model
class ObjectsOfItsOwn(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        box = Box(self.begin(x))
        for inner in self.blocks:
            box = Box(inner(box.inside)) + box
        return self.end(box.inside)


@dataclasses.dataclass
class Result:
    value: torch.Tensor
    more: Any = None

    def __post_init__(self) -> None:
        self.times = 3

    @property
    def total(self) -> torch.Tensor:
        return self.value.sum()


@model
class DataclassWithProperties(Around):
    def forward(self, x: torch.Tensor) -> Result:
        result = Result(super().forward(x))
        result.more = result.total * result.times
        return result


@model
class Profiled(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.profiler.record_function("part"):
            return super().forward(x)


@body
def decorated_functions(self, x):
    @torch.compiler.disable
    def twice(y):
        return y * 2

    @torch.jit.ignore
    def more(y):
        return y + 1

    return self.second(more(twice(self.first(x))))


@body
def partial_functions(self, x):
    leaky = functools.partial(F.leaky_relu, negative_slope=0.2)
    return self.second(leaky(functools.reduce(torch.add, [self.first(x), x, x])))


@body
def tensors_of_shapes(self, x):
    sizes = torch.tensor(x.shape)
    return self.second(self.first(x)) * sizes.prod() / sizes[0] + torch.as_tensor(x.size(1))


@body
def rearranged_memory(self, x):
    y = self.first(x).t().contiguous().t()
    z = y.unflatten(1, (2, 2)).movedim(1, 2).flatten(1)
    return self.second(torch.ops.aten.add(z, y).reshape_as(y).expand(ROWS, WIDTH)).masked_fill(y.isnan(), 0)


@model
class EmptyTensors(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([x, x[:0], x.new_empty(0, WIDTH)])[:2])
