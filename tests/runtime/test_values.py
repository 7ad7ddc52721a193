import copy
import math
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from fxpipe._torch import FakeTensorMode
from fxpipe.capture.model.blocks import block_fqns
from fxpipe.capture.model.sequence import SpecSequential
from fxpipe.capture.model.skeleton import make_skeleton
from fxpipe.errors import MaterializeError
from fxpipe.ir.spec import LayerSpec, TiedLayerSpec
from fxpipe.runtime.build.values import initial_values


def on_meta(build):
    with torch.device("meta"):
        return build()


def materialized(model, fqns=None, *, init=None, seed=0, device="cpu", dtype=None, blocks=None, **more):
    skeleton = make_skeleton(model)
    return initial_values(
        skeleton.module,
        list(skeleton.infos) if fqns is None else fqns,
        skeleton.originals,
        aliases=skeleton.aliases,
        blocks=block_fqns(model) if blocks is None else blocks,
        init=init,
        seed=seed,
        device=device,
        dtype=dtype,
        **more,
    )


def tensors(model, *args, **kwargs):
    values = materialized(model, *args, **kwargs)
    assert values.unfilled == ()
    return values.tensors


def named(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for fqn, tensor in expected.items():
        torch.testing.assert_close(found[fqn], tensor.detach(), rtol=0, atol=0, equal_nan=True, msg=fqn)


# --- models ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.up = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(2 * width, width)
        self.positioned = parametrizations.weight_norm(nn.Conv1d(width, width, 3))


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2)


class Model(nn.Module):
    """Blocks, what stands beside them, a tie across them, tensors of the model itself."""

    def __init__(self, width=8):
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.h = nn.ModuleList([Residual(width), Recurrent(width), Residual(width)])
        self.shared = self.h[0].up
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.empty(width))

    def reset_parameters(self):
        nn.init.normal_(self.scale, mean=4.0)


