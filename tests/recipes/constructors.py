"""Constructors that initialise in every way we know."""

import copy
import math
import random

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

CONSTRUCTORS = {}


def case(build):
    CONSTRUCTORS[build.__name__] = build
    return build


class Holder(nn.Module):
    """Parameters and buffers by name."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def filled(fill, *shape, dtype=None):
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype))
    with torch.no_grad():
        fill(parameter)
    return parameter


@case
def linears():
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))


@case
def convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose1d(4, 6, 3), nn.Conv3d(1, 2, 2))


@case
def recurrent():
    return nn.ModuleList([nn.LSTM(5, 6, 2, bidirectional=True), nn.GRU(3, 4), nn.RNNCell(3, 3)])


@case
def embeddings():
    return nn.ModuleList([nn.Embedding(11, 5, padding_idx=3), nn.EmbeddingBag(9, 4), nn.Bilinear(2, 3, 4)])


@case
def transformer():
    return nn.Transformer(16, 2, 1, 2, 32, batch_first=True)


@case
def attention():
    return nn.ModuleList([nn.MultiheadAttention(12, 3, kdim=5, vdim=7, add_bias_kv=True), nn.LayerNorm(12)])


@case
def small_normals():
    sizes = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 40)
    return Holder(**{f"n{n}": filled(lambda p: p.normal_(1, 2), n) for n in sizes}, after=torch.rand(5))


@case
def odd_normals_leave_a_sample():
    return Holder(a=torch.randn(3), b=torch.randn(1), c=torch.randn(20), d=torch.randn(4), e=torch.randn(7))


@case
def transposed_normals():
    weights = [nn.Parameter(torch.empty(6, 8).t()) for _ in range(2)] + [nn.Parameter(torch.empty(5, 7).t())]
    with torch.no_grad():
        for weight in weights:
            weight.normal_()
    return Holder(a=weights[0], b=weights[1], c=weights[2], after=torch.rand(3))


@case
def dtypes():
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    tensors = {}
    for kind in kinds:
        name = str(kind).removeprefix("torch.")
        tensors[f"{name}_normal"] = filled(lambda p: p.normal_(0.5, 0.1), 37, dtype=kind)
        tensors[f"{name}_uniform"] = filled(lambda p: p.uniform_(-2, 3), 5, 9, dtype=kind)
        tensors[f"{name}_small"] = filled(lambda p: p.normal_(), 6, dtype=kind)
    return Holder(**tensors, complex=torch.randn(9, dtype=torch.complex64))


@case
def default_dtype_inside():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = nn.Linear(6, 5)
        table = torch.arange(9) / 7
    finally:
        torch.set_default_dtype(before)
    layer.register_buffer("table", table)
    return layer


@case
def dtype_arguments():
    return nn.ModuleList([nn.Linear(5, 6, dtype=kind) for kind in (torch.float64, torch.float16, torch.bfloat16)])


@case
def converted_inside():
    return nn.ModuleList(
        [nn.Linear(5, 6).half(), nn.Linear(4, 3).to(torch.bfloat16), nn.BatchNorm1d(3).double(), nn.Linear(2, 2)]
    )


@case
def every_init_function():
    init = nn.init
    return Holder(
        xavier=filled(init.xavier_uniform_, 6, 7),
        xavier_normal=filled(init.xavier_normal_, 6, 7),
        kaiming=filled(init.kaiming_uniform_, 6, 7),
        kaiming_normal=filled(init.kaiming_normal_, 6, 7),
        orthogonal=filled(init.orthogonal_, 6, 7),
        tall_orthogonal=filled(init.orthogonal_, 9, 4),
        sparse=filled(lambda p: init.sparse_(p, 0.4), 10, 6),
        dirac=filled(init.dirac_, 4, 4, 3),
        eye=filled(init.eye_, 4, 5),
        ones=filled(init.ones_, 4),
        zeros=filled(init.zeros_, 4),
        constant=filled(lambda p: init.constant_(p, 0.3), 4),
        after=torch.rand(3),
    )


@case
def truncated_normals():
    init = nn.init
    return Holder(
        far=filled(lambda p: init.trunc_normal_(p, std=0.02), 30, 20),
        near=filled(lambda p: init.trunc_normal_(p, std=1.0), 30, 20),
        small=filled(lambda p: init.trunc_normal_(p, std=1.0), 5),
        tail=filled(lambda p: init.trunc_normal_(p, mean=0, std=1, a=1.0, b=1.5), 40),
        sixteen=filled(lambda p: init.trunc_normal_(p, std=0.02), 33, dtype=torch.bfloat16),
        after=torch.rand(3),
    )


@case
def other_distributions():
    return Holder(
        exponential=filled(lambda p: p.exponential_(2.0), 20),
        bernoulli=torch.bernoulli(torch.full((30,), 0.3)),
        cauchy=filled(lambda p: p.cauchy_(), 20),
        log_normal=filled(lambda p: p.log_normal_(), 20),
        geometric=filled(lambda p: p.geometric_(0.4), 20),
        integers=torch.randint(0, 100, (20,)),
        permutation=torch.randperm(20),
        multinomial=torch.multinomial(torch.rand(10), 4),
        normal=torch.normal(torch.arange(10.0), torch.rand(10)),
        poisson=torch.poisson(torch.rand(10) * 4),
        dropout=nn.functional.dropout(torch.rand(10)),
        like=torch.rand_like(torch.zeros(9)) + torch.randn_like(torch.zeros(9)),
        after=torch.rand(3),
    )


@case
def torch_distributions():
    normal = torch.distributions.Normal(torch.zeros(5), torch.ones(5))
    gamma = torch.distributions.Gamma(torch.ones(5), torch.ones(5))
    return Holder(normal=normal.sample((3,)), gamma=gamma.sample(), after=torch.rand(3))


@case
def views():
    weight = nn.Parameter(torch.empty(12, 8))
    with torch.no_grad():
        nn.init.normal_(weight[:4])
        nn.init.zeros_(weight[4:8])
        nn.init.orthogonal_(weight.view(8, 12)[6:].t().contiguous().t())
        weight[8:, ::2].uniform_()
        weight[8:, 1::2].fill_(3)
        weight[0, 0] = 7
        weight.view(-1)[5].mul_(2)
        nn.init.xavier_uniform_(weight[:, :3])
    return Holder(weight=weight)


@case
def parts_of_one_storage():
    flat = torch.empty(60)
    flat.normal_()
    one, other = flat[:20].view(4, 5), flat[20:].view(8, 5)
    other[3:].zero_()
    return Holder(one=nn.Parameter(one), other=nn.Parameter(other))


@case
def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 5), "head": nn.Linear(5, 9, bias=False)})
    model["head"].weight = model["embedding"].weight
    nn.init.normal_(model["head"].weight, std=0.02)
    return model


@case
def second_pass():
    model = nn.Sequential(nn.Linear(5, 20), nn.LayerNorm(20), nn.Sequential(nn.Linear(20, 8), nn.Embedding(7, 3)))

    def initialise(module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)
            module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.5)

    model.apply(initialise)
    for name, parameter in model.named_parameters():
        if name.endswith("0.weight"):
            nn.init.normal_(parameter, mean=0, std=0.02 / math.sqrt(2 * 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.25)
    return model


@case
def copies():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.register_buffer("table", torch.arange(6.0) * 0.5)
    layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(2)])
    nn.init.ones_(layers[1].linear1.weight)
    return nn.ModuleList([nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), layers, copy.deepcopy(layers)])


@case
def buffers():
    model = nn.Linear(4, 4)
    model.register_buffer("kept", torch.randn(4))
    model.register_buffer("mask", torch.tril(torch.ones(5, 5, dtype=torch.bool)), persistent=False)
    frequencies = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    model.register_buffer("frequencies", torch.outer(torch.arange(6.0), frequencies).cos(), persistent=False)
    model.register_buffer("count", torch.tensor(3))
    return model


@case
def orthogonal_parametrization():
    return parametrizations.orthogonal(nn.Linear(6, 6))


@case
def weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 7)), parametrizations.spectral_norm(nn.Linear(5, 5)))


@case
def own_parametrization():
    class Symmetric(nn.Module):
        def forward(self, value):
            return value.triu() + value.triu(1).mT

        def right_inverse(self, value):
            return value.triu()

    layer = nn.Linear(5, 5)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


@case
def decisions_by_value():
    weight = torch.randn(30)
    if weight.mean().item() > 0:
        weight = weight * 2
    if (weight > 3).any():
        weight.clamp_(max=3)
    depth = int(torch.randint(1, 4, ()).item())
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(depth)])
    layers.register_buffer("weight", weight)
    layers.register_buffer("positive", weight[weight > 0])
    layers.rates = [rate.item() for rate in torch.linspace(0, 0.3, 5)]
    layers.register_buffer("rates_again", torch.tensor(layers.rates))
    return layers


@case
def rejection_by_hand():
    weight = torch.empty(50)
    for _ in range(100):
        weight.normal_()
        if weight.max() < 2.0:
            break
    return Holder(weight=weight, after=torch.rand(2))


@case
def read_as_numpy_and_lists():
    weight = torch.rand(4, 5)
    rank = np.linalg.matrix_rank(weight.numpy())
    total = sum(weight[0].tolist())
    array = np.asarray(torch.arange(4.0))
    return Holder(weight=weight, facts=torch.tensor([float(rank), total]), array=torch.from_numpy(array * 2))


@case
def numpy_and_python_numbers():
    np.random.seed(3)
    random.seed(4)
    table = np.random.randn(6, 4).astype(np.float32)
    layer = nn.Linear(4, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(table))
        layer.weight[2] = random.random()
        table[:] = 0  # what was read before stays as it was
        layer.weight[3].copy_(torch.from_numpy(table)[3])
    layer.register_buffer("positions", torch.tensor(np.arange(5.0)))
    layer.extra = nn.Parameter(torch.from_numpy(np.ones(3, np.float32)))
    return layer


@case
def own_generators():
    generator = torch.Generator().manual_seed(42)
    other = torch.Generator()
    other.manual_seed(generator.initial_seed() + 1)
    weight = torch.empty(30, 4)
    weight.normal_(generator=generator)
    state = generator.get_state()
    first = torch.rand(7, generator=generator)
    generator.set_state(state)
    assert isinstance(generator, torch.Generator)
    return Holder(
        weight=weight,
        first=first,
        again=torch.rand(7, generator=generator),
        other=torch.randn(3, generator=other),
        more=torch.randperm(9, generator=other),
        common=torch.rand(4),
        end=torch.rand(4, generator=generator),
    )


@case
def reseeding():
    first = torch.rand(20)
    torch.manual_seed(7)
    second = torch.randn(20)
    state = torch.get_rng_state()
    third = torch.rand(3)
    torch.set_rng_state(state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        forked = torch.rand(4)
    saved = torch.default_generator.get_state()
    fourth = torch.rand(50)
    torch.default_generator.set_state(saved)
    return Holder(
        a=first, b=second, c=third, d=forked, e=fourth, f=torch.rand(2), seed=torch.tensor(torch.initial_seed())
    )


@case
def data_assignments():
    layer, other = nn.Linear(4, 5), nn.Linear(5, 4)
    layer.weight.data = other.weight.data.t().contiguous()
    layer.bias.data = torch.from_numpy(np.full(5, 0.5, np.float32))
    other.weight.data.copy_(torch.eye(4, 5))
    other.bias = nn.Parameter(layer.bias.detach().clone()[:4] * 2)
    return nn.ModuleList([layer, other])


@case
def shapes_changed_in_place():
    weight = torch.rand(4, 6)
    weight.t_().unsqueeze_(0)
    weight.mul_(2)
    other = torch.empty(0)
    torch.add(torch.ones(3), torch.rand(3), out=other)
    grown = torch.rand(3).resize_(2)
    return Holder(weight=weight, other=other, grown=grown)


@case
def loaded_state():
    source = nn.Linear(4, 3)
    target = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    target.load_state_dict({f"0.{key}": value for key, value in source.state_dict().items()}, strict=False)
    return target


@case
def complex_numbers():
    poles = torch.randn(6, 2)
    complex_ = torch.view_as_complex(poles)
    conjugate = complex_.conj()
    return Holder(poles=conjugate * 2, mirrored=conjugate.imag.clone(), spectrum=torch.fft.fft(torch.rand(8)))


@case
def linear_algebra():
    matrix = torch.randn(6, 6)
    q, r = torch.linalg.qr(matrix)
    s = torch.linalg.svd(matrix @ matrix.T)[1]
    return Holder(q=q, r=r, s=s, inverse=torch.linalg.inv(matrix), hadamard=torch.kron(torch.eye(2), torch.ones(2, 2)))


@case
def forward_in_a_constructor():
    layer = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
    mean = layer(torch.rand(8, 4)).mean(0)
    layer.register_buffer("mean", mean.detach())
    return layer


@case
def gradients_in_a_constructor():
    layer = nn.Linear(4, 1)
    layer(torch.rand(3, 4)).sum().backward()
    with torch.no_grad():
        layer.weight -= 0.1 * layer.weight.grad
    layer.zero_grad()
    return layer


@case
def probe_on_meta():
    """A layer that is only built on meta to find out a shape draws nothing."""
    first = nn.Linear(4, 4)
    with torch.device("meta"):
        probe = nn.Conv1d(3, 8, 3)
        size = probe(torch.rand(1, 3, 20)).numel()
    return nn.ModuleList([first, nn.Linear(size, 2)])


@case
def exponential_average():
    layer = nn.Linear(3, 3)
    average = torch.optim.swa_utils.AveragedModel(layer)
    nn.init.zeros_(layer.bias)
    return nn.ModuleList([layer, average])


@case
def frozen_and_lists():
    model = nn.Module()
    model.queries = nn.ParameterList([torch.randn(3), nn.Parameter(torch.rand(2), requires_grad=False)])
    model.table = nn.ParameterDict({"a": torch.zeros(2), "b": torch.randn(2, 9)})
    return model


@case
def scatter_and_index():
    table = torch.zeros(6, 5)
    table[torch.randperm(6)[:3], 2] = 1.5
    table.scatter_(1, torch.randint(0, 5, (6, 1)), 2.0)
    table.index_add_(0, torch.tensor([0, 2]), torch.rand(2, 5))
    table.masked_fill_(torch.rand(6, 5) > 0.8, -1)
    parts = torch.cat([table, torch.stack([torch.rand(5), torch.ones(5)])])
    return Holder(table=table, parts=parts, split=parts.split([3, 5])[1].clone(), unique=torch.unique(table))


@case
def lazy_layers():
    layer = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(3))
    layer(torch.rand(2, 3, 8))
    return layer


@case
def skipped_and_emptied():
    skipped = nn.utils.skip_init(nn.Linear, 4, 3)
    skipped.reset_parameters()
    with torch.device("meta"):
        emptied = nn.Linear(3, 5)
    emptied.to_empty(device="cpu").reset_parameters()
    return nn.ModuleList([skipped, emptied, nn.Linear(2, 2)])
