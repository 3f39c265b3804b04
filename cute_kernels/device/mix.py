"""The row kernel behind mix_fwd, serve_step and phase2_fwd: reads every row once, mixes it in registers, writes once.

    x_i        source i of a token; the first one may arrive as two rows whose sum, rounded to its storage, is x_1
    logit_i  = scale * rstd_i * <u, x_i>,  rstd_i = (mean(x_i^2) + eps)^(-1/2),  u = query * key_weight
    m        = sum_i softmax(logit)_i x_i;  merging, one more row (phase 1's mix) takes part with a given logit (its lse)
    out      = m, or RMSNorm(m) * output_weight

Every sum has a fixed order. Kernels differ in how a token's rows come to the registers: by way of a ring in shared memory
(mix_ring.py), or straight from device memory, on the SMs of a cluster where one is slow (mix_registers.py).
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Numeric

from cute_kernels.config_rows import Operands, RowConfig
from cute_kernels.device.pipelines import global_row
from cute_kernels.device.rounding import PARTIAL_SUM, RowBits, inverse, row_bits, scale_from, stochastic
from cute_kernels.device.rows import (
    LANES,
    VECTOR,
    Exchange,
    RowSums,
    RowTile,
    add,
    add_products,
    exp_difference,
    largest_finite,
    log,
    number_at,
    pack,
    reciprocal_root,
    select,
    store_by_owner,
    store_scalar,
    tree,
    unpack,
    unpack_again,
    warp_sum,
)

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp16_scaled": Float16, "fp32": Float32}


class Scalars(NamedTuple):
    """Run-time numbers of a launch."""

    tokens: Int32
    eps: Float32
    output_eps: Float32
    scale: Float32


class RowMix:
    """The arithmetic of one token; how its rows come to the registers and how sums cross the warps is the kernels' part."""

    scale_first: bool  # whether a scaled sum's scale is found before the logits

    def __init__(self, config: RowConfig):
        self.config, self.tile, self.dtype = config, config.tile, TYPES[config.dtype]
        self.formats = config.formats or (config.dtype,) * config.rows_per_token
        self.row_types = [TYPES[name] for name in self.formats]

    def load_parameter(self, part: RowTile, dtype: str, address: Int64) -> cute.Tensor:
        """This thread's part of a vector [D] as stored."""
        return part.load(TYPES[dtype], global_row(TYPES[dtype], address, 0, 0, self.config.hidden_size))

    def load_key(self, part: RowTile, operands: Operands) -> cute.Tensor:
        """This thread's part of u = query * key_weight in fp32."""
        r_query = self.load_parameter(part, self.config.query, operands.query)
        r_u = part.fragment(Float32)
        if self.config.key_weight is None:
            r_u.store(r_query.load().to(Float32))
        else:
            r_weight = self.load_parameter(part, self.config.key_weight, operands.key_weight)
            r_u.store(r_query.load().to(Float32) * r_weight.load().to(Float32))
        return r_u

    def mix_token(self, token, reader, exchange, r_u, r_given, weight, operands: Operands, scalars: Scalars):
        """weight: this thread's part of the output norm's, where the kernel holds it; else it is read when it is needed."""
        config, part = self.config, reader.part
        softmax = OnlineSoftmax()
        r_mix = None
        held = []
        unit = None  # of the scales: the largest, if above one; what is squared is divided by it, and stays in fp32's range
        for chunk in self.tile.chunks(config.num_sources):
            r_rows, scales, logits = [], [], []
            if config.merge and chunk.start == 0:
                r_rows.append(reader.next())
                scales.append(reader.scale)
                logits.append(r_given)
            squares, products, unrounded = [], [], None
            for source in chunk:
                # A row's arithmetic follows the loads of the next one, so that it covers their latency.
                r_row, row_scale = reader.next(), reader.scale
                if source == 0 and config.delta:
                    r_row, row_scale, unrounded = self.add_delta(
                        r_row, row_scale, reader.next(), token, part, exchange, operands
                    )
                if source == 0 and unrounded is None:
                    self.store_first(r_row, row_scale, token, part, exchange, operands)
                r_rows.append(r_row)
                scales.append(row_scale)
                if source > chunk.start:
                    add_products(squares, products, r_rows[-2], r_u)
            reader.release()
            add_products(squares, products, r_rows[-1], r_u)
            sums, first = RowSums(len(chunk)), len(logits)
            totals = sums.reduce(squares, products, exchange.lane)
            if unrounded is None:
                totals = exchange.sum(totals)
            else:
                totals, scales[first] = sum_in_units(totals, scales[first], exchange)
                r_rows[first] = unrounded.stored(scales[first], part)
                self.store_first(r_rows[first], scales[first], token, part, exchange, operands)
            found = scales[first:]
            lane_logits = self.finish_logits(sums, totals, exchange, found, chunk.start, token, operands, scalars)
            held.append((chunk.start, sums, lane_logits))
            rescale, shares = softmax.join(logits + sums.spread(lane_logits))
            shares = [share if s is None else share * s for share, s in zip(shares, scales, strict=True)]
            if config.num_scales or config.scaled_sum:
                unit = tree(cute.arch.fmax, [Float32(1.0), *(s for s in (unit, *scales) if s is not None)])

            r_mix = self.accumulate(r_mix, rescale, r_rows, shares, part)
        self.store_softmax(softmax, held, token, exchange, operands, scalars)
        self.store_mix(r_mix, softmax, unit, token, exchange, part, weight, operands, scalars)

    def add_delta(self, r_row, scale, r_delta, token, part: RowTile, exchange: Exchange, operands: Operands) -> tuple:
        """(sum as it is stored, its scale, None); or (sum in a unit of the warp's, the unit, the sum for when the scale is known).

        The unit will do for the logits. A scale before them is another exchange, with one rounding: in registers, phase 2 with
        delta and norm cost 7 % over bf16 by that on an H200, and 1.5 % without; the ring's groups hide it behind each other's.
        """
        config = self.config
        if not (config.formats or config.stochastic):
            r_row.store((r_row.load().to(Float32) + r_delta.load().to(Float32)).to(self.dtype))
            return r_row, None, None
        vectors = []
        for v in range(part.vectors):
            x, d = unpack(r_row, v), unpack(r_delta, v)
            vectors.append([(a if scale is None else a * scale) + b for a, b in zip(x, d, strict=True)])
        bits = row_bits(operands.seed, token, PARTIAL_SUM).after(part.thread * VECTOR) if config.stochastic else None
        total = DeltaSum(vectors, TYPES[config.sum or config.dtype], bits)
        if not config.scaled_sum:
            return total.stored(None, part), None, None
        unit = total.warp_unit()
        if not self.scale_first:
            return total.stored(unit, part), unit, total
        scale = row_scale(*exchange.gather([unit]))
        return total.stored(scale, part), scale, None

    def store_first(self, r_row, scale, token: Int32, part: RowTile, exchange: Exchange, operands: Operands) -> None:
        """The first source, where its sum or a block is wanted."""
        config = self.config
        if config.delta:
            self.store_row(r_row, operands.sum, operands.sum_stride, token, part)
            if scale is not None:
                store_scalar(number_at(operands.sum_scale, token, operands.sum_scale_stride), scale, exchange)
        if config.write_block:
            self.store_row(r_row, operands.block, operands.block_stride, token, part)
            if scale is not None:
                store_scalar(number_at(operands.block_scale, token, operands.block_scale_stride), scale, exchange)

    def store_row(self, r_row: cute.Tensor, address: Int64, stride: Int64, token: Int32, part: RowTile) -> None:
        g_row = global_row(r_row.element_type, address, stride, token, self.config.hidden_size)
        for v in range(part.vectors):
            part.store_vector(r_row[None, v], g_row, v)

    def finish_logits(
        self, sums: RowSums, totals: list, exchange: Exchange, scales: list, first: int, token, operands, scalars
    ) -> list[Float32]:
        """Logits of a chunk's rows in the lanes that own them (RowSums); stores the statistics that are wanted."""
        config = self.config
        lane_logits, lane_rstd = [], []
        for place, total in enumerate(totals):
            square, product = sums.pair(total, exchange.lane)
            if any(s is not None for s in scales):
                # Sums of the values as stored: a scale above one divides eps instead.
                scale = sums.gather(scales, exchange.lane)[place]
                low, down = cute.arch.fmin(scale, Float32(1.0)), inverse(cute.arch.fmax(scale, Float32(1.0)))
                mean = square * Float32(1.0 / config.hidden_size) * low * low
                root = reciprocal_root(mean + scalars.eps * down * down)
                lane_rstd.append(root * down)
                lane_logits.append(scalars.scale * (root * low * product))
                continue
            rstd = reciprocal_root(square * Float32(1.0 / config.hidden_size) + scalars.eps)
            lane_rstd.append(rstd)
            lane_logits.append(scalars.scale * (rstd * product))
        if config.logits:
            store_by_owner(operands.logits, lane_logits, sums, first, token, exchange, scalars.tokens)
        if config.rstd:
            store_by_owner(operands.rstd, lane_rstd, sums, first, token, exchange, scalars.tokens)
        return lane_logits

    def accumulate(self, r_mix, rescale, r_rows: list, shares: list, part: RowTile) -> list[list[Float32]]:
        """r_mix * rescale + sum_i shares_i * row_i, as [vectors][VECTOR] fp32."""
        result = []
        for v in range(part.vectors):
            rows = [unpack_again(r_row, v) for r_row in r_rows]
            vector = []
            for e in range(VECTOR):
                value = r_mix[v][e] * rescale if r_mix is not None else None
                for share, row in zip(shares, rows, strict=True):
                    value = share * row[e] if value is None else value + share * row[e]
                vector.append(value)
            result.append(vector)
        return result

    def store_softmax(self, softmax, held: list, token, exchange: Exchange, operands, scalars) -> None:
        if self.config.lse:
            store_scalar(number_at(operands.lse, token), softmax.lse(), exchange)
        if self.config.weights:
            for first, sums, lane_logits in held:
                lane_weights = [softmax.weight(logit) for logit in lane_logits]
                store_by_owner(operands.weights, lane_weights, sums, first, token, exchange, scalars.tokens)

    def store_mix(self, r_mix, softmax, unit, token, exchange: Exchange, part: RowTile, weight, operands, scalars):
        config = self.config
        normalizer = softmax.inverse()
        mix = [[value * normalizer for value in vector] for vector in r_mix]
        g_out = global_row(self.dtype, operands.out, config.hidden_size, token, config.hidden_size)
        if config.mixed:
            g_mixed = global_row(Float32, operands.mixed, config.hidden_size, token, config.hidden_size)
            for v, vector in enumerate(mix):
                part.store_vector(pack(vector, Float32), g_mixed, v)
        if config.output_weight is not None:
            output_eps = scalars.output_eps
            if unit is not None:
                down = inverse(unit)
                mix = [[value * down for value in vector] for vector in mix]
                output_eps = output_eps * down * down
            square = tree(add, [tree(add, [value * value for value in vector]) for vector in mix])
            if weight is None:
                weight = self.load_parameter(part, config.output_weight, operands.output_weight)
            (square,) = exchange.sum([warp_sum(square)])
            rstd = reciprocal_root(square * Float32(1.0 / config.hidden_size) + output_eps)
            for v, vector in enumerate(mix):
                r_weight = cute.make_rmem_tensor((VECTOR,), weight.element_type)
                cute.autovec_copy(weight[None, v], r_weight)
                w = r_weight.load().to(Float32)
                mix[v] = [value * rstd * w[e] for e, value in enumerate(vector)]
        for v, vector in enumerate(mix):
            part.store_vector(pack(vector, self.dtype), g_out, v)


