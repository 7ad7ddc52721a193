"""Every torch-private name that fxpipe needs; tests/test_torch_private.py fails when torch changes one."""
# Long: what differs between versions of torch, and every name that torch may change, stands here alone.

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import torch.utils.checkpoint
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._functorch import apis as _functorch_apis
from torch._guards import Source as Source
from torch._ops import OpOverload as OpOverload
from torch._subclasses import fake_tensor as _fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.nn.modules._functions import BackwardHookFunction as BackwardHookFunction
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes

import fxpipe._heard as heard
from fxpipe._heard import check_version as check_version
from fxpipe._heard import splits_backward as splits_backward

Hook = TypeVar("Hook", bound=Callable[..., Any])


def without_modes() -> AbstractContextManager[Any]:
    """Run torch calls for real, whatever modes are active."""
    return cast(AbstractContextManager[Any], _disable_current_modes())


def without_functions() -> AbstractContextManager[Any]:
    """Call torch without asking any function mode."""
    return cast(AbstractContextManager[Any], torch._C.DisableTorchFunction())


@contextmanager
def _apart() -> Iterator[None]:
    """Leave the caller's modes, for a trial of a hook."""
    with without_modes(), without_functions():
        yield


def tried(trial: Callable[[Any], bool]) -> Callable[[Hook], Hook]:
    """Try a hook at its first use."""

    def decorate(hook: Hook) -> Hook:
        return heard.tried(hook, trial, _apart)

    return decorate


def functorch_is_active() -> bool:
    """Tell whether the call is made inside ``vmap``, ``grad`` or another transform of ``torch.func``."""
    return bool(torch._C._are_functorch_transforms_active())


def attention_kernels() -> tuple[Any, ...]:
    """Give the kernels (of ``torch.nn.attention.SDPBackend``) that attention may take, preferred first."""
    return tuple(_cur_sdpa_kernel_backends(with_priority=True))


GROUPED_MM, READ_NUMBER = torch.ops.aten._grouped_mm.default, torch.ops.aten._local_scalar_dense.default
"""A matrix product per group of rows, of experts; what each call dispatches that takes a tensor for its number."""
UNVIEWED = torch.ops.aten._unsafe_view.default
"""``UNVIEWED(tensor, tensor.shape)`` has a contiguous tensor's memory, a graph's node of its own, and is no view."""

_real_apply = vars(torch._C._FunctionBase)["apply"]
_REGION = "_checkpoint_without_reentrant_generator"  # what runs before, between and after a region and its forward
_REGION += "_impl" if hasattr(torch.utils.checkpoint, f"{_REGION}_impl") else ""  # from 2.14
_KEEPS_INPUTS = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)  # until 2.11: a region's own function


def device_asked(func: Any, args: Sequence[Any]) -> torch.device | None:
    """Answer a fake tensor's question for its device, more than half of what a dispatch mode sees; None for others."""
    if func is not torch.ops.prim.device.default or not isinstance(args[0], FakeTensor):
        return None
    return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device


