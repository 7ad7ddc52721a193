import argparse
import dataclasses
import enum
import functools
import gc
import operator
import os
import pathlib
import pickle
import re
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxpipe.errors import SpecError
from fxpipe.ir.spec import LayerSpec, TensorInfo, TiedLayerSpec


class Block(nn.Module):
    def __init__(self, config, width=4, *layers, act=None, **more):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(width, width)


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    width: int = 4
    act: object = F.gelu
    names: set[str] = dataclasses.field(default_factory=lambda: {"a", "b", "c"})


class DictConfig:
    def __init__(self):
        self.width = 4

    def to_dict(self):
        return vars(self)


def twice(module, x):
    return module(module(x))


def run_python(code, **environment):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )


# --- construction is deferred -----------------------------------------------------------------------------------


def test_a_spec_of_a_layer_no_machine_could_hold_allocates_nothing():
    spec = LayerSpec(nn.Linear, 10**9, 10**9)
    assert spec.build(device="meta").weight.shape == (10**9, 10**9)


def test_build_alone_runs_the_constructor():
    calls = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            calls.append(1)

    spec = LayerSpec(Counting)
    assert (repr(spec), spec.fingerprint) == (repr(spec), spec.fingerprint)
    assert calls == []
    spec.build()
    assert calls == [1]


def test_build_makes_a_new_module_each_time():
    spec = LayerSpec(nn.Linear, 2, 2)
    assert spec.build() is not spec.build()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "float64"])
def test_build_honours_device_and_dtype_and_leaves_torch_defaults_alone(dtype):
    module = LayerSpec(nn.BatchNorm1d, 3).build(device="meta", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {t.dtype for t in module.parameters()} == {wanted}
    assert module.num_batches_tracked.dtype == torch.int64
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"


def test_build_gives_the_asked_dtype_even_where_the_class_names_another():
    assert LayerSpec(nn.Linear, 2, 2, dtype=torch.float32).build(dtype=torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int64, "int32", "nonsense"])
def test_build_refuses_a_dtype_that_is_not_floating_point(dtype):
    with pytest.raises(SpecError, match="cannot build a layer in dtype"):
        LayerSpec(nn.Linear, 2, 2).build(dtype=dtype)
    assert torch.get_default_dtype() == torch.float32


def test_an_error_in_a_constructor_says_which_spec_was_being_built():
    with pytest.raises(RuntimeError) as caught:
        LayerSpec(nn.Linear, -1, 2).build()
    assert "while building LayerSpec(Linear, -1, 2)" in "".join(caught.value.__notes__)


# --- the check at creation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), F.gelu, "Linear", None, functools.partial(nn.Linear, 2)])
def test_something_that_is_no_class_is_refused_at_once(thing):
    with pytest.raises(SpecError, match="not a class"):
        LayerSpec(thing)


@pytest.mark.parametrize("make", [LayerSpec, functools.partial(TiedLayerSpec, "key")])
def test_a_class_that_is_no_module_is_refused_by_name(make):
    with pytest.raises(SpecError, match="builtins:dict, which is not a subclass of torch"):
        make(dict)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((2,), {}), ((2, 2, True, None, None, 1), {}), ((2, 2), {"nonsense": 1}), ((2, 2), {"in_features": 1})],
)
def test_arguments_that_do_not_fit_the_constructor_are_refused_naming_the_class(args, kwargs):
    with pytest.raises(SpecError, match="Linear cannot be built with the arguments"):
        LayerSpec(nn.Linear, *args, **kwargs)


def test_an_argument_that_cannot_be_compared_is_named():
    with pytest.raises(SpecError, match=r"Block argument 'config'\['lock'\]"):
        LayerSpec(Block, {"lock": __import__("threading").Lock()})


