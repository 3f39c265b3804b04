"""phase1_bwd's consumers on a machine without a GPU: the kernel's own methods run on NumPy arrays of all threads of a cluster.

Every number of a thread becomes an array [CTAs, warps, 32]; instructions (ldmatrix, mma, shuffles, shared memory) are replaced
by what PTX says of them. Barriers do nothing: all threads walk in step. What is left to the GPU is the order among warps.
"""

import contextlib
import types

import numpy as np
import pytest
import torch

from attnres import rounding

pytest.importorskip("cutlass")

import cutlass
import cutlass.cute as cute

from cute_kernels.config_phase1_bwd import Phase1BwdConfig, phase1_bwd_config

LANES = np.arange(32)
C, Q = LANES // 4, LANES % 4
NAN = np.uint32(0x7FFFFFFF).view(np.float32)  # what arithmetic makes on the device


class F32:
    def __new__(cls, value):
        return np.float32(value)


class I32:
    def __new__(cls, value):
        return np.asarray(value, np.int64)


class Word(np.ndarray):
    """32 bits of each thread, which device/rounding.py reads as integers and as fp32 numbers."""

    def bitcast(self, kind):
        return self.view(np.int32 if kind is Int else np.float32)


class Int:
    def __new__(cls, value):
        # An array even of one number: those may overflow without a warning
        return np.atleast_1d(value).astype(np.int32).view(Word)


class Float:
    def __new__(cls, value):
        return np.asarray(value).astype(np.float32).view(Word)


class Pointer:
    """Of a barrier."""

    def __add__(self, _):
        return self

    def toint(self):
        return 0


class Registers(dict):
    """An rmem tensor: indices are static and not negative."""

    def __setitem__(self, key, value):
        assert all(k >= 0 for k in (key if isinstance(key, tuple) else (key,)))
        super().__setitem__(key, np.asarray(value, np.float32))