def storage_key(tensor: torch.Tensor) -> int:
    """Give a number that is the same for tensors that share a storage, while it lives; also inside of ``vmap``."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return storage_key(torch._C._functorch.get_unwrapped(tensor)) if wrapped else int(tensor.untyped_storage()._cdata)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while; one that ``owner`` only inherits is removed again."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def encoder_decisions(aligned: Callable[..., bool], decided: Callable[..., Any]) -> Iterator[None]:
    """Hear how ``nn.TransformerEncoder`` decides about its fast path.

    Args:
        aligned: Called in the place of the look at a padding mask's values.
        decided: Called where the fast path begins.
    """
    with (
        replaced(torch, "_nested_tensor_from_mask_left_aligned", aligned),
        replaced(torch, "_nested_tensor_from_mask", decided),
        replaced(torch.overrides, "has_torch_function", lambda _: False),
    ):
        yield


def flex_attention_anywhere() -> AbstractContextManager[None]:
    """Let flex attention with a backward run on the CPU: no kernel has it there, fake tensors need none."""
    module = sys.modules.get("torch.nn.attention.flex_attention")
    return replaced(module, "_validate_device", lambda *_: None) if module is not None else nullcontext()


def is_higher_order(func: Any) -> bool:
    """Tell whether an operation takes functions, as flex attention does: it has no schema."""
    return isinstance(func, torch._ops.HigherOrderOperator)


@tried(heard.leaves_distributions_alone)
def unvalidated_distributions() -> AbstractContextManager[None]:
    """Let ``torch.distributions`` take their arguments unseen, unless ``validate_args=True`` asks for a look."""
    return replaced(torch.distributions.Distribution, "_validate_args", False)


@tried(heard.hears_conversions)
def module_conversions(convert: Callable[..., Any]) -> AbstractContextManager[None]:
    """Have ``convert(real, module, function)`` called for ``module.to()``, ``module.half()`` and the like."""
    real = torch.nn.Module._apply

    def apply(module: torch.nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> Any:
        return convert(real, module, function)

    return replaced(torch.nn.Module, "_apply", apply)


@tried(heard.hears_calls)
@contextmanager
def intercepted(
    function: Callable[[type, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any],
    vmap: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
    script: Callable[[Any, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any],
    region: Callable[[bool], None],
) -> Iterator[None]:
    """Hear of the calls that reach torch past every function mode.

    Args:
        function: Called instead of ``autograd.Function.apply`` with the class, its arguments and the real one.
        vmap: Called instead of what ``torch.vmap`` runs, with that and its arguments.
        script: Called instead of a scripted function with it, its arguments and the real call.
        region: Called with True when a non-reentrant ``checkpoint`` region begins, with False when it ends.
    """

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        call = _real_apply.__get__(None, cls)
        return call(*args, **kwargs) if cls is _KEEPS_INPUTS else function(cls, args, kwargs, call)

    def apply_itself(cls: type, *args: Any, **kwargs: Any) -> Any:
        call = _real_apply.__get__(None, cls)
        return call(*args, **kwargs) if functorch_is_active() else function(cls, args, kwargs, call)

    real_vmap = vars(_functorch_apis)["vmap_impl"]

    def vmap_impl(*args: Any, **kwargs: Any) -> Any:
        return vmap(real_vmap, args, kwargs)

    script_class = torch._C.ScriptFunction
    real_call = script_class.__call__

    def script_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return script(self, args, kwargs, real_call)

    real_region = getattr(torch.utils.checkpoint, _REGION)

    def checkpoint_region(*args: Any, **kwargs: Any) -> Iterator[None]:
        inner = real_region(*args, **kwargs)
        region(True)
        with without_functions():  # nothing of the user's runs before the forward
            next(inner)
        try:
            yield
        except BaseException as error:
            region(False)
            inner.throw(error)
            raise
        region(False)
        yield from inner

    with ExitStack() as stack:
        stack.enter_context(replaced(_SingleLevelFunction, "apply", classmethod(apply)))
        if vars(torch.autograd.Function)["apply"] is _real_apply:  # from 2.14: what was Python of the subclass is in C
            stack.enter_context(replaced(torch.autograd.Function, "apply", classmethod(apply_itself)))
        stack.enter_context(replaced(_functorch_apis, "vmap_impl", vmap_impl))
        stack.enter_context(replaced(script_class, "__call__", script_call))
        stack.enter_context(replaced(torch.utils.checkpoint, _REGION, checkpoint_region))
        yield


# --- recipes: fake tensors that are recorded ----------------------------------------------------------------------

FAKE_CANNOT: tuple[type[Exception], ...] = (
    *(DataDependentOutputException, DynamicOutputShapeException, _fake_tensor.UnsupportedOperatorException),
    *(_fake_tensor.UnsupportedFakeTensorException, _fake_tensor.UnsupportedMutationAliasingException),
)
"""What a fake mode raises where a result's shape depends on values, or it has no rule for an operation."""


