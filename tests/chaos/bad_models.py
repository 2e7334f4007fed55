"""Weights and models that lie: safetensors, checkpoints of torch, ONNX."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from chaos.mutate import NASTY, spoil, spoil_values


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file; the header's length may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(text) if length is None else length) & (2**64 - 1)) + text + data


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and rest of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def bad_safetensors(number: int, generator: random.Random, sample: bytes) -> tuple[bytes, str]:
    """A safetensors file of the same tensors as ``sample``, but for one lie."""
    header, data = taken_apart(sample)
    names = [name for name in header if name != "__metadata__"]
    name = generator.choice(names)
    lies = (
        *_lies_in_the_frame(header, data, generator),
        *_lies_about_a_tensor(header, data, name, generator),
        *_lies_in_the_values(header, data, name),
    )
    if number < len(lies):
        return lies[number]
    if number % 3 == 0:
        spoilt, what = spoil_values(header, generator)
        return safetensors(spoilt, data), f"header with {what}"
    return spoil(sample, generator)


def _lies_in_the_frame(header: Any, data: bytes, generator: random.Random) -> list[tuple[bytes, str]]:
    lengths = (0, 1, 2**31, 2**63, 2**64 - 1, len(data) + 10**6, 100_000_001)
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    shapes = {
        **{
            "no texts": 3,
            "deep JSON": "[" * 100_000,
            "a billion planes": '{"num_classes": 2, "planes": [1000000000, 8]}',
        },
        **{"1e9 classes": '{"num_classes": 1e9, "planes": [4, 8]}', "no planes": '{"num_classes": 2, "planes": []}'},
        **{"negative": '{"num_classes": -2, "planes": [-4, "a"]}'},
    }
    return [
        *((safetensors(header, data, length=n), f"header of {n} bytes") for n in lengths),
        (safetensors(header), "no tensors behind the header"),
        (safetensors({}, data), "empty header"),
        (safetensors([], data), "header is a list"),
        (safetensors(b"{" + b" " * 1_000_000 + b"}", data), "header of blanks"),
        (safetensors(deep, data), "header nested 100000 deep"),
        (safetensors(b'{"a":' + b"1" * 100_000 + b"}", data), "number of 100000 digits"),
        *(
            (safetensors({**header, "__metadata__": {"unet": v}}, data), f"metadata: {what}")
            for what, v in shapes.items()
        ),
        (safetensors(header, data + generator.randbytes(100)), "more bytes than tensors"),
    ]


def _lies_about_a_tensor(header: Any, data: bytes, name: str, generator: random.Random) -> list[tuple[bytes, str]]:
    entry = header[name]
    begin, end = entry["data_offsets"]
    changes: list[dict[str, Any]] = [
        *({"dtype": d} for d in ("F64", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X9", "", None, 3)),
        *({"shape": s} for s in ([2**62, 4], [2**32, 2**32], [-1], [], [0], ["a"], None, 3, [1.5], [1] * 10_000)),
        *({"data_offsets": o} for o in ([0, 0], [end, begin], [begin, 2**63], [-1, end], [begin], None)),
        {"data_offsets": [begin, end + 1]},
    ]
    found = [
        (safetensors({**header, name: {**entry, **change}}, data), f"a tensor with {change}") for change in changes
    ]
    without = {key: value for key, value in header.items() if key != name}
    odd = {"a\x1b[31m\nb": entry, "x" * 100_000: entry, "": entry}
    found += [(safetensors({**without, odd_name: entry}, data), f"a tensor named {odd_name[:9]!r}") for odd_name in odd]
    found.append((safetensors({**header, "more": entry}, data), "two tensors of the same bytes"))
    return found


def _lies_in_the_values(header: Any, data: bytes, name: str) -> list[tuple[bytes, str]]:
    found = []
    for bits, what in (
        (b"\0\0\xc0\x7f", "NaN"),
        (b"\0\0\x80\x7f", "infinite"),
        (b"\xff\xff\x7f\x7f", "3.4e38"),
        (b"\1\0\0\0", "tiny"),
    ):
        begin, end = header[name]["data_offsets"]
        if header[name]["dtype"] == "F32":
            found.append(
                (safetensors(header, data[:begin] + bits * ((end - begin) // 4) + data[end:]), f"values {what}")
            )
    return found


class _Runs:
    """Unpickled without care, it would run a command."""

    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def good_checkpoint(tensors: dict[str, torch.Tensor]) -> bytes:
    """What ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def bad_checkpoint(number: int, generator: random.Random, sample: bytes) -> tuple[bytes, str]:
    """A checkpoint of torch with one lie."""
    lies = _checkpoint_lies()
    if number < len(lies):
        return lies[number]
    if number % 2:
        return spoil(sample, generator)
    with zipfile.ZipFile(io.BytesIO(sample)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    chosen = generator.choice([name for name in parts if name.endswith("pkl")] * 3 + list(parts))
    parts[chosen], what = spoil(parts[chosen], generator)
    return _zip(parts), f"{Path(chosen).name}: {what}"


@cache
def _checkpoint_lies() -> list[tuple[bytes, str]]:
    def saved(content: Any, **options: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **options)
        return file.getvalue()

    ring: list[Any] = []
    ring.append(ring)
    nested: Any = 1
    for _ in range(100):
        nested = [nested]
    weight = torch.ones(2, 3)
    others = (3, None, "text", [weight], ring, nested, weight, {}, {3: weight})
    names = (["a"], [1], "abc", [["a"]], ["\x1b[31m"] * 3, ["x" * 10**6])
    plain = [value for value in NASTY if not isinstance(value, str) or value.isascii()]
    deep = pickle.PROTO + b"\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."
    bombs = {"archive/data.pkl": bytes(300_000_000), "archive/version": b"3\n"}
    return [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "half a zip"),
        (_zip({"archive/version": b"3\n"}), "a zip without pickle"),
        (_zip(bombs, zipfile.ZIP_DEFLATED), "a pickle of 300 MB of zeros"),
        (_zip({"archive/data.pkl": deep, "archive/version": b"3\n"}), "tuples nested 200000 deep"),
        (_zip({"archive/data.pkl": b"\x80\x02\x8b\xff\xff\xff\x7f1.", "archive/version": b"3\n"}), "number of 2 GB"),
        (_zip({"archive/data.pkl": pickle.dumps(_Runs(), 2), "archive/version": b"3\n"}), "a call"),
        (pickle.dumps(_Runs(), 2), "a plain pickle with a call"),
        (pickle.dumps({"a": 1}, 5), "a plain pickle"),
        (saved({"weight": weight}, _use_new_zipfile_serialization=False), "the older format, all right"),
        (saved({"weight": weight}, _use_new_zipfile_serialization=False)[:-20], "the older format, cut short"),
        *((saved(v), f"holds {type(v).__name__}") for v in others),
        *((saved({"state_dict": v}), f"state_dict {str(v)[:20]}") for v in plain),
        *(
            (saved({"state_dict": {"w": weight}, "meta": {"CLASSES": v, "PALETTE": v}}), f"{str(v)[:9]!r}")
            for v in names
        ),
        (saved({"a\x1b[31m\n": weight, "b": 3}), "names with control characters"),
        (saved({f"weight.{i}": weight for i in range(5000)}), "5000 tensors"),
        (saved({"weight": weight.to_sparse()}), "a sparse tensor"),
        (saved({"weight": torch.ones(1).expand(10**9)}), "a billion views of one number"),
        (saved({"weight": torch.empty(10**12, device="meta")}), "a tensor of 4 TB on the meta device"),
        (saved({"weight": weight.to(torch.complex64)}), "complex numbers"),
    ]


