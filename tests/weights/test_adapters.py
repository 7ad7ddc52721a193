"""Models that peft wrapped on meta start as peft starts them."""

import families
import peft
import pytest
import torch
from safetensors.torch import load_file

import fxpipe

# peft asks for it, until it follows transformers 5.24.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # OFT's own
]

FAMILY = families.FAMILIES["llama"]
TARGETS = ["q_proj", "down_proj"]
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS),
    "copy": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "rs-gaussian": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="gaussian"),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "tokens": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices={"embed_tokens": [1, 2]}),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_r=2, init_r=3, total_step=10, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


def compiled(model, stages=2):
    return fxpipe.compile(model, stages, (), FAMILY.batch(), microbatches=4, schedule="GPipe")


ORDINARY = [("lora", "huggingface"), ("copy", "empty"), ("ia3", "huggingface"), ("dora", "huggingface")]
OTHERS = [(kind, init) for kind in KINDS for init in ("huggingface", "empty") if (kind, init) not in ORDINARY]


@pytest.mark.parametrize(
    ("kind", "init"), [*ORDINARY, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_an_adapter_changes_nothing_at_first(kind, init, tmp_path):
    """Whatever the kind: the wrapped model computes what the plain one does, and what it trains is not all zero."""
    FAMILY.build("cpu").save_pretrained(tmp_path)
    pipe = compiled(peft.get_peft_model(FAMILY.build(), KINDS[kind]()))
    pipe.materialize(init=init)
    pipe.load(tmp_path)
    plain = compiled(FAMILY.build()).materialize(init=tmp_path)
    tokens = {"input_ids": FAMILY.batch()["input_ids"]}
    torch.testing.assert_close(pipe.infer(**tokens).logits, plain.infer(**tokens).logits)
    trained = {fqn: tensor for fqn, tensor in pipe.named_parameters() if tensor.requires_grad}
    assert trained
    assert any(tensor.any() for tensor in trained.values())
    pipe.step(**FAMILY.batch())
    assert any(tensor.grad.any() for tensor in trained.values())


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft asks for it too
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_a_prompt_starts_as_its_constructor_leaves_it(kind, tmp_path):
    FAMILY.build("cpu").save_pretrained(tmp_path)
    configuration = getattr(peft, kind)(num_virtual_tokens=8, task_type="CAUSAL_LM")
    pipe = compiled(peft.get_peft_model(FAMILY.build(), configuration)).materialize(init=tmp_path)
    prefix = pipe.state_dict(full=True)["prompt_encoder.default.embedding.weight"]
    assert 0.8 < prefix.std() < 1.2
    pipe.step(**FAMILY.batch())
    assert any(parameter.grad.any() for parameter in pipe.parameters() if parameter.requires_grad)


def test_what_is_trained_beside_its_original_starts_as_its_copy():
    pipe = compiled(peft.get_peft_model(FAMILY.build(), KINDS["copy"]())).materialize(init="huggingface")
    named = pipe.state_dict()
    start = "base_model.model.lm_head"
    copied = named[f"{start}.modules_to_save.default.weight"]
    assert copied.any()
    if f"{start}.original_module.weight" in named:
        assert torch.equal(copied, named[f"{start}.original_module.weight"])


def test_a_recorded_adapter_has_the_bits_of_an_eager_one():
    torch.manual_seed(4)
    eager = peft.get_peft_model(built(), KINDS["copy"]()).state_dict()
    with fxpipe.deferred_init(seed=4):
        model = peft.get_peft_model(built(), KINDS["copy"]())
    named = compiled(model).materialize().state_dict()
    assert set(named) <= set(eager)
    assert {fqn for fqn, tensor in named.items() if not torch.equal(tensor, eager[fqn])} == set()


def built():
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILY.options)).eval()


def test_a_wrapped_model_saves_its_adapters_as_peft_would(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(FAMILY.build("cpu"), KINDS["copy"]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "theirs")
    with compiled(model).materialize() as pipe:
        pipe.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    assert {name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])} == set()
    configurations = [(tmp_path / part / "adapter_config.json").read_text() for part in ("theirs", "ours")]
    assert configurations[0] == configurations[1]


def test_an_adapter_does_not_fit_a_model_without_one(tmp_path):
    model = peft.get_peft_model(FAMILY.build("cpu"), KINDS["lora"]())
    model.save_pretrained(tmp_path)
    message = "is an adapter of peft, and LlamaForCausalLM has none"
    with compiled(FAMILY.build("cpu")).materialize() as pipe, pytest.raises(fxpipe.WeightsError, match=message):
        pipe.load(tmp_path)
