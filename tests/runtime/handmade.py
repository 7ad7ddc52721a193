"""Programs made by hand: small models cut into stages without capture, and the plain models to compare them with."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor, LossTerm, Program, RunInfo, StageProgram, run_info, set_run_info
from fxpipe.runtime.build.stage import StageParts, build_stages
from fxpipe.runtime.run.work import Job


class Draft:
    """An FX graph of a whole model, written call by call while it runs on an example; each call names its stage."""

    def __init__(self, model: nn.Module, num_stages: int, **inputs: Any) -> None:
        self.model = model
        self.num_stages = num_stages
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[str, Any] = {}
        self.draw_names: tuple[str, ...] = ()
        self.drawing: dict[str, Any] = {}
        for name, value in inputs.items():
            setattr(self, name, self._added(self.graph.placeholder(name), value))

    def _added(self, node: fx.Node, value: Any, stage: int | None = None, **meta: Any) -> fx.Node:
        self.values[node] = value
        set_run_info(node, RunInfo(**meta))
        if stage is not None:
            node.meta["stage"] = stage
        return node

    def _example(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.values[node])

    def attribute(self, fqn: str) -> fx.Node:
        owner, _, name = fqn.rpartition(".")
        return self._added(self.graph.get_attr(fqn), getattr(self.model.get_submodule(owner), name))

    def constant(self, name: str, value: Any) -> fx.Node:
        self.constants[name] = value
        return self._added(self.graph.create_node("get_attr", name), value)

    def module(self, stage: int, fqn: str, *args: Any, **meta: Any) -> fx.Node:
        value = self.model.get_submodule(fqn)(*self._example(args))
        return self._added(self.graph.create_node("call_module", fqn, args), value, stage, **meta)

    def call(self, stage: int, function: Any, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any) -> fx.Node:
        value = function(*self._example(args), **self._example(kwargs))
        return self._added(self.graph.call_function(function, args, kwargs), value, stage, **(meta or {}))

    def method(self, stage: int, name: str, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any) -> fx.Node:
        receiver, *rest = self._example(args)
        value = getattr(receiver, name)(*rest, **self._example(kwargs))
        return self._added(self.graph.call_method(name, args, kwargs), value, stage, **(meta or {}))

    def program(self, outputs: list[fx.Node] = (), loss: list[tuple[fx.Node, str]] = ()) -> Program:
        results = [*outputs, *(node for node, _ in loss)]
        last = {node: max([user.meta["stage"] for user in node.users], default=-1) for node in self.graph.nodes}
        last.update(dict.fromkeys(results, self.num_stages))
        stages = tuple(self._stage(index, last, results) for index in range(self.num_stages))
        return Program(
            stages=stages,
            outputs=tuple(node.name for node in outputs),
            rebuild=lambda flat: flat[0] if len(flat) == 1 else flat,
            loss_terms=tuple(LossTerm(node.name, kind) for node, kind in loss),
            constants=self.constants,
            drawing=self.drawing,
            draw_names=self.draw_names,
        )

    def _crossing(self, boundary: int, last: dict[fx.Node, int]) -> list[fx.Node]:
        return [n for n in self.graph.nodes if "stage" in n.meta and n.meta["stage"] <= boundary < last[n]]

    def _stage(self, index: int, last: dict[fx.Node, int], results: list[fx.Node]) -> StageProgram:
        received = self._crossing(index - 1, last) if index else []
        is_last = index == self.num_stages - 1
        sent = results if is_last else self._crossing(index, last)
        own = [node for node in self.graph.nodes if node.meta.get("stage") == index]
        read = {source for node in own for source in node.all_input_nodes}
        graph, copies = fx.Graph(), {}
        for node in received:
            copies[node] = graph.create_node("placeholder", node.name, name=node.name)
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and node in read]
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
        for node in self.graph.nodes:
            if node in own or (node.op == "get_attr" and node in read):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in sent))
        attributes = [str(node.target) for node in self.graph.nodes if node.op == "get_attr" and node in read]
        return StageProgram(
            stage_index=index,
            graph=graph,
            received=tuple(map(self._boundary, received)),
            sent=() if is_last else tuple(map(self._boundary, sent)),
            inputs=tuple(node.name for node in inputs),
            modules=tuple(dict.fromkeys(str(node.target) for node in own if node.op == "call_module")),
            attributes=tuple(name for name in attributes if name not in self.constants),
            constants=tuple(name for name in attributes if name in self.constants),
            draws=any(run_info(node).draws for node in own),
        )

    def _boundary(self, node: fx.Node) -> BoundaryTensor:
        value = self.values[node]
        meta = TensorMeta(tuple(value.shape), str(value.dtype).removeprefix("torch."), value.requires_grad)
        dense = not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
        return BoundaryTensor(node.name, meta, tuple(value.stride()) if dense else ())


@dataclasses.dataclass
class Case:
    """A model, how it is cut, and its plain loss on a batch."""

    model: nn.Module
    batch: dict[str, Any]
    draft: Any  # (model, num_stages, inputs) -> Program with a loss
    loss: Any  # (model, inputs) -> list of loss terms, by the model's own code
    rows: Any = None  # (inputs) -> weight of a microbatch
    programs: dict[Any, Program] = dataclasses.field(default_factory=dict)

    def program(self, key: Any, num_stages: int, part: dict[str, Any]) -> Program:
        """Draft a variant, once."""
        if key not in self.programs:
            self.programs[key] = self.draft(copy.deepcopy(self.model), num_stages, part)
        return self.programs[key]


def stages_of(case_model: nn.Module, program: Program, indices: Any = None, device: str = "cpu") -> list[Any]:
    """Build stage modules with a copy of the model's values; stages share what they both hold."""
    model = copy.deepcopy(case_model)
    named = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    aliases = {fqn: first.setdefault(id(tensor), fqn) for fqn, tensor in named}
    parts = [
        StageParts(stage.stage_index, stage.modules, stage.attributes)
        for stage in program.stages
        if indices is None or stage.stage_index in indices
    ]
    values = {fqn: tensor.detach().clone().to(device) for fqn, tensor in named if aliases[fqn] == fqn}
    return build_stages(model, parts, values, aliases, torch.device(device))


