"""Tensor-core products on rows in shared memory, and the few PTX instructions the DSL has no operation for.

Lane layout of `mma.m16n8k16` (A row-major, B column-major, fp32 accumulators), with c = lane // 4 and q = lane % 4:

    A 16x16   a0 = A[c][2q, 2q+1]   a1 = A[c+8][2q, 2q+1]   a2 = A[c][2q+8, 2q+9]   a3 = A[c+8][2q+8, 2q+9]
    B 16x8    b0 = B[2q, 2q+1][c]   b1 = B[2q+8, 2q+9][c]
    C 16x8    c0, c1 = C[c][2q, 2q+1]   c2, c3 = C[c+8][2q, 2q+1]

Rows 0 to 7 and rows 8 to 15 of A never meet: a 16-row operand is two independent *octets* of rows, (a0, a2) and (a1,
a3), with results (c0, c1) and (c2, c3). Two numbers of a 2-byte type in one register are a *pair*, the first in the
lower half.

Addresses are integers: bytes in shared memory (Int32) or device memory (Int64). A pointer plus an offset would lose its
alignment, and with it the access width. What reads or writes memory is marked as having side effects, so that it keeps
its place among barriers.
"""

import cutlass
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64, Numeric
from cutlass._mlir.dialects import llvm

Pair = Int32
Octet = tuple[Pair, Pair]

_CONSTRAINT = {Int32: "r", Int64: "l", Float32: "f", Boolean: "b"}
_PTX_TYPE = {BFloat16: "bf16", Float16: "f16"}


def ptx(text: str, results: list[type[Numeric]], operands: list[Numeric], effects: bool) -> list[Numeric]:
    """Inline PTX; $0.. are the results, then the operands."""
    constraints = ["=" + _CONSTRAINT[kind] for kind in results] + [_CONSTRAINT[type(value)] for value in operands]
    values = [value.ir_value() for value in operands]
    types = [kind.mlir_type for kind in results]
    result_type = None if not types else types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    made = llvm.inline_asm(
        result_type,
        values,
        text,
        ",".join(constraints),
        has_side_effects=effects,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    if not results:
        return []
    if len(results) == 1:
        return [results[0](made)]
    return [kind(llvm.extractvalue(kind.mlir_type, made, [i])) for i, kind in enumerate(results)]


def select(condition: Boolean, yes: Numeric, no: Numeric) -> Numeric:
    return type(yes)(cutlass.select_(condition, yes, no))


def opaque(value: Int32) -> Int32:
    """The value, as one the compiler knows nothing of."""
    return ptx("mov.b32 $0,$1;", [Int32], [value], effects=True)[0]


def _slots(first: int, count: int) -> str:
    return ",".join(f"${first + i}" for i in range(count))


def _guard(predicate: Boolean | None, index: int) -> tuple[str, list[Boolean]]:
    """The prefix that makes an instruction conditional on operand `index`, and that operand."""
    return ("", []) if predicate is None else (f"@${index} ", [predicate])


# Tensor cores


def mma(dtype: type[Numeric], a: tuple[Octet, Octet | None], b: Octet, c: list[Float32] | None) -> list[Float32]:
    """A [16 x 16] times B [16 x 8] plus C [16 x 8] (None: zero); A as its two octets of rows (None: zeros)."""
    (a0, a2), (a1, a3) = a[0], a[1] or (Int32(0), Int32(0))
    operands = [a0, a1, a2, a3, *b, *(c or [Float32(0.0)])]
    addend = _slots(10, 4) if c else "$10,$10,$10,$10"
    kind = _PTX_TYPE[dtype]
    kinds = f"f32.{kind}.{kind}.f32"
    text = f"mma.sync.aligned.m16n8k16.row.col.{kinds} {{$0,$1,$2,$3}},{{$4,$5,$6,$7}},{{$8,$9}},{{{addend}}};"
    return ptx(text, [Float32] * 4, operands, effects=False)


def mma_k8(dtype: type[Numeric], a: tuple[Pair, Pair], b: Pair, c: list[Float32] | None) -> list[Float32]:
    """A [16 x 8] times B [8 x 8] plus C [16 x 8] (None: zero): the first half of K of `mma`, (a0, a1) and b0."""
    operands = [*a, b, *(c or [Float32(0.0)])]
    addend = _slots(7, 4) if c else "$7,$7,$7,$7"
    kind = _PTX_TYPE[dtype]
    text = f"mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32 {{$0,$1,$2,$3}},{{$4,$5}},{{$6}},{{{addend}}};"
    return ptx(text, [Float32] * 4, operands, effects=False)


def ldmatrix(address: Int32, offset: int, transposed: bool = False, count: int = 4) -> list[Pair]:
    """2 or 4 8x8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l // 8.

    From each matrix a lane gets the pair (row c, columns 2q and 2q + 1): matrix rows as columns of B. Transposed, it
    gets (rows 2q and 2q + 1, column c): matrix rows as rows of B.
    """
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{_slots(0, count)}}},[${count}+{offset}];"
    return ptx(text, [Int32] * count, [address], effects=True)