def gpt_init(module):
    """As GPT-2's: containers scale what lies below them, the model a layer outside of the blocks."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, Residual):
        for name, parameter in module.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(parameter, std=0.002)
    if isinstance(module, Model):
        module.table.weight.data.normal_(std=3.0)


def draws_for_everything_below(module):
    for parameter in module.parameters():
        parameter.data.uniform_(1, 2)


def draws_from_numpy_and_python(module):
    for parameter in module.parameters(recurse=False):
        parameter.data.copy_(torch.from_numpy(np.random.randn(*parameter.shape)))
        parameter.data.mul_(1 + random.random())


INITS = ["reset", gpt_init, draws_for_everything_below, draws_from_numpy_and_python]

# --- bits -----------------------------------------------------------------------------------------------------------

META = on_meta(Model)
FQNS = list(make_skeleton(META).infos)
WHOLE = {}


@pytest.mark.parametrize("init", INITS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fqns=st.permutations(FQNS).flatmap(lambda order: st.integers(1, len(order)).map(lambda n: order[:n])))
def test_any_tensors_in_any_order_get_the_bits_they_get_among_all(init, fqns):
    if init not in WHOLE:
        WHOLE[init] = tensors(META, init=init)
    found = tensors(META, fqns, init=init)
    assert list(found) == fqns
    assert_same(found, {fqn: WHOLE[init][fqn] for fqn in fqns})


@pytest.mark.parametrize("init", INITS)
def test_every_random_tensor_depends_on_the_seed_and_on_its_name(init):
    first, second = tensors(META, init=init), tensors(META, init=init, seed=1)
    assert_same(first, tensors(META, init=init))
    constant = {fqn for fqn, tensor in first.items() if tensor.eq(tensor.view(-1)[0]).all()}
    assert all(torch.equal(first[fqn], second[fqn]) == (fqn in constant) for fqn in first)
    for fqn in first.keys() - constant:
        if fqn.startswith("h.0."):
            assert not torch.equal(first[fqn], first[fqn.replace("h.0.", "h.2.")]), fqn


def test_modules_that_fill_only_their_own_tensors_get_the_same_bits_whatever_the_blocks_are():
    def own(module):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)

    found = tensors(META, init=own)
    for blocks in ([], ["h"], ["h.0.attention", "h.2"]):
        again = tensors(META, init=own, blocks=blocks)
        assert_same(again, found)


class Node(nn.Module):
    """Modules with a tensor of their own at every level."""

    def __init__(self, *children):
        super().__init__()
        self.inner = nn.ModuleList(children)
        self.weight = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self):
        for parameter in self.parameters():
            parameter.data.mul_(2)
        self.weight.data.fill_(len(self.inner))


@pytest.mark.parametrize("blocks", [None, [], ["inner.1"], ["inner.1.inner.0"], ["inner"]])
def test_functions_run_on_all_modules_in_the_order_of_constructors_and_apply(blocks):
    """Functions that are neither idempotent nor content with their own tensors tell any difference in order."""

    def build():
        return Node(Node(), Node(Node(Node()), Node()), Node(nn.LayerNorm(3)))

    def init(module):
        for parameter in module.parameters():
            parameter.data.mul_(3).add_(len(list(module.modules()))).remainder_(1009)

    eager = build()
    eager.apply(init)
    assert len({tensor[0].item() for tensor in eager.parameters()}) > 4
    found = tensors(on_meta(build), init=init, blocks=blocks)
    assert_same(found, named(eager))


def test_reset_and_function_do_not_draw_the_same_numbers():
    def shift(module):
        module.weight.data.add_(torch.randn_like(module.weight))

    reset, both = (tensors(on_meta(lambda: nn.Embedding(500, 2)), init=init)["weight"] for init in ("reset", shift))
    assert both.std() == pytest.approx(2**0.5, rel=0.1)  # twice the same would be 2
    assert not torch.equal(both, 2 * reset)


def test_the_device_the_caller_works_on_makes_no_difference():
    expected = tensors(META, init=gpt_init)
    with torch.device("meta"):
        assert_same(tensors(META, init=gpt_init), expected)
    with torch.inference_mode():
        found = tensors(META, init=gpt_init)
    assert_same(found, expected)
    assert not any(tensor.is_inference() for tensor in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bits_are_the_same_on_a_gpu():
    state = torch.cuda.get_rng_state()
    found = tensors(META, init=gpt_init, device="cuda")
    assert {tensor.device.type for tensor in found.values()} == {"cuda"}
    assert_same({fqn: tensor.cpu() for fqn, tensor in found.items()}, tensors(META, init=gpt_init))
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_the_global_random_state_stays_as_it_was():
    def init(module):
        torch.manual_seed(3)
        draws_from_numpy_and_python(module)

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    tensors(META, init=init)
    assert states() == before
    with pytest.raises(MaterializeError):
        tensors(META, init=lambda module: torch.rand(3) @ torch.rand(2))
    assert states() == before


# --- equal to the eager build ---------------------------------------------------------------------------------------


def assert_alike(found, eager):
    """Constants are equal; what is drawn has the mean and the deviation of the eager build's, within the noise."""
    expected = dict(eager.named_parameters(remove_duplicate=False)) | dict(eager.named_buffers(remove_duplicate=False))
    for fqn, tensor in found.items():
        other = expected[fqn].detach()
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), fqn
        if torch.equal(tensor, other):
            continue
        assert tensor.is_floating_point(), fqn
        noise = tensor.numel() ** -0.5
        one, two = tensor.double(), other.double()
        assert one.std() == pytest.approx(two.std().item(), rel=5 * noise), fqn  # 5 sigma, twice over
        assert one.mean() == pytest.approx(two.mean().item(), abs=7 * noise * two.std().item()), fqn


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.transposed = nn.ConvTranspose1d(4, 4, 3)
        self.batch = nn.BatchNorm2d(16)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(2, 16)
        self.layer = nn.LayerNorm(16)
        self.rms = nn.RMSNorm(16)
        self.embedding = nn.Embedding(50, 16, padding_idx=3)
        self.bag = nn.EmbeddingBag(50, 16)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.lstm = nn.LSTM(16, 32, bidirectional=True, proj_size=8)
        self.gru = nn.GRU(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, kdim=8, add_bias_kv=True)
        self.prelu = nn.PReLU(4)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(16, 30, [5, 10])
        self.normed = parametrizations.weight_norm(nn.Linear(16, 40))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(16, 16))


def test_reset_gives_layers_of_torch_what_their_constructors_give():
    torch.manual_seed(0)
    found = tensors(Layers().to("meta"), init="reset")
    assert_alike({f: t for f, t in found.items() if "orthogonal" not in f}, Layers())
    assert found["batch.running_var"].eq(1).all()
    assert found["batch.num_batches_tracked"].dtype == torch.int64
    assert found["embedding.weight"][3].eq(0).all()
    assert found["attention.out_proj.bias"].eq(0).all()


