"""A model whose blocks draw, keep statistics and look at their own flag, and its numbers microbatch by microbatch."""

import torch
import torch.nn.functional as F
from torch import nn

X, TARGET = torch.randn(2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.5),
            nn.Linear(8, 8),
        )

    def forward(self, x):
        x = x + self.last(self.drop(self.norm(self.first(x)).relu()))
        return F.dropout(x, 0.3, self.training)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.training else x * 2


def tower():
    torch.manual_seed(0)
    return Tower().double()


def quiet(modules):
    """Switch off what draws, by the modules' flags alone: the blocks' own and that of their dropout."""
    for fqn, part in modules:
        if fqn.startswith("blocks.") and (fqn.count(".") == 1 or fqn.endswith(".drop")):
            part.training = False


def expected(model, num_microbatches=2):
    """Loss, gradients and buffers of the model itself, microbatch by microbatch."""
    model.zero_grad()
    rows = len(X) // num_microbatches
    parts = [slice(at, at + rows) for at in range(0, len(X), rows)]
    losses = [F.mse_loss(model(X[part]), TARGET[part]) / num_microbatches for part in parts]
    sum(losses).backward()
    return sum(losses).detach(), {fqn: p.grad for fqn, p in model.named_parameters()}, dict(model.named_buffers())


def check(pipe, model):
    """Compare a step with what the model computes."""
    pipe.zero_grad()
    loss, gradients, buffers = expected(model)
    torch.testing.assert_close(pipe.step(X, target=TARGET), loss, rtol=1e-12, atol=0)
    for fqn, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[fqn], rtol=1e-10, atol=1e-12)
    for fqn, buffer in pipe.named_buffers():
        torch.testing.assert_close(buffer, buffers[fqn], rtol=1e-12, atol=1e-12)