def _zip(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def good_onnx() -> bytes | None:
    """A convolution from 3 to 2 channels; ``None`` where onnx is not installed."""
    try:
        from onnx import TensorProto, helper
    except ImportError:
        return None
    sizes = ["b", 3, "h", "w"]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [2, 3, 1, 1], [0.1, 0.2, 0.3, -0.1, -0.2, -0.3])
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2, "h", "w"])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def bad_onnx(number: int, generator: random.Random, sample: bytes) -> tuple[bytes, str]:
    """An ONNX file with one lie."""
    lies = _onnx_lies(sample)
    return lies[number] if number < len(lies) else spoil(sample, generator)


@cache
def _onnx_lies(sample: bytes) -> list[tuple[bytes, str]]:
    import onnx

    def changed(what: str, change: Any) -> tuple[bytes, str]:
        model = onnx.ModelProto.FromString(sample)
        change(model)
        return model.SerializeToString(), what

    def outside(location: str, **more: str) -> Any:
        def change(model: Any) -> None:
            weight = model.graph.initializer[0]
            weight.ClearField("float_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            for key, value in {"location": location, **more}.items():
                weight.external_data.add(key=key, value=value)

        return change

    def dims(*values: int) -> Any:
        def change(model: Any) -> None:
            model.graph.initializer[0].dims[:] = values

        return change

    def field(path: str, value: Any) -> Any:
        def change(model: Any) -> None:
            *holders, last = path.split(".")
            target = model
            for holder in holders:
                target = target[int(holder)] if holder.isdigit() else getattr(target, holder)
            setattr(target, last, value)

        return change

    operators, channels = ("Nothing", "", "\x1b[31m\n", "Loop"), "type.tensor_type.shape.dim.1.dim_value"
    places = ("/dev/zero", "../../../../etc/passwd", "missing.bin", "", "data", "a\x1b[31m", "x" * 5000)
    return [
        *(changed(f"weights in {place[:20]!r}", outside(place)) for place in places),
        *(changed(f"weights at {n}", outside("base.safetensors", offset=n, length=n)) for n in ("-1", str(2**62), "a")),
        *(changed(f"weights of {d}", dims(*d)) for d in ((2**40, 3, 1, 1), (-2, 3, 1, 1), (2, 3, 1), (2, 4, 1, 1))),
        *(changed(f"operator {name!r}", field("graph.node.0.op_type", name)) for name in operators),
        *(changed(f"version {n}", field("ir_version", n)) for n in (0, -1, 99, 2**40)),
        *(changed(f"operators' version {n}", field("opset_import.0.version", n)) for n in (0, -1, 9999)),
        *(changed(f"input of type {n}", field("graph.input.0.type.tensor_type.elem_type", n)) for n in (0, 7, 8, 99)),
        *(changed(f"input with {n} channels", field(f"graph.input.0.{channels}", n)) for n in (0, -3, 4, 2**40)),
        *(changed(f"outputs {n} classes", field(f"graph.output.0.{channels}", n)) for n in (-1, 2**40)),
        changed("no input", lambda model: model.graph.ClearField("input")),
        changed("no output", lambda model: model.graph.ClearField("output")),
        changed("no nodes", lambda model: model.graph.ClearField("node")),
        changed("a node that reads itself", lambda model: model.graph.node[0].input.__setitem__(0, "y")),
        changed("no graph", lambda model: model.ClearField("graph")),
        (b"", "empty"),
        (b"\x08\x08" + b"\x3a\xff\xff\xff\xff\x0f", "graph of 4 GB that is not there"),
        (b"\x3a\x80" * 10_000, "graphs in graphs"),
    ]