def test_parametrized_layers_start_from_the_value_their_class_resets_to():
    found = tensors(Layers().to("meta"), init="reset", blocks=[])
    model = Layers()
    model.load_state_dict(found, strict=True)
    lengths = found["normed.parametrizations.weight.original1"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(found["normed.parametrizations.weight.original0"], lengths)
    assert model.normed.weight.detach().std() == pytest.approx(1 / math.sqrt(3 * 16), rel=0.1)
    torch.testing.assert_close(model.orthogonal.weight @ model.orthogonal.weight.T, torch.eye(16), rtol=0, atol=1e-5)


def test_a_model_that_resets_all_its_layers_itself_has_the_last_word():
    def build():
        return nn.Transformer(32, 4, 2, 2, 64, batch_first=True)

    found = tensors(on_meta(build), init="reset")
    assert_alike(found, build())
    bound = math.sqrt(6 / (32 + 64))  # Xavier of the whole model, not Kaiming of the layer
    assert found["encoder.layers.0.linear1.weight"].abs().max() == pytest.approx(bound, rel=0.01)


LM = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GQA = {**LM, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL = {"vocab_size": 128, "hidden_size": 32}
SEQ2SEQ = {
    "vocab_size": 128,
    "d_model": 32,
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 64))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{which}_token_id": 1 for which in ("pad", "bos", "eos", "decoder_start")},
}
FAMILIES = {
    "GPT2LMHeadModel": {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXForCausalLM": LM,
    "OPTForCausalLM": {**LM, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {**SMALL, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4},
    "LlamaForCausalLM": GQA,
    "MixtralForCausalLM": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma2ForCausalLM": {**GQA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "MambaForCausalLM": {**SMALL, "num_hidden_layers": 2, "state_size": 4},
    "BertForMaskedLM": LM,
    "DebertaV2ForMaskedLM": {**LM, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "T5ForConditionalGeneration": {
        "vocab_size": 128,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
    },
    "WhisperForConditionalGeneration": {**SEQ2SEQ, "num_mel_bins": 8},
    "ViTForImageClassification": {**LM, "image_size": 32, "patch_size": 8},
    "SwinForImageClassification": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "ResNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "Wav2Vec2ForCTC": {
        **LM,
        "conv_dim": [16, 16],
        "conv_kernel": [8, 4],
        "conv_stride": [4, 4],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
    },
}


def huggingface(name, **over):
    cls = getattr(transformers, name)
    return cls(cls.config_class(**FAMILIES[name], **over))


@pytest.mark.parametrize("name", FAMILIES)
def test_huggingface_models_start_like_their_eager_build(name):
    model = on_meta(lambda: huggingface(name))
    found = tensors(model, init="huggingface")
    torch.manual_seed(1)
    assert_alike(found, huggingface(name))
    draw = random.Random(0)
    for blocks in (None, []):
        whole = tensors(model, init="huggingface", blocks=blocks)
        for _ in range(3):
            some = draw.sample(list(whole), len(whole) // 4)
            assert_same(tensors(model, some, init="huggingface", blocks=blocks), {fqn: whole[fqn] for fqn in some})


def test_a_huggingface_function_given_as_init_does_the_same():
    model = on_meta(lambda: huggingface("GPT2LMHeadModel"))
    assert_alike(tensors(model, init=model._init_weights), huggingface("GPT2LMHeadModel"))


def test_values_that_huggingface_once_saw_are_not_taken_for_values():
    model = on_meta(lambda: huggingface("GPT2LMHeadModel"))
    for tensor in named(model).values():
        tensor._is_hf_initialized = True  # as from_pretrained leaves them
    assert_alike(tensors(model, init="huggingface"), huggingface("GPT2LMHeadModel"))


def clip():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, vision = dict(sizes, vocab_size=128), dict(sizes, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return transformers.CLIPModel(config)


def test_what_huggingface_forgets_is_named_and_can_be_added():
    model = on_meta(clip)
    with pytest.raises(MaterializeError, match=r"'huggingface' gives no value to 1 tensor of CLIPModel: logit_scale\n"):
        tensors(model, init="huggingface")

    def init(module):
        for part in (model.text_model, model.vision_model, model):
            part._init_weights(module)
        if isinstance(module, transformers.CLIPModel):
            module.logit_scale.data.fill_(model.config.logit_scale_init_value)

    assert_alike(tensors(model, init=init), clip())


def test_a_model_around_a_huggingface_model_resets_its_own_layers():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = huggingface("BertForMaskedLM")
            self.head = nn.Linear(128, 200)

    found = tensors(on_meta(Classifier), init="huggingface")
    assert_alike(found, Classifier())
    assert found["head.weight"].abs().max() <= 128**-0.5


# --- nothing unfilled -----------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A parameter that no method fills."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.empty(3, 2))


def test_a_tensor_of_a_module_without_reset_is_named():
    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), Bare(), Bare()))
    with pytest.raises(MaterializeError) as caught:
        tensors(model, init="reset")
    first, second = str(caught.value).split("\n")
    assert first == (
        "init='reset' gives no value to 2 tensors of Sequential: {1-2}.weight (no reset_parameters() in Bare)"
    )
    assert second.startswith("  let reset_parameters of Bare fill them, or give init= a function; or build the model")
    assert set(tensors(model, ["0.weight", "1.linear.bias"], init="reset")) == {"0.weight", "1.linear.bias"}


def partly(module):
    if isinstance(module, Bare):
        module.weight.data[:2].zero_()


def from_garbage(module):
    if isinstance(module, Bare):
        module.weight.data.mul_(0.5).clamp_(-1, 1)


def to_another(module):
    if isinstance(module, Bare):
        module.weight.data = torch.empty(3, 2).copy_(module.weight)


@pytest.mark.parametrize("init", [lambda module: None, partly, from_garbage, to_another])
def test_memory_that_a_function_leaves_is_found(init):
    message = r"init= gives no value to 1 tensor of Bare: weight\n  let the function fill them when called on Bare; or"
    with pytest.raises(MaterializeError, match=message):
        tensors(on_meta(Bare), init=init)


def by_numpy(module):
    module.weight.detach().numpy()[:] = 7


def by_data(module):
    module.weight.data.fill_(7)


def by_replacing(module):
    module.weight = nn.Parameter(torch.full(module.weight.shape, 7.0))


def by_new_data(module):
    module.weight.data = torch.full((100,), 7.0)[: module.weight.numel()].view(module.weight.shape)


def by_deleting(module):
    shape = module.weight.shape
    del module.weight
    module.weight = nn.Parameter(torch.full(shape, 7.0))


@pytest.mark.parametrize("fill", [by_numpy, by_data, by_replacing, by_new_data, by_deleting])
@pytest.mark.parametrize("blocks", [["0", "1"], []])
def test_every_way_to_fill_a_tensor_counts(fill, blocks):
    def init(module):
        if isinstance(module, Bare):
            fill(module)

    model = on_meta(lambda: nn.Sequential(Bare(), Bare()))
    found = tensors(model, init=init, blocks=blocks)
    for fqn in ("0.weight", "1.weight"):
        assert found[fqn].eq(7).all()
        assert found[fqn].untyped_storage().nbytes() == 6 * 4
    assert model[0].weight.is_meta


def test_values_that_look_untouched_may_be_meant():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("slots", torch.empty(4, dtype=torch.int64))
            self.register_buffer("unseen", torch.empty(4))
            self.register_buffer("mask", torch.empty(4, dtype=torch.bool))

        def reset_parameters(self):
            self.slots.fill_(-1)
            self.unseen.fill_(torch.nan)
            self.mask.fill_(True)

    found = tensors(on_meta(Odd), init="reset")
    assert found["slots"].eq(-1).all()
    assert found["unseen"].isnan().all()
    assert found["mask"].view(torch.uint8).eq(1).all()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))

    def reset_parameters(self, *, gain):
        self.weight.data.fill_(gain)


