"""Measured seconds of every layer: taken on the machine that trains, read on the one that plans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxpipe.errors import PlanError
from fxpipe.ir.cost import LayerCost
from fxpipe.ir.files.reading import read_json, read_value

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of each layer for one microbatch, as measured on one device.

    Attributes:
        device: Name of the device, for the reader.
        layers: Name and seconds of each layer, by name.

    Raises:
        PlanError: A time is negative or not finite, or a layer is named twice.

    >>> profile = Profile.of("laptop", {"head": LayerCost(2e-3, 2e-3, 2e-3), "embed": LayerCost(1e-3)})
    >>> Profile.from_json(profile.to_json()) == profile
    True
    >>> profile.costs["embed"].seconds
    0.001
    """

    device: str
    layers: tuple[tuple[str, LayerCost], ...]

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

    @classmethod
    def of(cls, device: str, costs: Mapping[str, LayerCost]) -> Profile:
        """Make a profile of a mapping from layer name to seconds."""
        return cls(device, tuple((name, costs[name]) for name in sorted(costs)))

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
            return cls.of(str(data["device"]), {name: times[place] for name, place in places.items()})
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise PlanError(f'this profile is damaged: {error!r}\n  measure anew with cost="profile"') from error


def _is_time(seconds: object) -> bool:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return False
    return 0 <= seconds < math.inf and seconds < 2**63
