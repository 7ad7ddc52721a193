"""Layer graphs made by hand: what capture would find in models of known shape."""

from __future__ import annotations

import math
from functools import cache

from fxpipe.ir.cost import LayerCounts, OpCount
from fxpipe.ir.graph import LayerGraph, SavedTensor, Tie, Value
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.spec import LayerSpec, TensorInfo
from fxpipe.ir.tensor import TensorMeta, dtype_bytes
from fxpipe.planning.costs.estimate import estimate_costs
from fxpipe.planning.settings import Settings


class Builder:
    """Adds layers one by one; a layer's output is called by the layer's name."""

    def __init__(self, name, dtype="float32", batch_size=1):
        self.name, self.dtype, self.batch_size = name, dtype, batch_size
        self.specs, self.blocks, self.counts = [], [], []
        self.edges, self.free_edges, self.recomputed, self.groups = {}, {}, [], []
        self.made, self.readers, self.savers, self.calls = {}, {}, {}, {}
        self.users, self.ties = {}, []

    def layer(
        self,
        name,
        reads=(),
        shape=(),
        weights=(),
        *,
        flops=0,
        ops=1,
        saves=(),
        saved_bytes=0,
        gradient_bytes=0,
        block="",
        free=False,
        grad=True,
        uncounted=(),
    ):
        """Add a layer; ``weights`` are ``(attribute, shape)`` or whole FQNs of tied ones, ``saves`` names of values."""
        call = self.calls.get(name, -1) + 1
        self.calls[name] = call
        index = len(self.specs)
        infos = tuple(
            TensorInfo(
                attr if "." in attr else f"{name}.{attr}",
                size,
                self.dtype,
                math.prod(size) * dtype_bytes(self.dtype),
                trainable=True,
            )
            for attr, size in weights
        )
        self.specs.append(LayerSpec.captured(name, "torch.nn:Module", call=call, parameters=infos))
        self.blocks.append(block)
        for info in infos:
            self.users.setdefault(info.fqn, []).append(index)
        label = f"{name}@{call}" if call else name
        for read in reads:
            producer = self.made[read][0]
            (self.free_edges if producer in self.recomputed else self.edges)[producer, index] = None
            self.readers.setdefault(read, []).append(index)
        for saved in saves:
            self.savers.setdefault(label if saved == "self" else saved, []).append(index)
        meta = TensorMeta(tuple(shape), self.dtype, grad and not free)
        self.made[label] = index, meta
        if free:
            self.recomputed.append(index)
        moved = meta.nbytes + sum(self.made[read][1].nbytes for read in reads)
        held = sum(info.nbytes for info in infos)
        self.counts.append(
            counts(
                self.dtype, flops, moved, held, ops, saved_bytes, gradient_bytes, bool(infos), grad, tuple(uncounted)
            )
        )
        return label

    def tie(self, *fqns):
        """Make several names one tensor."""
        layers = tuple(sorted(layer for fqn in fqns for layer in self.users[fqn]))
        infos = {info.fqn: info for layer in layers for info in self.specs[layer].parameters}
        self.ties.append(Tie(fqns[0], fqns, layers, infos[fqns[0]].nbytes))

    def graph(self, **more):
        tied = {fqn for tie in self.ties for fqn in tie.fqns}
        for fqn, layers in self.users.items():
            if len(layers) > 1 and fqn not in tied:
                self.tie(fqn)
        last = len(self.specs) - 1
        values = tuple(
            Value(name, producer, tuple(self.readers.get(name, ())) or (last,), meta)
            for name, (producer, meta) in self.made.items()
            if producer not in self.recomputed and (self.readers.get(name) or producer != last)
        )
        saved = tuple(SavedTensor(name, self.made[name][1], tuple(by)) for name, by in self.savers.items())
        return LayerGraph(
            name=self.name,
            specs=tuple(self.specs),
            values=values,
            edges=tuple(sorted(self.edges)),
            free_edges=tuple(sorted(self.free_edges)),
            recomputed=tuple(self.recomputed),
            groups=tuple(self.groups),
            blocks=tuple(self.blocks),
            ties=tuple(self.ties),
            counts=tuple(self.counts),
            batch_size=self.batch_size,
            saved=saved,
            **more,
        )


