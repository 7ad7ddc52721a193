"""What people use: flex attention, padding, blocks called by their forward, paddings kept in buffers, vmap."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxpipe


class Encoded(nn.Module):
    def __init__(self, norm=None, layers=3, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x, pad):
        return self.out(self.encoder(x, src_key_padding_mask=pad).mean(1))


def padding(*lengths, size=5):
    return torch.arange(size) >= torch.tensor(lengths).unsqueeze(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("form", [lambda pad: pad, lambda pad: torch.zeros(pad.shape).masked_fill(pad, -torch.inf)])
@pytest.mark.parametrize("norm", [lambda: None, lambda: nn.LayerNorm(8)])
def test_an_encoder_leaves_out_what_is_padded_as_it_does_without_gradients(norm, form):
    torch.manual_seed(0)
    model, x = Encoded(norm()).eval(), torch.randn(4, 5, 8)
    pipe = fxpipe.compile(model, 2, (x, form(padding(5, 5, 3, 3))), microbatches=2).materialize(device="cpu")
    pipe.eval()
    for pad in (padding(5, 5, 3, 3), padding(5, 5, 5, 5), padding(1, 2, 3, 5)):
        with torch.no_grad():
            expected = model(x, form(pad))
        torch.testing.assert_close(pipe.infer(x, form(pad)), expected, rtol=1e-5, atol=1e-6)
    scattered = torch.tensor([[False, True, False, False, True]] * 4)  # not at the end: no fast path
    with torch.no_grad():
        torch.testing.assert_close(pipe.infer(x, form(scattered)), model(x, form(scattered)), rtol=1e-5, atol=1e-6)
    pipe.close()


def test_an_encoder_in_training_does_what_it_does_in_training():
    torch.manual_seed(0)
    model, x, pad = Encoded(), torch.randn(4, 5, 8), padding(5, 5, 3, 3)
    target = torch.randn(4, 2)
    options = {"loss_fn": F.mse_loss, "microbatches": 2}
    pipe = fxpipe.compile(model, 2, (x, pad), {"target": target}, **options).materialize(device="cpu")
    expected = F.mse_loss(model(x, pad), target).detach()
    torch.testing.assert_close(pipe.step(x, pad, target=target), expected, rtol=1e-5, atol=1e-6)
    pipe.close()


def causal(batch, head, query, key):
    return query >= key


def near(batch, head, query, key):
    return (query - key).abs() < 9


class Flexible(nn.Module):
    def __init__(self, mask, score=None):
        super().__init__()
        self.linear, self.mask, self.score = nn.Linear(16, 16), [mask], [score]

    def forward(self, x):
        q = self.linear(x)[:, None]
        q = q if x.shape[0] > 4 else q.detach()  # the CPU has no backward of it
        return x + flex_attention(q, q, q, block_mask=self.mask[0], score_mod=self.score[0])[:, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize(
    ("mask", "score"),
    [(causal, None), (near, None), (None, lambda score, b, h, q, k: score + (q - k) * 0.01)],
)
def test_flex_attention_is_captured_and_run(mask, score, grain):
    torch.manual_seed(0)
    block_mask = create_block_mask(mask, None, None, 32, 32, device="cpu") if mask else None
    model, x = nn.Sequential(*(Flexible(block_mask, score) for _ in range(3))), torch.randn(4, 32, 16)
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "grain": grain}
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu")
    with torch.no_grad():
        expected = F.mse_loss(model(x), x)
        torch.testing.assert_close(pipe.infer(x), model(x))
    torch.testing.assert_close(pipe.step(x, target=x), expected, rtol=1e-5, atol=1e-6)
    pipe.close()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grain", ["block", "op"])
def test_flex_attention_meant_for_an_accelerator_is_planned_with_its_backward(grain):
    mask = create_block_mask(causal, None, None, 128, 128, device="cpu")
    x = torch.randn(16, 128, 16)
    model = nn.Sequential(*(Flexible(mask) for _ in range(3)))
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, loss_fn=F.mse_loss, microbatches=2, grain=grain)
    assert any("flex_attention" in op.name for counts in pipe.graph.counts for op in counts.ops)


class Scaled(nn.LayerNorm):
    """A forward that calls that of the class above it."""

    def forward(self, x):
        return 2 * nn.LayerNorm.forward(self, x)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.rest = nn.Linear(8, 8), Scaled(8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        return {"out": x + self.rest(self.norm.forward(self.first.forward(x)))}


class ByForward(nn.Module):
    """Calls its blocks by their forward, past their hooks."""

    def __init__(self, blocks, hooked):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.blocks = nn.ModuleList(Inner() for _ in range(blocks))
        for index in hooked:
            self.blocks[index].register_forward_hook(wrong)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block.forward(x)["out"]
        return self.head(x)


def wrong(module, args, output):
    return {"out": torch.zeros_like(output["out"])}


def mean_square(output):
    return output.square().mean()


def assert_trains_as_the_model(model, x, **options):
    """In float64, two stages and two microbatches: the loss and every gradient of the whole batch."""
    model = model.double()
    expected = mean_square(copy.deepcopy(model)(x))
    pipe = fxpipe.compile(model, 2, (x,), loss_fn=mean_square, microbatches=2, **options).materialize(device="cpu")
    torch.testing.assert_close(pipe.step(x), expected.detach(), rtol=1e-12, atol=1e-12)
    mean_square(model(x)).backward()
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=1e-12, atol=1e-12)
    pipe.close()
    return pipe


@pytest.mark.parametrize("grain", ["block", "op", "auto"])
@pytest.mark.parametrize(("blocks", "hooked"), [(2, ()), (4, ()), (3, (1,)), (4, (0, 3))])
def test_a_block_called_by_its_forward_is_that_block(blocks, hooked, grain):
    torch.manual_seed(0)
    pipe = assert_trains_as_the_model(ByForward(blocks, hooked), torch.randint(0, 9, (4, 6)), grain=grain)
    if not hooked and grain == "block":
        assert {f"blocks.{index}" for index in range(blocks)} <= {
            layer for stage in pipe.plan.stages for layer in stage.layers
        }


class Padded(nn.Module):
    """Reads how much it pads, and whether it does, from buffers."""

    def __init__(self, kernel, persistent):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, kernel)
        self.register_buffer("padding", torch.tensor(kernel) - torch.tensor(1), persistent=persistent)
        self.register_buffer("pads", torch.tensor([True]), persistent=persistent)

    def forward(self, x):
        x = F.pad(x, (self.padding, torch.ceil(self.padding / 2).long() - self.padding // 2)) if self.pads else x
        return torch.tanh(self.conv(x))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(("kernels", "persistent"), [((3, 5, 3), False), ((2, 2, 2), True), ((7, 3, 4), True)])
def test_a_block_reads_numbers_from_its_buffers(kernels, persistent, deferred):
    def build():
        return nn.Sequential(*(Padded(kernel, persistent) for kernel in kernels))

    torch.manual_seed(3)
    real, x = build().double(), torch.randn(4, 4, 9, dtype=torch.float64)
    if deferred:
        with fxpipe.deferred_init(seed=3):
            model = build().double()
    else:
        model = copy.deepcopy(real)
    pipe = fxpipe.compile(model, 2, (x,), loss_fn=mean_square, microbatches=2).materialize(device="cpu")
    torch.testing.assert_close(pipe.step(x), mean_square(real(x)).detach(), rtol=1e-12, atol=1e-12)
    pipe.close()


class Counting(nn.Module):
    """Asks Python for the number in a buffer, or for how many of its flags are set."""

    def __init__(self, ask):
        super().__init__()
        self.layer, self.ask = nn.Linear(6, 6), ask
        self.register_buffer("times", torch.tensor(2))
        self.register_buffer("flags", torch.tensor([True, False, True]))

    def forward(self, x):
        return x + torch.tanh(self.layer(x)) * self.ask(self)


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda block: int(block.times),
        lambda block: block.times.item() / 2,
        lambda block: block.flags.nonzero().shape[0],
        lambda block: 3 if block.flags[0] else 1,
    ],
)
def test_numbers_in_buffers_stay_those_of_every_length(ask, grain):
    torch.manual_seed(4)
    model = nn.Sequential(*(Counting(ask) for _ in range(3))).double()
    batches = [torch.randn(4, length, 6, dtype=torch.float64) for length in (5, 7, 4, 9)]
    pipe = fxpipe.compile(model, 2, (batches[0],), loss_fn=mean_square, microbatches=2, grain=grain)
    with pipe.materialize(device="cpu"):
        for x in batches:
            torch.testing.assert_close(pipe.step(x), mean_square(model(x)).detach(), rtol=1e-12, atol=1e-12)


class Mapped(nn.Module):
    """A ``vmap`` over real numbers that activations were written into."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(9, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, ids):
        x = self.embedding(ids)
        places = torch.zeros(ids.shape, dtype=torch.long)
        places[:, 1] = (x[:, 1, 0] > 0).long()
        return self.layers(x + torch.vmap(lambda row: 2 * row + 1)(places)[..., None])