class Idle(nn.Linear):
    def reset_parameters(self):
        nn.init.zeros_(self.bias)


def test_a_reset_that_needs_arguments_or_leaves_a_parametrized_tensor_is_none():
    with pytest.raises(MaterializeError, match=r"1 tensor of Scaled: weight \(no reset_parameters\(\) in Scaled\)\n"):
        tensors(on_meta(Scaled), init="reset")
    idle = on_meta(lambda: parametrizations.weight_norm(Idle(2, 3)))
    with pytest.raises(MaterializeError, match=r"2 tensors of \S+: parametrizations\.weight\.original0, \S+original1"):
        tensors(idle, init="reset")


def test_spectral_norm_cannot_be_reset_and_says_so():
    model = on_meta(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))))
    with pytest.raises(
        MaterializeError, match=r"2 tensors of Sequential: 0\.parametrizations\.weight\.0\._u, 0\.\S+_v "
    ):
        tensors(model, init="reset")


def test_without_init_every_tensor_without_a_value_is_named():
    model = on_meta(lambda: huggingface("GPT2LMHeadModel"))
    with pytest.raises(MaterializeError) as caught:
        tensors(model)
    first, second = str(caught.value).split("\n")
    assert first.startswith("there is no value for 28 tensors of GPT2LMHeadModel: transformer.wte.weight, ")
    assert "transformer.h.{0-1}.attn.c_attn.weight" in first
    assert second == (
        "  give init= a function of a module, 'reset' or 'huggingface'; or build the model with real weights, "
        "or use init='empty' and load weights"
    )
    with pytest.raises(MaterializeError, match=r"no value for 1 tensor of Linear: bias\n  .*, 'reset'; or"):
        tensors(on_meta(lambda: nn.Linear(2, 2)), ["bias"])