def forget_conversions(mode: FakeTensorMode) -> None:
    """Let a fake mode forget which fakes it made of which tensors: ``Module.half()`` refuses fakes it remembers."""
    mode.fake_tensor_converter.meta_converter.tensor_memo.clear()


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as its negative, lazily."""
    return torch._neg_view(tensor)


@tried(heard.hears_truncated_normals)
def truncated_normals(record: Callable[..., Any]) -> AbstractContextManager[None]:
    """Have ``record(real, tensor, mean, std, a, b, generator)`` called for ``nn.init.trunc_normal_``."""
    real = torch.nn.init._no_grad_trunc_normal_
    return replaced(torch.nn.init, "_no_grad_trunc_normal_", functools.partial(record, real))


@tried(heard.hears_generators)
def checked_generators(check: Callable[[torch.device], None]) -> AbstractContextManager[None]:
    """Have ``check(device)`` called before a ``torch.Generator`` is made."""
    real = torch.Generator

    class Checked(type):
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            check(torch.device(device))
            return real(device)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    return replaced(torch, "Generator", Checked("Generator", (), {}))


# --- runtime: torch's pipeline stage, split backward, compiled modules, FSDP2 -----------------------------------
# What takes a second to import (torch.distributed.pipelining, torch._dynamo) is imported where it is needed.


class WithoutMetadata:
    """Goes before ``PipelineStage`` among a class's bases: no exchange of shapes before the first step."""

    chunks: int | None

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:  # until 2.11 alone
        return []

    def _warmup_forward_vote(self, has_backward: bool, received_acc: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _prepare_forward_infra(self, num_microbatches: int, *_args: Any, **_kwargs: Any) -> None:
        self.args_recv_info: dict[int, Any] = dict.fromkeys(range(num_microbatches), ())
        self.act_send_info: dict[int, Any] = {}

    def _prepare_backward_infra(self, num_microbatches: int, *_args: Any, **_kwargs: Any) -> None:
        self.chunks = num_microbatches

    def _post_metadata_inference_cleanup(self) -> None:
        pass


def weight_groups(
    roots: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], weights: Iterable[torch.Tensor]
) -> list[tuple[list[Node], list[torch.Tensor], list[Any]]]:
    """Find where the backward of weights leaves that of inputs.

    Args:
        roots: Where the backward starts.
        inputs: What it is to reach first.
        weights: What it is to reach later.

    Returns:
        Groups of the nodes that both go through last, of the weights that are reached from them, and of what keeps the
        nodes: no node and no weight is in two of them. A weight on no common path is in none.
    """
    from torch.distributed.pipelining._backward import construct_reverse_graph, get_param_groups

    def nodes(tensors: Iterable[torch.Tensor]) -> list[Node]:
        return [get_gradient_edge(tensor).node for tensor in tensors]

    weight_of = dict(zip(nodes(listed := list(weights)), listed, strict=True))
    found: list[tuple[dict[Node, None], dict[Node, None]]] = []
    consumers = construct_reverse_graph(nodes(roots))
    for group in get_param_groups(nodes(inputs), list(weight_of), consumers):
        shared, reached = dict.fromkeys(group["intermediates"]), dict.fromkeys(group["params"])
        apart = []
        # Where a weight meets the nodes of several groups, torch adds it, and what they have, to each of them.
        for others, its in found:
            if others.keys().isdisjoint(shared) and its.keys().isdisjoint(reached):
                apart.append((others, its))
            else:
                shared, reached = others | shared, its | reached
        found = [*apart, (shared, reached)]

    def owners(node: Node) -> list[Any]:  # until 2.12 a Python function's object does not keep it; recursion would
        while isinstance(node, torch.autograd.function.BackwardCFunction):
            if own := [edge for edge in map(get_gradient_edge, roots) if edge.node is node]:
                return own
            node = consumers[node][0]
        return [node]

    return [
        (list(shared), [weight_of[node] for node in reached], [owners(node) for node in shared])
        for shared, reached in found
    ]