@pytest.mark.parametrize("grain", ["block", "op"])
def test_vmap_takes_numbers_that_an_activation_was_written_into(grain):
    torch.manual_seed(0)
    assert_trains_as_the_model(Mapped(), torch.randint(0, 9, (4, 6)), grain=grain)


class Quantized(nn.Module):
    """Takes the nearest of some vectors: no gradient comes back through it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 8))

    def forward(self, x):
        return F.embedding(torch.cdist(x, self.codes).argmin(-1), self.codes)


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize(("stages", "schedule"), [(4, "GPipe"), (4, "1F1B"), (2, "1F1B"), (8, "Interleaved1F1B")])
def test_gradients_before_a_quantizer_are_none_as_the_model_leaves_them(stages, schedule, grain):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(8)]
    model, x = nn.Sequential(*layers[:5], Quantized(), *layers[5:]).double(), torch.randn(4, 6, 8, dtype=torch.float64)
    options = {"loss_fn": mean_square, "microbatches": 4, "schedule": schedule, "grain": grain}
    ranks = {"ranks": 4} if stages == 8 else {}
    pipe = fxpipe.compile(model, stages, (x,), **options, **ranks).materialize(device="cpu")
    pipe.step(x)
    mean_square(model(x)).backward()
    found = {name: parameter.grad for name, parameter in pipe.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-12)
    pipe.close()


@pytest.fixture
def lone_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stack_of(wrap_one=lambda block: block):
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), wrap_one(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize(
    "kind", [nn.DataParallel, nn.parallel.DistributedDataParallel, partial(FullyShardedDataParallel, device_id="cpu")]
)
@pytest.mark.parametrize("make", [lambda kind: kind(stack_of()), stack_of])
def test_what_exchanges_gradients_by_itself_is_refused_by_name(kind, make, lone_rank):
    model = make(kind)
    name = getattr(kind, "func", kind).__name__
    where = "the model" if type(model).__name__ == name else "2"
    with pytest.raises(fxpipe.CaptureError, match=rf"^{where} is a {name}, .*\n  compile the module inside it"):
        fxpipe.compile(model, 2, (torch.randn(4, 4),), loss_fn=torch.mean)


class Experts(nn.Module):
    """Sends each row to one of its experts: how many each gets only values say."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            y = y.index_add(0, rows, expert(x[rows]))
        return y


