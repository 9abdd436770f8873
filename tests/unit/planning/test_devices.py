import math
import tomllib

import pytest
import torch

from polyrank.errors import RecipeError
from polyrank.planning.devices import DEVICES, PUBLISHED, DeviceProfile, device
from polyrank.planning.units import parse_bytes, parse_flops, parse_link, parse_seconds
from polyrank.runner import measure_device as profile
from runs import polyrank


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        ("6 GiB", 6 * 2**30),
        ("512 MiB", 2**29),
        ("8 GB", 8 * 10**9),
        ("8GB", 8 * 10**9),
        (" 1.5 kB ", 1500),
        ("2KB", 2000),
        ("100", 100),
        ("1e3", 1000),
        (7, 7),
        (7.9, 7),
    ],
)
def test_bytes_are_read_in_decimal_and_binary_units(written, amount):
    assert parse_bytes(written) == amount


def test_rates_and_times_are_read_in_base_units():
    assert parse_flops("1.2 TFLOPS") == 1.2e12
    assert parse_flops("150 GFLOPS") == 150e9
    assert parse_flops(3) == 3.0
    assert parse_link("100 Mbit/s") == parse_link("100 Mbps") == 12.5e6
    assert parse_link("12 MB/s") == 12e6
    assert parse_link("1 MiB/s") == 2**20
    assert parse_seconds("20 ms") == pytest.approx(0.02, rel=1e-15)
    assert parse_seconds("0.1 s") == parse_seconds(0.1) == 0.1


@pytest.mark.parametrize(
    "written", ["6 Gib", "6 gb", "GiB", "", "-1 GB", "6 GB RAM", "1,5 GB", "6 GB/s", "0x10", "6 G"]
)
def test_a_text_that_is_no_amount_of_bytes_is_refused_with_an_example(written):
    with pytest.raises(RecipeError, match=r'devices\.x\.memory: .*"6 GiB"'):
        parse_bytes(written, "devices.x.memory")


def test_bits_and_bytes_are_not_confused():
    assert parse_link("8 Mbit/s") == parse_link("1 MB/s")
    for written in ("8 MB", "8 Mb/s", "8 mbit/s", "8 M"):
        with pytest.raises(RecipeError, match=r"unknown unit .* upper and lower case matter"):
            parse_link(written)


@pytest.mark.parametrize("written", [math.nan, math.inf, -1, "1e999 GB", True, None, [1]])
def test_amounts_that_are_not_finite_negative_or_no_numbers_are_refused(written):
    with pytest.raises(RecipeError, match="place: expected"):
        parse_bytes(written, "place")


def test_a_profile_is_read_from_a_recipes_table():
    read = DeviceProfile.of(
        "phone", memory="3 GiB", flops="300 GFLOPS", up="20 Mbit/s", down="5 MB/s", latency="30 ms"
    )
    assert read == DeviceProfile("phone", 3 * 2**30, 300e9, 2.5e6, 5e6, 0.03)
    assert DeviceProfile.of("x", memory=5) == DeviceProfile("x", 5, None, None, None, 0.0)


def test_a_written_profile_reads_back_as_itself():
    for one in (
        DeviceProfile("a", 5, 2.0, 3.0, 4.0, 0.5),
        DeviceProfile("b", 5),
        *DEVICES.values(),
    ):
        assert DeviceProfile.of(one.name, **one.written) == one


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"memory_bytes": 0}, r"devices\.d\.memory: .*above zero, got 0"),
        ({"memory_bytes": -5}, r"memory: .*got -5"),
        ({"memory_bytes": 1.5}, r"memory: .*whole number of bytes.*got 1\.5"),
        ({"memory_bytes": True}, r"memory: .*got True"),
        ({"flops": 0.0}, r"devices\.d\.flops: .*above zero, got 0\.0"),
        ({"flops": math.nan}, r"flops: .*got nan"),
        ({"up": -1.0}, r"devices\.d\.up: .*got -1\.0"),
        ({"down": math.inf}, r"devices\.d\.down: .*got inf"),
        ({"latency": -0.1}, r"devices\.d\.latency: .*not negative; got -0\.1"),
        ({"latency": math.nan}, r"latency: .*got nan"),
    ],
)
def test_figures_that_cannot_be_are_refused_by_name(figures, told):
    with pytest.raises(RecipeError, match=told):
        DeviceProfile(**{"name": "d", "memory_bytes": 1, **figures})