def norms(tensors: Sequence[torch.Tensor], order: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Give the norms of many tensors in few kernels, computed in ``dtype``."""
    return list(torch._foreach_norm(list(tensors), order, dtype=dtype))


def scale(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply many tensors in place by a scalar on their device, in few kernels."""
    by_kind: dict[tuple[torch.dtype, torch.device, torch.layout], list[torch.Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device, tensor.layout), []).append(tensor)
    for (dtype, _, layout), alike in by_kind.items():
        if layout == torch.strided:
            torch._foreach_mul_(alike, factor.to(torch.float32 if dtype == torch.float32 else factor.dtype))
        else:
            for tensor in alike:
                tensor.mul_(factor)


def found_infinities(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Give what ``unscale_`` found, a number per device: above zero where a gradient is not finite."""
    return list(scaler._per_optimizer_states[id(optimizer)].get("found_inf_per_device", {}).values())


def compiled_in_place(module: torch.nn.Module) -> bool:
    """Tell whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def is_compiled(module: torch.nn.Module) -> bool:
    """Tell whether a module is compiled, in place or as what ``torch.compile(module)`` returns."""
    if compiled_in_place(module):
        return True
    dynamo = sys.modules.get("torch._dynamo")  # not loaded: nothing was compiled
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


@tried(heard.sees_hooks)
def has_accumulation_hooks(parameter: torch.Tensor, *, others: bool = False) -> bool:
    """Tell whether ``register_post_accumulate_grad_hook`` was called on a parameter, or ``register_hook`` (others)."""
    return bool(parameter._post_accumulate_grad_hooks or (others and parameter._backward_hooks))


def default_store() -> Any:
    """Give the key-value store all ranks share."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


@tried(heard.hears_checkpoints)
@contextmanager
def watched_checkpoints(
    called: Callable[[Callable[..., Any], bool], AbstractContextManager[Any] | None],
) -> Iterator[None]:
    """Hear of every call of ``torch.utils.checkpoint``.

    Args:
        called: Gets the checkpointed function and whether the call is reentrant. What it returns is entered around
            every recomputation of a call that is not.
    """
    module = torch.utils.checkpoint
    real_function, real_region = module.CheckpointFunction, getattr(module, _REGION)

    def apply(function: Callable[..., Any], *args: Any) -> Any:
        called(function, True)
        return real_function.apply(function, *args)  # type: ignore[no-untyped-call]

    def surrounded(function: Callable[..., Any], contexts: Any) -> Any:
        around = called(function, False)
        if around is None:
            return contexts
        forward, recompute = contexts()
        both = _Both(around, recompute)
        return lambda: (forward, both)

    def region(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if "context_fn" in options:  # from 2.14: arguments and keyword arguments, then the options by name
            return real_region(
                function, *args, **{**options, "context_fn": surrounded(function, options["context_fn"])}
            )
        preserve, contexts, *rest = args
        return real_region(function, preserve, surrounded(function, contexts), *rest, **options)

    with (
        replaced(module, "CheckpointFunction", SimpleNamespace(apply=apply)),
        replaced(module, _REGION, region),
    ):
        yield


class _Both:
    """Two context managers as one that can be entered again and again."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._managers = outer, inner

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for manager in self._managers:
            self._stack.enter_context(manager)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def leaf_of(node: Any) -> torch.Tensor | None:
    """Give the leaf whose gradient a node of the autograd graph accumulates; None for a node that computes one."""
    leaf = getattr(node, "variable", None)
    return leaf if not node.next_functions and isinstance(leaf, torch.Tensor) else None


def reduce_sharded_gradients(module: Any, on_all: Callable[[list[bool]], list[bool]] | None = None) -> None:
    """Reduce and scatter the gradients that an FSDP2 root and what it wraps have accumulated, now.

    Args:
        module: The root.
        on_all: Given which parameters have a gradient here, tells which have one on some rank: those get zeros here,
            since all ranks must reduce the same ones. None: all ranks have the same.
    """
    from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
    from torch.distributed.fsdp import fully_shard

    api: Any = replicate if isinstance(module, ReplicateModule) else fully_shard
    state = api.state(module)
    groups: list[Any] = []
    for each in state._state_ctx.all_states:  # the one group of each until 2.11
        groups += getattr(each, "_fsdp_param_groups", None) or filter(None, [each._fsdp_param_group])
    if on_all is not None:
        _give_zeros([parameter for group in groups for parameter in group.fsdp_params], on_all)
    for group in groups:
        group.post_backward()
    state._root_post_backward_final_callback()


def _give_zeros(parameters: Sequence[Any], on_all: Callable[[list[bool]], list[bool]]) -> None:
    """Give zeros to the parameters that have no gradient here, and have one on another rank."""
    trained = [each for each in parameters if each.sharded_param.requires_grad]
    whole = [getattr(each, "_unsharded_param", None) for each in trained]  # None: its module has never run
    has_one = [
        each.unsharded_accumulated_grad is not None or (tensor is not None and tensor.grad is not None)
        for each, tensor in zip(trained, whole, strict=True)
    ]
    wanted = on_all(has_one)
    for each, tensor, has, wants in zip(trained, whole, has_one, wanted, strict=True):
        if wants and not has and tensor is not None:
            tensor.grad = torch.zeros_like(tensor)
            each.to_accumulated_grad_if_needed()