class DeltaSum(NamedTuple):
    """The first source with its delta, before it is rounded."""

    vectors: list[list[Float32]]  # [vectors][VECTOR] of this thread
    dtype: type[Numeric]  # of what is stored
    bits: RowBits | None  # of stochastic rounding

    def warp_unit(self) -> Float32:
        """The scale that the warp's part of the row would have; 0 if all of it is zero."""
        peak = largest_finite([value for vector in self.vectors for value in vector])
        return select(peak == 0.0, peak, scale_from(peak))

    def stored(self, scale: Float32 | None, part: RowTile) -> cute.Tensor:
        """Rounded, in units of a scale if there is one."""
        down = None if scale is None else inverse(scale)
        r_sum = part.fragment(self.dtype)
        for v, vector in enumerate(self.vectors):
            values = vector if down is None else [value * down for value in vector]
            if self.bits is None:
                r_sum[None, v].store(pack(values, self.dtype).load())
            else:
                r_pairs = cute.recast_tensor(r_sum[None, v], Int32)
                bits = self.bits.after(v * part.threads * VECTOR)
                for i, pair in enumerate(stochastic(values, self.dtype, bits)):
                    r_pairs[i] = pair
        return r_sum


def row_scale(units: list[Float32]) -> Float32:
    """The scale of a row from the units of its warps."""
    largest = tree(cute.arch.fmax, units)
    return select(largest == 0.0, Float32(1.0), largest)


