"""What lies between a model's blocks and a number that it returns: found in two recordings, and run on other values.

The second recording is of twice the samples; what changes between the two is what depends on their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxpipe.capture.calls.reads import shape_depends_on_values
from fxpipe.capture.graph.sizes import WIDE, Read, Sizes, Unsuited, Varying, fill, pair, paired
from fxpipe.capture.graph.stand_ins import module_run, rows_made_up
from fxpipe.capture.graph.twins import Twins, spoken
from fxpipe.capture.model.builtin import is_builtin
from fxpipe.capture.model.preserve import random_states
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import function_of, info, is_setting, made_by, reached, sources

COMPARING = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "masked_fill", "masked_fill_", "pad", "where", "fill_"})
ENTROPIES = frozenset({"cross_entropy", "nll_loss"})
_NAN_AWARE = frozenset({"isnan", "isfinite", "nanmean", "nansum", "nanmedian", "nanquantile", "nan_to_num"})
_READ = (
    "Python reads a number from an input, or the number of selected elements from a shape, on the way to the loss; "
    "keep it a tensor (the mask's sum(), no .item())"
)
_NARROWING = frozenset({"float", "half", "bfloat16", "double"})
_ARITHMETIC = frozenset(
    {"mul", "div", "truediv", "add", "sub", "pow", "mul_", "div_", "imul", "itruediv", "true_divide"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """The calls from the blocks to one number.

    Attributes:
        twins: The recordings.
        result: The number.
        nodes: Calls, in order.
        sources: What they are given: inputs, weights, constants, and what the blocks hand out.
        opaque: Those of the sources that come out of the model and have no dimension of samples.
        reads: Nodes whose values Python read, and which say something of the same inputs, with the answer.
        drawn: What random numbers are drawn with outside of blocks (logits, what dropout is given): what is drawn is
            one of the sources, so of these it is seen by themselves whether they couple samples.
        draws: Calls among ``nodes`` that draw what is no source (whole numbers, what has no samples): a batch and its
            microbatches are given the same.
    """

    twins: Twins
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]
    opaque: tuple[fx.Node, ...]
    reads: tuple[tuple[fx.Node, Any], ...]
    drawn: tuple[fx.Node, ...] = ()
    draws: tuple[fx.Node, ...] = ()

    @property
    def steps_over_nan(self) -> bool:
        """Whether calls ask what is a number."""
        return any(spoken(node) in _NAN_AWARE for node in self.nodes)

    def is_by_rows(self, node: fx.Node) -> bool:
        """Whether a layer made a value of rows that values of inputs select."""
        return self.twins.is_selected(node) and is_of_model(self.twins, node)

    def sizes(self) -> list[int]:
        """Give the sizes of what is given, the samples' dimension by what each sample has."""
        found = []
        for node in (*self.sources, *self.nodes):
            shapes = self.twins.growing(node)
            for one, two in zip(*shapes, strict=True) if shapes is not None else ():
                found.append(one if one == two else abs(two - one) // self.twins.samples)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """A call between a summand and the loss that only scales it.

    Attributes:
        node: The call.
        through: The argument that the summand goes through.
        zero: The argument that this one is taken from, another summand: the call then only turns the sign.
    """

    node: fx.Node
    through: fx.Node
    zero: fx.Node | None = None

    @property
    def factors(self) -> list[fx.Node]:
        """The other arguments."""
        return [each for each in self.node.all_input_nodes if each not in (self.through, self.zero)]


@dataclass(frozen=True, slots=True, eq=False)
class Summand:
    """A scalar of the graph, and the calls between it and the loss that only scale it.

    Attributes:
        node: The scalar.
        outer: Those calls, the innermost first.
    """

    node: fx.Node
    outer: tuple[Scaling, ...] = ()


def find_tail(twins: Twins, result: fx.Node, also: Sequence[fx.Node] = ()) -> Tail:
    """Go back from a number to the blocks.

    Args:
        twins: The recordings.
        result: The number.
        also: What else must be computed.

    Raises:
        Unsuited: Python reads a value on the way that the graph cannot follow.
    """
    given: set[fx.Node] = set()
    opaque: set[fx.Node] = set()
    drawn: dict[fx.Node, None] = {}

    def follow(node: fx.Node) -> Sequence[fx.Node]:
        if node.op in ("placeholder", "get_attr"):
            given.add(node)
        elif node is not result and not twins.is_selected(node) and is_handed_out(twins, node):
            given.add(node)
            if twins.sample_dim(node) is None:
                opaque.add(node)
            before = _drawn_with(node)
            drawn.update(dict.fromkeys(before))
            return before
        else:
            return sources(node)
        return ()

    needed = set(reached([result, *also], follow))
    for hook in twins.structure.nodes:  # what it makes of gradients may couple samples
        if is_setting(hook) and hook.args[0] in needed:
            needed.update(reached([hook], follow))
    inputs = {node for node in given if node.op == "placeholder"}
    related = [read for read in twins.reads if inputs_of(read[0]) & inputs or is_read_on_the_way(twins, *read[:2])]
    for read, *_ in related:
        for node in reached([read]):
            needed.add(node)
            if node.op in ("placeholder", "get_attr"):
                given.add(node)
    ordered = [node for node in twins.one.recorder.graph.nodes if node in needed]
    calls = tuple(node for node in ordered if node not in given)
    starts = tuple(node for node in ordered if node in given)
    reads = tuple((node, answer) for node, answer, _ in related)
    draws = _draws_among(calls)
    drawn.update(dict.fromkeys(each for node in draws for each in _drawn_with(node)))
    handed = tuple(node for node in starts if node in opaque)
    tail = Tail(twins, result, calls, starts, handed, reads, tuple(drawn), draws)
    _check_reads(tail, related)
    return tail


def _check_reads(tail: Tail, related: Sequence[tuple[fx.Node, Any, Any]]) -> None:
    """Refuse numbers that Python read and that the graph has as numbers of another form.

    A shape that values decide about says nothing by itself: where Python asked for a size of it, that is a read too.
    """
    followed, others = TailProgram(tail).followed()
    read = [node for node, one, _ in related if not isinstance(one, bool) and node.target is not getattr]
    if any(node not in followed for node in read) or (read and others):
        raise Unsuited(_READ)


def is_read_on_the_way(twins: Twins, node: fx.Node, answer: Any) -> bool:
    """Whether Python reads numbers of what is split, past the model's blocks: what it does with them is not seen."""
    if isinstance(answer, bool) or node.target is getattr or not any(map(twins.is_split, inputs_of(node))):
        return False
    return is_past_blocks(twins.one.recorder.graph, twins.skeleton, node)


def is_past_blocks(graph: fx.Graph, skeleton: Skeleton, node: fx.Node) -> bool:
    """Whether a call comes after the last one of the model's layers."""
    for each in reversed(graph.nodes):
        if each is node:
            return True
        if info(each).block or (each.op == "call_module" and not _is_plain(skeleton, each)):
            return False
    return False


def _is_plain(skeleton: Skeleton, node: fx.Node) -> bool:
    return next(skeleton.module.get_submodule(str(node.target)).parameters(), None) is None


def is_handed_out(twins: Twins, node: fx.Node) -> bool:
    """Whether a value comes out of the model: its weights, random numbers or blocks made it."""
    meta = info(node).tensor
    if meta is None or node in twins.structure.derived or "float" not in meta.dtype:
        return False
    grows = twins.sample_dim(node) is not None
    maker = made_by(node)
    if maker.op == "call_module":
        module = twins.skeleton.module.get_submodule(str(maker.target))
        if next(module.parameters(), None) is None and not _draws(maker):
            return False
        is_criterion = meta.numel == 1 and is_builtin(module)
        return grows or not is_criterion
    known = info(node)
    return grows and (known.position is not None or bool(known.block) or _writes_to_model(twins, node))


def _writes_to_model(twins: Twins, node: fx.Node) -> bool:
    """Whether a call writes to a parameter or buffer: to what outlasts the forward."""
    storages = twins.one.recorder.storages
    return any(each.op == "get_attr" for key in info(node).writes for each in storages[key].aliases)


def is_of_model(twins: Twins, node: fx.Node) -> bool:
    """Whether a layer with weights, or random numbers, made a value."""
    if node.op == "call_module":
        module = twins.skeleton.module.get_submodule(str(node.target))
        return next(module.parameters(), None) is not None or _draws(node)
    return info(node).position is not None


def _draws(node: fx.Node) -> bool:
    frame = info(node).frame
    return frame is not None and bool(frame.drew or frame.inside)


def _draws_among(calls: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Give the calls that draw; none where a mask comes of one: of what it hits rarely a few values do not tell."""
    draws = [node for node in calls if info(node).position is not None and not info(node).writes]
    masks = [node for node in calls if getattr(info(node).tensor, "dtype", "") == "bool"]
    return () if reached(masks).keys() & set(draws) else tuple(draws)


def _drawn_with(node: fx.Node) -> list[fx.Node]:
    """Give the values that a call outside of blocks draws random numbers with; not what it takes a shape of."""
    known = info(node)
    name = spoken(node)
    if known.position is None or known.block or name.endswith("_like"):
        return []
    overwrites = name.endswith("_") and "dropout" not in name
    return [each for each in node.all_input_nodes if not (overwrites and each is node.args[0]) and info(each).tensor]


def inputs_of(node: fx.Node) -> set[fx.Node]:
    """Give the inputs that a value depends on."""
    return {each for each in reached([node]) if each.op == "placeholder"}


@contextmanager
def tried_quietly() -> Iterator[None]:
    """Compute in float64, outside of autocast, and leave random generators and defaults as they are."""
    before = torch.get_default_dtype()
    with (
        random_states(),
        warnings.catch_warnings(),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        warnings.simplefilter("ignore")  # of values that are not the user's own
        torch.set_default_dtype(torch.float64)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@dataclass(slots=True, eq=False)
class TailProgram:
    """The calls of a tail, made ready to be run for any number of samples.

    Args:
        tail: The calls.
        sizes: What numbers become.

    Attributes:
        floats: What the values look like that stand for what layers make: as of ``Kind``.
    """

    tail: Tail
    sizes: Sizes = field(default_factory=lambda: Sizes(1))
    floats: str = "normal"
    _calls: list[tuple[fx.Node, Any, Any]] = field(default_factory=list)
    _selected: set[tuple[int, int]] = field(default_factory=set)
    _answers: dict[Any, fx.Node] = field(default_factory=dict)
    _writes: bool = False

    def __post_init__(self) -> None:
        self._selected = set(self._selected_sizes())
        for node, one, two in self.tail.twins.reads:
            if not isinstance(one, bool) and isinstance(one, int | float):
                self._answers.setdefault((one, two), node)
        self._calls = [(node, *self._prepared(node)) for node in self.tail.nodes]
        self._writes = any(info(node).writes for node in self.tail.nodes)

    def _prepared(self, node: fx.Node) -> tuple[Any, Any]:
        """Give the arguments of a call, numbers that change with the samples marked."""
        other = self.tail.twins.other[node]
        given = pair((node.args, node.kwargs), (other.args, other.kwargs), lambda left, _: left)
        args, kwargs = fill(given, self._followed) if spoken(node) in _ARITHMETIC else given
        return args, kwargs

    def followed(self) -> tuple[set[fx.Node], bool]:
        """Give the reads whose numbers the graph can follow, and whether other numbers of arithmetic vary."""
        leaves: list[Any] = []
        for node, args, kwargs in self._calls:
            if spoken(node) in _ARITHMETIC:
                fill((args, kwargs), leaves.append)
        read = {leaf.node for leaf in leaves if isinstance(leaf, Read)}
        return read, any(isinstance(leaf, Varying) for leaf in leaves)

    def _selected_sizes(self) -> Iterator[tuple[int, int]]:
        """Yield the sizes that depend on values: of what a mask selects."""
        for node in self.tail.nodes:
            shapes = self.tail.twins.growing(node)
            args = tuple(fill(node.args, _stand_in))
            if shapes is not None and args and shape_depends_on_values(f"__{spoken(node)}__", args, None):
                yield from ((one, two) for one, two in zip(*shapes, strict=True))

    def _followed(self, leaf: Any) -> Any:
        """Follow a number of arithmetic to what Python read it from."""
        if isinstance(leaf, bool) or not isinstance(leaf, int | float | Varying):
            return leaf
        numbers = (leaf.first, leaf.second) if isinstance(leaf, Varying) else (leaf, leaf)
        if numbers in self._answers:
            return Read(self._answers[numbers])
        if isinstance(leaf, Varying) and numbers in self._selected:
            raise Unsuited("it takes the number of selected elements from a shape; use the mask's sum()")
        return leaf

    def run(
        self, values: Mapping[fx.Node, Any], samples: int, drawn: Mapping[fx.Node, Any] | None = None
    ) -> dict[fx.Node, Any]:
        """Run the calls.

        Args:
            values: Of the sources.
            samples: Their number.
            drawn: What calls that draw give; others draw.

        Returns:
            The value of every node.

        Raises:
            Unsuited: A shape is another than expected: sizes that were renamed have more than one meaning.
        """
        env = {node: value.clone() if _is_leaf(value) or self._writes else value for node, value in values.items()}
        twins, known = self.tail.twins, drawn or {}
        data_dependent: set[fx.Node] = set()
        for node, args, kwargs in self._calls:
            context = info(node).context
            quiet = context is not None and context.grad_enabled is False
            with torch.set_grad_enabled(not quiet):
                env[node] = known[node] if node in known else self.call(node, args, kwargs, env, samples)
            moved = data_dependent.intersection(node.all_input_nodes)
            shapes = twins.growing(node)
            value = env[node]
            fits = shapes is None or moved or tuple(value.shape) == self.sizes.shape(*shapes, samples)
            if not isinstance(value, torch.Tensor) or not fits:
                stands = fill(node.args, lambda leaf: env.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf)
                names = (spoken(node), f"__{spoken(node)}__")
                if any(shape_depends_on_values(name, tuple(stands), None) for name in names):
                    moved = {node}
                elif not fits:
                    raise Unsuited(f"{spoken(node)} cannot be run on fewer samples or classes")
            if moved and (not isinstance(value, torch.Tensor) or value.dim()):
                data_dependent.add(node)
        return env

    def again(
        self, env: Mapping[fx.Node, Any], instead: Mapping[fx.Node, Any], calls: Sequence[fx.Node], samples: int
    ) -> torch.Tensor:
        """Make the last calls again with other values for some before them, and give what the last one makes."""
        values = {**env, **{node: value.expand(env[node].shape) for node, value in instead.items()}}
        for node in calls:
            values[node] = self.scaled(node, {}, values, samples).detach()
        found: torch.Tensor = values[calls[-1]]
        return found

    def scaled(
        self, node: fx.Node, instead: Mapping[Any, Any], env: Mapping[fx.Node, Any], samples: int
    ) -> torch.Tensor:
        """Make a call that only scales, with other values in the place of arguments."""
        found: torch.Tensor = self.call(node, *self._prepared(node), {**env, **instead}, samples)
        return found

    def call(self, node: fx.Node, args: Any, kwargs: Any, env: Mapping[fx.Node, Any], samples: int) -> Any:
        """Make one call with the values that nodes have."""
        name = spoken(node)
        compares = name in COMPARING or name in ENTROPIES

        def give(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return env[leaf]
            if isinstance(leaf, Read):
                if leaf.node not in env:  # of an input that the loss is not computed of
                    raise Unsuited(_READ)
                return env[leaf.node]
            if isinstance(leaf, torch.dtype):
                return torch.float64 if leaf in WIDE else leaf
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            if compares and isinstance(leaf, int) and not isinstance(leaf, bool):
                return self.sizes.identify(leaf)
            if isinstance(leaf, int | float | Varying):
                return self.sizes.at(leaf, samples)
            return leaf

        args, kwargs = fill((args, kwargs), give)
        if self.tail.is_by_rows(node):
            twins = self.tail.twins
            size = lambda one, two: int(self.sizes.at(paired(one, two), samples))  # noqa: E731
            return rows_made_up(node, twins.rows, env, twins.growing(node), size, self.floats)
        if node.op == "call_module":
            return module_run(self.tail.twins.skeleton, str(node.target), args, kwargs, self.sizes.rename)
        if node.op == "call_method" and name in _NARROWING:
            return args[0].double()
        return function_of(node)(*args, **kwargs)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _stand_in(leaf: Any) -> Any:
    """Give a tensor of a node's dtype, where only that is looked at."""
    meta = info(leaf).tensor if isinstance(leaf, fx.Node) else None
    if meta is None:
        return leaf
    return torch.empty(0, dtype=getattr(torch, meta.dtype))