@pytest.mark.parametrize("held", [nn.Linear(2, 2), nn.Parameter(torch.ones(2)), [nn.BatchNorm1d(2, affine=False)]])
def test_weights_are_not_arguments(held):
    with pytest.raises(SpecError, match="holds weights"):
        LayerSpec(Block, held)


# --- immutability -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["typename", "module_args", "module_kwargs", "fingerprint", "_args", "new"])
def test_nothing_can_be_assigned_or_deleted(name):
    spec = LayerSpec(nn.Linear, 2, 2)
    with pytest.raises(AttributeError, match="never changes"):
        setattr(spec, name, 1)
    with pytest.raises(AttributeError, match="never changes"):
        delattr(spec, name)


def test_changing_an_argument_after_creation_changes_nothing():
    config, tensor = {"sizes": [1, 2]}, torch.zeros(2)
    spec = LayerSpec(Block, config, act=tensor)
    before = spec.fingerprint
    config["sizes"].append(3)
    tensor.add_(1)
    assert spec.module_args == ({"sizes": [1, 2]},)
    assert spec.module_kwargs["act"].tolist() == [0, 0]
    assert spec.fingerprint == before
    assert spec != LayerSpec(Block, config, act=tensor)


def test_changing_what_a_spec_hands_out_changes_nothing():
    spec = LayerSpec(Block, {"sizes": [1]}, act=[1])
    spec.module_args[0]["sizes"].append(2)
    spec.module_kwargs["act"].append(2)
    spec.build().config["sizes"].append(2)
    assert (spec.module_args, spec.module_kwargs) == (({"sizes": [1]},), {"act": [1]})


# --- equality, hash, fingerprint --------------------------------------------------------------------------------

DIFFERENT = [
    LayerSpec(nn.Linear, 2, 4),
    LayerSpec(nn.Linear, 4, 2),
    LayerSpec(nn.Linear, 2, 4, bias=False),
    LayerSpec(nn.Linear, 2, 4, dtype=torch.float64),
    LayerSpec(nn.Linear, 2, 4, dtype=torch.float32),
    LayerSpec(nn.Linear, 2, 4, device="cpu"),
    LayerSpec(nn.Linear, 2, 4, device=torch.device("meta")),
    LayerSpec(nn.Identity, 2, 4),
    LayerSpec(nn.Identity, 2.0, 4),
    LayerSpec(nn.Identity, True, 4),
    LayerSpec(nn.Identity, None),
    LayerSpec(nn.Identity, [1, 2]),
    LayerSpec(nn.Identity, (1, 2)),
    LayerSpec(nn.Identity, {1, 2}),
    LayerSpec(nn.Identity, {1: 2}),
    LayerSpec(nn.Identity, F.gelu),
    LayerSpec(nn.Identity, F.relu),
    LayerSpec(nn.Identity, torch.relu),
    LayerSpec(nn.Identity, nn.GELU),
    LayerSpec(nn.Identity, nn.GELU()),
    LayerSpec(nn.Identity, nn.GELU(approximate="tanh")),
    LayerSpec(nn.Identity, functools.partial(F.gelu, approximate="tanh")),
    LayerSpec(nn.Identity, lambda x: x + 1),
    LayerSpec(nn.Identity, lambda x: x + 2),
    LayerSpec(nn.Identity, Color.RED),
    LayerSpec(nn.Identity, Config()),
    LayerSpec(nn.Identity, Config(act=F.relu)),
    LayerSpec(nn.Identity, DictConfig()),
    LayerSpec(nn.Identity, torch.zeros(2)),
    LayerSpec(nn.Identity, torch.ones(2)),
    LayerSpec(nn.Identity, torch.zeros(2, dtype=torch.bfloat16)),
    LayerSpec(nn.Identity, torch.zeros(2, device="meta")),
    LayerSpec(nn.Identity, np.zeros(2)),
    LayerSpec(nn.Identity, np.float32(1)),
    LayerSpec(nn.Identity, torch.Size([1, 2])),
    LayerSpec(nn.Identity, torch.strided),
    LayerSpec(nn.Identity, torch.zeros(2).to_sparse()),
    LayerSpec(nn.Identity, re.compile("a+")),
    LayerSpec(nn.Identity, re.compile("b+")),
    LayerSpec(nn.Identity, argparse.Namespace(width=4)),
    LayerSpec(nn.Identity, argparse.Namespace(width=8)),
    LayerSpec(nn.Identity, operator.itemgetter(1)),
    LayerSpec(nn.Identity, range(3)),
    LayerSpec(nn.Identity, pathlib.PurePosixPath("a")),
    TiedLayerSpec("a", nn.Linear, 2, 4),
    TiedLayerSpec("b", nn.Linear, 2, 4),
    TiedLayerSpec("a", nn.Linear, 2, 4, forward_fn=twice),
    TiedLayerSpec("a", nn.Linear, 2, 4, tied_weight_attr="bias"),
    TiedLayerSpec("a", nn.Linear, 2, 4, tied_weight_attr=("weight", "bias")),
    LayerSpec.captured("h.0", "m:Block"),
    LayerSpec.captured("h.1", "m:Block"),
    LayerSpec.captured("h.0", "m:Other"),
    LayerSpec.captured("h.0", "m:Block", call=1),
    LayerSpec.captured("h.0", "m:Block", parameters=(TensorInfo("h.0.w", (2,), "float32", 8, True),)),
    LayerSpec.captured("h.0", "m:Block", buffers=(TensorInfo("h.0.w", (2,), "float32", 8, False, False),)),
    LayerSpec.captured("h.0", "m:Block", ties=(("k", "w"),)),
]


