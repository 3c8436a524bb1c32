"""Reading PyTorch's .bin files without torch: values, layouts, and malicious pickles."""

import io
import pickle
import zipfile
from collections import OrderedDict

import checkpoints
import numpy as np
import pytest
import torch

from janus_jax.interop.torch_pickle import read_torch_file

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)


def save(path, value, **kwargs):
    torch.save(value, path, **kwargs)
    return path


def rewrite(path, change):
    """Replaces each zip member by change(name, data); None deletes it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            data = change(name, data)
            if data is not None:
                archive.writestr(name, data)


def replace_pickle(path, data):
    rewrite(path, lambda name, old: data if name.endswith("data.pkl") else old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_every_dtype(tmp_path, dtype):
    torch.manual_seed(0)
    value = (torch.randn(3, 4) * 3).to(dtype)
    read = read_torch_file(save(tmp_path / "m.bin", {"a": value}))["a"].read()
    assert read.shape == (3, 4)
    assert read.tobytes() == value.contiguous().view(torch.uint8).numpy().tobytes()


def test_views_offsets_and_shared_storage(tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    state = OrderedDict(
        base=base,
        transposed=base.transpose(0, 2),
        part=base[1:, ::2, 3],
        expanded=base[0, 0, :1].expand(6),
        scalar=base[2, 3, 4],
        empty=base[:0],
    )
    tensors = read_torch_file(save(tmp_path / "m.bin", state))
    assert list(tensors) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(tensors[name].read(), value.numpy())


def test_a_state_dict_with_metadata_and_parameters_shared_by_two_names(tmp_path):
    layer = torch.nn.Linear(2, 3)
    state = torch.nn.Sequential(layer, layer).state_dict()
    tensors = read_torch_file(save(tmp_path / "m.bin", state))
    np.testing.assert_array_equal(tensors["1.weight"].read(), layer.weight.detach().numpy())


@pytest.mark.parametrize("protocol", [1, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path, protocol):
    state = torch.nn.Linear(2, 3).state_dict()
    tensors = read_torch_file(save(tmp_path / "m.bin", state, pickle_protocol=protocol))
    np.testing.assert_array_equal(tensors["weight"].read(), state["weight"].numpy())


def test_what_is_read_cannot_be_written(tmp_path):
    tensors = read_torch_file(save(tmp_path / "m.bin", {"a": torch.zeros(2, 3).T}))
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"].read()[0, 0] = 1


@pytest.mark.parametrize("place", ["value", "top", "inside"])
def test_a_pickle_that_calls_something_is_named_and_not_executed(tmp_path, place):
    trap = checkpoints.Trap(tmp_path / "executed")
    value = {"value": {"a": trap}, "top": trap, "inside": {"a": [torch.zeros(2), trap]}}[place]
    path = save(tmp_path / "m.bin", value)
    with pytest.raises(ValueError, match=r"pickle.* \w+\.mkdir\b") as error:
        read_torch_file(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # the trap works if it is executed


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n.",
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x17__builtins__.__import__\x93.",
    ],
)
def test_every_way_to_name_a_global_is_refused(tmp_path, data):
    path = save(tmp_path / "m.bin", {"a": torch.zeros(2)})
    replace_pickle(path, data)
    with pytest.raises(ValueError, match=f"{path}: .*pickle (names|uses) "):
        read_torch_file(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x02ctorch\nFloatStorage\n(tR.",
        b"\x80\x02}X\x01\x00\x00\x00aK\x01s.",
        pickle.dumps({1: 2}),
        pickle.dumps([1]),
        pickle.dumps(OrderedDict())[:-4],
    ],
)
def test_pickles_of_other_things_give_one_line(tmp_path, data):
    path = save(tmp_path / "m.bin", {"a": torch.zeros(2)})
    replace_pickle(path, data)
    with pytest.raises(ValueError) as error:
        read_torch_file(path)
    assert "\n" not in str(error.value) and "m.bin" in str(error.value)


def spelled_pickle(**after):
    """{"a": a tensor of 2 floats}; `after` appends opcodes to what pushes one of its parts."""
    storage = f"ctorch\nFloatStorage\n{after.get('kind', '')}"
    storage = f"(S'storage'\n{storage}S'0'\nS'cpu'\nI2\ntQ{after.get('storage', '')}"
    rebuild = f"ctorch._utils\n_rebuild_tensor_v2\n{after.get('rebuild', '')}"
    hooks = f"ccollections\nOrderedDict\n{after.get('class_', '')})R"
    tensor = f"{rebuild}({storage}I0\n(I2\nt(I1\ntI00\n{hooks}tR{after.get('tensor', '')}"
    top = f"ccollections\nOrderedDict\n)R{after.get('top', '')}"
    return f"{top}S'a'\n{tensor}s.".encode("latin-1")


STRIDES = "S'strides'\n(I100000000\nI-100000000\nt"
BUILT = {
    "tensor": STRIDES,
    "storage": "S'dtype'\nccollections\nOrderedDict\n)R",
    "kind": "S'dtype'\nccollections\nOrderedDict\n)R",
    "rebuild": "S'__defaults__'\n(t",
    "class_": "S'items'\n(t",
}


@pytest.mark.parametrize("state", ["(d{}sb", "N(d{}s\x86b"], ids=["dict", "slots"])
@pytest.mark.parametrize("part", BUILT)
def test_attributes_cannot_be_set_behind_the_checks(tmp_path, part, state):
    path = save(tmp_path / "m.bin", {"a": torch.arange(2.0)})
    replace_pickle(path, spelled_pickle(**{part: state.format(BUILT[part])}))
    with pytest.raises(ValueError, match=r"m\.bin: .*pickle.*attributes") as error:
        read_torch_file(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["items", "_metadata"])
def test_attributes_of_a_dict_change_nothing(tmp_path, name):
    path = save(tmp_path / "m.bin", {"a": torch.arange(2.0)})
    replace_pickle(path, spelled_pickle(top=f"(dS'{name}'\nccollections\nOrderedDict\nsb"))
    np.testing.assert_array_equal(read_torch_file(path)["a"].read(), [0, 1])


def test_truncated_anywhere(tmp_path):
    path = save(tmp_path / "m.bin", {"a": torch.zeros(1000)})
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated"):
            read_torch_file(path)


def test_a_damaged_directory(tmp_path):
    path = save(tmp_path / "m.bin", {"a": torch.zeros(10)})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 16] = 5  # zip files in the set
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.bin: .*disks"):
        read_torch_file(path)


def test_a_tensor_larger_than_its_storage(tmp_path):
    path = save(tmp_path / "m.bin", {"a": torch.zeros(10)})
    rewrite(path, lambda name, data: data[:-4] if "/data/" in name else data)
    with pytest.raises(ValueError, match=r"\ba .*\b40 bytes.*\b36\b"):
        read_torch_file(path)


def test_a_storage_that_is_not_there(tmp_path):
    path = save(tmp_path / "m.bin", {"a": torch.zeros(10)})
    rewrite(path, lambda name, data: None if "/data/" in name else data)
    with pytest.raises(ValueError, match=r"data/0'.*missing"):
        read_torch_file(path)


def test_other_kinds_of_file(tmp_path):
    legacy = save(tmp_path / "old.bin", {"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.bin.*torch 1\.6"):
        read_torch_file(legacy)
    text = tmp_path / "text.bin"
    text.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=f"{text}: .*PyTorch file"):
        read_torch_file(text)
    big = save(tmp_path / "big.bin", {"a": torch.zeros(2)})
    rewrite(big, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(ValueError, match=r"byte order.*'little'.*'big'"):
        read_torch_file(big)


def test_compressed_archives_are_refused(tmp_path):
    path = save(tmp_path / "m.bin", {"a": torch.zeros(10)})
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="compressed"):
        read_torch_file(path)
