"""Whether torch still calls what fxpipe puts in its place: each private hook is tried, on a tiny thing, at first use.

A hook that torch stops calling fails silently, with wrong numbers much later; a trial takes milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar, cast

import torch
import torch.utils.checkpoint
from torch.utils.checkpoint import checkpoint

from fxpipe.errors import TorchVersionError

TESTED = ("2.11.0", "2.13.0", "2.14.1")
"""The versions of torch that all tests pass on; another one is taken with a warning."""

Hook = TypeVar("Hook", bound=Callable[..., Any])
Modes = Callable[[], AbstractContextManager[Any]]


def tried(hook: Hook, trial: Callable[[Hook], bool], apart: Modes = contextlib.nullcontext) -> Hook:
    """Try a hook before its first use.

    Args:
        hook: What is put in torch's place, or asks for what torch does not publish.
        trial: Gets the hook; gives whether torch called what it should.
        apart: Where the trial runs: away from the caller's modes.

    Returns:
        The hook; its first use raises a ``TorchVersionError`` where torch did not call it, or has nothing under a name
        that it needs.
    """
    heard = False

    @functools.wraps(hook)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal heard
        if not heard:
            check_version()
            expect(hook.__name__, functools.partial(trial, hook), apart)
            heard = True
        return hook(*args, **kwargs)

    return cast(Hook, checked)


def expect(name: str, trial: Callable[[], bool], apart: Modes = contextlib.nullcontext) -> None:
    """Raise unless a trial says yes.

    Raises:
        TorchVersionError: It says no, or torch has nothing under a name that it needs.
    """
    cause: Exception | None = None
    with ExitStack() as stack:
        for manager in (
            *(apart(), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)),
            *(torch.device("cpu"), warnings.catch_warnings()),
        ):
            stack.enter_context(manager)
        warnings.simplefilter("ignore")
        try:
            well = trial()
        except (AttributeError, ImportError, KeyError, TypeError) as error:
            well, cause = False, error
    if not well:
        raise TorchVersionError(
            f"torch {torch.__version__} does not do what fxpipe's {name}() relies on\n"
            f"  install a version that was tested: torch {' or '.join(TESTED)}"
        ) from cause


@functools.cache
def check_version() -> None:
    """Warn, once, where not all tests were run on this torch."""
    version = torch.__version__.partition("+")[0]
    if version not in TESTED:
        warnings.warn(
            f"fxpipe was not tested with torch {version}, but with {' and '.join(TESTED)}; "
            "before you rely on a result, call pipe.verify()",
            stacklevel=2,
        )


# --- the trials: what torch must do, seen on the least that shows it ---------------------------------------------


class _Tiny(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def hears_calls(hook: Callable[..., AbstractContextManager[None]]) -> bool:
    """Try ``intercepted``: a custom function, ``vmap``, a scripted function, checkpointed regions, in this order."""
    said: list[Any] = []

    def function(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], real: Callable[..., Any]) -> Any:
        said.append(cls)
        return real(*args, **kwargs)

    def vmap(real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        said.append("vmap")
        return real(*args, **kwargs)

    def script(scripted: Any, args: tuple[Any, ...], kwargs: dict[str, Any], real: Callable[..., Any]) -> Any:
        said.append("script")
        return args[0]

    scripted = torch.jit.CompilationUnit("def same(x):\n    return x\n").same
    x = torch.ones(1, requires_grad=True)
    with hook(function, vmap, script, said.append):
        _Tiny.apply(x)  # type: ignore[no-untyped-call]
        torch.vmap(torch.neg)(x)
        scripted(x)
        checkpoint(torch.neg, x, use_reentrant=False)
        with contextlib.suppress(ZeroDivisionError):
            checkpoint(lambda x: x / (1 // 0), x, use_reentrant=False)
    return said == [_Tiny, "vmap", "script", True, False, True, False]


def hears_checkpoints(hook: Callable[..., AbstractContextManager[None]]) -> bool:
    """Try ``watched_checkpoints``: a call of either kind, and the recomputation of the one that is recomputed."""
    said: list[Any] = []

    @contextlib.contextmanager
    def around() -> Any:
        said.append("again")
        yield

    def called(function: Callable[..., Any], reentrant: bool) -> Any:
        said.append((function, reentrant))
        return None if reentrant else _Anew(around)

    x = torch.ones(1, requires_grad=True)
    with hook(called):
        checkpoint(torch.sin, x, use_reentrant=True)
        y = checkpoint(torch.cos, x, use_reentrant=False)
    y.sum().backward()
    return said == [(torch.sin, True), (torch.cos, False), "again"]


class _Anew:
    """A context manager that can be entered again and again."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._now = self._make()
        self._now.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._now.__exit__(*error)


def hears_conversions(hook: Callable[..., AbstractContextManager[None]]) -> bool:
    """Try ``module_conversions``: a module asked for another precision."""
    said, module = [], torch.nn.Module()
    with hook(lambda real, module, function: said.append(module)):
        module.half()
    return said == [module]


def leaves_distributions_alone(hook: Callable[..., AbstractContextManager[None]]) -> bool:
    """Try ``unvalidated_distributions``: one with arguments that are none."""
    distribution = torch.distributions.Distribution
    before = bool(vars(distribution)["_validate_args"])
    distribution.set_default_validate_args(True)  # torch.compile switches it off for good
    try:
        with hook():
            torch.distributions.Normal(torch.zeros(1), -torch.ones(1))
    except ValueError:
        return False
    finally:
        distribution.set_default_validate_args(before)
    return True


def hears_truncated_normals(hook: Callable[..., AbstractContextManager[None]]) -> bool:
    """Try ``truncated_normals``: one tensor to be filled."""
    said, tensor = [], torch.zeros(1)
    with hook(lambda real, filled, *rest, **named: said.append(filled)):
        torch.nn.init.trunc_normal_(tensor)
    return said == [tensor]


def hears_generators(hook: Callable[..., AbstractContextManager[None]]) -> bool:
    """Try ``checked_generators``: a generator is made."""
    said: list[torch.device] = []
    with hook(said.append):
        torch.Generator()
    return said == [torch.device("cpu")]


def splits_backward(for_inputs: Callable[..., Any], for_weights: Callable[..., Any]) -> bool:
    """Try the two halves of a backward: first no weight has a gradient, then all is as after a whole backward."""
    x, weights = torch.full((2, 2), 3.0, requires_grad=True), [torch.full((2, 2), 2.0, requires_grad=True)]
    y = x @ weights[0]
    given, groups = for_inputs([y], [torch.ones(2, 2)], [x], weights)
    early = weights[0].grad
    for_weights(groups)
    late = weights[0].grad
    return early is None and bool((given[0] == 4).all()) and late is not None and bool((late == 6).all())


def sees_hooks(hook: Callable[[torch.Tensor], bool]) -> bool:
    """Try ``has_accumulation_hooks``: a parameter before and after it has one."""
    parameter = torch.nn.Parameter(torch.ones(1))
    before = hook(parameter)
    parameter.register_post_accumulate_grad_hook(lambda parameter: None)  # type: ignore[no-untyped-call]
    return not before and hook(parameter)