def test_specs_that_differ_in_anything_are_unequal_and_have_different_fingerprints():
    assert len(set(DIFFERENT)) == len(DIFFERENT)
    assert len({spec.fingerprint for spec in DIFFERENT}) == len(DIFFERENT)


def test_equal_class_and_arguments_make_equal_specs():
    def make():
        return LayerSpec(Block, {"b": {3, 1}, "a": np.arange(3)}, act=Config(), x=torch.ones(2), y=lambda x: x)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make().fingerprint == make().fingerprint


def test_an_argument_by_position_or_by_name_is_the_same_argument():
    assert LayerSpec(nn.Linear, 2, out_features=4) == LayerSpec(nn.Linear, in_features=2, out_features=4)


def test_order_counts_where_python_says_so():
    from collections import OrderedDict

    assert LayerSpec(Block, {"a": 1, "b": 2}) == LayerSpec(Block, {"b": 2, "a": 1})
    assert LayerSpec(Block, OrderedDict(a=1, b=2)) != LayerSpec(Block, OrderedDict(b=2, a=1))


def test_a_spec_does_not_equal_other_things():
    assert LayerSpec(nn.Identity) != "LayerSpec(Identity)"


def test_an_argument_may_contain_itself():
    def loop(last):
        items = [1]
        items.append(items)
        items.append(last)
        return LayerSpec(nn.Identity, items)

    assert loop(1).fingerprint == loop(1).fingerprint != loop(2).fingerprint


def test_a_transformers_config_is_an_argument_like_any_other():
    transformers = pytest.importorskip("transformers")
    small = transformers.GPT2Config(n_embd=8, n_head=2)
    spec = LayerSpec(Block, small)
    assert spec == LayerSpec(Block, transformers.GPT2Config(n_embd=8, n_head=2))
    small.n_embd = 16
    assert spec.module_args[0].n_embd == 8
    assert spec != LayerSpec(Block, small)
    assert pickle.loads(pickle.dumps(spec)) == spec


