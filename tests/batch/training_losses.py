"""More losses that separate, as training code has them: selections, weights, averages and contrasts within a sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from losses import CLASSES, LENGTH, Loss, entropy, flat, log_probabilities, per_token


def in_length(t: Any) -> torch.Tensor:
    return torch.arange(LENGTH)[None] < t["lengths"][:, None]


def of_labels(t: Any) -> torch.Tensor:
    return t["labels"].reshape(-1)


def within_the_sample(o: torch.Tensor, t: Any) -> torch.Tensor:
    z = F.normalize(o, dim=-1)
    return F.cross_entropy((z @ z.transpose(1, 2) / 0.1).reshape(-1, LENGTH), torch.arange(LENGTH).repeat(len(o)))


def group_relative(o: torch.Tensor, t: Any) -> torch.Tensor:
    new, old = log_probabilities(o, t), log_probabilities(t["real"], t)
    ratio, far = (new - old).exp(), (old - new).exp() - (old - new) - 1
    each = 0.04 * far - torch.min(ratio * t["advantages"], ratio.clamp(0.8, 1.2) * t["advantages"])
    return ((each * t["mask"]).sum(1) / t["mask"].sum(1).clamp(min=1)).mean()


def unlikelihood(o: torch.Tensor, t: Any) -> torch.Tensor:
    off = (1 - log_probabilities(o, t).exp()).clamp(min=1e-5).log()
    return -(off * t["weights"]).sum() / t["weights"].sum()


def expert_balance_per_sample(o: torch.Tensor, t: Any) -> torch.Tensor:
    p = o.softmax(-1)
    chosen = F.one_hot(p.argmax(-1), CLASSES).to(p).mean(1)
    return entropy(o, t) + 0.01 * CLASSES * (chosen * p.mean(1)).sum(-1).mean()


def found_places(o: torch.Tensor, t: Any) -> torch.Tensor:
    keep = (of_labels(t) != -100).nonzero().squeeze(-1)
    return F.cross_entropy(flat(o)[keep], of_labels(t)[keep])


def index_select(o: torch.Tensor, t: Any) -> torch.Tensor:
    keep = torch.where(of_labels(t) != -100)[0]
    return F.cross_entropy(flat(o).index_select(0, keep), of_labels(t).index_select(0, keep))


def poly(o: torch.Tensor, t: Any) -> torch.Tensor:
    each, keep = F.cross_entropy(flat(o), of_labels(t), reduction="none"), of_labels(t) != -100
    return ((each + 1 - (-each).exp()) * keep).sum() / keep.sum()


def jensen_shannon(o: torch.Tensor, t: Any) -> torch.Tensor:
    p, q = o.softmax(-1), t["probabilities"]
    middle = ((p + q) / 2).log()
    return 0.5 * sum(F.kl_div(middle, each, reduction="batchmean") for each in (p, q))


def arcface(o: torch.Tensor, t: Any) -> torch.Tensor:
    cosine = F.normalize(o.mean(1), dim=-1)
    turned = (cosine.clamp(-0.99, 0.99).acos() + 0.3).cos()
    return F.cross_entropy(8 * torch.where(F.one_hot(t["class"], CLASSES).bool(), turned, cosine), t["class"])


def tversky_per_sample(o: torch.Tensor, t: Any) -> torch.Tensor:
    p, y = o.sigmoid().flatten(1), t["bits"].flatten(1)
    both = (p * y).sum(1)
    return (1 - both / (both + 0.3 * (p * (1 - y)).sum(1) + 0.7 * ((1 - p) * y).sum(1) + 1)).pow(0.75).mean()


def selected_by_a_wider_mask(o: torch.Tensor, t: Any) -> torch.Tensor:
    each = F.binary_cross_entropy_with_logits(o, t["bits"], reduction="none")
    return each[t["mask"][..., None].expand_as(each)].mean()


def sum_over_the_length_of_the_selected(o: torch.Tensor, t: Any) -> torch.Tensor:
    chosen = per_token(o, t)[t["mask"]]
    return chosen.sum() / max(len(chosen), 1)


def weighed_twice(o: torch.Tensor, t: Any) -> torch.Tensor:
    weights = t["weights"] * t["sample_weights"][:, None]
    return (per_token(o, t) * weights).sum() / weights.sum()


def per_sequence(o: torch.Tensor, t: Any) -> torch.Tensor:
    lengths = (t["labels"] != -100).sum(1).clamp(min=1)
    return (F.cross_entropy(o.transpose(1, 2), t["labels"], reduction="none").sum(1) / lengths).mean()


TRAINING: dict[str, Loss] = {
    "contrast within the sample": within_the_sample,
    "group relative policy": group_relative,
    "unlikelihood": unlikelihood,
    "expert balance per sample": expert_balance_per_sample,
    "nonzero": found_places,
    "index_select": index_select,
    "poly": poly,
    "jensen-shannon": jensen_shannon,
    "arcface": arcface,
    "tversky per sample": tversky_per_sample,
    "a wider mask": selected_by_a_wider_mask,
    "length of the selected": sum_over_the_length_of_the_selected,
    "weighed twice": weighed_twice,
    "per sequence": per_sequence,
    "length": lambda o, t: (per_token(o, t) * in_length(t)).sum() / t["lengths"].sum(),
    "packed": lambda o, t: F.cross_entropy(o[in_length(t)], t["clean"][in_length(t)]),
    "float mask": lambda o, t: per_token(o, t)[t["weights"].bool()].mean(),
    "float mask, shifted": lambda o, t: per_token(o, t)[:, 1:][t["weights"][:, 1:] > 0].mean(),
    "float mask, selected": lambda o, t: per_token(o, t).masked_select(t["weights"] != 0).mean(),
    "mean of what is a number": lambda o, t: torch.where(t["mask"], per_token(o, t), torch.nan).nanmean(),
    "sum of what is a number": lambda o, t: (
        torch.where(t["mask"], per_token(o, t), torch.nan).nansum() / t["mask"].sum()
    ),
    "count_nonzero": lambda o, t: (per_token(o, t) * t["mask"]).sum() / t["mask"].count_nonzero(),
    "einsum": lambda o, t: torch.einsum("bl,bl->", per_token(o, t), t["weights"]) / t["weights"].sum(),
    "dot": lambda o, t: per_token(o, t).flatten() @ t["weights"].flatten() / t["weights"].sum(),
    "count that Python read": lambda o, t: (
        F.cross_entropy(flat(o), of_labels(t), reduction="sum") / of_labels(t).ne(-100).sum().item()
    ),
    "hot distillation": lambda o, t: (
        16 * F.kl_div((o / 4).log_softmax(-1), (t["real"] / 4).softmax(-1), reduction="batchmean")
    ),
    "spectrum": lambda o, t: (torch.fft.rfft(o, dim=1).abs() - torch.fft.rfft(t["real"], dim=1).abs()).abs().mean(),
    "one sample after the other": lambda o, t: torch.stack(
        [F.cross_entropy(one, other) for one, other in zip(o, t["clean"], strict=True)]
    ).mean(),
    "in chunks": lambda o, t: (
        sum(
            F.cross_entropy(one, other, reduction="sum")
            for one, other in zip(flat(o).chunk(4), of_labels(t).chunk(4), strict=True)
        )
        / (of_labels(t) != -100).sum()
    ),
}
REFUSED = {"in chunks": "cannot be run on fewer samples"}
"""What unrolls the batch in Python: it separates, and is refused."""