@cache
def counts(dtype, flops, moved, held, ops, saved_bytes, gradient_bytes, has_weights, grad, uncounted):
    """Count a layer as ``ops`` operations forward, as many for its input, and as many for its weights if it has any."""
    phases = ["forward"] + ["input_grad"] * grad + ["weight_grad"] * (grad and has_weights)
    return LayerCounts(
        tuple(
            OpCount("mm" if flops else "add", phase, flops // ops, (moved + held) // ops, dtype)
            for phase in phases
            for _ in range(ops)
        ),
        saved_bytes,
        uncounted=uncounted,
        gradient_bytes=gradient_bytes,
    )


def gpt(blocks=4, hidden=64, vocab=512, tokens=32, *, dtype="float32", tied=True, whole=False):
    """GPT-2's shape; ``whole`` for block grain."""
    build = Builder("GPT", dtype)
    stream, wide = (1, tokens, hidden), (1, tokens, 4 * hidden)
    linear = 2 * tokens * hidden * hidden
    x = build.layer("wte", (), stream, [("weight", (vocab, hidden))])
    mask = build.layer("mask", (), (tokens, tokens), free=True)
    for index in range(blocks):
        name = f"h.{index}"
        if whole:
            weights = [("qkv", (3 * hidden, hidden)), ("proj", (hidden, hidden))]
            weights += [("fc", (4 * hidden, hidden)), ("out", (hidden, 4 * hidden))]
            kept = 16 * tokens * hidden * dtype_bytes(dtype)
            x = build.layer(
                name, [x, mask], stream, weights, flops=12 * linear, ops=6, saves=[x], saved_bytes=kept, block=name
            )
            continue
        part = lambda *args, block=name, **more: build.layer(f"{block}.{args[0]}", *args[1:], block=block, **more)  # noqa: E731
        ln = part("ln_1", [x], stream, [("weight", (hidden,))], saves=[x])
        heads = (1, tokens, 3 * hidden)
        qkv = part("qkv", [ln], heads, [("weight", (3 * hidden, hidden))], flops=3 * linear, saves=[ln])
        scores = 4 * tokens * tokens * hidden
        att = part("sdpa", [qkv, mask], stream, flops=scores, saves=[qkv, "self", mask], saved_bytes=4 * tokens)
        out = part("proj", [att], stream, [("weight", (hidden, hidden))], flops=linear, saves=[att])
        mid = part("add", [x, out], stream)
        ln = part("ln_2", [mid], stream, [("weight", (hidden,))], saves=[mid])
        up = part("fc", [ln], wide, [("weight", (4 * hidden, hidden))], flops=4 * linear, saves=[ln])
        act = part("gelu", [up], wide, saves=[up])
        down = part("out", [act], stream, [("weight", (hidden, 4 * hidden))], flops=4 * linear, saves=[act])
        x = part("add_1", [mid, down], stream)
    x = build.layer("ln_f", [x], stream, [("weight", (hidden,))], saves=[x])
    head = 2 * tokens * hidden * vocab
    logits = build.layer("lm_head", [x], (1, tokens, vocab), [("weight", (vocab, hidden))], flops=head, saves=[x])
    build.layer("loss", [logits], (), saves=[logits], saved_bytes=4 * tokens * vocab)
    if tied:
        build.tie("wte.weight", "lm_head.weight")
    return build.graph()


def llama(blocks=126, hidden=16_384, vocab=128_256, tokens=4_096, inner=53_248, kv=1_024, dtype="bfloat16"):
    """Llama's shape at op grain, rotary tables recomputed; the defaults are those of the 405-billion-parameter one."""
    build = Builder("Llama", dtype)
    stream = (1, tokens, hidden)
    x = build.layer("embed_tokens", (), stream, [("weight", (vocab, hidden))])
    cos = build.layer("rotary.cos", (), (1, tokens, 128), free=True)
    sin = build.layer("rotary.sin", (), (1, tokens, 128), free=True)
    for index in range(blocks):
        block = f"layers.{index}"

        def add(name, reads, width, weights=(), flops=0, saves=(), block=block):
            shape = (1, tokens, width)
            return build.layer(f"{block}.{name}", reads, shape, weights, flops=flops, saves=saves, block=block)

        def linear(name, source, width, into, add=add):
            weights = [("weight", (into, width))]
            return add(name, [source], into, weights, flops=2 * tokens * width * into, saves=[source])

        def norm(name, source, add=add):
            square = add(f"{name}.pow", [source], hidden, saves=[source])
            mean = add(f"{name}.mean", [square], 1)
            root = add(f"{name}.rsqrt", [mean], 1, saves=["self"])
            scaled = add(f"{name}.mul", [source, root], hidden, saves=[source, root])
            return add(name, [scaled], hidden, [("weight", (hidden,))], saves=[scaled])

        def rotate(name, source, width, add=add):
            half = add(f"{name}.half", [source], width)
            one = add(f"{name}.mul", [source, cos], width, saves=[cos])
            two = add(f"{name}.mul_1", [half, sin], width, saves=[sin])
            return add(f"{name}.add", [one, two], width)

        ln = norm("input_layernorm", x)
        q = linear("self_attn.q_proj", ln, hidden, hidden)
        k = linear("self_attn.k_proj", ln, hidden, kv)
        v = linear("self_attn.v_proj", ln, hidden, kv)
        q, k = rotate("self_attn.q", q, hidden), rotate("self_attn.k", k, kv)
        views = [add(f"self_attn.{name}_view", [part], width) for name, part, width in (("q", q, hidden), ("k", k, kv))]
        scores = 4 * tokens * tokens * hidden
        att = add("self_attn.sdpa", [*views, v], hidden, flops=scores, saves=[*views, v, "self"])
        att = add("self_attn.reshape", [att], hidden)
        out = linear("self_attn.o_proj", att, hidden, hidden)
        mid = add("add", [x, out], hidden)
        ln = norm("post_attention_layernorm", mid)
        gate = linear("mlp.gate_proj", ln, hidden, inner)
        up = linear("mlp.up_proj", ln, hidden, inner)
        act = add("mlp.act_fn", [gate], inner, saves=[gate])
        both = add("mlp.mul", [act, up], inner, saves=[act, up])
        down = linear("mlp.down_proj", both, inner, hidden)
        x = add("add_1", [mid, down], hidden)
    x = build.layer("norm", [x], stream, [("weight", (hidden,))], saves=[x])
    head = 2 * tokens * hidden * vocab
    logits = build.layer("lm_head", [x], (1, tokens, vocab), [("weight", (vocab, hidden))], flops=head, saves=[x])
    build.layer("loss", [logits], (), saves=[logits], saved_bytes=4 * tokens * vocab)
    return build.graph()


def unet(depth=4, width=16, size=64):
    """Down and up again, with a skip at every level."""
    build = Builder("UNet")
    channels, x = width, ""
    skips = []

    def conv(name, reads, cin, cout, side):
        flops = 2 * 9 * cin * cout * side * side
        weights = [("weight", (cout, cin, 3, 3))]
        return build.layer(name, reads, (1, cout, side, side), weights, flops=flops, saves=reads)

    x = conv("stem", [], 3, width, size)
    for level in range(depth):
        x = conv(f"down.{level}", [x], channels, 2 * channels, size >> level)
        skips.append(x)
        x = build.layer(f"pool.{level}", [x], (1, 2 * channels, size >> level + 1, size >> level + 1))
        channels *= 2
    x = conv("middle", [x], channels, channels, size >> depth)
    for level in reversed(range(depth)):
        side = size >> level
        x = build.layer(f"cat.{level}", [x, skips[level]], (1, 2 * channels, side, side))
        x = conv(f"up.{level}", [x], 2 * channels, channels // 2, side)
        channels //= 2
    conv("out", [x], channels, 3, size)
    return build.graph()


def hardware(**changes):
    """A device of round numbers with free links."""
    values = {"flops": {"float32": 1e12, "bfloat16": 4e12}, "memory_bandwidth": 1e12, "memory": 1e12, **changes}
    return Hardware(**values)


def settings(stages, *, ranks=None, schedule="1F1B", num_microbatches=8, training=None, **more):
    """Settings with defaults for what a test does not care about."""
    return Settings.of(
        stages=stages,
        ranks=stages if ranks is None else ranks,
        schedule=schedule,
        num_microbatches=num_microbatches,
        hardware=more.pop("hardware", None) or hardware(),
        training=training or Training(),
        **more,
    )


def estimate(graph, made_for, cost="roofline"):
    """Estimate for the hardware and the training of some settings."""
    return estimate_costs(graph, cost, made_for.hardware, made_for.training)