def stmatrix(address: Int32, offset: int, matrices: list[Pair]) -> None:
    """Stores 2 or 4 8x8 matrices of which each lane has (rows 2q and 2q + 1, column c): `ldmatrix`, transposed, the other way."""
    count = len(matrices)
    text = f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [$0+{offset}],{{{_slots(1, count)}}};"
    ptx(text, [], [address, *matrices], effects=True)


def transpose(pair: Pair) -> Pair:
    """An 8x8 matrix whose row c, columns 2q and 2q + 1 each lane holds, transposed over the warp."""
    return ptx("movmatrix.sync.aligned.m8n8.trans.b16 $0,$1;", [Int32], [pair], effects=False)[0]


# Pairs


def pack(dtype: type[Numeric], first: Float32, second: Float32) -> Pair:
    return ptx(f"cvt.rn.{_PTX_TYPE[dtype]}x2.f32 $0,$1,$2;", [Int32], [second, first], effects=False)[0]


def unpack(dtype: type[Numeric], pair: Pair) -> tuple[Float32, Float32]:
    if dtype is BFloat16:
        text = "{.reg .b32 t; shl.b32 t,$2,16; mov.b32 $0,t; and.b32 t,$2,0xffff0000; mov.b32 $1,t;}"
    else:
        text = "{.reg .b16 l,h; mov.b32 {l,h},$2; cvt.f32.f16 $0,l; cvt.f32.f16 $1,h;}"
    first, second = ptx(text, [Float32, Float32], [pair], effects=False)
    return first, second


def larger_magnitudes(dtype: type[Numeric], first: Pair, second: Pair) -> Pair:
    """Element by element, with signs that mean nothing; a number where the other is NaN."""
    return ptx(f"max.xorsign.abs.{_PTX_TYPE[dtype]}x2 $0,$1,$2;", [Int32], [first, second], effects=False)[0]


def split_pair(dtype: type[Numeric], first: Float32, second: Float32, terms: int) -> list[Pair]:
    """Pairs that add up to two numbers, each with the mantissa that those before it leave."""
    split = [pack(dtype, first, second)]
    for _ in range(terms - 1):
        high_first, high_second = unpack(dtype, split[-1])
        first, second = first - high_first, second - high_second
        split.append(pack(dtype, first, second))
    return split


def split_vector(dtype: type[Numeric], values: list[Float32], terms: int) -> list[list[Pair]]:
    """Numbers as terms of the dtype, each as pairs."""
    split = [split_pair(dtype, *pair, terms) for pair in zip(values[::2], values[1::2], strict=True)]
    return [list(term) for term in zip(*split, strict=True)]


def power_of_two_scale(peak: Float32) -> tuple[Float32, Float32]:
    """(2^e, 2^-e) with peak * 2^e in [2^13, 2^14): no fp16 overflow, and far from fp16's subnormals."""
    text = (
        "{.reg .b32 e; mov.b32 e,$2; shr.u32 e,e,23; sub.s32 e,267,e; min.s32 e,e,253; "
        ".reg .b32 t; shl.b32 t,e,23; mov.b32 $0,t; sub.s32 e,254,e; shl.b32 t,e,23; mov.b32 $1,t;}"
    )
    scale, inverse = ptx(text, [Float32, Float32], [peak], effects=False)
    return scale, inverse


def zip_pairs(even: Pair, odd: Pair, element: int) -> Pair:
    """(even[element], odd[element]): element 0 or 1 of two pairs as a pair."""
    selector = 0x7632 if element else 0x5410
    return ptx(f"prmt.b32 $0,$1,$2,0x{selector:x};", [Int32], [even, odd], effects=False)[0]


# Shared memory


def load_shared(kind: type[Numeric], address: Int32, offset: int, count: int) -> list[Numeric]:
    """1, 2 or 4 consecutive 4-byte values."""
    width, data = ("", "$0") if count == 1 else (f".v{count}", f"{{{_slots(0, count)}}}")
    text = f"ld.shared{width}.b32 {data},[${count}+{offset}];"
    return ptx(text, [kind] * count, [address], effects=True)


def store_shared(address: Int32, offset: int, values: list[Numeric], predicate: Boolean | None = None) -> None:
    """1, 2 or 4 consecutive 4-byte values."""
    count = len(values)
    guard, condition = _guard(predicate, count + 1)
    width, data = ("", "$1") if count == 1 else (f".v{count}", f"{{{_slots(1, count)}}}")
    ptx(f"{guard}st.shared{width}.b32 [$0+{offset}],{data};", [], [address, *values, *condition], effects=True)


