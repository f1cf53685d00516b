"""A reader of caches written from schemas/FORMAT.md alone: pyarrow, NumPy and the standard library."""

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
DIGITS = {255: 1, 15: 2, 5: 3, 3: 5}


class Refused(Exception):
    pass


def read_sealed(path):
    data = Path(path).read_bytes()
    pattern = rb'"checksum": "[0-9a-f]{64}"'
    if len(re.findall(pattern, data)) != 1:
        raise Refused(f"{path}: checksum")
    value = json.loads(data)
    if value["format_version"] != 1:
        raise Refused(f"{path}: version")
    blank = re.sub(pattern, b'"checksum": "' + b"0" * 64 + b'"', data)
    if hashlib.sha256(blank).hexdigest() != value["checksum"]:
        raise Refused(f"{path}: checksum")
    return value


def read_file(folder, reference):
    path = Path(folder) / reference["name"]
    data = path.read_bytes()
    if path.is_symlink() or len(data) != reference["bytes"]:
        raise Refused(f"{path}: size")
    if hashlib.sha256(data).hexdigest() != reference["sha256"]:
        raise Refused(f"{path}: hash")
    return data


def read_safetensors(data):
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(body[slice(*e["data_offsets"])], DTYPES[e["dtype"]]).reshape(e["shape"])
        for name, e in header.items()
    }


def plane(table, name):
    rows = table.column(name).to_pylist()
    return np.array([list(row) for row in rows], np.int64)


def number(table, name, count):
    return sum(plane(table, f"{name}{i}") << (8 * i) for i in range(count))