class Folder(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(6), Experts()


class InFolders(nn.Module):
    """Its blocks are kept in folders, not called: lists, dictionaries and modules without a forward."""

    def __init__(self, folder):
        super().__init__()
        self.layers, self.head = nn.ModuleList(folder() for _ in range(3)), nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            norm, experts = layer.children()
            x = x + experts(norm(x))
        return self.head(x)


@pytest.mark.parametrize(
    "folder",
    [
        Folder,
        lambda: nn.ModuleList([nn.LayerNorm(6), Experts()]),
        lambda: nn.ModuleDict({"norm": nn.LayerNorm(6), "experts": Experts()}),
    ],
)
def test_what_a_folder_in_a_list_holds_is_a_block(folder):
    torch.manual_seed(0)
    model, x = InFolders(folder).double(), torch.randn(6, 6, dtype=torch.float64)
    assert_trains_as_the_model(model, x)


def test_a_module_that_cannot_be_opened_is_named_for_leaves():
    model, x = nn.Sequential(nn.Linear(6, 6), Experts(), nn.Linear(6, 6)), torch.randn(6, 6)
    with pytest.raises(fxpipe.CaptureError, match=r"name it in leaves= \(leaves=\[Experts\]"):
        fxpipe.compile(model, 2, (x,), loss_fn=mean_square, microbatches=2)
    pipe = fxpipe.compile(model, 2, (x,), loss_fn=mean_square, microbatches=2, leaves=[Experts])
    assert "1" in [layer for stage in pipe.plan.stages for layer in stage.layers]
