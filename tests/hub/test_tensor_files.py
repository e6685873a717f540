"""Files of tensors as strangers make them: what is read is right, and everything else is one line that names the tensor."""

import json
import os
import re
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_hf import GQA, assert_same, random_params

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.hub import llama, tensor_files

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the files are PyTorch's")


def tensors_of(params: dict) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor) for name, tensor in llama.to_hf(params, GQA)}


def write(folder, files: dict[str, dict[str, np.ndarray]], weight_map: dict[str, str] | None = None) -> None:
    """A Hugging Face folder of safetensors files."""
    for file, tensors in files.items():
        safetensors.numpy.save_file(tensors, folder / file)
    if weight_map is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(llama.to_hf_config(GQA, 1, 2, "float32")))


def split(tensors: dict) -> tuple[dict, dict]:
    names = list(tensors)
    parts = {"one.safetensors": {n: tensors[n] for n in names[::2]}, "two.safetensors": {n: tensors[n] for n in names[1::2]}}
    return parts, {name: file for file, part in parts.items() for name in part}


def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        llama.load_folder(folder)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1_000
    return str(error.value)


# -- folders ------------------------------------------------------------------------------------------------------------


def test_odd_folders_that_are_right(tmp_path, capsys):
    params = random_params(GQA)
    tensors = tensors_of(params)
    mixed = {n: t.astype([np.float32, np.float16, ml_dtypes.bfloat16][i % 3]) for i, (n, t) in enumerate(tensors.items())}
    for table in (tensors, mixed):  # exact, whatever the dtypes
        write(tmp_path, {"model.safetensors": table | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}})
        for name, tensor in llama.to_hf(llama.load_folder(tmp_path)[0], GQA):
            np.testing.assert_array_equal(tensor, table[name].astype(np.float32), err_msg=name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    write(tmp_path, {"model.safetensors": tensors}, dict.fromkeys(tensors, "lost.safetensors"))
    capsys.readouterr()
    assert_same(llama.load_folder(tmp_path)[0], params)
    line = "its weights are read from model.safetensors, as Transformers does, and not from model.safetensors.index.json, "
    assert f"{line}pytorch_model.bin\n" in capsys.readouterr().out

    (tmp_path / "one").mkdir()  # one shard alone, and its index knows nothing of the rotary tables in it
    rotary = {"model.layers.2.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    shard = "model-00001-of-00001.safetensors"
    write(tmp_path / "one", {shard: tensors | rotary}, dict.fromkeys(tensors, shard))
    assert_same(llama.load_folder(tmp_path / "one")[0], params)

    (tmp_path / "snapshot").mkdir()  # as the hub's cache lays it out
    for file in (tmp_path / "one").iterdir():
        file.rename(tmp_path / f"blob-{file.name}")
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blob-{file.name}")
    assert_same(llama.load_folder(tmp_path / "snapshot")[0], params)


def test_the_index_and_the_files_agree_or_are_refused(tmp_path):
    tensors = tensors_of(random_params(GQA))
    parts, weight_map = split(tensors)
    write(tmp_path, parts, weight_map)
    assert llama.load_folder(tmp_path)[1].n_kv_heads == 2
    a, b = weight_map[NAME], next(file for file in parts if file != weight_map[NAME])
    write(tmp_path, parts, weight_map | {NAME: b})
    assert f"index.json: says that {NAME} is in {b}, but it is in {a}" in refused(tmp_path)
    write(tmp_path, parts | {b: parts[b] | {NAME: tensors[NAME] * 2}}, weight_map)
    assert f"{NAME} is in one.safetensors and in two.safetensors; take it out" in refused(tmp_path)
    write(tmp_path, parts, {n: f for n, f in weight_map.items() if n != NAME})
    assert f"index.json: unknown tensor {NAME}" in refused(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below/one.safetensors").write_bytes((tmp_path / a).read_bytes())
    for name in ("../one.safetensors", "below/one.safetensors", str(tmp_path / a), "", ".", "..", "a\0b", "a\nb", "below"):
        write(tmp_path, parts, weight_map | {NAME: name})
        assert f": its index names {tensor_files.shown(name)}, which is not in it" in refused(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "[" * 10**6, '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}', "\xff", ""],
)
def test_an_index_of_something_else_is_one_line(tmp_path, text):
    write(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert "model.safetensors.index.json: is damaged (" in refused(tmp_path)


def test_an_index_or_header_beyond_any_model_is_refused_unread(tmp_path):
    write(tmp_path, {})
    with (tmp_path / "model.safetensors.index.json").open("w") as f:
        f.write('{"weight_map": {')
        f.truncate(1 << 40)  # sparse
    assert "has more than 16,777,216 bytes" in refused(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", 1 << 25))
        f.truncate(1 << 40)
    assert "is not a whole safetensors file: its header would have 33,554,432 bytes" in refused(tmp_path)


# -- safetensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "I64", "F64", "C64", "BOOL"])
def test_another_dtype_is_named(tmp_path, code):
    tensors = tensors_of(random_params(GQA))
    width = {"F8": 1, "I8": 1, "U8": 1, "I3": 4, "BO": 1}.get(code[:2], 8)
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = tensor.size * width if name == NAME else tensor.nbytes
        kind = code if name == NAME else "F32"
        header[name], end = {"dtype": kind, "shape": tensor.shape, "data_offsets": [end, end + size]}, end + size
    text = json.dumps(header).encode()
    write(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    assert f"{NAME} is of dtype {code}; only float32, bfloat16, float16 can be read" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"garbage, and more of it", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**63) + b"{}"]
    + [struct.pack("<Q", 10**5) + b"[" * 10**5, struct.pack("<Q", 2) + b"{}" + b"more"]
    + [
        struct.pack("<Q", len(header)) + header + bytes(8)
        for header in (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}',
            b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            b'{"a":{"dtype":"I4","shape":[2],"data_offsets":[0,8]}}',
        )
    ],
)
def test_a_file_that_is_no_safetensors_is_one_line(tmp_path, content):
    write(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors: is not a whole safetensors file: " in refused(tmp_path)


def test_only_regular_files_are_read(tmp_path):
    write(tmp_path, {})
    os.mkfifo(tmp_path / "model.safetensors")
    assert "holds neither model.safetensors nor" in refused(tmp_path)
    for name in ("pipe.safetensors", "pipe.bin"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is neither a file nor a folder"):
            llama.load_folder(tmp_path / name)


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_number_that_is_not_finite_is_refused_unless_it_is_asked_for(tmp_path, number, dtype):
    tensors = tensors_of(random_params(GQA))
    tensors[NAME][3, 5] = number
    write(tmp_path, {"model.safetensors": tensors | {NAME: tensors[NAME].astype(dtype)}})
    assert f"{NAME} has 1 numbers that are NaN or infinite" in (line := refused(tmp_path)) and "--allow-non-finite" in line
    params, _ = llama.load_folder(tmp_path, allow_non_finite=True)
    np.testing.assert_array_equal(params["layers"]["up"]["kernel"][1, 5, 3], np.float32(number))


# -- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "module.", "_forward_module.", "module._orig_mod.", "_forward_module._orig_mod.module."]
)
def test_prefixes_of_wrappers_are_taken_off_and_said(tmp_path, torch, capsys, wrapper):
    params = random_params(GQA)
    tensors = {wrapper + name: tensor for name, tensor in tensors_of(params).items()}
    if wrapper == "module.":  # a layer of its own is compiled
        tensors = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in tensors.items()}
    parts, weight_map = split(tensors)
    write(tmp_path, parts, weight_map)
    assert_same(llama.load_folder(tmp_path)[0], params)
    said = capsys.readouterr().out
    assert "out of the names of its tensors" in said and all(f"{part}." in said for part in wrapper.split(".")[:-1])
    torch.save({name: torch.tensor(tensor) for name, tensor in tensors.items()}, tmp_path / "a.bin")
    assert_same(llama.load_folder(tmp_path / "a.bin")[0], params)
    torch.save({NAME: torch.ones(1), wrapper + NAME: torch.ones(1)}, tmp_path / "a.bin")
    assert "two of its tensors have the same name" in refused(tmp_path / "a.bin")


# -- pickles ------------------------------------------------------------------------------------------------------------


def odd_tensors(torch) -> dict:
    ones = torch.ones(52, 24)
    return {
        "sparse": (ones.to_sparse(), "is sparse"),
        "sparse rows": (ones.to_sparse_csr(), "is sparse"),
        "quantised": (torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), "is quantised"),
        "fp8": (ones.to(torch.float8_e4m3fn), "is of dtype torch.float8_e4m3fn"),
        "int8": (ones.to(torch.int8), "is of dtype torch.int8"),
        "bool": (ones.bool(), "is of dtype torch.bool"),
        "double": (ones.double(), "is of dtype torch.float64"),
        "complex": (ones.to(torch.complex64), "is of dtype torch.complex64"),
        "meta": (ones.to("meta"), "is a meta tensor"),
        "expanded": (torch.ones(1, 24).expand(52, 24), "has elements that share memory"),
        "overlapping": (torch.ones(200).as_strided((52, 24), (2, 1)), "has elements that share memory"),
        "shape": (torch.ones(52, 25), "has shape [52, 25]"),
        "no dimensions": (torch.tensor(1.0), "has shape []"),
        "number": (3.0, "is of type float"),
        "nothing": (None, "is of type NoneType"),
        "list": ([1.0] * 24, "is of type list"),
        "table": ({"a": ones}, "is of type dict"),
    }