class Cache:
    """All of a cache in memory; `rows[sequence]` is a dict of arrays."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.dataset = read_sealed(self.folder / "dataset.json")
        self.target = self.dataset["target"]
        self.rows = {}
        shards = -(-self.dataset["num_sequences"] // self.dataset["sequences_per_shard"])
        for shard in range(shards):
            self.read_shard(shard)

    def read_shard(self, shard):
        record = read_sealed(self.folder / "commits" / f"{shard:05d}.json")
        if record["dataset"] != self.dataset["checksum"] or record["shard"] != shard:
            raise Refused(f"record {shard}")
        sidecars = {
            kind: read_safetensors(read_file(self.folder / "bases", record[kind])) if record[kind] else None
            for kind in ("basis", "codebook", "hidden_basis")
        }
        read_file(self.folder / "shards", record["targets"])
        columns = self.decode(self.table("targets", record), sidecars)
        if record["hidden"]:
            read_file(self.folder / "shards", record["hidden"])
            columns |= self.decode_hidden(self.table("hidden", record), sidecars["hidden_basis"])
        at, sequence = 0, shard * self.dataset["sequences_per_shard"]
        for length in (n for group in record["groups"] for n in group):
            part = {name: values[at : at + length] for name, values in columns.items()}
            if set(part.pop("seq").tolist()) != {sequence}:
                raise Refused(f"sequence {sequence}")
            self.rows[sequence] = part
            at, sequence = at + length, sequence + 1

    def table(self, family, record):
        path = self.folder / "shards" / record[family]["name"]
        file = pq.ParquetFile(path, page_checksum_verification=True)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if counts != [sum(group) for group in record["groups"]]:
            raise Refused(f"{path}: rows")
        return file.read()

    def decode(self, table, sidecars):
        target, m = self.target, len(self.target["curve_nodes"])
        vocab, k, n = target["vocab_size"], target["k"], table.num_rows
        planes = 1 if vocab <= 1 << 8 else 2 if vocab <= 1 << 16 else 3
        codebook = sidecars["codebook"]
        order = codebook["token_order"] if codebook else np.arange(vocab)
        out = {name: table.column(name).to_numpy() for name in ("seq", "doc", "msk")}
        out["tok"] = number(table, "tok", planes)[:, 0]
        out["ids"] = order[number(table, "id", planes)]
        d = np.zeros((n, k), np.int64)
        if k > 1:
            d[:, 1:] = np.cumsum(number(table, "gap", 2), axis=1)
        rel = -target["logprob_step"] * d
        out["curve"] = np.zeros((n, m))
        if target["tail"] == "none":
            top = -number(table, "top", 2)[:, 0] / 2048
        else:
            out["curve"] = self.decode_curve(number(table, "crv", 2), codebook)
            at_one = out["curve"][:, target["curve_nodes"].index(1.0)]
            top = -np.log(np.exp(rel).sum(1) + np.exp(rel[:, -1] + at_one))
        out["logprobs"] = top[:, None] + rel
        out["y"] = self.decode_sketch(table, sidecars["basis"], n)
        if sidecars["basis"] and "predictor_constant" in sidecars["basis"]:
            out["y"] = out["y"] + prediction(sidecars["basis"], out["tok"], out["ids"])
        if sidecars["basis"]:
            out["t"] = self.tail_logits(sidecars["basis"], out["y"], out["curve"])
        for name in ("ids", "logprobs", "curve", "y"):
            out[name][~out["msk"]] = 0
        return out

    def decode_curve(self, residuals, codebook):
        m = residuals.shape[1]
        predictor = np.zeros((m, m + 1), np.int64)
        for j in range(1, m):
            predictor[j, j] = 65536
        if codebook:
            predictor = codebook["curve_predictor"]
        c = np.zeros_like(residuals)
        for j in range(m):
            prediction = (predictor[j, 0] + sum(predictor[j, 1 + i] * c[:, i] for i in range(j))) >> 16
            value = (prediction + residuals[:, j] - 128) & 0xFFFF
            c[:, j] = np.where(value >= 1 << 15, value - (1 << 16), value)
        return self.target["curve_step"] * c

    def decode_sketch(self, table, basis, n):
        if basis is None:
            return np.zeros((n, 0))
        parts = []
        for index, (start, stop, levels) in enumerate(basis["groups"].tolist()):
            if levels == 65536:
                q = plane(table, f"sk{index}l") + 256 * plane(table, f"sk{index}h")
                q = np.where(q >= 1 << 15, q - (1 << 16), q)
            else:
                packed, per = plane(table, f"sk{index}"), DIGITS[levels]
                if packed.max() >= levels**per:
                    raise Refused(f"sk{index}")
                digits = np.stack([packed // levels**i % levels for i in range(per)], axis=2)
                q = digits.reshape(n, -1)[:, : stop - start]
                q = np.where(q > levels // 2, q - levels, q)
            parts.append(basis["step"][0] * q)
        return np.concatenate(parts, axis=1)

    def tail_logits(self, basis, y, curve):
        t = basis["mean"] + y @ basis["components"].astype(np.float64).T
        if basis["margin"][0] >= 1e9:
            return t
        ceiling = t.mean(axis=1) - self.slope_at_zero(curve) - basis["margin"][0]
        return np.minimum(t, ceiling[:, None])

    def slope_at_zero(self, curve):
        start = np.full(len(curve), np.log(self.target["vocab_size"] - self.target["k"]))
        powers = np.vander([0.0, *self.target["curve_nodes"]])
        return np.linalg.solve(powers, np.stack([start, *curve.T]))[-2]

    def decode_hidden(self, table, basis):
        spec = self.dataset["hidden"]
        width = spec["rank"] or spec["hidden_size"]
        out = {}
        for position, layer in enumerate(spec["layers"]):
            raw = b"".join(table.column(f"h{layer}").to_pylist())
            if spec["encoding"] == "int8":
                q = np.frombuffer(raw, np.int8).reshape(-1, width).astype(np.float64)
                scales = np.frombuffer(b"".join(table.column(f"s{layer}").to_pylist()), "<f2")
                scales = scales.reshape(len(q), -1).astype(np.float64)
                values = q * scales[:, np.arange(width) // spec["group_size"]]
            else:
                values = np.frombuffer(raw, "<f2").reshape(-1, width).astype(np.float64)
            if basis:
                values = values @ basis["components"][position].astype(np.float64).T + basis["mean"][position]
            out[f"hidden{layer}"] = values
        return out


def prediction(basis, tok, ids):
    unit = basis["step"][0] / 64
    components, d1, d2 = (
        basis[name].astype(np.float64) for name in ("components", "predictor_head", "predictor_token")
    )
    e = np.rint(components @ d1 / unit).clip(-32767, 32767)
    f = (np.rint(components @ d2 / unit) + np.rint(basis["predictor_constant"] / unit)).clip(-32767, 32767)
    total = (f[tok] + e[ids].sum(axis=1)).astype(np.int64) & 0xFFFF
    return unit * np.where(total >= 1 << 15, total - (1 << 16), total)


def smaller_head(row, nodes, k):
    """Log-probabilities and curve of the first `k` entries."""
    u = row["logprobs"]
    dropped = u[:, k:] - u[:, k - 1 : k]
    curve = [
        np.log(np.exp(b * dropped).sum(1) + np.exp(row["curve"][:, j] + b * (u[:, -1] - u[:, k - 1])))
        for j, b in enumerate(nodes)
    ]
    return u[:, :k], np.stack(curve, axis=1)