FINGERPRINTS = textwrap.dedent("""
    import dataclasses, functools, numpy as np, torch, torch.nn.functional as F
    from torch import nn
    from fxpipe.ir.spec import LayerSpec, TiedLayerSpec, TensorInfo

    @dataclasses.dataclass
    class Config:
        names: set

    class Local(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()

    strings = {"alpha", "beta", "gamma", "delta"}
    print(LayerSpec(nn.Linear, 2, 4, bias=False, dtype=torch.bfloat16).fingerprint)
    print(LayerSpec(Local, strings, {s: {s} for s in strings}, Config(strings), frozenset(strings)).fingerprint)
    tanh, info = functools.partial(F.gelu, approximate="tanh"), TensorInfo("w", (1,), "float32", 4, True)
    print(LayerSpec(Local, F.gelu, torch.relu, nn.GELU, nn.GELU(), tanh).fingerprint)
    print(LayerSpec(Local, torch.arange(5), np.arange(5), lambda x: x in {"a", "b"}, a=torch.device("cpu")).fingerprint)
    print(TiedLayerSpec("k", Local, forward_fn=lambda m, x: x @ m.weight.T, tied_weight_attr=["w", "b"]).fingerprint)
    print(LayerSpec.captured("h.0", "m:B", parameters=(info,)).fingerprint)
""")


def test_fingerprints_are_the_same_in_every_process_and_hash_seed():
    seen = set()
    for seed in ("0", "1", "12345"):
        done = run_python(FINGERPRINTS, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(set(seen.pop().split())) == 6


# --- pickling and repr ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(nn.Linear, 2, 4, bias=False),
        TiedLayerSpec("k", nn.Linear, 2, 4, forward_fn=twice, tied_weight_attr=["weight", "bias"]),
        LayerSpec.captured("h.0", "m:Block", call=1, parameters=(TensorInfo("w", (1,), "float32", 4, True),)),
        LayerSpec.captured("h.0", "m:Block", ties=(("k", "w"), ("l", "b"))),
    ],
)
def test_a_pickled_spec_comes_back_equal(spec):
    back = pickle.loads(pickle.dumps(spec))
    assert back == spec
    assert type(back) is type(spec)
    assert (back.fingerprint, repr(back), back.ties) == (spec.fingerprint, repr(spec), spec.ties)


def test_repr_shows_key_and_arguments():
    assert repr(LayerSpec(nn.Linear, 2, out_features=4)) == "LayerSpec(Linear, 2, out_features=4)"
    tied = repr(TiedLayerSpec("embed", nn.Linear, 2, 4, forward_fn=twice, tied_weight_attr=["weight", "bias"]))
    assert tied.startswith("TiedLayerSpec('embed', Linear, 2, 4, forward_fn=<function twice")
    assert tied.endswith("tied_weight_attr=('weight', 'bias'))")
    assert len(repr(LayerSpec(nn.Identity, {str(i): "x" * 1000 for i in range(1000)}))) < 1000


# --- tied specs -------------------------------------------------------------------------------------------------


def test_tied_weight_attr_is_a_name_or_several():
    assert TiedLayerSpec("k", nn.Linear, 2, 2).tied_weight_attr == ("weight",)
    assert TiedLayerSpec("k", nn.Linear, 2, 2, tied_weight_attr="bias").tied_weight_attr == ("bias",)
    several = TiedLayerSpec("k", nn.Linear, 2, 2, tied_weight_attr=["weight", "bias"])
    assert several.ties == (("k", "weight"), ("k", "bias"))


@pytest.mark.parametrize("attrs", ["", [], ["weight", "weight"], [1]])
def test_a_tied_weight_attr_that_names_nothing_is_refused(attrs):
    with pytest.raises(SpecError, match="tied_weight_attr is"):
        TiedLayerSpec("k", nn.Linear, 2, 2, tied_weight_attr=attrs)


@pytest.mark.parametrize("key", ["", None, 3])
def test_a_key_is_a_name(key):
    with pytest.raises(SpecError, match="key is"):
        TiedLayerSpec(key, nn.Linear, 2, 2)


