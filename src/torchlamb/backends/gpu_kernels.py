"""The GPU's kernels, in Triton. Nothing imports this room before there is a GPU to run it on: see gpu.py, which launches it.

One launch serves all rows of a bucket: a table in device memory says where their tensors lie. A program works on one chunk of
one row. Full chunks of tensors whose memory is aligned to 16 bytes are read and written in accesses of 128 bits, and all others
element by element, by the same code with other constants.

Sums of squares go to one slot for each chunk, which a second launch adds up in a fixed order: the same bits at every run.
Nothing is fused into multiply-adds either, so that an element's new values do not depend on how its memory is aligned.
The arithmetic follows `torchlamb.rule` and `torchlamb.precision` and is held to them by tests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(2048)  # elements of a row that one program works on
BLOCK = tl.constexpr(1024)  # of them at a time: 8 for each thread, one access of 128 bits in bfloat16 and two in float32
THREADS = 128
# What a thread may use at most. Of 65,536 in an NVIDIA multiprocessor, that leaves 3 programs side by side, where something is
# rounded stochastically, and 5 or more where nothing is. Left to itself, the compiler spills some to have more programs.
REGISTERS = 168
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch_options(backend: str) -> dict[str, int | bool]:
    """Return how kernels are launched by a backend of Triton: "cuda", "hip" or another."""
    options = {"num_warps": THREADS // (64 if backend == "hip" else 32), "enable_fp_fusion": False}
    return {**options, "maxnreg": REGISTERS} if backend == "cuda" else options


def find_launcher() -> None:
    """Build what launches kernels, with the system's C compiler, where that has not been done; raises where it cannot be."""
    triton.runtime.driver.active.get_current_target()


OPTIONS = launch_options("hip" if torch.version.hip else "cuda" if torch.version.cuda else "")

# The table, of int64. A row's full chunks, if all its tensors are aligned, and the rest of its chunks are numbered apart: first
# the numbers of each row's first full chunk, and how many there are of all rows, then the same of the others; then one record
# for each row; then what STARTS points to.
SIZE = tl.constexpr(0)  # elements
PARAM = tl.constexpr(1)  # addresses; of what there is not, 0
GRAD = tl.constexpr(2)
EXP_AVG = tl.constexpr(3)
EXP_AVG_SQ = tl.constexpr(4)
MASTER = tl.constexpr(5)
STEP = tl.constexpr(6)
SEED = tl.constexpr(7)
COUNTS = tl.constexpr(8)  # whether this is the first row of its parameter, which counts its step
FIRST = tl.constexpr(9)  # see place.Runs
STARTS = tl.constexpr(10)  # place in the table, 0 where all is one run
LENGTH = tl.constexpr(11)
STRIDE = tl.constexpr(12)
FIELDS = tl.constexpr(13)

# What is added up of each row, in this order: see torchlamb.rule.SUMS.
PARAM_SQ = tl.constexpr(0)
UPDATE_SQ = tl.constexpr(1)
SUMS = tl.constexpr(2)


class Numbers(NamedTuple):
    """What all rows step with: see torchlamb.rule.Scalars. Tensors have one element."""

    lr: float | Tensor
    grad_factor: float | Tensor
    beta1: float
    beta2: float
    grad_weight: float  # 1 - beta1 and 1 - beta2, from float64
    grad_sq_weight: float
    log_beta1: float
    log_beta2: float
    eps: float
    weight_decay: float
    phi_low: float  # 0 and infinity where there are no bounds
    phi_high: float
    ratio_low: float
    ratio_high: float


class Kinds(NamedTuple):
    """What the kernels are compiled for."""

    param: tl.dtype
    grad: tl.dtype
    exp_avg: tl.dtype
    exp_avg_sq: tl.dtype
    masters: bool
    rounds_params: bool  # stochastically
    bias_correction: bool
    grad_averaging: bool
    layer_adaptation: bool
    decays: bool
    guarded: bool = False  # parameters whose norms are not finite stay as they are


# Launches.


