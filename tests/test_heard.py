"""A torch that no longer calls what fxpipe puts in its place is refused by name, and an untested one is warned of."""

import contextlib
import warnings

import pytest
import torch

import fxpipe
from fxpipe import _heard, _torch
from fxpipe.errors import TorchVersionError

TRIALS = {
    "unvalidated_distributions": _heard.leaves_distributions_alone,
    "module_conversions": _heard.hears_conversions,
    "intercepted": _heard.hears_calls,
    "truncated_normals": _heard.hears_truncated_normals,
    "checked_generators": _heard.hears_generators,
    "watched_checkpoints": _heard.hears_checkpoints,
}


@pytest.mark.parametrize("name", TRIALS)
def test_this_torch_calls_the_hook(name):
    state = torch.get_rng_state()
    _heard.expect(name, lambda: TRIALS[name](getattr(_torch, name).__wrapped__), _torch._apart)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", TRIALS)
def test_a_hook_that_torch_no_longer_calls_is_an_error_at_its_first_use(name):
    def deaf(*_args):
        return contextlib.nullcontext()

    hook = _heard.tried(deaf, TRIALS[name])
    with pytest.raises(TorchVersionError, match=rf"does not do what fxpipe's deaf.*\n  install .*{_heard.TESTED[0]}"):
        hook()


def test_a_name_that_torch_no_longer_has_is_the_same_error():
    def gone(_hook):
        return torch.no_such_name

    with pytest.raises(TorchVersionError) as raised:
        _heard.tried(lambda: None, gone)()
    assert isinstance(raised.value.__cause__, AttributeError)


def test_a_hook_is_tried_once_away_from_the_caller_s_modes():
    tries = []

    def trial(hook):
        tries.append((torch.is_grad_enabled(), torch.ones(1).device.type))
        return True

    hook = _heard.tried(lambda value: value, trial, _torch._apart)
    with torch.no_grad(), torch.device("meta"):
        assert [hook(1), hook(2)] == [1, 2]
    assert tries == [(True, "cpu")]


def test_only_an_untested_version_is_warned_of(monkeypatch):
    for version, warned in ((f"{_heard.TESTED[-1]}+cpu", False), ("99.0.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        _heard.check_version.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _heard.check_version()
            _heard.check_version()
        assert ["not tested with torch 99.0.0" in str(warning.message) for warning in said] == [True] * warned
    monkeypatch.undo()
    _heard.check_version.cache_clear()


def test_an_untested_version_made_an_error_is_no_failure_of_the_forward(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    _heard.check_version.cache_clear()
    model, example = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), (torch.ones(4, 2),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="not tested with torch 99"):
                fxpipe.compile(model, 2, example)
        warnings.filterwarnings("ignore", "fxpipe was not tested with torch")
        assert fxpipe.compile(model, 2, example).plan.num_stages == 2
    monkeypatch.undo()
    _heard.check_version.cache_clear()


def test_halves_of_a_backward_and_hooks_of_parameters_are_tried_too():
    import torch.distributed.pipelining._backward

    from fxpipe.runtime.run import work

    halves = work.backward_for_inputs.__wrapped__
    _heard.expect("halves", lambda: _heard.splits_backward(halves, work.backward_for_weights), _torch._apart)
    _heard.expect("hooks", lambda: _heard.sees_hooks(_torch.has_accumulation_hooks.__wrapped__), _torch._apart)
    assert not _heard.splits_backward(lambda *_: ((torch.ones(2, 2),), []), lambda *_: None)
    assert not _heard.sees_hooks(lambda _parameter: True)