ODD = "sparse,sparse rows,quantised,fp8,int8,bool,double,complex,meta,expanded,overlapping,shape,no dimensions,number,nothing"


@pytest.mark.filterwarnings("ignore")  # of torch, on what it calls experimental or deprecated
@pytest.mark.parametrize("kind", [*ODD.split(","), "list", "table"])
def test_an_odd_tensor_in_a_pickle_is_named(torch, tmp_path, kind):
    tensor, says = odd_tensors(torch)[kind]
    write(tmp_path, {})
    table = {name: torch.tensor(t) for name, t in tensors_of(random_params(GQA)).items()} | {NAME: tensor}
    torch.save(table, tmp_path / "pytorch_model.bin")
    assert f"{NAME} {says}" in refused(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_views_are_read_as_the_numbers_that_they_show_or_refused(torch, tmp_path):
    conj = torch.randn(3, 3, dtype=torch.complex64).conj()
    assert "conjugates or negates" in tensor_files.unfit("a", conj) and "negates" in tensor_files.unfit("a", conj.imag)
    right = {"a": torch.randn(4, 6).T, "b": torch.randn(40)[3:33:2].view(3, 5), "c": torch.randn(5, 1).expand(5, 1)}
    right |= {"d": torch.randn(3, 4).bfloat16().T, "e": torch.randn(0, 3), "f": torch.nn.Parameter(torch.randn(2))}
    torch.save(right, tmp_path / "a.bin")
    arrays = tensor_files.read(tmp_path / "a.bin")
    for name, tensor in right.items():
        np.testing.assert_array_equal(np.asarray(arrays[name], np.float32), tensor.detach().float().numpy(), err_msg=name)


@pytest.mark.parametrize("key", [3, None, True, 2.5, (1, 2)])
def test_a_key_that_is_no_name(torch, tmp_path, key):
    write(tmp_path, {})
    torch.save({key: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert f"is not a table of tensors by name: {key!a} is no name" in refused(tmp_path)


def test_names_that_would_break_the_line_are_escaped(torch, tmp_path):
    write(tmp_path, {})
    torch.save({"a\nb\x1b[31m" + "c" * 10**5: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert "no tensor model.embed_tokens.weight" in refused(tmp_path)
    table = tensors_of(random_params(GQA)) | {"a\nb\x1b[31m" + "c" * 10**5: np.ones(2, np.float32)}
    torch.save({name: torch.tensor(tensor) for name, tensor in table.items()}, tmp_path / "pytorch_model.bin")
    assert re.search(r"unknown tensor 'a\\nb\\x1b\[31mc+;", refused(tmp_path))


def test_a_zip_that_would_grow_is_refused_unread(torch, tmp_path):
    write(tmp_path, {})
    file = tmp_path / "pytorch_model.bin"
    torch.save({NAME: torch.ones(2)}, file)
    with zipfile.ZipFile(file) as right:
        entries = {entry.filename: right.read(entry) for entry in right.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, bytes(10**7) if name.endswith("data/0") else content)
    assert file.stat().st_size < 10**5
    assert "pytorch_model.bin: is compressed, which PyTorch's files are not" in refused(tmp_path)
    with zipfile.ZipFile(file, "w") as bomb:
        for name, content in entries.items():
            bomb.writestr(name, bytes((1 << 24) + 1) if name.endswith("data.pkl") else content)
    assert "has more than 16,777,216 bytes beside its tensors" in refused(tmp_path)
    with zipfile.ZipFile(file, "w") as bomb:
        bomb.writestr("archive/data/0", bytes(1_000))
        bomb.filelist *= 3  # three entries, one place
    assert "is not a whole PyTorch file: its parts overlap" in refused(tmp_path)
