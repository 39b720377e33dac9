"""``show_replicas`` prints which device holds which replicas, and their values."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import replicax
from replicax import _report
from replicax._report import show_replicas


def picture(x, name="y", *, axis=0, width=100):
    file = io.StringIO()
    show_replicas(x, name, axis=axis, console=Console(file=file, width=width, color_system=None))
    return file.getvalue()


def rows(text):
    """The rows of the printed table as (device, replicas, values), without the bar."""
    lines = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return [tuple(cell.strip() for i, cell in enumerate(cells) if i != 2) for cells in lines[1:]]


def double(size, **options):
    return replicax.pmap(lambda x: 2 * x, **options)(np.arange(size, dtype=np.float32))


def test_one_replica_a_device():
    text = picture(double(8))
    assert text.startswith("y: float32[8], 8 replicas on 8 devices\n")
    assert rows(text) == [(f"cpu:{i}", f"{i}", f"{2 * i}") for i in range(8)]
    assert text.endswith("Each device holds 1 replica.\n")
    assert "│ ·····█·· │ 10 " in text


def test_several_replicas_a_device():
    text = picture(double(12))
    assert "12 replicas on 6 devices" in text
    assert rows(text) == [(f"cpu:{i}", f"{2 * i}–{2 * i + 1}", f"{4 * i} {4 * i + 2}") for i in range(6)]
    assert "Each device holds 2 replicas." in text


def test_all_replicas_on_every_device():
    text = picture(double(13))
    assert "13 replicas on 7 devices" in text
    assert rows(text) == [(f"cpu:{i}", "0–12", "0 2 4 … 24") for i in range(7)]
    assert "Each device holds all 13 replicas." in text


def test_groups_of_replicas_on_several_devices():
    text = picture(double(14, devices=jax.devices()[:4]))
    expected = [("0–6", "0 2 4 … 12"), ("0–6", "0 2 4 … 12"), ("7–13", "14 16 18 … 26"), ("7–13", "14 16 18 … 26")]
    assert [row[1:] for row in rows(text)] == expected
    assert "Each device holds 7 replicas, and each replica is on 2 devices." in text


def test_one_device():
    text = picture(double(3, devices=jax.devices()[5:6]))
    assert rows(text) == [("cpu:5", "0–2", "0 2 4")]
    assert "3 replicas on 1 device\n" in text
    assert "The device holds all 3 replicas." in text


def test_numpy_lies_on_the_host():
    text = picture(np.arange(10).reshape(5, 2), "w[0]")
    assert text.startswith("w[0]: int64[5, 2], 5 replicas on the host\n")
    assert rows(text) == [("host", "0–4", "[0 1] … [8 9]")]


def test_keys():
    keys = replicax.pmap(jax.random.key)(np.arange(16))
    text = picture(keys)
    assert text.startswith("y: key<fry>[16], 16 replicas on 8 devices\n")
    assert rows(text)[3] == ("cpu:3", "6–7", "[0 6] [0 7]")
    assert rows(picture(jax.random.split(jax.random.key(0), 3)))[0][:2] == ("cpu:0", "0–2")


def test_another_axis():
    y = replicax.pmap(lambda x: jnp.stack([x, -x]), out_axes=1)(jnp.arange(8.0))
    for axis in (1, -1):
        text = picture(y, axis=axis)
        assert "8 replicas along axis 1 on 8 devices" in text
        assert rows(text)[3] == ("cpu:3", "3", "[3 -3]")


def test_replicas_divided_among_devices():
    mesh = jax.make_mesh((4, 2), ("replicas", "model"))
    x = jax.device_put(np.arange(32).reshape(8, 4), jax.NamedSharding(mesh, jax.P("replicas", "model")))
    text = picture(x)
    assert rows(text)[3] == ("cpu:3", "2–3 [2:4]", "[10 11] [14 15]")
    assert "Each device holds a part of each replica in its row." in text


def test_within_a_mesh_of_the_users():
    y = double(8)
    with jax.set_mesh(jax.make_mesh((4, 2), ("a", "b"))):
        assert rows(picture(y))[7] == ("cpu:7", "7", "14")


def test_big_array():
    y = replicax.pmap(lambda x: x)(np.arange(80 * 50 * 20).reshape(80, 50, 20))
    assert rows(picture(y))[1] == ("cpu:1", "10–19", "[10000 10001 … 10999] … [19000 19001 … 19999]")


def test_only_a_few_values_leave_a_device(monkeypatch):
    array = type(jnp.zeros(1))
    read, to_numpy = [], array.__array__
    monkeypatch.setattr(array, "__array__", lambda self, *args, **kwargs: read.append(self) or to_numpy(self))
    picture(jax.device_put(np.zeros((8, 1000)), double(8).sharding))
    assert [x.size for x in read] == [_report.VALUES] * 8
    assert [x.devices() for x in read] == [{device} for device in jax.devices()]


def test_many_devices(monkeypatch):
    monkeypatch.setattr(_report, "DEVICES", 4)
    assert rows(picture(double(16))) == [
        ("cpu:0", "0–1", "0 2"),
        ("cpu:1", "2–3", "4 6"),
        ("… 4 more", "4–11", "…"),
        ("cpu:6", "12–13", "24 26"),
        ("cpu:7", "14–15", "28 30"),
    ]


@pytest.mark.few("bfloat16-1", "complex64-1+0j", "bool-True")
@pytest.mark.parametrize(
    ("dtype", "shown"),
    [("bool", "True"), ("int4", "1"), ("bfloat16", "1"), ("float32", "1"), ("complex64", "1+0j")],
)
def test_dtypes(dtype, shown):
    assert rows(picture(replicax.replicate(jnp.asarray(1, dtype))))[0] == ("cpu:0", "0", shown)


def test_replicas_without_values():
    assert rows(picture(np.zeros((2, 0)))) == [("host", "0–1", "[] []")]


def test_narrow_terminal_cuts_no_number_off():
    numbers = np.asarray([[123456789, 987654321]])
    text = picture(numbers, width=50)
    assert "123456789" in text
    assert "987654321" in text


def test_encoding_without_the_characters():
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding="ascii"), width=100)
    show_replicas(double(13), "y", console=console)
    console.file.flush()
    assert "| 0-12     | ############# | 0 2 4 ... 24 |" in written.getvalue().decode("ascii")


def test_prints_to_stdout_and_returns_nothing(capsys):
    assert show_replicas(double(8)) is None
    assert capsys.readouterr().out.startswith("array: float32[8], 8 replicas on 8 devices")


def test_tree_is_refused():
    with pytest.raises(replicax.NotAnArrayError, match=r"y is of type dict\. Pass .* jax\.tree\.map"):
        picture({"w": np.zeros(3)})


def test_traced_array_is_refused():
    with pytest.raises(replicax.NotAnArrayError, match=r"y is a tracer: .* Call show_replicas outside jit"):
        jax.jit(picture)(np.zeros(3))


@pytest.mark.parametrize(("shape", "axis"), [((), 0), ((3,), 1), ((3,), -2), ((0, 2), 0)])
def test_missing_axis_is_refused(shape, axis):
    with pytest.raises(replicax.AxisSpecError) as error:
        picture(np.zeros(shape), axis=axis)
    assert f"at least one replica along axis {axis}, but y has shape {shape}. Pass a result" in str(error.value)
