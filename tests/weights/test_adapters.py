"""Models that peft wrapped: they start as peft starts them, and what they save is what peft saves."""

import dataclasses
import json

import families
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import fxpipe

# peft asks for it, until it follows transformers 5.24.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # OFT's own
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),  # BOFT's own
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

LLAMA = families.FAMILIES["llama"]
FAMILY = dataclasses.replace(LLAMA, options={**LLAMA.options, "num_hidden_layers": 2, "max_position_embeddings": 32})
TARGETS = ["q_proj", "down_proj"]
PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS),
    "copy": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"], use_dora=True),
    "gaussian": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="gaussian"),
    "orthogonal": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="orthogonal"),
    "random": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "bias": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, bias="all", task_type="CAUSAL_LM"),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "tokens": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices={"embed_tokens": [4, 5]}),
    "only-tokens": lambda: peft.TrainableTokensConfig(token_indices=[4, 5], target_modules=["embed_tokens"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_r=2, init_r=3, total_step=10, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=TARGETS),
    "vera-unsaved": lambda: peft.VeraConfig(r=2, target_modules=TARGETS, save_projection=False),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, topk=2, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=2, target_modules=TARGETS),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=5, target_modules=TARGETS),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=TARGETS),
    "prompt": lambda: peft.PromptTuningConfig(**PROMPT),
    "prefix": lambda: peft.PrefixTuningConfig(**PROMPT),
    "prefix-encoder": lambda: peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=6),
    "p-tuning": lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=6),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
}
ENCODED = ("prefix-encoder", "p-tuning")
"""What these save is what an encoder makes: peft itself does not go on training from it."""
ORDINARY = ("copy", "vera", "prefix", "p-tuning")


def compiled(model, stages=2):
    return fxpipe.compile(model, stages, (), FAMILY.batch(), microbatches=4, schedule="GPipe")


def built():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILY.options)).eval()


def wrapped(model, kind, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return peft.get_peft_model(model, KINDS[kind]()).eval()


def differing(found, wanted):
    """Names whose tensors are not the same bit for bit."""
    assert set(found) == set(wanted)
    return {name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)}


def alike(ours, theirs):
    """See that two directories hold the same tensors and configuration; a card for people is peft's alone."""
    names = [{str(file.relative_to(path)) for file in path.rglob("*.*")} for path in (ours, theirs)]
    assert names[0] == names[1] - {"README.md"}
    for name in names[0]:
        if name.endswith(".json"):
            one, other = (json.loads((path / name).read_text()) for path in (ours, theirs))
            for each in (one, other):  # peft keeps a set, and writes it in any order
                each["target_modules"] = each.get("target_modules") and sorted(each["target_modules"])
            assert one == other
        else:
            assert differing(load_file(ours / name), load_file(theirs / name)) == set()


@pytest.mark.parametrize(
    "kind", [*ORDINARY, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in ORDINARY)]
)
def test_a_wrapped_model_starts_is_saved_and_read_as_by_peft(kind, tmp_path):
    """On meta: as ``from_pretrained``, then ``torch.manual_seed``, then ``get_peft_model``; trained, written, read."""
    FAMILY.build("cpu").save_pretrained(tmp_path / "base")
    theirs = wrapped(FAMILY.build("cpu"), kind, seed=5)
    with compiled(wrapped(FAMILY.build(), kind)) as pipe:
        pipe.materialize(init=tmp_path / "base", seed=5)
        assert differing(pipe.state_dict(full=True), theirs.state_dict()) == set()
        pipe.step(**FAMILY.batch())
        # AdaLoRA's ranks are numbers that peft keeps frozen, but for those that it moves to meta.
        trained = [p for fqn, p in pipe.named_parameters() if p.requires_grad and "ranknum" not in fqn]
        assert any(parameter.grad.any() for parameter in trained)
        torch.optim.SGD(trained, lr=0.5).step()
        pipe.save(tmp_path / "ours", only="trainable")
        theirs.load_state_dict(pipe.state_dict(full=True))
        theirs.save_pretrained(tmp_path / "theirs")
        alike(tmp_path / "ours", tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(FAMILY.build("cpu"), tmp_path / "ours").eval()
        tokens = {"input_ids": FAMILY.batch()["input_ids"]}
        with torch.no_grad():
            torch.testing.assert_close(pipe.infer(**tokens).logits, back(**tokens).logits)
        if kind in ENCODED:
            with pytest.raises(fxpipe.WeightsError, match="is what an encoder makes"):
                pipe.load(tmp_path / "ours")
            return
        wanted = {fqn: tensor.clone() for fqn, tensor in pipe.state_dict().items()}
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1)
        pipe.load(tmp_path / "ours")
        assert differing(pipe.state_dict(), wanted) == set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_bits_when_recorded(kind, tmp_path):
    """And what peft makes of base weights follows those that are read later; the rest stays."""
    torch.manual_seed(4)
    eager = wrapped(built(), kind).state_dict()
    with fxpipe.deferred_init(seed=4):
        model = wrapped(built(), kind)
    with compiled(model).materialize() as pipe:
        assert differing(pipe.state_dict(full=True), eager) == set()
        FAMILY.build("cpu").save_pretrained(tmp_path)
        pipe.load(tmp_path)
        pipe.save(tmp_path / "adapter", only="trainable")
        back = peft.PeftModel.from_pretrained(FAMILY.build("cpu"), tmp_path / "adapter").eval()
        tokens = {"input_ids": FAMILY.batch()["input_ids"]}
        with torch.no_grad():
            torch.testing.assert_close(pipe.infer(**tokens).logits, back(**tokens).logits)