@triton.jit(do_not_specialize=["rows"])
def grad_sq_norms(table, rows, kinds: tl.constexpr, partials, FULL: tl.constexpr):
    """Write the sum of squares of each chunk's gradient to its slot of `partials` (slots, SUMS)."""
    row, chunk = _locate(table, rows, tl.program_id(0), FULL)
    record = _record(table, rows, row)
    grad = _memory(record, GRAD, kinds.grad, chunk, FULL)
    count = _elements(record, chunk, FULL)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        g = _read(grad, start + tl.arange(0, BLOCK), count, FULL)
        total += g * g
    tl.store(partials + SUMS * (_first_slot(table, rows, row) + chunk), tl.sum(total))


@triton.jit(do_not_specialize=["rows"])
def accumulate(table, rows, kinds: tl.constexpr, numbers, skip, partials, FULL: tl.constexpr):
    """Advance the moments in place, and write each chunk's sums to its slot of `partials` (slots, SUMS)."""
    if skip is not None:
        if tl.load(skip):
            return
    row, chunk = _locate(table, rows, tl.program_id(0), FULL)
    _accumulate(table, rows, row, chunk, kinds, numbers, partials, FULL)


@triton.jit(do_not_specialize=["rows"])
def add_partials(table, rows, skip, partials, sums, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """Add up each row's slots to `sums` (rows, COLUMNS), and count its step if COUNT. One program for each row."""
    if skip is not None:
        if tl.load(skip):
            return
    _add_partials(table, rows, tl.program_id(0), partials, sums, COLUMNS)
    if COUNT:
        _count(_record(table, rows, tl.program_id(0)), tl.program_id(0) < rows)


@triton.jit(do_not_specialize=["rows"])
def apply(table, rows, kinds: tl.constexpr, numbers, skip, sums, FULL: tl.constexpr):
    """Take ``lr * ratio * update`` from the parameters, with the ratio of `sums` (rows, SUMS). The step has been counted."""
    if skip is not None:
        if tl.load(skip):
            return
    row, chunk = _locate(table, rows, tl.program_id(0), FULL)
    _apply(table, rows, row, chunk, kinds, numbers, sums, 0.0, FULL)


@triton.jit(do_not_specialize=["rows", "segments", "tickets"])
def step(table, rows, kinds: tl.constexpr, numbers, skip, partials, sums, order, segments, tickets, counters):
    """Do all of it in one launch, finding in the second-level cache what `accumulate` has read a moment before.

    Programs draw tickets. `order` says what they are for: the first ticket of each segment, and their number behind the last;
    then, for each segment, its row and whether the row's chunks are accumulated (0) or applied (1). A row is applied, from its
    last chunk to its first, in a later segment than it is accumulated in. So whoever waits, waits for programs that hold
    earlier tickets and run already: there is no deadlock, however few programs run at a time.

    `counters` is zeros (2 + 2 rows,) int32: tickets drawn, tickets done; then for each row the chunks that are accumulated, and
    whether it can be applied. Who is done last counts the steps.
    """
    if skip is not None:
        if tl.load(skip):
            return
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    segment = _search(order, segments, ticket)
    row = tl.load(order + segments + 1 + 2 * segment).to(tl.int32)
    chunk = ticket - tl.load(order + segment).to(tl.int32)
    chunks = (_first_slot(table, rows, row + 1) - _first_slot(table, rows, row)).to(tl.int32)
    full_chunks = (tl.load(table + row + 1) - tl.load(table + row)).to(tl.int32)
    arrived = counters + 2 + 2 * row
    ready = arrived + 1
    if tl.load(order + segments + 2 + 2 * segment) == 0:
        if chunk < full_chunks:
            _accumulate(table, rows, row, chunk, kinds, numbers, partials, True)
        else:
            _accumulate(table, rows, row, chunk, kinds, numbers, partials, False)
        tl.debug_barrier()  # what all threads have written is published with the release that follows
        if tl.atomic_add(arrived, 1, sem="acq_rel") == chunks - 1:
            tl.debug_barrier()
            _add_partials(table, rows, row, partials, sums, SUMS)
            tl.debug_barrier()
            tl.atomic_xchg(ready, 1, sem="release")
    else:
        while tl.atomic_add(ready, 0, sem="acquire") == 0:
            pass
        tl.debug_barrier()
        chunk = chunks - 1 - chunk
        if chunk < full_chunks:
            _apply(table, rows, row, chunk, kinds, numbers, sums, 1.0, True)
        else:
            _apply(table, rows, row, chunk, kinds, numbers, sums, 1.0, False)
    tl.debug_barrier()  # all threads have read the step count that the last program changes
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tickets - 1:
        for start in range(0, rows, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            _count(_record(table, rows, lanes), lanes < rows)


# Rows and chunks.


@triton.jit
def _search(firsts, count, number):
    """Return i with ``firsts[i] <= number < firsts[i + 1]``, of `count` + 1 ascending numbers."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(firsts + middle) <= number:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _locate(table, rows, number, FULL: tl.constexpr):
    """Return the row and the chunk in it of a full chunk, or another one, by its number among its kind."""
    if FULL:
        row = _search(table, rows, number)
        chunk = number - tl.load(table + row)
    else:
        row = _search(table + rows + 1, rows, number)
        chunk = number - tl.load(table + rows + 1 + row) + tl.load(table + row + 1) - tl.load(table + row)
    return row, chunk


@triton.jit
def _first_slot(table, rows, row):
    return tl.load(table + row) + tl.load(table + rows + 1 + row)


@triton.jit
def _record(table, rows, row):
    return table + 2 * (rows + 1) + row * FIELDS


@triton.jit
def _elements(record, chunk, FULL: tl.constexpr):
    """Return how many there are in the chunk."""
    count = CHUNK
    if not FULL:
        count = tl.minimum(tl.load(record + SIZE) - chunk.to(tl.int64) * CHUNK, CHUNK).to(tl.int32)
    return count


@triton.jit
def _memory(record, FIELD: tl.constexpr, TYPE: tl.constexpr, chunk, FULL: tl.constexpr):
    """Return a pointer to the chunk's first element, of which the compiler knows that it is aligned if FULL."""
    pointer = tl.load(record + FIELD).to(tl.pointer_type(TYPE)) + chunk.to(tl.int64) * CHUNK
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(pointer, lanes, count, FULL: tl.constexpr):
    # Past the first-level cache, which does not see what other multiprocessors have written, and serves nothing here twice.
    if FULL:
        values = tl.load(pointer + lanes, cache_modifier=".cg")
    else:
        values = tl.load(pointer + lanes, mask=lanes < count, other=0.0, cache_modifier=".cg")
    return values.to(tl.float32)


@triton.jit
def _write(pointer, lanes, count, values, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + lanes, values)
    else:
        tl.store(pointer + lanes, values, mask=lanes < count)


# One chunk.


@triton.jit
def _accumulate(table, rows, row, chunk, kinds: tl.constexpr, numbers, partials, FULL: tl.constexpr):
    record = _record(table, rows, row)
    param = _memory(record, PARAM, kinds.param, chunk, FULL)
    master = _memory(record, MASTER, tl.float32, chunk, FULL)
    grad = _memory(record, GRAD, kinds.grad, chunk, FULL)
    exp_avg = _memory(record, EXP_AVG, kinds.exp_avg, chunk, FULL)
    exp_avg_sq = _memory(record, EXP_AVG_SQ, kinds.exp_avg_sq, chunk, FULL)
    count = _elements(record, chunk, FULL)
    t = tl.load(tl.load(record + STEP).to(tl.pointer_type(tl.float32))) + 1.0
    eps, k = _bias_factors(t, kinds, numbers)
    factor = _number(numbers.grad_factor)
    param_sum = tl.zeros((BLOCK,), tl.float32)
    update_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        w = _weight(param, master, lanes, count, kinds, FULL)
        g = _read(grad, lanes, count, FULL) * factor
        m = _read(exp_avg, lanes, count, FULL)
        v = _read(exp_avg_sq, lanes, count, FULL)
        if kinds.grad_averaging:
            # From the one that weighs more, or the digits of a gradient are lost beside a moment that is hardly kept.
            m = tl.where(numbers.beta1 <= 0.5, g - numbers.beta1 * (g - m), m + numbers.grad_weight * (g - m))
        else:
            m = numbers.beta1 * m + g
        v = numbers.beta2 * v + numbers.grad_sq_weight * (g * g)
        stored_m = _nearest(m, kinds.exp_avg)
        if kinds.exp_avg_sq == tl.bfloat16:
            stored_v = _stochastic(v, _random_bits(table, record, chunk, lanes, t) & 0xFFFF)
        else:
            stored_v = v
        _write(exp_avg, lanes, count, stored_m, FULL)
        _write(exp_avg_sq, lanes, count, stored_v, FULL)
        # The update is taken of the moments as they are stored: `apply` finds nothing else.
        u = _update(w, stored_m.to(tl.float32), stored_v.to(tl.float32), eps, k, kinds, numbers)
        if not FULL:
            u = tl.where(lanes < count, u, 0.0)  # without eps, 0 / 0
        param_sum += w * w
        update_sum += u * u
    slot = partials + SUMS * (_first_slot(table, rows, row) + chunk)
    tl.store(slot + PARAM_SQ, tl.sum(param_sum))
    tl.store(slot + UPDATE_SQ, tl.sum(update_sum))


@triton.jit
def _apply(table, rows, row, chunk, kinds: tl.constexpr, numbers, sums, uncounted, FULL: tl.constexpr):
    record = _record(table, rows, row)
    param = _memory(record, PARAM, kinds.param, chunk, FULL)
    master = _memory(record, MASTER, tl.float32, chunk, FULL)
    exp_avg = _memory(record, EXP_AVG, kinds.exp_avg, chunk, FULL)
    exp_avg_sq = _memory(record, EXP_AVG_SQ, kinds.exp_avg_sq, chunk, FULL)
    count = _elements(record, chunk, FULL)
    t = tl.load(tl.load(record + STEP).to(tl.pointer_type(tl.float32))) + uncounted
    eps, k = _bias_factors(t, kinds, numbers)
    param_sq = tl.load(sums + SUMS * row + PARAM_SQ, cache_modifier=".cg")
    update_sq = tl.load(sums + SUMS * row + UPDATE_SQ, cache_modifier=".cg")
    size = _number(numbers.lr) * _trust_ratio(param_sq, update_sq, kinds, numbers)
    if kinds.guarded:  # what is not a number is not less either
        count = tl.where((param_sq < float("inf")) & (update_sq < float("inf")), count, 0)
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        w = _weight(param, master, lanes, count, kinds, FULL)
        m = _read(exp_avg, lanes, count, FULL)
        v = _read(exp_avg_sq, lanes, count, FULL)
        w = w - size * _update(w, m, v, eps, k, kinds, numbers)
        if kinds.masters:
            _write(master, lanes, count, w, FULL)
        if kinds.rounds_params:
            _write(param, lanes, count, _stochastic(w, _random_bits(table, record, chunk, lanes, t) >> 16), FULL)
        else:
            _write(param, lanes, count, _nearest(w, kinds.param), FULL)


@triton.jit
def _weight(param, master, lanes, count, kinds: tl.constexpr, FULL: tl.constexpr):
    """Return the parameter as arithmetic takes it: see `weight` in precision.py."""
    w = _read(param, lanes, count, FULL)
    if kinds.masters:
        precise = _read(master, lanes, count, FULL)
        w = tl.where(w == _nearest(precise, kinds.param).to(tl.float32), precise, w)
    return w


@triton.jit
def _add_partials(table, rows, row, partials, sums, COLUMNS: tl.constexpr):
    first = _first_slot(table, rows, row)
    count = _first_slot(table, rows, row + 1) - first
    for column in tl.static_range(COLUMNS):
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            slot = partials + SUMS * (first + slots) + column
            total += tl.load(slot, mask=slots < count, other=0.0, cache_modifier=".cg")
        tl.store(sums + COLUMNS * row + column, tl.sum(total))


@triton.jit
def _count(record, inside):
    """Count the step of one row, or of those that are inside."""
    counts = tl.load(record + COUNTS, mask=inside, other=0) != 0
    step = tl.load(record + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    tl.store(step, tl.load(step, mask=counts, other=0.0) + 1.0, mask=counts)


# The rule: see rule.py.


@triton.jit
def _number(value):
    if isinstance(value, tl.tensor) and value.dtype.is_ptr():
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def _bias_factors(t, kinds: tl.constexpr, numbers):
    eps = numbers.eps
    k = 1.0
    if kinds.bias_correction:
        root = tl.sqrt_rn(_bias_correction(numbers.log_beta2, t))
        eps = eps * root
        k = tl.div_rn(root, _bias_correction(numbers.log_beta1, t))
    return eps, k


@triton.jit
def _bias_correction(log_beta, t):
    """Return ``1 - beta ** t`` as -expm1(t log beta), to some 2e-7: by its series up to 1, by the exponential beyond."""
    x = -t * log_beta
    series = 1.0
    for n in tl.static_range(12):
        series = 1.0 - x * series * (1.0 / (13 - n))
    return tl.where(x < 1.0, x * series, 1.0 - tl.exp(-x))


@triton.jit
def _update(w, m, v, eps, k, kinds: tl.constexpr, numbers):
    u = k * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    if kinds.decays:
        u = u + numbers.weight_decay * w
    return u


@triton.jit
def _trust_ratio(param_sq, update_sq, kinds: tl.constexpr, numbers):
    ratio = 1.0
    if kinds.layer_adaptation:
        phi = _clamp(tl.sqrt_rn(param_sq), numbers.phi_low, numbers.phi_high)
        ratio = _clamp(tl.div_rn(phi, tl.sqrt_rn(update_sq)), numbers.ratio_low, numbers.ratio_high)
        ratio = tl.where((param_sq == 0.0) | (update_sq == 0.0), 1.0, ratio)
    return ratio


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # what is not a number stays that


# Rounding: see precision.py. Written out, for the interpreter cuts off where hardware rounds.


@triton.jit
def _nearest(x, TYPE: tl.constexpr):
    if TYPE == tl.bfloat16:
        raw = x.to(tl.uint32, bitcast=True)
        nearest = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16  # ties to even
        nearest = tl.where((raw & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest)
        x = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        x = x.to(TYPE)
    return x


@triton.jit
def _stochastic(x, noise):
    """Round to bfloat16 by 16 random bits."""
    raw = x.to(tl.uint32, bitcast=True)
    rounded = ((raw + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((raw & 0x7F800000) == 0x7F800000, _nearest(x, tl.bfloat16), rounded)


@triton.jit
def _random_bits(table, record, chunk, lanes, t):
    """Return 32 random bits for elements of a chunk, by their indices in the whole tensor."""
    elements = chunk.to(tl.int64) * CHUNK + lanes
    seed = tl.load(tl.load(record + SEED).to(tl.pointer_type(tl.int64)))
    key1 = _mix(seed.to(tl.uint32) ^ t.to(tl.int64).to(tl.uint32))
    key2 = _mix((seed >> 32).to(tl.uint32) ^ key1)
    index = tl.load(record + FIRST) + tl.load(record + STRIDE) * elements
    starts = tl.load(record + STARTS)
    if starts != 0:
        length = tl.load(record + LENGTH)
        run = elements // length
        inside = elements < tl.load(record + SIZE)
        index = tl.load(table + starts + run, mask=inside, other=0) + tl.load(record + STRIDE) * (elements - run * length)
        index += tl.load(record + FIRST)
    return _mix(_mix(index.to(tl.uint32) ^ key1) ^ (index >> 32).to(tl.uint32) ^ key2)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)
