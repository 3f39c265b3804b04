"""phase1_fwd's consumers on a machine without a GPU: the kernel's own methods run on NumPy arrays of all threads of a cluster.

As in test_cute_phase1_bwd_lanes.py: barriers do nothing and all threads walk in step. Rows are put into the ring where the producer
would put them.
"""

import contextlib

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass")

import cutlass
import cutlass.cute as cute
from test_cute_phase1_bwd_lanes import F32, I32, LANES, Float, Machine, Pointer, peak, replace_in_rounding

from attnres import oracle, rounding
from attnres.scaled import ScaledTensor
from cute_kernels.config_phase1 import Phase1Config, Phase1Outputs, phase1_config
from cute_kernels.device import phase1, phase1_queries
from cute_kernels.device import rounding as device_rounding

HALF = {phase1_queries.BFloat16: False, phase1_queries.Float16: True}
STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp16_scaled": torch.float16}
EPS, SCALE, SEED = 1e-6, 0.7, 2**40 + 5


class ForwardMachine(Machine):
    """What the forward uses besides: two 16-bit types, vectors of device memory, scales."""

    def pack(self, dtype, first, second):
        self.half = HALF[dtype]
        return super().pack(dtype, first, second)

    def unpack(self, dtype, pair):
        self.half = HALF[dtype] if dtype else self.half
        return super().unpack(dtype, pair)

    def mma(self, dtype, a, b, c):
        self.half = HALF[dtype]
        return super().mma(dtype, a, b, c)

    def stochastic(self, values, dtype, bits, guard=True):
        return device_rounding.stochastic([Float(self.full(value)) for value in values], dtype, bits, guard)

    def larger_magnitudes(self, dtype, first, second):
        pairs = (np.abs(self.unpack(dtype, pair)) for pair in (first, second))
        return self.pack(dtype, *map(np.fmax, *pairs))

    def store(self, tensor: torch.Tensor) -> int:
        """The address of a copy of a tensor in device memory."""
        address = self.device.size * 4
        data = np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().tobytes(), np.uint32)
        self.device = np.concatenate([self.device, data])
        return address

    def fetch(self, address: int, like: torch.Tensor) -> torch.Tensor:
        words = like.numel() * like.element_size() // 4
        return torch.from_numpy(self.device[address // 4 :][:words].copy()).view(like.dtype).view(like.shape)

    def store_scalar(self, address, value, predicate):
        self.store_pair(address, 0, [value], predicate)

    def store_vector(self, address, offset, values, predicate):
        where = self.full(True if predicate is None else predicate)
        places = self.full(address + offset)[where] // 4
        for i, value in enumerate(values):
            # No two lanes write to one place, and no place is written to twice.
            assert np.isin(self.device[places + i], 0x7FC07FC0).all()
            assert len(np.unique(places)) == len(places)
            self.device[places + i] = self.bits(value)[where]

    def store_shared(self, address, offset, values, predicate=None):
        super().store_shared(address, offset, values, True if predicate is None else predicate)

    def store_cluster(self, address, barrier, rank, values, predicate=None):
        super().store_cluster(address, barrier, rank, values, True if predicate is None else predicate)

    def copy_scalar(self, shared, address):
        self.store_shared(shared, 0, [self.device[self.full(address) // 4]])


class Table(dict):
    """Row table: address and stride of row i."""

    def __getitem__(self, key):
        which, rows = key
        entries = np.array([super(Table, self).__getitem__((which, i)) for i in range(len(self) // 2)])
        return entries[rows]


def power_of_two_scale(peak):
    exponent = np.minimum(267 - (np.asarray(peak, np.float32).view(np.int32) >> 23), 253)
    return tuple((e.astype(np.int32) << 23).view(np.float32) for e in (exponent, 254 - exponent))


def scale_from(peak):
    exponent = (np.asarray(peak, np.float32).view(np.int32) >> 23) - 14
    return (np.where(peak == 0, 127, np.maximum(exponent, 1)).astype(np.int32) << 23).view(np.float32)


def inverse(scale):
    return (np.int32(254 << 23) - np.asarray(scale, np.float32).view(np.int32)).astype(np.int32).view(np.float32)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def make(config: Phase1Config) -> ForwardMachine:
        machine = ForwardMachine(config)
        names = "ldmatrix pack unpack split_vector split_pair mma mma_k8 zip_pairs larger_magnitudes load_shared store_shared "
        names += "store_cluster load_vector store_scalar store_vector copy_scalar stochastic"
        replaced = {name: getattr(machine, name) for name in names.split()}
        functions = {
            "Float32": F32,
            "Int32": I32,
            "Int64": I32,
            "Boolean": lambda value: value,
            "select": np.where,
            "opaque": lambda value: value,
            "power_of_two_scale": power_of_two_scale,
            "scale_from": scale_from,
            "inverse": inverse,
            "finite_magnitude": lambda x: np.where(np.isfinite(x), np.abs(x), np.float32(0)),
            "reciprocal_root": lambda x: (1 / np.sqrt(x)).astype(np.float32),
            "exp_difference": lambda a, b: np.exp(a - b),
            "log": np.log,
        }
        for name, value in (replaced | functions).items():
            for module in (phase1, phase1_queries):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        replace_in_rounding(monkeypatch, machine)
        monkeypatch.setattr(F32, "width", 32, raising=False)
        monkeypatch.setitem(phase1_queries.TYPES, "fp32", F32)
        # Loops in the kernel
        monkeypatch.setattr(phase1_queries.QueryReader, "peak", peak)
        monkeypatch.setattr(phase1.Phase1Kernel, "announce_totals", lambda *_: None)
        monkeypatch.setattr(cutlass, "min", np.minimum)
        nothing = "sync_warp mbarrier_wait mbarrier_arrive cp_async_wait_group cp_async_commit_group"
        for name in nothing.split():
            monkeypatch.setattr(cute.arch, name, lambda *_, **__: None)
        monkeypatch.setattr(cute.arch, "elect_one", contextlib.nullcontext)
        monkeypatch.setattr(cute.arch, "fmax", np.fmax)
        monkeypatch.setattr(cute.arch, "fmin", np.fmin)
        monkeypatch.setattr(cute.arch, "rcp_approx", lambda x: 1 / x)
        monkeypatch.setattr(
            cute.arch, "shuffle_sync_bfly", lambda value, offset: machine.full(value)[..., LANES ^ offset]
        )
        monkeypatch.setattr(cute.arch, "shuffle_sync", shuffle_sync(machine))
        monkeypatch.setattr(cute.arch, "vote_all_sync", lambda value: machine.full(value).all(-1, keepdims=True))
        monkeypatch.setattr(cute, "recast_ptr", lambda *_, **__: Pointer())
        monkeypatch.setattr(cute, "make_layout", lambda *_, **__: None)
        monkeypatch.setattr(cute, "make_tensor", lambda *_, **__: Table())
        return machine

    return make


def shuffle_sync(machine):
    # As PTX has it, the lane is taken modulo 32: rows of output that are not stored ask for lanes past the last.
    return lambda value, source: np.take_along_axis(machine.full(value), machine.full(source) % 32, -1)


def run(machine: ForwardMachine, config: Phase1Config, sources, queries, key_weights, tokens: int):
    """(out, scale of out, lse) of a cluster's walk over all items."""
    tile, shape = config.tile, config.shape
    kernel, memory = phase1.Phase1Kernel(config), phase1.Memory(config, Pointer())
    values = [s.values if config.scaled_sources else s for s in sources]
    rows = [s.scale for s in sources] if config.scaled_sources else []
    kernel.fill_table(
        memory, [0] * len(sources) + [machine.store(r) for r in rows], [0] * len(sources) + [1] * len(rows)
    )
    out = torch.full((config.num_queries, tokens, config.hidden_size), torch.nan, dtype=STORAGE[config.out])
    lse, logits = (
        torch.full(out.shape[:2], torch.nan),
        torch.full((config.num_queries, len(sources), tokens), torch.nan),
    )
    rstd = torch.full((len(sources), tokens), torch.nan)
    nothing = out.view(torch.int16).fill_(0x7FC0).view(out.dtype)
    outputs = Phase1Outputs(
        **{
            name: I32(machine.store(t))
            for name, t in (("out", nothing), ("out_scale", lse), ("lse", lse), ("logits", logits))
        },
        rstd=I32(machine.store(rstd)),
        seed=SEED,
        first_row=0,
    )
    work = phase1.Queue(
        np.arange(tile.cluster)[:, None, None], I32(0), I32(1), I32(-(-tokens // shape.tokens)), I32(tokens)
    )
    lane = kernel.place(memory, work, np.arange(tile.warps)[None, :, None], LANES[None, None, :])
    weights = (0, 0) if key_weights is None else (I32(machine.store(key_weights)), config.hidden_size)
    given = phase1_queries.load_queries(kernel, memory, lane, I32(machine.store(queries)), config.hidden_size, *weights)
    machine.shared[:, : shape.ring_bytes(tile) // 4] = 0 if kernel.ragged else 0xFFFFFFFF
    columns = tile.cluster * shape.cta_columns(tile)
    padded = [torch.nn.functional.pad(v, (0, columns - config.hidden_size)).view(torch.int32) for v in values]
    padded = [p.view(tokens, tile.cluster, tile.slabs, -1).numpy().view(np.uint32) for p in padded]

    def fill(turn: int) -> None:
        for group in range(shape.groups):
            for slab in range(tile.slabs):
                index = (turn * shape.slots_per_item(tile) + group * tile.slabs + slab) % tile.slots
                slot = int(kernel.slot_address(memory, I32(index), group, slab)) // 4
                for row, source, token in kernel.group_rows(group, I32(turn * shape.tokens), work):
                    at = slot + row * shape.row_bytes(tile) // 4
                    data = padded[source][int(token), :, slab]
                    assert at + data.shape[1] <= shape.ring_bytes(tile) // 4
                    machine.shared[:, at : at + data.shape[1]] = data

    items = int(work.items)
    for turn in range(items + 1):
        if turn < items:
            fill(turn)
            if config.scaled_sources:
                kernel.fetch_scales(memory, work, lane, I32(turn), I32(turn))
            kernel.logits(memory, work, lane, given, I32(turn))
        if turn > 0:
            before = I32(turn - 1)
            found = kernel.softmax(memory, work, lane, outputs, before, before, np.float32(EPS), np.float32(SCALE))
            kernel.mix(memory, work, lane, outputs, before, before, found)
        if turn < items and not tile.direct:
            kernel.exchange(memory, work, lane, I32(turn))
    return [
        machine.fetch(int(address), like) for address, like in zip(outputs, (out, lse, lse, logits, rstd), strict=False)
    ]


SHAPES = [
    (512, 8, 16, {}),
    (1152, 12, 9, {}),
    (384, 4, 8, {"query": "fp32"}),
    (128, 1, 1, {"query": "fp32", "key_weight": "bf16"}),
    (384, 1, 2, {}),
    (384, 1, 3, {"logits": True}),
    (256, 2, 4, {"key_weight": "fp32"}),
    (72, 3, 1, {"logits": True}),
    (128, 3, 2, {}),
    (256, 3, 7, {}),
    (200, 2, 12, {"logits": True}),
    (256, 3, 9, {"logits": True}),
    (264, 4, 9, {"query": "fp32"}),
    (4104, 5, 8, {}),
    (2048, 9, 17, {"query": "fp32"}),
    (320, 17, 24, {"logits": True}),
]


@pytest.mark.parametrize("out", ["bf16", "fp16_scaled"])
@pytest.mark.parametrize("scaled_sources", [False, True])
@pytest.mark.parametrize(("size", "depth", "queries", "given"), SHAPES)
def test_mixes_of_a_few_tokens(
    machine, size: int, depth: int, queries: int, given: dict, scaled_sources: bool, out: str
):
    tokens = 7
    dtype = "fp16" if scaled_sources else "bf16"
    given = {"dtype": dtype, "query": "bf16", "key_weight": None, "logits": False} | given
    sizes = {"hidden_size": size, "num_sources": depth, "num_queries": queries}
    config = phase1_config(**sizes, **given, rstd=True, out=out, scaled_sources=scaled_sources)
    assert config.num_queries == queries
    generator = torch.Generator().manual_seed(size + queries)
    values = torch.randn(depth, tokens, size, generator=generator)
    if scaled_sources:
        values *= torch.exp2(torch.randint(-40, 41, (depth, tokens, 1), generator=generator))
        values[:, 2] *= 1e25
        values[0, 3] = 0
        values[1:, 3] *= 1e-30
        values[:, 4] = 0
    sources = [ScaledTensor.from_tensor(v) if scaled_sources else v.bfloat16() for v in values]
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    query = (torch.randn(queries, size, generator=generator) * 1.5 / size**0.5).to(kinds[config.query])
    weight = None
    if config.key_weight:
        weight = (1 + 0.2 * torch.randn(queries, size, generator=generator)).to(kinds[config.key_weight])
    found, out_scale, lse, logits, rstd = run(machine(config), config, sources, query, weight, tokens)
    exact = oracle.phase1(sources, query, EPS, weight, SCALE)
    stored = ScaledTensor.from_tensor(exact.out.float()) if out == "fp16_scaled" else exact.out.bfloat16()
    result = found.double() * out_scale.double().unsqueeze(-1) if out == "fp16_scaled" else found.double()
    if out == "fp16_scaled":
        assert ((out_scale >= stored.scale) & (out_scale <= 16 * stored.scale)).all()
    largest = exact.out.abs().amax(-1, keepdim=True).clamp_min(2.0**-120)
    error, floor = (((r.to(torch.float64) - exact.out) / largest).norm(dim=-1) for r in (result, stored))
    assert (error <= 1.1 * floor + 3e-5).all(), (error / floor.clamp_min(1e-12)).max()
    torch.testing.assert_close(lse.double(), exact.lse, rtol=0, atol=2e-5)
    represented = torch.stack([s.to(torch.float64) for s in sources])
    torch.testing.assert_close(rstd.double(), (represented.square().mean(-1) + EPS) ** -0.5, rtol=1e-5, atol=0)
    if config.logits:
        effective = query.double() if weight is None else query.double() * weight.double()
        wanted = SCALE * torch.einsum("sd,ntd->snt", effective, represented) * rstd.double()
        torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("broken", [None, 2])
@pytest.mark.parametrize(("size", "queries"), [(72, 2), (384, 3), (512, 16)])
def test_out_is_rounded_stochastically(machine, size: int, queries: int, broken: int | None):
    """A block twice: the mix is the block, exactly, so that its bits are those of the definition. NaN stays in its token, and where
    it reaches others of its item; other items do not see it."""
    values = torch.randn(5, size, generator=torch.Generator().manual_seed(1))
    if broken is not None:
        values[broken, 3] = torch.nan
    block = ScaledTensor.from_tensor(values)
    sizes = {"hidden_size": size, "num_sources": 2, "num_queries": queries}
    config = phase1_config(
        **sizes,
        dtype="fp16",
        query="bf16",
        key_weight=None,
        rstd=True,
        logits=True,
        out="bf16",
        scaled_sources=True,
        stochastic=True,
    )
    query = torch.randn(queries, size, generator=torch.Generator().manual_seed(2)).bfloat16()
    found, *_ = run(machine(config), config, [block, block], query, None, 5)
    rows = block.to(torch.float32).expand(queries, -1, -1).reshape(-1, size)
    wanted = rounding.stochastic(rows, torch.bfloat16, SEED, rounding.PHASE_1_OUT).view(found.shape)
    per_item = config.shape.tokens
    whole = [t for t in range(5) if broken is None or t // per_item != broken // per_item]
    assert torch.equal(found[:, whole], wanted[:, whole])
    if broken is not None:
        assert found[:, broken].isnan().all()
        assert not found[:, whole].isnan().any()


def test_weights_of_stochastic_rounding_have_24_bits(machine):
    """With weights of 16 bits, 182 elements are drawn otherwise than the exact result."""
    generator = torch.Generator().manual_seed(3)
    blocks = [torch.randn(9, 512, generator=generator).bfloat16() for _ in range(8)]
    query = torch.randn(16, 512, generator=generator).mul(0.02).bfloat16()
    config = phase1_config(
        dtype="bf16", query="bf16", key_weight=None, hidden_size=512, num_sources=8, num_queries=16, stochastic=True
    )
    found, *_ = run(machine(config), config, blocks, query, None, 9)
    exact, _ = oracle.phase1(blocks, query, EPS, scale=SCALE)
    drawn = rounding.stochastic(exact.float().view(-1, 512), torch.bfloat16, SEED, rounding.PHASE_1_OUT)
    assert (found.view(-1, 512) != drawn).sum() <= 10
