import dataclasses
import json
import math
import pickle

import pytest

from fxpipe.errors import PlanError
from fxpipe.ir.files.hardware_file import read_hardware, resolve_hardware
from fxpipe.ir.hardware import Hardware, Training

PRESETS = ["h100", "h200", "b200", "a100", "a100-40gb", "a100-80gb", "l4", "l40s", "rtx4090", "mi300x", "cpu"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_hashes_pickles_and_survives_json(name):
    hardware = Hardware.preset(name)
    assert pickle.loads(pickle.dumps(hardware)) == hardware
    assert hash(hardware) == hash(Hardware.preset(name))
    text = json.dumps(dataclasses.asdict(hardware), default=dict)
    assert Hardware(**json.loads(text)) == hardware


def test_an_infinite_link_is_free_and_survives_json():
    hardware = dataclasses.replace(Hardware.preset("h100"), link_bandwidth=math.inf, link_latency=0.0)
    assert hardware.transfer_s(1e12) == 0.0
    assert Hardware(**json.loads(json.dumps(dataclasses.asdict(hardware), default=dict))) == hardware


def test_flops_is_a_mapping_that_cannot_change():
    flops = Hardware.preset("h100").flops
    assert flops["bfloat16"] == 989e12
    assert "int3" not in flops
    with pytest.raises(TypeError):
        flops["bfloat16"] = 1.0
    with pytest.raises(AttributeError):
        flops.rate = 1.0


def test_unknown_hardware_lists_the_known_ones():
    with pytest.raises(PlanError, match=r"'h1000'\n.*a100-40gb.*cpu.*rtx4090"):
        resolve_hardware("h1000")
    with pytest.raises(PlanError, match="unknown hardware 3"):
        resolve_hardware(3)


def test_a_dtype_without_a_rate_runs_as_the_next_wider_one():
    hardware = Hardware({"bfloat16": 4.0, "float32": 1.0}, 1.0, 1.0)
    assert hardware.peak_flops("float16") == 4.0
    assert hardware.peak_flops("float8_e4m3fn") == 4.0
    assert hardware.peak_flops("float64") == 0.5


def test_a_rank_in_another_node_is_reached_over_the_slower_link():
    h100 = Hardware.preset("h100")
    assert h100.transfer_s(45e9, 0, 7) == pytest.approx(0.1, rel=1e-3)
    assert h100.transfer_s(45e9, 7, 8) == pytest.approx(0.9, rel=1e-3)
    assert h100.transfer_s(45e9, 3, 3) == 0.0
    assert h100.all_reduce_s(1e9, (0, 8)) > h100.all_reduce_s(1e9, (0, 7)) > h100.all_reduce_s(1e9, (0,)) == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory", -1),
        ("memory", "80 GB"),
        ("memory_bandwidth", 0),
        ("memory_bandwidth", math.nan),
        ("link_bandwidth", -1.0),
        ("link_latency", -1e-6),
        ("flops", {}),
        ("flops", {"bfloat17": 1.0}),
        ("flops", {"bfloat16": math.inf}),
        ("node_size", -1),
        ("device", "abacus"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value):
    values = {"flops": {"float32": 1e12}, "memory_bandwidth": 1e12, "memory": 1e9, field: value}
    with pytest.raises(PlanError, match=field):
        Hardware(**values)


def test_a_file_is_read_with_units_and_a_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "a100"\nmemory = "40 GB"\nlink_bandwidth = "200 Gbit/s"\nlink_latency = "3 us"\n'
        'internode_bandwidth = "inf"\n[flops]\nbfloat16 = "312 TFLOP/s"\nfloat32 = 19.5e12\n'
    )
    hardware = resolve_hardware(str(path))
    assert hardware == read_hardware(path)
    assert (hardware.name, hardware.memory, hardware.link_bandwidth) == ("mine", 40e9, 25e9)
    assert hardware.link_latency == pytest.approx(3e-6)
    assert dict(hardware.flops) == {"bfloat16": 312e12, "float32": 19.5e12}
    assert hardware.memory_bandwidth == Hardware.preset("a100").memory_bandwidth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "h100"\nmemory = "80 GHz"', "memory = '80 GHz' has no unit of bytes"),
        ('base = "h100"\nmemory = 80', "memory = 80 bytes is implausible"),
        ('base = "h100"\nlink_latency = 5', "link_latency = 5 seconds is implausible"),
        ('base = "h100"\nlink_bandwidth = "450 GB"', "link_bandwidth = '450 GB' has no unit of bytes/s"),
        ('base = "h100"\nmemory_size = 80e9', "unknown field 'memory_size'"),
        ('base = "h9"', "unknown hardware 'h9'"),
        ("memory = 80e9\nmemory_bandwidth = 1e12", "'flops' is missing"),
        ("memory = ", "is not TOML"),
        ('base = "h100"\n[flops]\nbfloat16 = "989 TB/s"', r"flops.bfloat16 = '989 TB/s' has no unit of FLOP/s"),
        ('base = "h100"\nflops = 3', "flops"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        resolve_hardware(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"none.toml"):
        resolve_hardware(tmp_path / "none.toml")


def test_training_keeps_torch_dtypes_by_name():
    torch = pytest.importorskip("torch")
    assert Training(param_dtype=torch.bfloat16) == Training(param_dtype="bfloat16")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adamv"),
        ("param_dtype", "float31"),
        ("grad_dtype", None),
        ("recompute", "often"),
        ("recompute", ()),
        ("recompute", [1]),
        ("data_parallel", 0),
        ("data_parallel", True),
    ],
)
def test_wrong_training_is_refused_by_name(field, value):
    with pytest.raises(PlanError, match=field):
        Training(**{field: value})