def test_a_forward_fn_that_cannot_be_called_is_refused():
    with pytest.raises(SpecError, match="forward_fn is 'twice'"):
        TiedLayerSpec("k", nn.Linear, 2, 2, forward_fn="twice")


def test_tied_specs_of_one_class_and_arguments_describe_one_module():
    first = TiedLayerSpec("k", nn.Linear, 2, 2)
    again = TiedLayerSpec("k", nn.Linear, in_features=2, out_features=2, forward_fn=twice)
    other = TiedLayerSpec("k", nn.Linear, 2, 2, bias=False)
    assert first.module_fingerprint == again.module_fingerprint != other.module_fingerprint
    assert first != again


def test_a_forward_fn_may_close_over_anything():
    trainer = {"lock": __import__("threading").Lock()}

    def make(n):
        return TiedLayerSpec("k", nn.Linear, 2, 2, forward_fn=lambda module, x: (module(x), trainer, n))

    assert make(1) == make(1) != make(2)


# --- captured specs ---------------------------------------------------------------------------------------------


class Builder:
    def build_layer(self, fqn, device, dtype):
        return nn.Identity(fqn, device, dtype) if device is None else nn.Linear(1, 1, device=device, dtype=dtype)


def test_a_captured_spec_tells_what_was_captured():
    info = TensorInfo("h.0.w", (2, 3), "float32", 24, trainable=True)
    buffer = TensorInfo("h.0.b", (1,), "int64", 8, trainable=False, persistent=False)
    spec = LayerSpec.captured("h.0", "m:Block", call=2, parameters=(info,), buffers=(buffer,))
    assert (spec.fqn, spec.type_path, spec.call, spec.ties) == ("h.0", "m:Block", 2, ())
    assert (spec.parameters, spec.buffers) == ((info,), (buffer,))
    assert (spec.typename, spec.module_args, spec.module_kwargs) == (None, (), {})


def test_later_calls_of_a_module_have_layer_names_of_their_own():
    names = [LayerSpec.captured("h.0", "m:Block", call=call).layer_name for call in range(3)]
    assert names == ["h.0", "h.0@1", "h.0@2"]


def test_a_captured_layer_with_ties_is_a_tied_layer_spec():
    spec = LayerSpec.captured("decoder", "m:Linear", ties=(("wte.weight", "weight"), ("bias", "bias")))
    assert isinstance(spec, TiedLayerSpec)
    assert (spec.key, spec.tied_weight_attr, spec.forward_fn) == ("wte.weight", ("weight", "bias"), None)
    with pytest.raises(SpecError, match="has no ties"):
        TiedLayerSpec.captured("decoder", "m:Linear")


def test_a_captured_spec_builds_while_the_capture_lives_and_says_so_afterwards():
    builder = Builder()
    spec = LayerSpec.captured("h.0", "m:Block", handle=builder)
    assert isinstance(spec.build(), nn.Identity)
    assert spec.build(device="meta", dtype=torch.float64).weight.dtype == torch.float64
    del builder
    gc.collect()
    with pytest.raises(SpecError, match=r"captured layer 'h\.0' \(m:Block\): the capture of its model is gone"):
        spec.build()


def test_the_handle_is_outside_equality_hash_pickle_and_fingerprint():
    builder = Builder()
    watch = weakref.ref(builder)
    live, dead = LayerSpec.captured("h.0", "m:Block", handle=builder), LayerSpec.captured("h.0", "m:Block")
    assert live == dead
    assert (hash(live), live.fingerprint) == (hash(dead), dead.fingerprint)
    with pytest.raises(SpecError, match="is gone"):
        pickle.loads(pickle.dumps(live)).build()
    del builder
    gc.collect()
    assert watch() is None


def test_describing_layers_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fxpipe.ir.spec import LayerSpec\n"
        "print(LayerSpec.captured('h.0', 'm:Block').fingerprint)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == LayerSpec.captured("h.0", "m:Block").fingerprint, done.stderr
