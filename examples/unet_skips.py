"""A U-Net that learns to remove noise: values that skip stages pass through the ones between.

    python examples/unet_skips.py                                 # all stages in one process
    torchrun --nproc-per-node 3 examples/unet_skips.py            # one stage per process

The model is plain PyTorch; nothing in it knows where it will be cut.
"""

import argparse
import itertools

import torch
from torch import nn

import fxpipe

SIZE, BATCH = 32, 8


def conv(inner, outer):
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.SiLU())


class UNet(nn.Module):
    """Three levels down and up again; every level's output is read once more on the way up."""

    def __init__(self, widths=(16, 32, 64)):
        super().__init__()
        self.stem = conv(1, widths[0])
        self.down = nn.ModuleList(conv(a, b) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(conv(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True))
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image, clean):
        x = self.stem(image)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(nn.functional.max_pool2d(x, 2))
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([skips.pop(), x], 1))
        return nn.functional.mse_loss(image - self.out(x), clean)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)

    def batch():
        """Stripes of random direction and width, and noise over them."""
        angle, pitch = torch.rand(2, BATCH, 1, 1, generator=generator)
        y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        clean = torch.sin((x * torch.cos(3 * angle) + y * torch.sin(3 * angle)) * (0.3 + pitch)).unsqueeze(1)
        return {"image": clean + 0.5 * torch.randn(clean.shape, generator=generator), "clean": clean}

    with fxpipe.deferred_init(seed=0):
        model = UNet()
    pipe = fxpipe.compile(model, options.stages, (), batch(), hardware="cpu", microbatches=4)
    pipe.print_report()
    pipe.materialize()
    optimizer = pipe.optimizer(torch.optim.AdamW, lr=3e-3)
    for step in range(options.steps):
        pipe.zero_grad()
        loss = pipe.step(**batch())
        optimizer.step()
        if step % 5 == 4 and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            print(f"step {step:3}  loss {loss:.4f}", flush=True)
    pipe.close()


if __name__ == "__main__":
    main()
