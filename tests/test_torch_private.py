"""Each private name of torch in ``fxpipe._torch`` does what it is used for; these fail when torch changes one."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.utils.checkpoint import checkpoint

from fxpipe import _torch

# --- runtime ---


def parameters_of(function):
    return list(inspect.signature(function).parameters)


BACKWARD = ["self", "num_microbatches", "loss_fn", "target", "received_grad_meta", "loss_kwargs"]
PREPARES = {  # and the parameters by version of torch: until 2.11, 2.12, from 2.13
    "_get_init_p2p_neighbors_ops": [["self"]],
    "_warmup_forward_vote": [["self", "has_backward", "received_acc"]],
    "_warmup_backward_result": [["self", "received_result"]],
    "_prepare_forward_infra": [
        ["self", "num_microbatches", "args", "kwargs"],
        ["self", "num_microbatches", "args", "kwargs", "has_backward"],
    ],
    "_prepare_backward_infra": [BACKWARD[:2], BACKWARD[:5], BACKWARD],
    "_post_metadata_inference_cleanup": [["self"]],
}


def test_torch_s_stage_prepares_itself_in_these_methods():
    source = inspect.getsource(schedules)
    called = [name for name in PREPARES if f".{name}(" in source]
    assert {"_prepare_forward_infra", "_prepare_backward_infra"} < set(called) <= vars(_torch.WithoutMetadata).keys()
    for name in called:
        assert parameters_of(getattr(PipelineStage, name)) in PREPARES[name], name


def test_torch_s_schedules_read_these_of_a_stage_that_skipped_preparing():
    source = inspect.getsource(schedules)
    from_2_13 = "defer_pp_recv" in source
    assert ("stage.args_recv_info[0]" in source) == from_2_13
    assert ("stage.act_send_info.values()" in source) == from_2_13


def test_the_backward_of_weights_leaves_that_of_inputs_in_these_nodes():
    weights, x = [torch.randn(3, requires_grad=True) for _ in range(4)], torch.randn(3, requires_grad=True)
    first = x * weights[0]
    both = first * (weights[1] + weights[2])
    groups = _torch.weight_groups([both.sum(), weights[3].sum()], [x], weights)
    assert [nodes for nodes, _, _ in groups] == [[first.grad_fn], [both.grad_fn]]
    assert [{id(weight) for weight in reached} for _, reached, _ in groups] == [
        {id(weights[0])},
        {id(weights[1]), id(weights[2])},
    ]
    twice = both * weights[0]
    assert sorted(len(nodes) for nodes, _, _ in _torch.weight_groups([twice.sum()], [x], weights)) == [1, 2]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_modules_are_told_apart():
    plain, in_place = nn.Linear(1, 1), nn.Linear(1, 1)
    in_place.compile(backend="eager")
    wrapped = torch.compile(nn.Linear(1, 1), backend="eager")
    assert [_torch.compiled_in_place(module) for module in (plain, in_place, wrapped)] == [False, True, False]
    assert [_torch.is_compiled(module) for module in (plain, in_place, wrapped)] == [False, True, True]


def test_accumulation_hooks_are_seen():
    parameter = nn.Parameter(torch.ones(1))
    assert not _torch.has_accumulation_hooks(parameter)
    handle = parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert _torch.has_accumulation_hooks(parameter)
    handle.remove()
    assert not _torch.has_accumulation_hooks(parameter, others=True)
    handle = parameter.register_hook(lambda gradient: gradient)
    assert not _torch.has_accumulation_hooks(parameter)
    assert _torch.has_accumulation_hooks(parameter, others=True)
    handle.remove()
    assert not _torch.has_accumulation_hooks(parameter, others=True)


def test_both_kinds_of_checkpointing_are_heard_of_and_recomputation_is_surrounded():
    heard, entered = [], []

    class Around:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    def called(function, reentrant):
        heard.append((function, reentrant))
        return Around()

    x = torch.ones(2, requires_grad=True)
    with _torch.watched_checkpoints(called):
        one = checkpoint(torch.sin, x, use_reentrant=True)
        two = checkpoint(torch.cos, x, use_reentrant=False)
    assert heard == [(torch.sin, True), (torch.cos, False)]
    assert entered == []
    (one + two).sum().backward()
    assert entered == ["in", "out"]
    checkpoint(torch.sin, x, use_reentrant=False)
    assert len(heard) == 2


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_store_of_all_ranks_is_found(one_rank):
    store = _torch.default_store()
    assert not store.check(["fxpipe/test"])
    store.compare_set("fxpipe/test", "", "first")
    store.compare_set("fxpipe/test", "", "second")
    assert store.get("fxpipe/test") == b"first"
    assert store.add("fxpipe/count", 2) == 2


def test_held_gradients_of_a_sharded_module_are_reduced_on_demand(one_rank):
    module = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    module.set_is_last_backward(False)
    module.set_reshard_after_backward(False)
    module.set_requires_gradient_sync(False)
    for _ in range(2):
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is None or not hasattr(module.weight, "to_local")
    module.set_is_last_backward(True)
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)
    _torch.reduce_sharded_gradients(module)
    assert torch.equal(module.weight.grad.full_tensor(), torch.full((2, 2), 2.0))


def test_modules_know_their_buffers_that_are_not_saved():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("lost", torch.ones(1), persistent=False)
    assert module._non_persistent_buffers_set == {"lost"}


def test_a_wide_gradient_is_allowed_where_grad_dtype_says_so():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert parameter.grad_dtype == torch.bfloat16
    parameter.grad_dtype = torch.float32
    (parameter * 3).sum().backward()
    assert parameter.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="grad_dtype"):
        parameter.grad_dtype = torch.bfloat16


# --- capture ---


def test_a_call_that_takes_a_tensor_for_a_number_dispatches_this_with_the_tensor():
    seen = []

    class Sees(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend(args[:1] if func is _torch.READ_NUMBER else ())
            return func(*args, **(kwargs or {}))

    x, number = torch.zeros(4, 4), torch.tensor(2)
    for call in (lambda: x[:number], lambda: x.narrow(0, 0, number), lambda: torch.zeros(number), number.item):
        seen.clear()
        with Sees():
            call()
        assert seen
        assert all(each is number for each in seen)


def test_distributions_take_any_values_for_a_while(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile switches it off
    with _torch.unvalidated_distributions():
        torch.distributions.Normal(torch.zeros(2), -torch.ones(2))
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(torch.zeros(2), -torch.ones(2))


def test_conversions_of_modules_are_heard_of():
    module, seen = nn.Linear(2, 2), []
    with _torch.module_conversions(lambda real, converted, function: seen.append(converted) or converted):
        assert module.double() is module
        module.to("cpu")
    assert seen == [module, module]
    assert module.weight.dtype == torch.float32
    assert module.double().weight.dtype == torch.float64


# --- recipes ---


def test_fake_tensors_can_be_swapped_once_their_conversions_are_forgotten():
    """``Module.half()`` swaps them."""
    mode = _torch.FakeTensorMode()
    real = torch.ones(2)
    fakes = [mode.from_tensor(real), mode.from_tensor(torch.zeros(3))]
    assert mode.from_tensor(real) is fakes[0]
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(*fakes)
    _torch.forget_conversions(mode)
    torch.utils.swap_tensors(*fakes)
    assert fakes[0].shape == (3,)


def test_operations_without_a_shape_are_refused_by_fakes():
    with _torch.FakeTensorMode():
        tensor = torch.zeros(1)
        for ask in (torch.nonzero, torch.Tensor.item, torch.unique):
            with pytest.raises(_torch.FAKE_CANNOT):
                ask(tensor)


def test_truncated_normals_are_heard_of():
    seen = []
    with _torch.truncated_normals(lambda real, tensor, *args, **kwargs: seen.append((args, kwargs)) or tensor):
        nn.init.trunc_normal_(torch.empty(3), std=0.5)
    assert seen == [((0.0, 0.5, -2.0, 2.0), {"generator": None})]
    assert nn.init.trunc_normal_(torch.empty(3)).abs().max() <= 2


def test_generators_are_checked_before_they_are_made():
    real, seen = torch.Generator, []
    with _torch.checked_generators(seen.append):
        generator = torch.Generator()
        torch.Generator(device="cpu")
        assert isinstance(generator, torch.Generator)
        assert not isinstance(3, torch.Generator)
    assert type(generator) is torch.Generator is real
    assert seen == [torch.device("cpu")] * 2


def test_what_has_a_tensor_s_memory_and_a_node_of_its_own_is_no_view():
    leaf = torch.randn(2, 1, 3, requires_grad=True)
    same = _torch.UNVIEWED(leaf, leaf.shape)
    assert same.data_ptr() == leaf.data_ptr()
    assert same._base is None
    assert not same.is_leaf
    assert same.stride() == leaf.stride()
    same.mul_(2)  # as a leaf may not be
    same.sum().backward()
    assert torch.equal(leaf.grad, torch.full((2, 1, 3), 2.0))


def test_a_negative_view_is_lazy():
    tensor = torch.ones(2)
    view = _torch.negative_view(tensor)
    assert view.is_neg()
    tensor.mul_(3)
    assert view.tolist() == [-3, -3]


def test_the_generator_state_has_the_layout_that_is_skipped_in():
    state = torch.Generator().manual_seed(7).get_state()
    assert state.numel() == 5056
    assert int(state[:8].view(torch.int64)) == 7
    words = state[24 : 24 + 8 * 624].view(torch.int64)
    assert int(words[0]) == 7  # the first word of MT19937 is its seed
    assert int(words[1]) == (1812433253 * (7 ^ (7 >> 30)) + 1) % 2**32


def test_an_encoder_decides_about_its_fast_path_where_it_is_heard():
    heard = []
    layer = torch.nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 1).eval()

    def decided(*args, **kwargs):
        heard.append("decided")
        raise KeyError

    def aligned(*args):
        heard.append("aligned")
        return True

    with torch.no_grad(), _torch.encoder_decisions(aligned, decided), pytest.raises(KeyError):
        encoder(torch.ones(1, 2, 4), src_key_padding_mask=torch.tensor([[False, True]]))
    assert heard == ["aligned", "decided"]


def test_flex_attention_looks_at_its_device_where_it_is_heard():
    import torch.nn.attention.flex_attention as flex

    real = flex._validate_device
    with _torch.flex_attention_anywhere():
        assert flex._validate_device is not real
    assert flex._validate_device is real
    assert _torch.is_higher_order(torch.ops.higher_order.flex_attention)


def test_a_fake_mode_asks_its_dispatch_for_every_operation():
    class Counting(_torch.FakeTensorMode):
        seen = 0

        def dispatch(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return super().dispatch(func, types, args, kwargs)

    with Counting() as mode:
        tensor = torch.ones(2)
    inside = mode.seen
    tensor.mul_(2)  # its tensors lead back to it
    assert 0 < inside < mode.seen


def test_sizes_may_be_symbols_of_a_source_of_ours():
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    class Named(_torch.Source):
        name = "size"

        def is_ephemeral(self):
            return False

    mode, env, source = _torch.FakeTensorMode(), ShapeEnv(), Named()
    mode.shape_env = env
    symbol = env.create_symbol(7, source, DimDynamic.DYNAMIC, None)
    size = env.create_symintnode(symbol, hint=7, source=source)
    with mode, _torch.enable_python_dispatcher():
        parts = torch.empty(2, size, 6).split(3, dim=2)
    assert [part.shape[1].node.expr for part in parts] == [symbol, symbol]
    assert (size + 1).node.hint == 8
    assert env.guards == []


def test_a_storage_is_known_also_inside_of_vmap():
    seen, rows = [], torch.zeros(3, 2, dtype=torch.long)

    def look(row):
        seen.append(_torch.storage_key(row[:1]))
        return row

    torch.vmap(torch.vmap(look))(rows[..., None])
    assert set(seen) == {_torch.storage_key(rows)} != {_torch.storage_key(rows.clone())}


def test_the_leaf_that_a_node_accumulates_the_gradient_of_is_found():
    leaf = torch.ones(2, requires_grad=True)
    product = leaf * 2
    ((accumulates, _), _) = product.grad_fn.next_functions
    assert _torch.leaf_of(accumulates) is leaf
    assert _torch.leaf_of(product.grad_fn) is None