def sum_in_units(values: list[Float32], unit: Float32, exchange: Exchange) -> tuple[list[Float32], Float32]:
    """RowSums over the warps, of whose first row each warp has its part in a unit of its own; and the row's scale.

    Rounding to the unit differs from rounding to the scale in elements below 2^-28 of the row's largest, by 2^-39 of it at most.
    """
    *found, units = exchange.gather([*values, unit])
    scale = row_scale(units)
    down = inverse(scale)
    # The first row's square is in lane 0, its product in lane 16.
    square, product = exchange.lane == 0, exchange.lane == LANES // 2
    for w, of_warp in enumerate(units):
        ratio = of_warp * down
        factor = select(square, ratio * ratio, select(product, ratio, Float32(1.0)))
        found[0][w] = found[0][w] * factor
    return [tree(add, of_warps) for of_warps in found], scale


class OnlineSoftmax:
    """Running maximum and denominator of a softmax whose logits come in chunks."""

    def __init__(self):
        self.highest = self.denominator = None

    def join(self, logits: list[Float32]) -> tuple[Float32 | None, list[Float32]]:
        """(factor for what was accumulated before, unnormalised shares of the new rows)."""
        before = self.highest
        self.highest = tree(cute.arch.fmax, logits if before is None else [before, *logits])
        rescale = None if before is None else exp_difference(before, self.highest)
        shares = [exp_difference(logit, self.highest) for logit in logits]
        total = tree(add, shares)
        self.denominator = total if before is None else self.denominator * rescale + total
        return rescale, shares

    def inverse(self) -> Float32:
        return cute.arch.rcp_approx(self.denominator)

    def lse(self) -> Float32:
        return self.highest + log(self.denominator)

    def weight(self, logit: Float32) -> Float32:
        return exp_difference(logit, self.highest) * self.inverse()