def store_cluster(
    address: Int32, barrier: Int32, rank: Int32, values: list[Float32], predicate: Boolean | None = None
) -> None:
    """1, 2 or 4 values into the shared memory of the cluster's CTA `rank`, at the address and with the barrier they have
    here.

    The barrier's transaction count falls by their bytes when they have arrived.
    """
    count = len(values)
    guard, condition = _guard(predicate, 3 + count)
    width, data = ("", "$3") if count == 1 else (f".v{count}", f"{{{_slots(3, count)}}}")
    text = (
        "{.reg .b32 d,b; mapa.shared::cluster.u32 d,$0,$2; mapa.shared::cluster.u32 b,$1,$2; "
        f"{guard}st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{width}.b32 [d],{data},[b];}}"
    )
    ptx(text, [], [address, barrier, rank, *values, *condition], effects=True)


# Device memory


def load_vector(kind: type[Numeric], address: Int64, offset: int, predicate: Boolean) -> list[Numeric]:
    """Four read-only 4-byte values; zeros where the predicate is false."""
    text = (
        "{.reg .b32 t<4>; mov.b32 t0,0; mov.b32 t1,0; mov.b32 t2,0; mov.b32 t3,0; "
        f"@$5 ld.global.nc.v4.b32 {{t0,t1,t2,t3}},[$4+{offset}]; "
        "mov.b32 $0,t0; mov.b32 $1,t1; mov.b32 $2,t2; mov.b32 $3,t3;}"
    )
    return ptx(text, [kind] * 4, [address, predicate], effects=True)


def copy_scalar(shared: Int32, address: Int64, predicate: Boolean | None = None) -> None:
    """Starts copying 4 bytes to shared memory, as part of this lane's open cp.async group."""
    guard, condition = _guard(predicate, 2)
    ptx(f"{guard}cp.async.ca.shared.global [$0],[$1],4;", [], [shared, address, *condition], effects=True)


def fetch_increment(address: Int64, predicate: Boolean) -> Int32:
    """Adds one to an integer, atomically; what it was before, zero where the predicate is false."""
    text = "{.reg .b32 t; mov.b32 t,0; @$2 atom.global.add.u32 t,[$1],1; mov.b32 $0,t;}"
    return ptx(text, [Int32], [address, predicate], effects=True)[0]


def store_scalar(address: Int64, value: Float32 | Int32, predicate: Boolean) -> None:
    ptx("@$2 st.global.b32 [$0],$1;", [], [address, value, predicate], effects=True)


def store_vector(address: Int64, offset: int, values: list[Int32], predicate: Boolean | None) -> None:
    """Four 4-byte values of a result that is not read again soon."""
    guard, condition = _guard(predicate, 5)
    text = f"{guard}st.global.cs.v4.b32 [$0+{offset}],{{{_slots(1, 4)}}};"
    ptx(text, [], [address, *values, *condition], effects=True)


def store_pair(address: Int64, offset: int, values: list[Float32], predicate: Boolean) -> None:
    ptx(f"@$3 st.global.v2.f32 [$0+{offset}],{{$1,$2}};", [], [address, *values, predicate], effects=True)


def bulk_load(
    shared: Int32, address: Int64, size: Int32, barrier: Int32, policy: int, predicate: Boolean | None
) -> None:
    """Starts copying `size` bytes (a multiple of 16) to shared memory; the barrier counts them as they arrive.

    The DSL's CopyBulkG2SOp takes static sizes only; the last columns of a row that is no multiple of the tile need a
    dynamic one.
    """
    guard, condition = _guard(predicate, 5)
    text = (
        f"{guard}cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$0],[$1],$2,[$3],$4;"
    )
    ptx(text, [], [shared, address, size, barrier, Int64(policy), *condition], effects=True)


def bulk_prefetch(address: Int64, size: Int32, predicate: Boolean | None) -> None:
    """Starts fetching `size` bytes (a multiple of 16) to L2."""
    guard, condition = _guard(predicate, 2)
    ptx(f"{guard}cp.async.bulk.prefetch.L2.global [$0],$1;", [], [address, size, *condition], effects=True)


def bulk_store(address: Int64, shared: Int32, size: Int32, predicate: Boolean) -> None:
    """Starts copying `size` bytes (a multiple of 16) from shared memory, as part of this lane's open bulk group.

    By an L2 policy of evict_first, phase 1's gradients on an H200 lost 1 to 2 points of copy bandwidth.
    """
    text = "@$3 cp.async.bulk.global.shared::cta.bulk_group [$0],[$1],$2;"
    ptx(text, [], [address, shared, size, predicate], effects=True)