def test_many_names_are_cut_short():
    model = on_meta(lambda: nn.ModuleDict({f"part_{letter}": Bare() for letter in "abcdefghijklmnop"}))
    with pytest.raises(MaterializeError, match=r"16 tensors of ModuleDict: part_a\.weight, .* and 4 more \(no"):
        tensors(model, init="reset")


def test_an_init_that_is_not_known_is_refused():
    with pytest.raises(MaterializeError, match=r"init='xavier' is not known\n  give None, a function"):
        tensors(on_meta(Bare), init="xavier")
    with pytest.raises(MaterializeError, match=r"needs a model of transformers, and Bare has no initialize_weights"):
        tensors(on_meta(Bare), init="huggingface")


# --- functions that fail, or change the model -----------------------------------------------------------------------


def failing(module):
    if isinstance(module, nn.LayerNorm):
        raise ZeroDivisionError("no width")


def reading_another(module):
    if isinstance(module, nn.Sequential):
        module[1].weight.copy_(module[0].weight)


def adding_another(module):
    """Torch itself lets this pass and does nothing."""
    if isinstance(module, nn.Sequential):
        module[1].weight.add_(module[0].weight.sum())


def growing(module):
    if isinstance(module, nn.LayerNorm):
        module.gain = nn.Parameter(torch.ones(2))


def reshaping(module):
    if isinstance(module, nn.LayerNorm):
        module.weight = nn.Parameter(torch.ones(3))


def removing(module):
    if isinstance(module, nn.LayerNorm):
        module.bias = None


def freezing(module):
    if isinstance(module, nn.LayerNorm):
        module.weight.requires_grad_(False)


def tying_within(module):
    if isinstance(module, nn.LayerNorm):
        module.bias = module.weight


