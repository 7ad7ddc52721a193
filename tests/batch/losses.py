"""Losses as people write them: which separate into microbatches, and which couple the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxpipe

SAMPLES, LENGTH, CLASSES = 8, 5, 7
Loss = Callable[[Any, Any], torch.Tensor]
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5, 3.0, 0.75], dtype=torch.float64)


def ragged_mask() -> torch.Tensor:
    """More in the first samples than in the last, none in the third."""
    lengths = torch.tensor([5, 5, 0, 4, 2, 1, 1, 3])
    return torch.arange(LENGTH)[None] < lengths[:, None]


def labels() -> torch.Tensor:
    found = torch.randint(CLASSES, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(3))
    return found.masked_fill(~ragged_mask(), -100)


def sequence() -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(5)
    mask = ragged_mask()
    return {
        "labels": labels(),
        "clean": labels().clamp(min=0),
        "mask": mask,
        "weights": mask.double(),
        "real": torch.randn(SAMPLES, LENGTH, CLASSES, generator=drawn, dtype=torch.float64),
        "probabilities": torch.rand(SAMPLES, LENGTH, CLASSES, generator=drawn, dtype=torch.float64).softmax(-1),
        "bits": (torch.rand(SAMPLES, LENGTH, CLASSES, generator=drawn) < 0.3).double(),
        "sample_weights": torch.rand(SAMPLES, generator=drawn, dtype=torch.float64),
        "class": torch.randint(CLASSES, (SAMPLES,), generator=drawn),
        "advantages": torch.randn(SAMPLES, LENGTH, generator=drawn, dtype=torch.float64),
        "signs": torch.where(torch.rand(SAMPLES, generator=drawn) < 0.5, 1.0, -1.0).double(),
        "lengths": torch.tensor([5, 5, 4, 4, 5, 4, 5, 5]),
        "word_lengths": torch.tensor([2, 1, 2, 1, 1, 2, 2, 1]),
        "words": torch.randint(1, CLASSES, (SAMPLES, 2), generator=drawn),
    }


def flat(o: torch.Tensor) -> torch.Tensor:
    return o.reshape(-1, CLASSES)


def per_token(o: torch.Tensor, t: Any) -> torch.Tensor:
    return F.cross_entropy(o.transpose(1, 2), t["clean"], reduction="none")


def log_probabilities(o: torch.Tensor, t: Any) -> torch.Tensor:
    return o.log_softmax(-1).gather(-1, t["clean"][..., None]).squeeze(-1)


def entropy(o: torch.Tensor, t: Any, **options: Any) -> torch.Tensor:
    return F.cross_entropy(flat(o), t["labels"].reshape(-1), **options)


def shifted(o: torch.Tensor, t: Any) -> torch.Tensor:
    return F.cross_entropy(o[:, :-1].reshape(-1, CLASSES), t["labels"][:, 1:].reshape(-1))


def ppo(o: torch.Tensor, t: Any) -> torch.Tensor:
    ratio = (log_probabilities(o, t) - log_probabilities(t["real"], t)).exp()
    clipped = ratio.clamp(0.8, 1.2) * t["advantages"]
    return -(torch.min(ratio * t["advantages"], clipped) * t["mask"]).sum() / t["mask"].sum()


def focal(o: torch.Tensor, t: Any) -> torch.Tensor:
    p = log_probabilities(o, t).exp()
    return ((1 - p) ** 2 * per_token(o, t)).mean()


def distillation(o: torch.Tensor, t: Any) -> torch.Tensor:
    soft = F.kl_div((o / 2).log_softmax(-1), (t["real"] / 2).softmax(-1), reduction="none").sum(-1)
    return 0.5 * entropy(o, t) + 0.5 * 4 * (soft * t["weights"]).sum() / t["weights"].sum()


def multi_task(o: torch.Tensor, t: Any) -> torch.Tensor:
    return sum([entropy(o, t), F.mse_loss(o, t["real"]), F.l1_loss(o, t["real"]) * 0.1])  # type: ignore[return-value]


def ctc(o: torch.Tensor, t: Any) -> torch.Tensor:
    return F.ctc_loss(
        o.log_softmax(-1).transpose(0, 1), t["words"], t["lengths"], t["word_lengths"], zero_infinity=True
    )


def dpo(o: torch.Tensor, t: Any) -> torch.Tensor:
    """Chosen and rejected answers as two columns of one sample."""
    chosen, rejected = o[:, 0].mean(-1), o[:, 1].mean(-1)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def triplet(o: torch.Tensor, t: Any) -> torch.Tensor:
    return F.triplet_margin_loss(o[:, 0], o[:, 1], o[:, 2])


def smoothed(o: torch.Tensor, t: Any) -> torch.Tensor:
    """Label smoothing as fairseq has it: two masked sums."""
    lp = o.log_softmax(-1)
    nll = -lp.gather(-1, t["clean"][..., None]).squeeze(-1).masked_fill(~t["mask"], 0.0)
    smooth = -lp.sum(-1).masked_fill(~t["mask"], 0.0)
    return (0.9 * nll.sum() + 0.1 / CLASSES * smooth.sum()) / t["mask"].sum()


def z_loss(o: torch.Tensor, t: Any) -> torch.Tensor:
    z = flat(o).logsumexp(-1)
    keep = t["labels"].reshape(-1) != -100
    return entropy(o, t) + 1e-2 * (z.square() * keep).sum() / keep.sum()


def gaussian(o: torch.Tensor, t: Any) -> torch.Tensor:
    return F.gaussian_nll_loss(o, t["real"], o.square() + 0.1)


def kullback_normal(o: torch.Tensor, t: Any) -> torch.Tensor:
    mu, logvar = o[..., :3], o[..., 3:6]
    return F.mse_loss(o, t["real"]) - 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()


def stacked(o: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.stack([F.mse_loss(o, t["real"]), F.l1_loss(o, t["real"])]).sum()


def dice_per_sample(o: torch.Tensor, t: Any) -> torch.Tensor:
    p, y = o.sigmoid().flatten(1), t["bits"].flatten(1)
    return (1 - 2 * (p * y).sum(1) / (p.sum(1) + y.sum(1) + 1)).mean()


SEPARATE: dict[str, Loss] = {
    "cross entropy": entropy,
    "shifted cross entropy": shifted,
    "cross entropy, sum": lambda o, t: entropy(o, t, reduction="sum"),
    "cross entropy of classes": lambda o, t: F.cross_entropy(o.mean(1), t["class"]),
    "cross entropy, sum over a count": lambda o, t: entropy(o, t, reduction="sum") / (t["labels"] != -100).sum(),
    "cross entropy, class weights": lambda o, t: entropy(o, t, weight=CLASS_WEIGHTS),
    "cross entropy, smoothing": lambda o, t: entropy(o, t, label_smoothing=0.1),
    "cross entropy, smoothing and weights": lambda o, t: entropy(o, t, label_smoothing=0.1, weight=CLASS_WEIGHTS),
    "cross entropy, other ignored": lambda o, t: F.cross_entropy(flat(o), t["clean"].reshape(-1), ignore_index=0),
    "cross entropy, probabilities": lambda o, t: F.cross_entropy(o.transpose(1, 2), t["probabilities"].transpose(1, 2)),
    "cross entropy, selected mean": lambda o, t: per_token(o, t)[t["mask"]].mean(),
    "cross entropy, none then mean": lambda o, t: per_token(o, t).mean(),
    "cross entropy, masked sum": lambda o, t: (per_token(o, t) * t["mask"]).sum() / t["mask"].sum(),
    "cross entropy, normalised mask": lambda o, t: (per_token(o, t) * (t["weights"] / t["weights"].sum())).sum(),
    "cross entropy, guarded count": lambda o, t: (per_token(o, t) * t["mask"]).sum() / t["mask"].sum().clamp(min=1),
    "cross entropy, count and epsilon": lambda o, t: (per_token(o, t) * t["mask"]).sum() / (t["mask"].sum() + 1e-8),
    "cross entropy, mean over the batch": lambda o, t: (per_token(o, t) * t["mask"]).sum() / len(o),
    "cross entropy, per sequence": lambda o, t: (
        (per_token(o, t) * t["mask"]).sum(1) / t["mask"].sum(1).clamp(min=1)
    ).mean(),
    "cross entropy, weighted samples": lambda o, t: (per_token(o, t).mean(1) * t["sample_weights"]).mean(),
    "cross entropy, normalised samples": lambda o, t: (
        (per_token(o, t).mean(1) * t["sample_weights"]).sum() / t["sample_weights"].sum()
    ),
    "nll": lambda o, t: F.nll_loss(flat(o).log_softmax(-1), t["labels"].reshape(-1)),
    "nll by gather": lambda o, t: -(log_probabilities(o, t) * t["mask"]).sum() / t["mask"].sum(),
    "masked_select": lambda o, t: -log_probabilities(o, t).masked_select(t["mask"]).mean(),
    "masked_select, broadcast": lambda o, t: (o - t["real"]).square().masked_select(t["mask"][..., None]).mean(),
    "gaussian, full": lambda o, t: F.gaussian_nll_loss(o, t["real"], o.exp() + 0.1, full=True),
    "fairseq smoothing": smoothed,
    "focal": focal,
    "z-loss": z_loss,
    "mse": lambda o, t: F.mse_loss(o, t["real"]),
    "mse, sum": lambda o, t: F.mse_loss(o, t["real"], reduction="sum"),
    "mse by hand": lambda o, t: (o - t["real"]).pow(2).mean(),
    "mse, masked": lambda o, t: ((o - t["real"]).pow(2).mean(-1) * t["weights"]).sum() / t["weights"].sum(),
    "mse, weighted, any sum": lambda o, t: ((o - t["real"]) ** 2 * t["weights"][..., None]).sum(),
    "mse, half": lambda o, t: 0.5 * ((o - t["real"]) ** 2).sum() / o.shape[0],
    "l1": lambda o, t: F.l1_loss(o, t["real"]),
    "smooth l1": lambda o, t: F.smooth_l1_loss(o, t["real"]),
    "huber": lambda o, t: F.huber_loss(o, t["real"], delta=0.5),
    "log-cosh": lambda o, t: (o - t["real"]).cosh().log().mean(),
    "rmse per sample": lambda o, t: (o - t["real"]).pow(2).mean((1, 2)).sqrt().mean(),
    "bce with logits": lambda o, t: F.binary_cross_entropy_with_logits(o, t["bits"]),
    "bce": lambda o, t: F.binary_cross_entropy(o.sigmoid(), t["bits"]),
    "bce, masked": lambda o, t: (
        (F.binary_cross_entropy_with_logits(o, t["bits"], reduction="none").mean(-1) * t["mask"]).sum()
        / t["mask"].sum()
    ),
    "bce, positive weights": lambda o, t: F.binary_cross_entropy_with_logits(
        o, t["bits"], pos_weight=CLASS_WEIGHTS.to(o)
    ),
    "bce, selected": lambda o, t: F.binary_cross_entropy_with_logits(o[t["mask"]], t["bits"][t["mask"]]),
    "kl": lambda o, t: F.kl_div(o.log_softmax(-1), t["probabilities"], reduction="batchmean"),
    "kl, logarithms": lambda o, t: F.kl_div(
        o.log_softmax(-1), t["probabilities"].log(), reduction="batchmean", log_target=True
    ),
    "distillation": distillation,
    "poisson": lambda o, t: F.poisson_nll_loss(o, t["bits"]),
    "gaussian": gaussian,
    "cosine embedding": lambda o, t: F.cosine_embedding_loss(o[:, 0], o[:, 1], t["signs"]),
    "margin ranking": lambda o, t: F.margin_ranking_loss(o[:, 0, 0], o[:, 1, 0], t["signs"]),
    "hinge embedding": lambda o, t: F.hinge_embedding_loss(o[:, 0, 0], t["signs"]),
    "multi margin": lambda o, t: F.multi_margin_loss(o.mean(1), t["class"]),
    "multilabel soft margin": lambda o, t: F.multilabel_soft_margin_loss(flat(o), flat(t["bits"])),
    "soft margin": lambda o, t: F.soft_margin_loss(o[:, 0, 0], t["signs"]),
    "triplet": triplet,
    "ctc": ctc,
    "ctc, sum": lambda o, t: F.ctc_loss(
        o.log_softmax(-1).transpose(0, 1), t["words"], t["lengths"], t["word_lengths"], reduction="sum"
    ),
    "preference pairs": dpo,
    "ppo": ppo,
    "vae": kullback_normal,
    "several tasks": multi_task,
    "stacked": stacked,
    "dice per sample": dice_per_sample,
    "cosine": lambda o, t: (1 - F.cosine_similarity(o, t["real"], dim=-1)).mean(),
    "entropy bonus": lambda o, t: entropy(o, t) - 0.01 * torch.distributions.Categorical(logits=o).entropy().mean(),
    "criterion": lambda o, t: nn.CrossEntropyLoss(ignore_index=-100)(flat(o), t["labels"].reshape(-1)),
    "criterion, weights": lambda o, t: nn.CrossEntropyLoss(CLASS_WEIGHTS)(flat(o), t["labels"].reshape(-1)),
    "python sum": lambda o, t: sum(F.mse_loss(o[:, i], t["real"][:, i]) for i in range(LENGTH)) / LENGTH,  # type: ignore[return-value,arg-type]
}

NOT_RECORDED: dict[str, str] = {}
"""Losses that separate and that capture refuses for another reason, with what the error names."""

COUPLED: dict[str, tuple[Loss, str]] = {
    "rmse": (lambda o, t: F.mse_loss(o, t["real"]).sqrt(), "sqrt"),
    "dice": (
        lambda o, t: 1 - 2 * (o.sigmoid() * t["bits"]).sum() / (o.sigmoid().sum() + t["bits"].sum()),
        "div",
    ),
    "in-batch negatives": (lambda o, t: F.cross_entropy(o[:, 0] @ t["real"][:, 0].T, torch.arange(len(o))), "matmul"),
    "pairs by halves": (lambda o, t: halves(o), ""),
    "perplexity": (lambda o, t: entropy(o, t).exp(), "exp"),
    "normalised by the batch": (lambda o, t: ((o - o.mean(0)) / (o.std(0) + 1)).pow(2).mean(), ""),
    "batch variance": (lambda o, t: F.mse_loss(o, t["real"]) + o.var(0).mean(), "var"),
    "correlation": (lambda o, t: torch.corrcoef(torch.stack([o.flatten(), t["real"].flatten()]))[0, 1], ""),
    "largest": (lambda o, t: F.mse_loss(o, t["real"], reduction="none").max(), "max"),
    "larger of two means": (lambda o, t: torch.maximum(F.mse_loss(o, t["real"]), F.l1_loss(o, t["real"])), "maximum"),
    "above a threshold": (lambda o, t: F.relu(F.mse_loss(o, t["real"]) - 0.5), "relu"),
    "flooded": (lambda o, t: (F.mse_loss(o, t["real"]) - 0.3).abs() + 0.3, ""),
    "log of a mean": (lambda o, t: o.exp().mean().log(), "log"),
    "softmax over the batch": (lambda o, t: -(o.log_softmax(0) * t["bits"]).mean(), "log_softmax"),
    "balancing": (lambda o, t: entropy(o, t) + flat(o).softmax(-1).mean(0).pow(2).sum(), "pow"),
    "sorted": (lambda o, t: (o.flatten().sort()[0] * torch.arange(o.numel())).mean(), ""),
    "gradients alone": (lambda o, t: F.mse_loss(o, t["real"]) + o.std() - o.std().detach(), ""),
}


def halves(o: torch.Tensor) -> torch.Tensor:
    left, right = o.chunk(2)
    return -F.logsigmoid((left - right).sum(-1)).mean()


class Chain(nn.Module):
    """Small layers of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(CLASSES, CLASSES, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def inputs(seed: int = 1) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, LENGTH, CLASSES, generator=drawn, dtype=torch.float64)


def compiled(model: nn.Module, loss: Loss | None, x: Any, target: Any = None, **options: Any) -> fxpipe.Pipeline:
    kwargs = {} if target is None else {"target": target}
    options = {"microbatches": 4, "schedule": "GPipe", **options}
    return fxpipe.compile(model, 2, (x,), kwargs, loss_fn=loss, **options)


def check_equal(pipe: fxpipe.Pipeline, plain: nn.Module, loss: torch.Tensor, wanted: torch.Tensor) -> None:
    """Loss and every gradient within 1e-12 of the largest."""
    assert abs(float(loss) - float(wanted)) <= 1e-12 * max(abs(float(wanted)), 1e-3)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    for name, parameter in pipe.named_parameters():
        assert float((parameter.grad - gradients[name]).abs().max()) <= 1e-12 * largest, name