def split(batch: dict[str, Any], num: int) -> list[dict[str, Any]]:
    return [{name: value.chunk(num)[index] for name, value in batch.items()} for index in range(num)]


def jobs_of(
    case: Case, stages: list[Any], num_stages: int, num: int, *, seed: int = 0, device: str = "cpu"
) -> list[Job]:
    """Cut the case's batch into jobs and make their programs known to the stages."""
    parts = split(case.batch, num)
    weights = [case.rows(part) if case.rows else 1.0 for part in parts]
    jobs = []
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        key = (num_stages, tuple(tuple(value.shape) for value in part.values()))
        program = case.program(key, num_stages, part)
        for stage in stages:
            stage.add_program(key, program)
        share = weight / math.fsum(weights)
        part = {name: value.to(device) for name, value in part.items()}
        jobs.append(Job(key, program, part, (share,) * len(program.loss_terms), seed + index))
    return jobs


def reference(case: Case, num: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the plain model, microbatch by microbatch."""
    model = copy.deepcopy(case.model)
    parts = split(case.batch, num)
    weights = [case.rows(part) if case.rows else 1.0 for part in parts]
    total = torch.zeros((), dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        share = weight / math.fsum(weights)
        if share:
            loss = sum(case.loss(model, part)) * share
            total += loss.detach()
            if loss.requires_grad:
                loss.backward()
    return total, {fqn: p.grad for fqn, p in model.named_parameters() if p.grad is not None}


def gradients_of(stages: list[Any]) -> dict[str, torch.Tensor]:
    return {fqn: p.grad for stage in stages for fqn, p in stage.named_parameters() if p.grad is not None}


# --- models ---


class Chain(nn.Module):
    """Eight layers in a row."""

    def __init__(self, width: int = 6, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def chain(rows: int = 24) -> Case:
    torch.manual_seed(0)
    model = Chain()

    def draft(model: Chain, num_stages: int, inputs: dict[str, Any]) -> Program:
        made = Draft(model, num_stages, **inputs)
        x = made.x
        for index in range(8):
            x = made.module(index * num_stages // 8, f"layers.{index}", x)
        loss = made.call(num_stages - 1, F.mse_loss, x, made.target)
        return made.program(loss=[(loss, "samples")])

    return Case(
        model,
        {"x": torch.randn(rows, 6), "target": torch.randn(rows, 6)},
        draft,
        lambda model, part: [F.mse_loss(model(part["x"]), part["target"])],
        lambda part: float(len(part["x"])),
    )


class Knot(nn.Module):
    """Everything at once: a tied embedding and head, skips, a late second input, and odd tensors at every boundary."""

    def __init__(self, width: int = 8, vocabulary: int = 11) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(8))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        mask = ids > 2  # boolean, crosses stages
        x = self.wte(ids)
        first = x
        skip = None
        for index, block in enumerate(self.blocks):
            x = torch.relu_(block(x)) + self.wpe(ids)[:, : x.shape[1]] * 0.1
            x = x.transpose(1, 2).reshape(x.shape[0], -1).view(x.shape[0], x.shape[2], -1).transpose(1, 2)
            if index == 1:
                skip = x
            if index == 5:
                x = x + skip.masked_fill(mask.unsqueeze(-1), 0.5)
            if index == 6:
                x = x + first * gain.unsqueeze(-1)
        return self.head(x * self.scale)


def knot(rows: int = 24) -> Case:
    torch.manual_seed(1)
    model = Knot()

    def draft(model: Knot, num_stages: int, inputs: dict[str, Any]) -> Program:
        made = Draft(model, num_stages, **inputs)
        mask = made.call(0, torch.gt, made.ids, 2)
        first = x = made.module(0, "wte", made.ids)
        skip = None
        for index in range(8):
            stage = index * num_stages // 8
            x = made.call(stage, torch.relu_, made.module(stage, f"blocks.{index}", x))
            position = made.module(stage, "wpe", made.ids)
            position = made.call(stage, torch.mul, position, made.constant("tenth", torch.tensor(0.1)))
            x = made.call(stage, torch.add, x, position)
            rows, width = len(inputs["ids"]), 8
            x = made.method(stage, "reshape", made.method(stage, "transpose", x, 1, 2), rows, -1)
            x = made.method(stage, "transpose", made.method(stage, "view", x, rows, width, -1), 1, 2)  # a view
            if index == 1:
                skip = x
            if index == 5:
                wide = made.method(stage, "unsqueeze", mask, -1)
                x = made.call(stage, torch.add, x, made.call(stage, torch.masked_fill, skip, wide, 0.5))
            if index == 6:
                gain = made.method(stage, "unsqueeze", made.gain, -1)
                x = made.call(stage, torch.add, x, made.call(stage, torch.mul, first, gain))
        last = num_stages - 1
        x = made.call(last, torch.mul, x, made.attribute("scale"))
        logits = made.call(last, F.linear, x, made.attribute("head.weight"))
        flat, labels = made.method(last, "flatten", logits, 0, 1), made.method(last, "flatten", made.labels)
        loss = made.call(last, F.cross_entropy, flat, labels, ignore_index=-100)
        return made.program(loss=[(loss, "tokens")])

    ids = torch.randint(0, 11, (rows, 5))
    labels = torch.randint(0, 11, (rows, 5)).masked_fill(torch.rand(rows, 5) < 0.4, -100)
    labels[: rows // 3] = -100  # whole microbatches without a valid target
    return Case(
        model,
        {"ids": ids, "gain": torch.rand(rows, 5), "labels": labels},
        draft,
        lambda model, part: [
            F.cross_entropy(model(part["ids"], part["gain"]).flatten(0, 1), part["labels"].flatten(), ignore_index=-100)
        ],
        lambda part: float((part["labels"] != -100).sum()),
    )


class Image(nn.Module):
    """Channels-last convolutions whose first half is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8))
        self.convolutions.to(memory_format=torch.channels_last)
        for convolution in self.convolutions[:4]:
            convolution.requires_grad_(False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.contiguous(memory_format=torch.channels_last)
        for convolution in self.convolutions:
            x = torch.tanh(convolution(x))
        return x


def image(rows: int = 24) -> Case:
    torch.manual_seed(2)
    model = Image()

    def draft(model: Image, num_stages: int, inputs: dict[str, Any]) -> Program:
        made = Draft(model, num_stages, **inputs)
        x = made.method(0, "contiguous", made.image, memory_format=torch.channels_last)
        for index in range(8):
            stage = index * num_stages // 8
            x = made.call(stage, torch.tanh, made.module(stage, f"convolutions.{index}", x))
        square = made.call(num_stages - 1, torch.square, x)
        loss = made.call(num_stages - 1, torch.sum, square)
        return made.program(loss=[(loss, "sum")])

    return Case(
        model,
        {"image": torch.randn(rows, 3, 4, 4)},
        draft,
        lambda model, part: [torch.square(model(part["image"])).sum()],
        lambda part: 1.0,
    )