def tying_across(module):
    if isinstance(module, nn.Sequential):
        module[1].weight = module[0].weight


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (failing, r"init= on 0 \(LayerNorm\) fails: ZeroDivisionError: no width\n  only the tensors of 0 have memory"),
        (reading_another, r"init= on the model \(Sequential\) fails: \w+: .*\n  only the tensors of 1 have memory"),
        (adding_another, r"fails: RuntimeError: add_ reads a tensor of another module\n"),
        (growing, r"init= on 0 \(LayerNorm\) adds 0\.gain\n"),
        (reshaping, r"init= on 0 \(LayerNorm\) replaces 0\.weight \(2,\) float32 by \(3,\) float32\n"),
        (removing, r"removes 0\.bias\n"),
        (freezing, r"sets requires_grad of 0\.weight to False\n"),
        (tying_within, r"ties 0\.bias to 0\.weight\n"),
        (
            tying_across,
            r"on the model \(Sequential\) replaces 1\.weight \(2,\) float32 by a tensor of another module\n",
        ),
    ],
)
def test_functions_that_cannot_be_followed_are_refused(init, message):
    model = on_meta(lambda: nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2)))
    with pytest.raises(MaterializeError, match=message) as caught:
        tensors(model, init=init)
    if init is failing:
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Outer(nn.Module):
    """A tensor of its own above another module."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.empty(4, 4))
        self.head = nn.Linear(4, 4, bias=False)


@pytest.mark.parametrize(
    "take",
    [
        lambda table, head: head.weight.copy_(table),
        lambda table, head: head.weight.data.copy_(table.data * 0.5),
        lambda table, head: head.weight[0].add_(table.sum(dim=0)),
        lambda table, head: head.weight.__setitem__(0, table[0]),
        lambda table, head: setattr(head.weight, "data", table + 1),
        lambda table, head: setattr(head, "weight", table),
        lambda table, head: setattr(head, "weight", nn.Parameter(table.detach().clone())),
    ],
)
@pytest.mark.parametrize("is_blocked_on_meta", [False, True])
def test_values_are_not_taken_from_tensors_that_are_drawn_elsewhere(take, is_blocked_on_meta):
    """The head would get another draw of the table than the table itself."""

    def init(module):
        if isinstance(module, Outer):
            if is_blocked_on_meta:
                module.table.detach().numpy()  # works on memory alone, so that the table gets some
            nn.init.normal_(module.table)
            take(module.table, module.head)

    model = on_meta(Outer)
    assert set(tensors(model, ["table"], init=init)) == {"table"}
    with pytest.raises(
        MaterializeError,
        match=r"(computes head\.weight from the module|replaces head\.weight .* by a tensor of another)",
    ):
        tensors(model, ["head.weight"], init=init)


def test_a_module_around_others_may_work_on_the_memory_of_its_own_tensors():
    def init(module):
        if isinstance(module, Outer):
            module.table.detach().numpy()[:] = np.random.randn(4, 4)
            if module.table.std() > 0.1:
                module.table.div_(module.table.std())
            module.table.copy_(torch.where(torch.eye(4) > 0, module.table, torch.zeros(())))

    found = tensors(on_meta(Outer), init=init)
    assert found["table"].count_nonzero() == 4
    assert found["head.weight"].abs().max() <= 1 / 2


def test_reading_within_a_block_is_fine():
    model = on_meta(lambda: nn.ModuleDict({"block": nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2))}))
    assert tensors(model, ["block.1.weight"], init=adding_another, blocks=["block"])["block.1.weight"].eq(3).all()


def test_what_a_function_hangs_elsewhere_is_gone_in_the_next_call():
    def init(module):
        if isinstance(module, nn.Sequential):
            module[2].weight.copy_(module[0].weight)
            module[0].weight = nn.Parameter(torch.ones(2))

    model = on_meta(lambda: nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2), nn.LayerNorm(2)))
    assert tensors(model, ["0.weight", "1.weight"], init=init)["0.weight"].eq(1).all()
    with pytest.raises(MaterializeError, match="only the tensors of 2 have memory"):
        tensors(model, init=init)


def test_a_reset_that_fails_names_its_module():
    class Broken(nn.Linear):
        def reset_parameters(self):
            if not self.weight.is_meta:
                raise OSError("no file")

    model = on_meta(lambda: nn.Sequential(Broken(2, 2)))
    with pytest.raises(MaterializeError, match=r"reset_parameters on 0 \(.*Broken\) fails: OSError: no file") as caught:
        tensors(model, init="reset")
    assert isinstance(caught.value.__cause__, OSError)


def test_notes_on_parameters_reach_the_function():
    model = on_meta(lambda: nn.Linear(2, 2))
    model.weight.depth = 9

    def init(module):
        module.weight.data.fill_(module.weight.depth)

    assert tensors(model, init=init)["weight"].eq(9).all()


# --- ties -----------------------------------------------------------------------------------------------------------


def test_a_tied_tensor_gets_the_value_of_the_module_that_names_it_first():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 64, bias=False)
            self.table = nn.Embedding(64, 16)
            self.table.weight = self.head.weight

    found = tensors(on_meta(Tied), init="reset")
    assert list(found) == ["head.weight"]
    assert found["head.weight"].abs().max() <= 1 / 4  # the linear layer's bound; an embedding's would be normal


def test_a_module_shared_by_blocks_is_initialised_with_the_first():
    class Sharing(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared
            self.own = nn.Linear(2, 2)

    def init(module):
        module.calls = getattr(module, "calls", 0) + 1
        if isinstance(module, nn.LayerNorm):
            module.weight.detach().numpy()[:] = module.calls

    def build():
        shared = nn.LayerNorm(2)
        return nn.ModuleList([Sharing(shared), Sharing(shared)])

    found = tensors(on_meta(build), init=init, blocks=["0", "1"])
    assert found["0.shared.weight"].eq(1).all()
    assert "1.shared.weight" not in found


# --- the user's own values ------------------------------------------------------------------------------------------


def test_real_values_are_copied_and_never_replaced():
    torch.manual_seed(0)
    model = Model()
    nn.init.zeros_(model.scale)
    model.h[0].norm.running_mean.fill_(3)
    before = {fqn: tensor.detach().clone() for fqn, tensor in named(model).items()}
    for init in (None, *INITS, "empty"):
        found = tensors(model, init=init)
        assert_same(found, before)
        for tensor in found.values():
            tensor.fill_(1)
    assert_same(named(model), before)


def test_real_values_beside_missing_ones_stay():
    torch.manual_seed(0)
    model = Model()
    model.h[2].proj = nn.Linear(16, 8, device="meta")
    before = {fqn: t.detach().clone() for fqn, t in named(model).items() if not t.is_meta}
    found = tensors(model, init=gpt_init)
    assert_same({fqn: found[fqn] for fqn in before}, before)
    assert found["h.2.proj.weight"].std() == pytest.approx(0.002, rel=0.3)
    assert_same({fqn: t for fqn, t in named(model).items() if not t.is_meta}, before)


def test_casting_changes_floating_point_alone():
    model = Model()
    for found, source in (
        (tensors(model, dtype=torch.bfloat16), named(model)),
        (tensors(META, init=gpt_init, dtype=torch.bfloat16), tensors(META, init=gpt_init)),
    ):
        whole = {fqn: t.detach().bfloat16() if t.is_floating_point() else t for fqn, t in source.items()}
        assert_same(found, whole)
        assert found["h.0.norm.num_batches_tracked"].dtype == torch.int64


def test_strides_of_weights_are_kept():
    real = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    meta = copy.deepcopy(real).to("meta")
    for found in (tensors(real), tensors(meta, init="reset"), materialized(meta, init="empty").tensors):
        assert found["weight"].stride() == real.weight.stride()


def test_fake_tensors_have_no_values():
    with FakeTensorMode():
        model = Model()
        model.plain, model.more = torch.zeros(3), [torch.zeros(3)]
    with pytest.raises(MaterializeError, match="there is no value for"):
        tensors(model)
    assert_same(tensors(model, init=gpt_init), tensors(META, init=gpt_init))


def test_neither_the_skeleton_nor_the_model_changes():
    model = on_meta(Model)
    skeleton = make_skeleton(model)
    before = [(fqn, id(tensor)) for module in (model, skeleton.module) for fqn, tensor in named(module).items()]
    seen = []

    def init(module):
        seen.append(module)
        gpt_init(module)
        module.mark = True

    blocks = block_fqns(model)
    more = {"aliases": skeleton.aliases, "blocks": blocks, "init": init, "seed": 0, "device": "cpu"}
    initial_values(skeleton.module, list(skeleton.infos), skeleton.originals, **more)
    own = {*model.modules(), *skeleton.module.modules()}
    assert seen
    assert not own & set(seen)
    assert not any(hasattr(module, "mark") for module in own)
    assert before == [(fqn, id(tensor)) for module in (model, skeleton.module) for fqn, tensor in named(module).items()]


# --- empty ----------------------------------------------------------------------------------------------------------


def test_empty_only_allocates():
    values = materialized(META, init="empty", dtype=torch.float64)
    assert list(values.tensors) == FQNS
    assert values.unfilled == tuple(FQNS)
    for fqn, tensor in named(META).items():
        found = values.tensors[fqn]
        assert found.shape == tensor.shape
        assert found.dtype == (torch.float64 if tensor.is_floating_point() else tensor.dtype)


def test_empty_lets_the_huggingface_model_make_the_buffers_that_no_file_holds():
    model = on_meta(lambda: huggingface("LlamaForCausalLM"))
    values = materialized(model, init="empty")
    buffers = {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    assert set(values.tensors) - set(values.unfilled) == buffers
    eager = dict(huggingface("LlamaForCausalLM").named_buffers())
    assert_same({fqn: values.tensors[fqn] for fqn in buffers}, eager)
    assert materialized(model, sorted(buffers)[:1], init="empty").unfilled == ()


def test_empty_leaves_what_a_file_holds():
    values = materialized(on_meta(lambda: huggingface("ResNetForImageClassification")), init="empty")
    assert any(fqn.endswith("running_mean") for fqn in values.unfilled)
    assert set(values.unfilled) == set(values.tensors)


def test_empty_keeps_real_buffers_and_leaves_those_that_nobody_makes():
    class Masked(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.linear = nn.Linear(2, 2, device="meta")
            self.register_buffer("mask", torch.full((2, 2), 5.0, device=device), persistent=False)
            self.register_buffer("count", torch.zeros(1, device="meta"))

    real = materialized(Masked("cpu"), init="empty")
    assert real.unfilled == ("count", "linear.weight", "linear.bias")
    assert real.tensors["mask"].eq(5).all()
    assert "mask" in materialized(Masked("meta"), init="empty").unfilled


# --- sequences of specs ---------------------------------------------------------------------------------------------


class Started(nn.Module):
    """Has values that only its constructor knows."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.randn(width) + 5)
        self.register_buffer("mask", torch.full((width,), 2.0), persistent=False)
        nn.init.constant_(self.inner.bias, 9)

    def forward(self, x):
        return self.inner(x) * self.gain