class Machine:
    """One cluster, with its shared memories and device memory, and the instructions that reach them."""

    def __init__(self, config: Phase1BwdConfig):
        self.half = config.dtype == "fp16"
        self.shape = (config.tile.cluster, config.tile.warps, 32)
        # Whatever is not written is NaN in every type.
        self.shared = np.full((config.tile.cluster, config.shared_bytes // 4 + 64), 0xFFFFFFFF, np.uint32)
        self.device = np.zeros(0, np.uint32)
        self.drawn: list[np.ndarray] = []  # what was rounded stochastically: two sources, a column of a tile each

    def place(self, tensor: np.ndarray, dtype: str = "fp32") -> int:
        """The address of a copy in device memory."""
        address = self.device.size * 4
        if dtype == "fp32":
            words = tensor.astype(np.float32).ravel().view(np.uint32)
        else:
            words = self.halves(tensor, dtype == "fp16").astype(np.uint16).ravel().view(np.uint32)
        self.device = np.concatenate([self.device, words])
        return address

    def full(self, value) -> np.ndarray:
        return np.broadcast_to(value, self.shape)

    def numbers(self, halves: np.ndarray, half: bool | None = None) -> np.ndarray:
        """fp32 of 16-bit patterns."""
        halves = halves.astype(np.uint16)
        if self.half if half is None else half:
            return halves.view(np.float16).astype(np.float32)
        return (halves.astype(np.uint32) << 16).view(np.float32)

    def halves(self, values: np.ndarray, half: bool | None = None) -> np.ndarray:
        """16-bit patterns of fp32, rounded to nearest even."""
        kind = torch.float16 if (self.half if half is None else half) else torch.bfloat16
        rounded = torch.from_numpy(np.array(values, np.float32)).to(kind).view(torch.int16).numpy()
        return rounded.view(np.uint16).astype(np.uint32)

    def unpack(self, dtype, pair):
        pair, half = self.full(pair).astype(np.uint32), None if dtype is None else dtype is cutlass.Float16
        return self.numbers(pair & 0xFFFF, half), self.numbers(pair >> 16, half)

    def pack(self, dtype, first, second):
        half = dtype is cutlass.Float16
        return self.halves(self.full(first), half) | self.halves(self.full(second), half) << 16

    def split_pair(self, dtype, first, second, terms):
        split = []
        for _ in range(terms):
            split.append(self.pack(dtype, first, second))
            high = self.unpack(dtype, split[-1])
            first, second = first - high[0], second - high[1]
        return split

    def split_vector(self, dtype, values, terms):
        split = [self.split_pair(dtype, *pair, terms) for pair in zip(values[::2], values[1::2], strict=True)]
        return [list(term) for term in zip(*split, strict=True)]

    def matrix(self, first, second) -> np.ndarray:
        """[..., 8, 8] of which each lane has (row c, columns 2q and 2q + 1)."""
        found = np.empty((*self.shape[:2], 8, 8), first.dtype)
        found[..., C, 2 * Q], found[..., C, 2 * Q + 1] = first, second
        return found

    def zip_pairs(self, even, odd, element):
        even, odd = (self.full(pair).astype(np.uint32) >> 16 * element & 0xFFFF for pair in (even, odd))
        return even | odd << 16

    def transpose(self, pair):
        pair = self.full(pair).astype(np.uint32)
        matrix = np.swapaxes(self.matrix(pair & 0xFFFF, pair >> 16), -1, -2)
        return matrix[..., C, 2 * Q] | matrix[..., C, 2 * Q + 1] << 16

    def product(self, dtype, octets, b, c):
        """octets: the rows' (K 0 to 7, K 8 to 15, ...) pairs; b: the pairs of K x 8."""
        result = []
        for i, octet in enumerate(octets):
            total = np.zeros((*self.shape[:2], 8, 8), np.float64)
            for left, right in zip(octet, b, strict=True):
                left, right = (self.matrix(*self.unpack(dtype, pair)) for pair in (left, right))
                total += left.astype(np.float64) @ np.swapaxes(right, -1, -2)
            for e in range(2):
                addend = 0.0 if c is None else self.full(c[2 * i + e])
                value = (total[..., C, 2 * Q + e] + addend).astype(np.float32)
                result.append(np.where(np.isnan(value), NAN, value))
        return result

    def mma(self, dtype, a, b, c):
        return self.product(dtype, [a[0], a[1] or (0, 0)], b, c)

    def mma_k8(self, dtype, a, b, c):
        return self.product(dtype, [(a[0],), (a[1],)], (b,), c)

    def stochastic_pair(self, values, words, dtype):
        from cute_kernels.device import rounding

        values = [Float(self.full(value)) for value in values]
        self.drawn.append(np.stack(values, -1))
        return rounding.stochastic_pair(values, words, dtype)

    def words(self, address) -> tuple[np.ndarray, np.ndarray]:
        address = self.full(address)
        assert (address % 4 == 0).all()
        return np.broadcast_to(np.arange(self.shape[0])[:, None, None], self.shape), address // 4

    def load_shared(self, kind, address, offset, count):
        ctas, index = self.words(address + offset)
        found = [self.shared[ctas, index + i] for i in range(count)]
        return [value.view(np.float32) for value in found] if kind is F32 else found

    def store_shared(self, address, offset, values, predicate=True):
        ctas, index = self.words(address + offset)
        where = self.full(predicate)
        for i, value in enumerate(values):
            self.shared[ctas[where], index[where] + i] = self.bits(value)[where]

    def store_cluster(self, address, barrier, rank, values, predicate=True):
        _, index = self.words(address)
        where, ctas = self.full(predicate), self.full(rank)
        for i, value in enumerate(values):
            self.shared[ctas[where], index[where] + i] = self.bits(value)[where]

    def bits(self, value) -> np.ndarray:
        value = np.ascontiguousarray(self.full(value))
        return value.view(np.uint32) if value.dtype == np.float32 else value.astype(np.uint32)

    def ldmatrix(self, address, offset, transposed=False, count=4):
        ctas, index = self.words(address + offset)
        assert (self.full(address + offset) % 16 == 0).all()
        found = []
        for matrix in range(count):
            lanes = slice(8 * matrix, 8 * matrix + 8)
            words = np.stack([self.shared[ctas[..., lanes], index[..., lanes] + i] for i in range(4)], -1)
            elements = np.stack([words & 0xFFFF, words >> 16], -1).reshape(*words.shape[:-1], 8)
            if transposed:
                elements = np.swapaxes(elements, -1, -2)
            found.append(elements[..., C, 2 * Q] | elements[..., C, 2 * Q + 1] << 16)
        return found

    def stmatrix(self, address, offset, matrices):
        ctas, index = self.words(address + offset)
        assert (self.full(address + offset) % 16 == 0).all()
        for number, pair in enumerate(matrices):
            pair = self.full(pair).astype(np.uint32)
            rows = np.swapaxes(self.matrix(pair & 0xFFFF, pair >> 16), -1, -2)
            lanes = slice(8 * number, 8 * number + 8)
            # No two lanes write to one place.
            assert all(
                len(np.unique(row)) == row.size for row in index[..., : 8 * len(matrices)].reshape(len(index), -1)
            )
            for i in range(4):
                self.shared[ctas[..., lanes], index[..., lanes] + i] = rows[..., 2 * i] | rows[..., 2 * i + 1] << 16

    def copy_scalar(self, shared, address, predicate=True):
        ctas, index = self.words(shared)
        where = self.full(predicate)
        self.shared[ctas[where], index[where]] = self.device[self.full(address)[where] // 4]

    def load_vector(self, kind, address, offset, predicate):
        where, found = self.full(predicate), []
        for i in range(4):
            value = np.zeros(self.shape, np.uint32)
            value[where] = self.device[self.full(address + offset)[where] // 4 + i]
            found.append(value.view(np.float32) if kind is F32 else value)
        return found

    def store_pair(self, address, offset, values, predicate):
        where = self.full(predicate)
        for i, value in enumerate(values):
            self.device[(self.full(address + offset)[where] // 4) + i] = self.bits(value)[where]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch):
    """The device module with its types and instructions replaced by a machine's."""
    from cute_kernels.device import phase1_bwd, phase1_queries

    def patch(machine: Machine) -> types.ModuleType:
        names = "ldmatrix stmatrix mma mma_k8 pack unpack split_pair split_vector transpose stochastic_pair"
        for name in names.split():
            monkeypatch.setattr(phase1_bwd, name, getattr(machine, name))
        for name in ("load_shared", "store_shared", "store_cluster", "copy_scalar", "store_pair"):
            monkeypatch.setattr(phase1_bwd, name, getattr(machine, name))
        for name in ("mma", "unpack", "load_vector"):
            monkeypatch.setattr(phase1_queries, name, getattr(machine, name))
        for name, value in {"Float32": F32, "Int32": I32, "Int64": I32, "select": np.where}.items():
            monkeypatch.setattr(phase1_bwd, name, value)
            monkeypatch.setattr(phase1_queries, name, value)
        monkeypatch.setattr(phase1_queries, "Boolean", np.asarray)
        monkeypatch.setitem(phase1_queries.TYPES, "fp32", F32)
        monkeypatch.setattr(F32, "width", 32, raising=False)
        # A loop in the kernel
        monkeypatch.setattr(phase1_queries.QueryReader, "peak", peak)
        monkeypatch.setattr(phase1_bwd, "inverse", lambda scale: 1 / scale)
        monkeypatch.setattr(phase1_bwd, "warp_max", lambda value: machine.full(value).max(-1, keepdims=True))
        replace_in_rounding(monkeypatch, machine)
        monkeypatch.setattr(phase1_bwd, "exp_difference", lambda a, b: np.exp(a - b))
        monkeypatch.setattr(phase1_bwd, "power_of_two_scale", power_of_two_scale)
        monkeypatch.setattr(cutlass, "min", np.minimum)
        monkeypatch.setattr(cutlass, "max", np.maximum)
        nothing = (
            "sync_warp barrier fence_view_async_shared mbarrier_wait mbarrier_arrive mbarrier_arrive_and_expect_tx"
        )
        for name in nothing.split():
            monkeypatch.setattr(cute.arch, name, lambda *_, **__: None)
        monkeypatch.setattr(cute.arch, "elect_one", contextlib.nullcontext)
        monkeypatch.setattr(cute.arch, "fmax", np.maximum)
        monkeypatch.setattr(cute.arch, "shuffle_sync_bfly", lambda value, offset: value[..., LANES ^ offset])
        monkeypatch.setattr(cute, "recast_ptr", lambda *_, **__: Pointer())
        monkeypatch.setattr(phase1_bwd, "wait_all", lambda _: None)
        return phase1_bwd

    return patch


def replace_in_rounding(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """For device/rounding.py, whose own functions run on NumPy arrays then."""
    from cute_kernels.device import rounding

    functions = {
        "Float32": Float,
        "Int32": Int,
        "select": select,
        "multiply": multiply,
        "upper_bits": lambda word, count: Int(word.astype(np.uint32) >> np.uint32(32 - count)),
        "add_toward_zero": add_toward_zero,
        "zip_pairs": machine.zip_pairs,
        "pack": machine.pack,
    }
    for name, value in functions.items():
        monkeypatch.setattr(rounding, name, value)


def select(condition, yes, no):
    return np.where(condition, yes, no).view(Word)


def multiply(x, factor):
    product = x.astype(np.uint32).astype(np.uint64) * np.uint64(factor)
    return Int(product >> np.uint64(32)), Int(product & np.uint64(0xFFFFFFFF))


def add_toward_zero(a, b):
    """Of fp32 numbers whose sum fp64 has."""
    total = np.asarray(a, np.float64) + np.asarray(b, np.float64)
    return Float((total.view(np.int64) & ~((1 << 29) - 1)).view(np.float64))


def peak(reader, octet):
    found = 0.0
    for row in range(8):
        found = np.where(reader.lane.c == row, reader.row_peak(I32(octet * 8 + row)), found)
    return found.astype(np.float32)


def power_of_two_scale(peak):
    exponent = 13 - np.floor(np.log2(np.maximum(peak, 2.0**-113)))
    return np.exp2(exponent).astype(np.float32), np.exp2(-exponent).astype(np.float32)


def rows_of(values: np.ndarray, machine: Machine, config: Phase1BwdConfig, half: bool | None = None) -> np.ndarray:
    """[rows, D] as [CTAs, rows, words of a CTA's row]; zeros past the row's end, as the kernel clears them."""
    columns = config.tile.cta_columns
    padded = np.zeros((len(values), config.tile.cluster * columns), np.float32)
    padded[:, : values.shape[1]] = values
    halves = machine.halves(padded, half).reshape(len(values), config.tile.cluster, columns)
    return (halves[..., ::2] | halves[..., 1::2] << 16).swapaxes(0, 1)


@pytest.mark.parametrize(
    ("hidden_size", "sources", "queries", "given"),
    [
        (2048, 4, 8, {}),
        (2048, 8, 16, {}),
        (1024, 8, 24, {}),
        (1024, 5, 32, {"query": "fp32"}),
        (7168, 8, 24, {}),
        (7168, 3, 20, {"accumulate": True}),
        (384, 5, 3, {"dtype": "fp16", "query": "fp16", "accumulate": True}),
        (456, 7, 12, {"dtype": "fp16", "query": "fp32"}),
        (8192, 8, 16, {"query": "fp32", "key_weight": "bf16", "accumulate": True}),
        (112, 2, 9, {"d_lse": False}),
        (8, 1, 1, {}),
        (1024, 8, 16, {"scaled": True}),
        (456, 7, 12, {"scaled": True, "dtype": "fp16", "query": "fp16"}),
        (2048, 5, 8, {"scaled": True, "query": "fp32", "accumulate": True}),
        (112, 3, 20, {"scaled": True}),
        (2048, 4, 8, {"stochastic": True}),
        (1024, 8, 24, {"stochastic": True, "accumulate": True}),
        (7168, 8, 24, {"stochastic": True, "query": "fp32"}),
        (456, 7, 12, {"stochastic": True, "dtype": "fp16", "query": "fp16"}),
        (2048, 5, 8, {"stochastic": True, "query": "fp32", "scaled": True, "accumulate": True}),
        (384, 8, 32, {"stochastic": True, "dtype": "fp16", "query": "fp32", "key_weight": "fp32", "scaled": True}),
        (456, 3, 9, {"stochastic": True, "dtype": "fp16"}),
        (112, 2, 20, {"stochastic": True, "query": "fp16"}),
        (8, 1, 1, {"stochastic": True, "query": "fp32"}),
    ],
)
def test_gradients_of_a_few_tokens(patched, hidden_size: int, sources: int, queries: int, given: dict) -> None:
    given = {"dtype": "bf16", "query": "bf16", "key_weight": None, "d_lse": True} | given
    shape = {"hidden_size": hidden_size, "num_sources": sources, "num_queries": queries}
    config = phase1_bwd_config(**shape, **given)
    machine = Machine(config)
    device = patched(machine)
    tile, tokens = config.tile, 3
    rng = np.random.default_rng(hidden_size + queries)

    def stored(*size: int, half: bool | None = None) -> np.ndarray:
        return machine.numbers(machine.halves(rng.standard_normal(size, np.float32), half), half)

    def parameters(values: np.ndarray, dtype: str) -> np.ndarray:
        return values if dtype == "fp32" else machine.numbers(machine.halves(values, dtype == "fp16"), dtype == "fp16")

    half = config.scaled or machine.half
    rows, row_scale = stored(tokens, sources, hidden_size, half=half), np.ones((tokens, sources), np.float32)
    if config.scaled:
        row_scale = np.exp2(rng.integers(-3, 4, (tokens, sources))).astype(np.float32)
    v = rows * row_scale[..., None]
    d_out, old = stored(queries, tokens, hidden_size), stored(tokens, sources, hidden_size)
    u = rng.standard_normal((queries, hidden_size), np.float32) * np.float32(1.5 / np.sqrt(hidden_size))
    u = query = parameters(u, config.query)
    if config.key_weight:
        key_weight = parameters(1 + 0.25 * rng.standard_normal(u.shape, np.float32), config.key_weight)
        u = query * key_weight
    d_lse = rng.standard_normal((queries, tokens)) * config.d_lse
    scale = 0.7

    # The formulas in float64
    rstd = (np.square(v.astype(float)).mean(-1) + 1e-6) ** -0.5  # [T, N]
    logits = scale * np.einsum("tnd,sd->stn", v.astype(float), u) * rstd
    lse = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - lse[..., None])
    a = np.einsum("std,tnd->stn", d_out.astype(float), v)
    h = p * (a - (p * a).sum(-1, keepdims=True) + d_lse[..., None])
    g = scale * rstd * h
    d_v = np.einsum("stn,std->tnd", p, d_out) + np.einsum("stn,sd->tnd", g, u)
    d_v -= (rstd**2 / hidden_size * (logits * h).sum(0))[..., None] * v
    d_v += old * config.accumulate
    du = np.einsum("stn,tnd->sd", g, v)

    # The kernel
    kernel = device.Phase1BwdKernel(config)
    memory = device.Memory(config, Pointer())
    forward = [machine.place(x) for x in (lse, logits.transpose(0, 2, 1), rstd.T, d_lse)]
    scales = [I32(machine.place(row_scale[:, n])) for n in range(sources)]
    seed = 2**41 + 5
    statistics = device.Statistics(*forward, scales, [I32(1)] * sources, [seed] * config.stochastic)
    found_du = machine.place(np.full((queries, hidden_size), np.nan))
    rank = np.arange(tile.cluster)[:, None, None]
    work = device.Work(rank, I32(0), I32(1), I32(tokens), I32(tokens))
    lane = kernel.place(work, np.arange(tile.warps)[None, :, None], LANES[None, None, :])
    sums, pulls = device.Sums(Registers(), Registers()), []
    for octet in range(config.du_octets):
        for k in range(tile.columns // 8):
            sums.du[0, k, octet] = sums.du[1, k, octet] = machine.full(np.float32(0.0))
    words = tile.row_bytes // 4

    def fill(first: int, row: int, rows: np.ndarray) -> None:
        for i in range(rows.shape[1]):
            at = int(first) // 4 + (row + i) * words
            machine.shared[:, at : at + rows.shape[2]] = rows[:, i]

    ring = config.ring_bytes // 4
    machine.shared[:, int(memory.sources) // 4 :][:, :ring] = 0 if config.ragged else 0xFFFFFFFF
    addresses = [I32(machine.place(query, config.query)), I32(hidden_size)]
    addresses += [I32(machine.place(key_weight, config.key_weight)), I32(hidden_size)] if config.key_weight else [0, 0]
    reader = device.QueryReader(kernel, lane, *addresses)
    if config.scales_queries:
        kernel.store_query_scales(memory, lane, reader)
    vectors = queries * tile.columns // 8
    for first in range(0, vectors, 32):
        kernel.load_query_vector(memory, lane, reader, np.minimum(lane.lane + first, vectors - 1))

    found = np.full((tokens, sources, tile.cluster * tile.cta_columns), np.nan)

    def begin(turn: int, number: int) -> None:
        item = kernel.item(I32(turn), number)
        if number == 0:
            _, _, slot = kernel.source_slot(memory, turn)
            fill(slot, 0, rows_of(rows[turn], machine, config, half))
            if config.accumulate:
                fill(slot, sources, rows_of(old[turn], machine, config))
        for octet in item.octets:
            _, _, slot = kernel.output_slot(memory, turn, octet)
            octet_rows = d_out[octet * 8 : octet * 8 + config.octet_rows(octet), turn]
            fill(slot, 0, rows_of(octet_rows, machine, config))
        kernel.products(memory, lane, item)
        # From here on every warp does what one warp of the kernel does.
        kernel.copy_statistics(memory, work, lane.lane, statistics, item.index)
        if tile.cluster > 1:
            kernel.exchange(memory, work, lane, item)
        if item.last and config.stochastic:
            kernel.store_bits(memory, work, lane.lane, seed, item)
        pulls.append([np.float32(0.0)] * 2 if item.first else pulls[-1])
        weights, pulls[-1] = kernel.weights(memory, lane, item, pulls[-1], np.float32(scale))
        kernel.store_weights(memory, lane, item, weights)

    drawn = np.full(found.shape, np.nan, np.float32)

    def end(turn: int, number: int) -> None:
        item = kernel.item(I32(turn), number)
        kernel.mix(memory, lane, item, sums)
        if number == config.items - 1:
            first = (int(memory.stage) + turn % tile.stages * config.stage_bytes) // 4
            written = machine.shared[:, first : first + sources * words].reshape(tile.cluster, sources, words)
            written = written[..., : tile.cta_columns // 2]
            pairs = np.stack([machine.numbers(written & 0xFFFF), machine.numbers(written >> 16)], -1)
            found[turn] = pairs.reshape(tile.cluster, sources, -1).swapaxes(0, 1).reshape(sources, -1)
            for tile_number, values in enumerate(machine.drawn):
                column = machine.full(lane.column + tile_number * 8 + lane.c)
                for e in range(2):
                    source = machine.full(lane.q * 2 + e)
                    there = source < sources
                    drawn[turn, source[there], column[there]] = values[there, e]
            machine.drawn.clear()

    items = [(turn, number) for turn in range(tokens) for number in range(config.items)]
    for now, before in zip([*items, None], [None, *items], strict=True):
        if now:
            begin(*now)
        if before:
            end(*before)
    kernel.store_du(work, lane, found_du, sums.du)
    found, drawn = found[..., :hidden_size], drawn[..., :hidden_size]
    found_du = machine.device.view(np.float32)[found_du // 4 :][: du.size].reshape(du.shape)

    if config.stochastic:
        # fp32's accuracy (two bf16 terms have up to 2e-6), and the random bits of every backend
        assert np.linalg.norm(drawn - d_v) <= 4e-7 * np.linalg.norm(d_v)
        dtype = torch.float16 if machine.half else torch.bfloat16
        by_row = torch.from_numpy(drawn.swapaxes(0, 1).reshape(sources * tokens, hidden_size).copy())
        expected = rounding.stochastic(by_row, dtype, seed, rounding.D_SOURCES).float()
        assert np.array_equal(found.swapaxes(0, 1).reshape(by_row.shape), expected.numpy())
    else:
        rounded = machine.numbers(machine.halves(d_v.astype(np.float32)))
        floor = np.linalg.norm(rounded - d_v)
        assert np.linalg.norm(found - d_v) <= 1.05 * floor + 1e-6 * np.linalg.norm(d_v)
    # Weights of two terms have 17 bits (bf16) or 22; of three, fp32's own.
    wanted = 1e-6 if config.weight_terms == 3 or config.dtype == "fp16" else 2e-5
    assert np.linalg.norm(found_du - du) <= wanted * np.linalg.norm(du) + 1e-6
