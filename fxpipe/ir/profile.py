"""Measured seconds and bytes of every layer, and of links: taken on the machine that trains, read on one that plans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fxpipe.errors import PlanError
from fxpipe.ir.cost import LayerCost, LayerCounts
from fxpipe.ir.files.reading import read_json, read_value
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware

FORMAT = 1


@dataclass(frozen=True, slots=True)
class LinkTime:
    """One message between two ranks, as measured.

    Attributes:
        bytes: Its size.
        seconds: From one rank to the other.
        far: Whether the ranks are on different nodes.
    """

    bytes: int
    seconds: float
    far: bool = False


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of each layer for one microbatch, as measured on one device, and what else was measured there.

    Attributes:
        device: Name of the device, for the reader.
        layers: Name and seconds of each layer, by name.
        links: Messages of several sizes between two ranks; none where one process measured.
        kept: Name and bytes of each layer that it alone keeps for its backward; none where that was not measured.

    Raises:
        PlanError: A time or size is negative or not finite, or a layer is named twice.

    >>> profile = Profile.of("laptop", {"head": LayerCost(2e-3, 2e-3, 2e-3), "embed": LayerCost(1e-3)})
    >>> Profile.from_json(profile.to_json()) == profile
    True
    >>> profile.costs["embed"].seconds
    0.001
    """

    device: str
    layers: tuple[tuple[str, LayerCost], ...]
    links: tuple[LinkTime, ...] = ()
    kept: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.layers]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PlanError(f"profile names layer {twice!r} twice\n  give each layer once")
        for name, cost in self.layers:
            for seconds in (cost.forward_s, cost.input_grad_s, cost.weight_grad_s):
                if not _is_time(seconds):
                    raise PlanError(
                        f"profile of layer {name!r} has {seconds!r} seconds\n  give a finite number >= 0 for each phase"
                    )

        for link in self.links:
            if not (_is_time(link.seconds) and link.seconds > 0 and isinstance(link.bytes, int) and link.bytes > 0):
                raise PlanError(
                    f"profile has a message of {link.bytes!r} bytes in {link.seconds!r} s\n"
                    "  give whole numbers of bytes > 0 and finite seconds > 0"
                )
        for name, nbytes in self.kept:
            if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
                raise PlanError(f"profile of layer {name!r} keeps {nbytes!r} bytes\n  give a whole number >= 0")

    @classmethod
    def of(
        cls,
        device: str,
        costs: Mapping[str, LayerCost],
        *,
        links: Sequence[LinkTime] = (),
        kept: Mapping[str, int] | None = None,
    ) -> Profile:
        """Make a profile of a mapping from layer name to seconds, and what else was measured."""
        kept = kept or {}
        return cls(
            device,
            tuple((name, costs[name]) for name in sorted(costs)),
            tuple(sorted(links, key=lambda link: (link.far, link.bytes, link.seconds))),
            tuple((name, kept[name]) for name in sorted(kept)),
        )

    def on_links(self, hardware: Hardware) -> Hardware:
        """Give the hardware with bandwidth and latency of its links as measured, where they were.

        >>> times = [LinkTime(1000, 3e-6), LinkTime(1_000_000, 1.002e-3)]
        >>> found = Profile.of("laptop", {}, links=times).on_links(Hardware.preset("cpu"))
        >>> round(found.link_bandwidth), round(found.link_latency, 9)
        (1000000000, 2e-06)
        """
        near, far = (line_through([link for link in self.links if link.far is kind]) for kind in (False, True))
        if near is not None:
            hardware = replace(hardware, link_bandwidth=near[0], link_latency=near[1])
        if far is not None:
            hardware = replace(hardware, internode_bandwidth=far[0], internode_latency=far[1])
        return hardware

    def with_kept(self, graph: LayerGraph) -> LayerGraph:
        """Give the graph with bytes that its layers keep as measured, where they were."""
        kept = dict(self.kept)
        made: dict[tuple[int, int], LayerCounts] = {}
        found = []
        for name, counts in zip(graph.layer_names, graph.counts, strict=False):
            nbytes = kept.get(name, counts.saved_bytes)
            if nbytes != counts.saved_bytes:
                counts = made.setdefault((id(counts), nbytes), replace(counts, saved_bytes=nbytes))
            found.append(counts)
        return replace(graph, counts=tuple(found)) if made else graph

    @property
    def costs(self) -> dict[str, LayerCost]:
        """Seconds by layer name."""
        return dict(self.layers)

    def to_json(self) -> str:
        """Write the profile as JSON text; equal layers name the same times, so it stays short."""
        times: dict[tuple[float, float, float], int] = {}
        layers = {}
        for name, cost in self.layers:
            phases = (cost.forward_s, cost.input_grad_s, cost.weight_grad_s)
            layers[name] = times.setdefault(phases, len(times))
        data = {
            "format": FORMAT,
            "device": self.device,
            "unit": "seconds",
            "times": [
                {"forward": forward, "input_grad": input_grad, "weight_grad": weight_grad}
                for forward, input_grad, weight_grad in times
            ],
            "layers": layers,
            "links": [{"bytes": link.bytes, "seconds": link.seconds, "far": link.far} for link in self.links],
            "kept_bytes": dict(self.kept),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Read a profile back.

        Raises:
            PlanError: The text is no profile of this format, or something in it is missing or wrong.
        """
        data = read_json(text, "a profile", "write profiles with Profile.to_json()")
        if data.get("format") != FORMAT or data.get("unit") != "seconds":
            raise PlanError(
                f"this is not a profile of format {FORMAT}, in seconds\n  measure anew with this version of fxpipe"
            )
        try:
            places = read_value(dict[str, int], data["layers"], "profile.layers")
            times = [LayerCost(time["forward"], time["input_grad"], time["weight_grad"]) for time in data["times"]]
            if any(place < 0 for place in places.values()):
                raise IndexError("negative place")
            costs = {name: times[place] for name, place in places.items()}
            links = [LinkTime(link["bytes"], link["seconds"], bool(link["far"])) for link in data.get("links", ())]
            kept = read_value(dict[str, int], data.get("kept_bytes", {}), "profile.kept_bytes")
            return cls.of(str(data["device"]), costs, links=links, kept=kept)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise PlanError(f'this profile is damaged: {error!r}\n  measure anew with cost="profile"') from error


def line_through(links: Sequence[LinkTime]) -> tuple[float, float] | None:
    """Fit bytes per second and seconds of latency to messages, so that the squares of relative errors are least.

    None where there are no messages of two sizes.
    """
    if len({link.bytes for link in links}) < 2:
        return None
    weights = [1 / link.seconds for link in links]
    sizes = [link.bytes * weight for link, weight in zip(links, weights, strict=True)]
    ww, ws, ss = (
        math.fsum(a * b for a, b in pairs)
        for pairs in (
            zip(weights, weights, strict=True),
            zip(weights, sizes, strict=True),
            zip(sizes, sizes, strict=True),
        )
    )
    w1, s1 = math.fsum(weights), math.fsum(sizes)
    latency_s, per_byte_s = (w1 * ss - s1 * ws) / (ww * ss - ws * ws), (ww * s1 - ws * w1) / (ww * ss - ws * ws)
    if latency_s < 0:
        latency_s, per_byte_s = 0.0, s1 / ss
    if per_byte_s <= 0:  # the largest message took no longer than the smallest
        largest = max(links, key=lambda link: link.bytes)
        latency_s, per_byte_s = 0.0, largest.seconds / largest.bytes
    return 1 / per_byte_s, latency_s


def _is_time(seconds: object) -> bool:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return False
    return 0 <= seconds < math.inf and seconds < 2**63