def sequence():
    layers = [
        TiedLayerSpec("table", nn.Embedding, 16, 4),
        LayerSpec(Started, 4),
        LayerSpec(nn.Linear, 4, 4),
        nn.LayerNorm(4),
        TiedLayerSpec("table", nn.Linear, 4, 16),
    ]
    return on_meta(lambda: SpecSequential(layers))


def sequence_tensors(model, fqns=None, *, seed=0, **more):
    return tensors(model, fqns, constructed=model.recorded(seed), seed=seed, **more)


def test_layers_of_a_sequence_have_the_values_of_their_constructors():
    model = sequence()
    found = sequence_tensors(model)
    assert found["1.inner.bias"].eq(9).all()
    assert found["1.mask"].eq(2).all()
    assert found["1.gain"].mean() > 2
    assert "4.weight" not in found
    torch.manual_seed(0)
    assert_same(found, named(SpecSequential(model.specs)))  # drawn one after another, as in a plain build
    assert_same(sequence_tensors(model, blocks=[]), found)
    for fqn in found:
        assert_same(sequence_tensors(model, [fqn]), {fqn: found[fqn]})
        assert found[fqn].untyped_storage().nbytes() == found[fqn].nbytes
    assert not torch.equal(sequence_tensors(model, seed=1)["1.gain"], found["1.gain"])


