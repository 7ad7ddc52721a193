"""What all tests share: the modules beside them, one thread each, their random inputs, and how they are spread."""

import gc
import os
import pathlib
import sys

# Before torch and numpy are imported: several processes share the processor.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(folder) for folder in sorted(HERE.iterdir()) if list(folder.glob("test_*.py")))]

# An ordinary run passes or fails for what changed and not by chance. Under `tox -e fuzz` property tests try as many
# times more examples, and random ones; what they find becomes an `@example`.
FUZZ = int(os.environ.get("FXPIPE_FUZZ") or 0)
hypothesis.settings.register_profile("ordinary", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fuzz" if FUZZ else "ordinary")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """As many processes as processors where all tests run; files that were named run in this one, at once."""
    return None if config.args == config.getini("testpaths") else 0


LONGEST = (
    *("test_training", "test_exact", "test_random_models", "test_source", "test_replicas", "test_example", "test_docs"),
    *("test_checkpoints", "test_architectures", "test_adapters", "test_constructs", "test_shapes", "test_chaos"),
    *("test_failures", "test_distributed", "test_costs", "test_stage", "test_cli", "test_finetune_example"),
    "test_examples",
)


def pytest_collection_modifyitems(config, items):
    """Begin with the files that take longest: a process takes a whole file at a time, and the last ones are short."""
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if FUZZ and hypothesis.is_hypothesis_test(item.obj):
            asked = item.obj._hypothesis_internal_use_settings
            more = hypothesis.settings(asked, max_examples=FUZZ * asked.max_examples)
            item.obj._hypothesis_internal_use_settings = more
            item.add_marker(pytest.mark.timeout(FUZZ * float(config.getini("timeout"))))


def pytest_collection_finish():
    """Let Python not look for garbage among all that was imported and collected: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def in_float64():
    """Make models and inputs of a test in float64, the same ones each time."""
    import judge
    import torch

    with judge.float64():
        torch.manual_seed(0)
        yield
