"""Directories that transformers writes go into pipelines and come back, every bit."""

import json

import families
import pytest
import torch
from safetensors.torch import load_file

import fxpipe


def files_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_directory_goes_into_stages_and_back(name, stages, tmp_path):
    """The names, shapes and bits that come back are those that transformers itself writes."""
    family = families.FAMILIES[name]
    model = family.build("cpu")
    numbers = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=numbers)
    model.save_pretrained(tmp_path / "theirs")
    pipe = fxpipe.compile(family.build(), stages, (), family.batch(), microbatches=4, schedule="GPipe")
    with pipe.materialize(init=tmp_path / "theirs"):
        wanted = model.state_dict()
        found = pipe.state_dict()
        assert set(found) == set(wanted)
        assert {fqn for fqn in wanted if not torch.equal(found[fqn], wanted[fqn])} == set()
        pipe.save_pretrained(tmp_path / "ours")
        pipe.save(tmp_path / "checkpoint")
    theirs, ours = files_of(tmp_path / "theirs"), files_of(tmp_path / "ours")
    assert set(ours) == set(theirs)
    assert {fqn for fqn in theirs if not torch.equal(ours[fqn], theirs[fqn])} == set()
    back = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert {fqn for fqn in wanted if not torch.equal(back[fqn], wanted[fqn])} == set()
    configurations = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("theirs", "ours")]
    for each in configurations:
        each.pop("problem_type", None)  # a forward with labels sets it
    assert configurations[0] == configurations[1]
    again = fxpipe.compile(family.build(), 5 - stages, (), family.batch(), microbatches=4, schedule="GPipe")
    with again.materialize(init=tmp_path / "checkpoint"):
        found = again.state_dict()
        assert {fqn for fqn in wanted if not torch.equal(found[fqn], wanted[fqn])} == set()


def test_what_a_directory_leaves_out_because_it_can_be_computed_is_computed(tmp_path):
    """transformers writes no positions of Marian, and makes them anew when it reads the rest."""
    options = families.FAMILIES["whisper"].options
    left_out = ("num_mel_bins", "max_source_positions", "max_target_positions")
    options = {
        **{name: value for name, value in options.items() if name not in left_out},
        "max_position_embeddings": 16,
    }
    family = families.Family("MarianMTModel", "MarianConfig", options)
    family.build("cpu").save_pretrained(tmp_path / "theirs")
    assert not any("embed_positions" in name for name in files_of(tmp_path / "theirs"))
    wanted = type(family.build()).from_pretrained(tmp_path / "theirs").state_dict()
    with fxpipe.compile(family.build(), 2, (), family.batch(), microbatches=4, schedule="GPipe") as pipe:
        pipe.materialize(init=tmp_path / "theirs")
        found = pipe.state_dict()
        assert {fqn for fqn in wanted if not torch.equal(found[fqn], wanted[fqn])} == set()
        assert torch.isfinite(pipe.step(**family.batch()))