def test_a_function_works_on_what_the_constructors_made():
    def init(module):
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(1)

    model = sequence()
    made, found = sequence_tensors(model), sequence_tensors(model, init=init)
    changed = {fqn for fqn in found if not torch.equal(found[fqn], made[fqn])}
    assert changed == {"1.inner.weight", "2.weight"}
    assert_same(sequence_tensors(model, ["1.gain"], init=init), {"1.gain": found["1.gain"]})


def test_a_module_on_meta_within_a_sequence_needs_init():
    model = on_meta(lambda: SpecSequential([LayerSpec(nn.Linear, 2, 2), nn.LayerNorm(2)]))
    with pytest.raises(MaterializeError, match=r"no value for 2 tensors of SpecSequential: 1\.weight, 1\.bias\n"):
        sequence_tensors(model)
    assert set(sequence_tensors(model, init="reset")) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_empty_keeps_the_buffers_that_constructors_make():
    model = sequence()
    values = materialized(model, init="empty", constructed=model.recorded(0))
    assert "1.mask" not in values.unfilled
    assert values.tensors["1.mask"].eq(2).all()
    assert {"0.weight", "1.gain", "2.bias"} <= set(values.unfilled)


def test_a_class_that_builds_another_layer_the_next_time_is_refused():
    sizes = iter((3, 4))

    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(next(sizes)))

    model = on_meta(lambda: SpecSequential([LayerSpec(Growing)]))
    with pytest.raises(MaterializeError, match=r"constructor makes 0\.weight \(4,\) .* captured it made \(3,\)"):
        sequence_tensors(model)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_is_that_of_the_tensors_and_one_block():
    code = """
        import re, torch
        from torch import nn
        from fxpipe.capture.model.blocks import block_fqns
        from fxpipe.capture.model.skeleton import make_skeleton
        from fxpipe.runtime.build.values import initial_values

        torch.set_num_threads(1)
        MIB, width = 2**20, 1448  # a layer of 8 MiB, a block of 16 MiB
        def block():
            return nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False))
        def init(module):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight)
        def used():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
        def run(model, fqns):
            skeleton = make_skeleton(model)
            before = used()
            more = dict(aliases=skeleton.aliases, blocks=block_fqns(model), init=init, seed=0, device="cpu")
            values = initial_values(skeleton.module, fqns, skeleton.originals, **more)
            return (used() - before) / MIB, sum(t.nbytes for t in values.tensors.values()) / MIB
        with torch.device("meta"):
            small = nn.ModuleList([nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))] * 2)])
            model = nn.ModuleList([nn.ModuleList([block() for _ in range(12)])])
        run(small, ["0.0.0.weight"])  # what torch itself loads at first use
        peak, own = run(model, [f"0.{i}.{i % 2}.weight" for i in range(3, 9)])  # half of each block
        assert own < peak < own + 16, (peak, own)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
