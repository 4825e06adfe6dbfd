"""Which shapes (utterances × padded length) units have, and how many of each: constants of corpus and settings.

The cost of an utterance is that of a transformer: one part in proportion to its frames, one to their square. All is
counted in whole numbers, so that every machine finds the same shapes.
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np
import numpy.typing as npt

from asr_train.data.lengths import LengthIndex

Ints = npt.NDArray[np.int64]

_MAX_SHAPES = 256  # each shape costs kernel planning and, when compiled, a graph; rests add a few more
_SHAPE_PENALTY = 20  # a shape must save a 20th of a unit, so that small corpora keep units of changing utterances
_TOLERANCE = 0.015  # a length takes part in every target that its units miss by no more than this
_TARGET_STEP = 0.02  # least distance of targets, relative
_TARGETS_A_GAP = 70  # targets × utterances a unit: how finely targets divide the gap from B to B + 1 utterances
_MIN_TARGETS, _MAX_TARGETS = 3, 8
_LONG_TARGET_STEP = 0.1  # distance of the targets for utterances that are longer than a unit


def utterance_cost(padded_samples: Ints, quadratic: float, stride_samples: int) -> Ints:
    """Cost of utterances padded to so many samples, in samples: T * (1 + q * frames), [n]."""
    return np.rint(padded_samples * (1 + quadratic * (padded_samples / stride_samples))).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shapes:
    """All units of an epoch: `num_units[i]` units of `num_utterances[i]` utterances padded to `padded_samples[i]`.

    The first of them holds the utterances from `first[i]` on of the line of all utterances by length; they follow
    each other in it without gap. Rows are sorted by target, so that like costs stand together.
    """

    target: Ints  # [num_rows], which of the wanted costs the units have
    padded_samples: Ints
    num_utterances: Ints
    num_units: Ints
    first: Ints
    length_ends: Ints  # [num_lengths], where the utterances end that are padded to `lengths`
    lengths: Ints  # [num_lengths], the padded lengths in use


@dataclass(frozen=True, kw_only=True, eq=False)
class _Menu:
    """What units of each rounded length may be: for target k, `num_utterances[:, k]` where `allowed[:, k]`."""

    allowed: npt.NDArray[np.bool_]  # [L, K]
    num_utterances: Ints  # [L, K]
    slot: Ints  # [L, K], what the slowest unit of the same target costs
    penalty: int  # least that a further shape must save


def equal_cost_shapes(
    index: LengthIndex, *, unit_samples: float, units_per_step: int, quadratic: float, stride_samples: int
) -> Shapes:
    """Units whose costs lie just under one of a few targets around the cost of `unit_samples` of average audio."""
    counts = np.diff(index.starts)
    cost = utterance_cost(index.lengths, quadratic, stride_samples)
    total_cost = int((counts * cost).sum())
    wanted = unit_samples * total_cost / int((counts * index.lengths).sum())
    num_steps = int(total_cost / wanted / units_per_step)
    targets, num_regular = _targets(counts, cost, wanted, num_steps)
    menu = _equal_cost_menu(cost, targets, num_regular, max(1, int(wanted) // _SHAPE_PENALTY))
    return _lay_out(index, cost, menu, _choose_lengths(counts, cost, menu))


def fixed_count_shapes(index: LengthIndex, *, unit_utterances: int, in_order: bool) -> Shapes:
    """Units of a fixed number of utterances: of one rounded length each, or, not in order, of whatever comes."""
    counts = np.diff(index.starts)
    size = np.full((len(counts), 1), unit_utterances)
    slot = size * index.lengths[:, None]
    mean = int((counts * index.lengths).sum()) // int(counts.sum())
    menu = _Menu(
        allowed=np.ones_like(size, dtype=bool),
        num_utterances=size,
        slot=slot,
        penalty=max(1, unit_utterances * mean // _SHAPE_PENALTY),
    )
    chosen = _choose_lengths(counts, index.lengths, menu)
    if in_order:
        return _lay_out(index, index.lengths, menu, chosen)
    whole, rest = divmod(index.num_utterances, unit_utterances)
    rows = [(0, 0, unit_utterances, whole, 0), (0, 0, rest, 1, whole * unit_utterances)]
    return _as_shapes([row for row in rows if row[2] and row[3]], index, chosen)


def _targets(counts: Ints, cost: Ints, wanted: float, num_steps: int) -> tuple[Ints, int]:
    """The wanted costs, ascending, and how many of them are not just for utterances longer than a unit.

    A length reaches costs that lie 1/B apart, B being the utterances of such a unit. Targets that divide this gap
    evenly let every length come close to one. A step holds units of one target, hence no more targets than steps.
    """
    pairs = list(zip(counts.tolist(), cost.tolist(), strict=True))
    mean_cost = sum(n * c * c for n, c in pairs) / sum(n * c for n, c in pairs)  # of what a moment of audio is part of
    unit_size = max(1.0, wanted / mean_cost)  # utterances of average length in a unit
    num_targets = min(max(_MIN_TARGETS, round(_TARGETS_A_GAP / unit_size)), _MAX_TARGETS, max(1, num_steps))
    ratio = 1 + max(_TARGET_STEP, 1 / (num_targets * unit_size))
    targets = [wanted * ratio ** (k - (num_targets - 1) / 2) for k in range(num_targets)]
    while targets[-1] < cost[-1]:
        targets.append(targets[-1] * (1 + _LONG_TARGET_STEP))
    return np.rint(targets).astype(np.int64), num_targets


def _equal_cost_menu(cost: Ints, targets: Ints, num_regular: int, penalty: int) -> _Menu:
    """Units as large as each target allows, for those targets that they come close to."""
    is_long = cost[:, None] > targets[num_regular - 1]  # alone in a unit; further targets are there for these
    fits = np.where(is_long, targets >= cost[:, None], np.arange(len(targets)) < num_regular)
    sizes = np.where(is_long, 1, np.maximum(targets // cost[:, None], 1))  # [L, K]
    slot = np.maximum(targets, sizes * cost[:, None])
    waste = np.where(fits, slot / (sizes * cost[:, None]) - 1, np.inf)
    allowed = waste <= np.maximum(_TOLERANCE, waste.min(axis=1, keepdims=True))
    return _Menu(allowed=allowed, num_utterances=sizes, slot=slot, penalty=penalty)


def _choose_lengths(counts: Ints, cost: Ints, menu: _Menu) -> Ints:
    """Which rounded lengths to pad to, ascending, [n]: indices; each takes the lengths up to it from the one before.

    Dynamic programming over the last chosen length. What is kept small is the mean of the cost with padding, which
    one process alone pays, and of the slot, which a process pays where each of many waits for the slowest.
    """
    num_shapes = menu.allowed.sum(axis=1)
    slot = np.where(menu.allowed, menu.slot // menu.num_utterances, 0).sum(axis=1) // num_shapes
    each = (slot + cost) // 2  # cost of an utterance padded to a length, [L]
    ends = np.concatenate([[0], np.cumsum(counts)])

    def solve(penalty: int) -> Ints:
        best, before = np.zeros(len(ends), np.int64), np.zeros(len(ends), np.int64)
        for j in range(1, len(ends)):
            through = best[:j] + (ends[j] - ends[:j]) * each[j - 1]
            before[j] = through.argmin()
            best[j] = through[before[j]] + penalty * num_shapes[j - 1]
        chosen = [len(ends) - 1]
        while before[chosen[-1]]:
            chosen.append(int(before[chosen[-1]]))
        return np.array(chosen[::-1], dtype=np.int64) - 1

    low, high = menu.penalty, max(menu.penalty, int(ends[-1]) * int(each[-1]))
    chosen = solve(low)
    if num_shapes[chosen].sum() <= _MAX_SHAPES:
        return chosen
    while high > low + low // 32 + 1:
        middle = isqrt(low * high)
        if middle in (low, high):
            break
        if num_shapes[solve(middle)].sum() > _MAX_SHAPES:
            low = middle
        else:
            high = middle
    return solve(high)


def _lay_out(index: LengthIndex, cost: Ints, menu: _Menu, chosen: Ints) -> Shapes:
    """Cut the line of utterances by length into units; the rest of a length goes to the next longer one."""
    cumulated = np.concatenate([[0], np.cumsum(np.diff(index.starts) * cost)])
    rows: list[tuple[int, int, int, int, int]] = []
    loads = np.zeros(menu.allowed.shape[1], dtype=np.int64)  # units of each target so far
    first = 0
    for place, j in enumerate(chosen):
        end = int(index.starts[j + 1])
        allowed = np.flatnonzero(menu.allowed[j])
        sizes = menu.num_utterances[j, allowed]
        num_units = _share_out(end - first, sizes, loads[allowed])
        loads[allowed] += num_units
        for k, size, number in zip(allowed.tolist(), sizes.tolist(), num_units.tolist(), strict=True):
            if number:
                rows.append((k, int(index.lengths[j]), size, number, first))
                first += size * number
        rest = end - first
        is_last = place == len(chosen) - 1
        own_cost = cumulated[j + 1] - np.interp(first, index.starts, cumulated)
        if rest and (
            is_last or not _is_cheap(rest, own_cost, int(cost[chosen[place + 1]]), int(menu.slot[j, allowed[0]]))
        ):
            least = int(allowed[loads[allowed].argmin()])
            rows.append((least, int(index.lengths[j]), rest, 1, first))
            loads[least] += 1
            first = end
    return _as_shapes(rows, index, chosen)


def _share_out(available: int, sizes: Ints, loads: Ints) -> Ints:
    """How many units of each size to make of the available utterances: as many of each, then to the least loaded."""
    num_units = np.full(len(sizes), available // int(sizes.sum()))
    rest = available - int((num_units * sizes).sum())
    while (fitting := np.flatnonzero(sizes <= rest)).size:
        least = fitting[(loads + num_units)[fitting].argmin()]
        num_units[least] += 1
        rest -= int(sizes[least])
    return num_units


def _is_cheap(rest: int, own_cost: float, next_cost: int, slot: int) -> bool:
    """Whether padding the rest to the next length costs little beside a unit of its own, which is not full."""
    return 4 * (rest * next_cost - own_cost) <= slot - own_cost


def _as_shapes(rows: list[tuple[int, int, int, int, int]], index: LengthIndex, chosen: Ints) -> Shapes:
    """Rows of (target, padded samples, utterances, units, first), sorted by target."""
    columns = np.array(sorted(rows, key=lambda row: row[0]), dtype=np.int64).T
    target, padded_samples, num_utterances, num_units, first = columns
    return Shapes(
        target=target,
        padded_samples=padded_samples,
        num_utterances=num_utterances,
        num_units=num_units,
        first=first,
        length_ends=np.asarray(index.starts)[chosen + 1],
        lengths=np.asarray(index.lengths)[chosen],
    )