def test_a_device_without_memory_is_refused():
    with pytest.raises(RecipeError, match=r"devices\.d\.memory: missing.*6 GiB"):
        DeviceProfile.of("d", memory=None)


def test_a_device_is_found_by_name_the_recipes_own_first():
    assert device("t4") == DEVICES["t4"]
    mine = DeviceProfile("t4", 1)
    assert device("t4", {"t4": mine}) is mine


def test_an_unknown_device_is_refused_with_near_names():
    with pytest.raises(RecipeError, match=r"no device 'a100'; did you mean 'a100-40gb'"):
        device("a100")
    with pytest.raises(RecipeError, match=r"did you mean 'my-phone'.*\[devices.my-phon\]"):
        device("my-phon", {"my-phone": DeviceProfile("my-phone", 1)})
    with pytest.raises(RecipeError, match=r"known: .*'t4'"):
        device("zzz")


def test_real_devices_have_a_source_a_share_of_their_memory_and_their_dtypes_rate():
    for name, published in PUBLISHED.items():
        assert published.source
        assert 0 < DEVICES[name].memory_bytes < published.memory
        assert DEVICES[name].flops == published.rates["float32"]
        assert DEVICES[name].up is DEVICES[name].down is None
    assert device("a100-40gb", dtype="bfloat16").flops == 312e12
    assert device("t4", dtype="bfloat16").flops == DEVICES["t4"].flops  # none of its own


@pytest.fixture(scope="module")
def measured() -> profile.Measured:
    return profile.measure("desk", threads=1, up="20 Mbit/s", down="12 MB/s", latency="30 ms")


def test_a_measured_machine_reads_back_from_toml_as_a_device(measured):
    table = tomllib.loads(measured.toml)["devices"]["desk"]
    assert DeviceProfile.of("desk", **table) == measured.profile
    assert measured.profile.up == 2.5e6
    assert measured.profile.down == 12e6
    assert measured.profile.latency == pytest.approx(0.03)


def test_measured_figures_are_in_the_range_of_machines(measured):
    """Not a bound on time: a thousandth of what a Raspberry Pi does, a thousand times an H100."""
    assert set(measured.rates) == {"float32", "bfloat16"}
    assert all(1e8 < rate < 1e18 for rate in measured.rates.values())
    assert measured.profile.flops == measured.rates["float32"]
    assert 2**24 < measured.profile.memory_bytes < 2**50


def test_measuring_leaves_the_number_of_threads_as_it_was(measured):
    before = torch.get_num_threads()
    profile.measure("x", threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_containers_limit_bounds_the_free_memory(tmp_path):
    assert profile._container(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert profile._container(tmp_path) == [450]
    (tmp_path / "memory.max").write_text("max\n")
    assert profile._container(tmp_path) == []


def test_the_command_prints_pure_toml_and_its_remarks_beside_it():
    done = polyrank("profile", "--name", "my phone", "--threads", "1", "--up", "8 Mbit/s")
    assert done.code == 0, done.err
    table = tomllib.loads(done.out)["devices"]["my phone"]
    assert table["up"] == 1e6
    assert "down" not in table
    assert "down: one machine alone cannot measure its link" in done.err


def test_the_command_refuses_a_link_that_cannot_be_read_before_it_measures():
    done = polyrank("profile", "--up", "8 mbit/s")
    assert done.code == 1
    assert "up: unknown unit 'mbit/s'" in done.err
    assert done.out == ""


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="expected the device cpu or cuda, got 'tpu'"):
        profile.measure(device="tpu")
    with pytest.raises(RecipeError, match="expected a dtype of float32, bfloat16, got 'int8'"):
        profile.measure(dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no CUDA device here"):
            profile.measure(device="cuda")