def test_a_recorded_adapter_has_the_bits_of_an_eager_one_and_follows_the_weights_read_later(tmp_path):
    torch.manual_seed(4)
    eager = wrapped(built(), "copy").state_dict()
    with fxpipe.deferred_init(seed=4):
        model = wrapped(built(), "copy")
    base = FAMILY.build("cpu")
    base.save_pretrained(tmp_path)
    with compiled(model).materialize() as pipe:
        found = pipe.state_dict()
        assert differing(found, {fqn: tensor for fqn, tensor in eager.items() if fqn in found}) == set()
        pipe.load(tmp_path)
        wanted = wrapped(base, "copy").state_dict()
        wanted.update({fqn: tensor for fqn, tensor in eager.items() if ".lora_" in fqn and "magnitude" not in fqn})
        assert differing(pipe.state_dict(), {fqn: wanted[fqn] for fqn in found}) == set()


def test_several_adapters_go_into_folders_and_come_back(tmp_path):
    def two(device):
        model = wrapped(FAMILY.build(device), "lora")
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["down_proj", "v_proj"]))
        return model

    FAMILY.build("cpu").save_pretrained(tmp_path / "base")
    with compiled(two("meta")).materialize(init=tmp_path / "base") as pipe:
        with torch.no_grad():
            for number, parameter in enumerate(pipe.parameters()):
                parameter.add_(number)
        wanted = {fqn: tensor.clone() for fqn, tensor in pipe.state_dict().items()}
        theirs = two("cpu")
        theirs.load_state_dict(pipe.state_dict(full=True))
        theirs.save_pretrained(tmp_path / "theirs")
        pipe.save(tmp_path / "ours", only="trainable")
        alike(tmp_path / "ours", tmp_path / "theirs")
        with torch.no_grad():
            for fqn, parameter in pipe.named_parameters():
                if ".lora_" in fqn:
                    parameter.fill_(9)
        pipe.load(tmp_path / "ours" / "other")
        others = {fqn for fqn in wanted if ".other." in fqn}
        assert differing(pipe.state_dict(), wanted) == {fqn for fqn in wanted if ".lora_" in fqn} - others
        pipe.load(tmp_path / "ours")
        assert differing(pipe.state_dict(), wanted) == set()


def test_an_adapter_without_a_wrapper_around_the_model_starts_as_peft_starts_it(tmp_path):
    """As ``add_adapter`` of transformers has it: peft's layers are put into the model, which stays what it is."""

    def injected(device, seed):
        model = FAMILY.build(device)
        torch.manual_seed(seed)
        return peft.inject_adapter_in_model(KINDS["lora"](), model)

    FAMILY.build("cpu").save_pretrained(tmp_path / "base")
    wanted = injected("cpu", 6).state_dict()
    with compiled(injected("meta", 0)).materialize(init=tmp_path / "base", seed=6) as pipe:
        assert differing(pipe.state_dict(full=True), wanted) == set()
        pipe.save(tmp_path / "adapter", only="trainable")
        with torch.no_grad():
            for parameter in pipe.parameters():
                parameter.add_(1 if parameter.requires_grad else 0)
        pipe.load(tmp_path / "adapter")
        assert differing(pipe.state_dict(full=True), wanted) == set()


def test_an_adapter_does_not_fit_a_model_without_one(tmp_path):
    model = wrapped(FAMILY.build("cpu"), "lora")
    model.save_pretrained(tmp_path)
    message = "is an adapter of peft, and LlamaForCausalLM has none"
    with compiled(FAMILY.build("cpu")).materialize() as pipe, pytest.raises(fxpipe.WeightsError, match=message):
        pipe.load(tmp_path)
