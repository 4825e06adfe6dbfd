"""The plan: every utterance once an epoch, the same on every machine and world size, in units of like cost."""

import pickle
from collections import Counter
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from asr_train.data.lengths import rounded_lengths
from asr_train.data.plan import (
    LengthIndex,
    Plan,
    PlanSettings,
    unit_seed,
    units_of_rank,
)
from asr_train.data.world_size import check_world_size
from asr_train.errors import RecipeError

S = 16_000
Q = 1.73e-4  # of wav2vec2-base with a frozen feature encoder
COST = PlanSettings(unit_audio_s=40, unit_utterances=None, units_per_step=4, order="cost", quadratic=Q)
GROUPED = replace(COST, unit_utterances=8, order="grouped")
RANDOM = replace(COST, unit_utterances=8, order="random")


def librispeech_like(num_utterances, seed=0):
    """Most utterances end between 12 and 16 s, where long recordings were cut; the rest reach down to 1.5 s."""
    random = np.random.default_rng(seed)
    cut = 16.3 - random.gamma(2.0, 0.9, num_utterances)
    seconds = np.where(random.random(num_utterances) < 0.7, cut, random.uniform(1.5, 14.5, num_utterances))
    return (np.clip(seconds, 1.3, 35) * S).astype(np.int64)


def common_voice_like(num_utterances):
    seconds = np.random.default_rng(1).lognormal(np.log(4.8), 0.36, num_utterances)
    return (np.clip(seconds, 1, 15) * S).astype(np.int64)


def long_tailed(num_utterances):
    seconds = np.random.default_rng(2).lognormal(np.log(6), 0.8, num_utterances)
    return (np.clip(seconds, 1, 30) * S).astype(np.int64)


def make_plan(num_samples, settings, seed=0):
    return Plan(LengthIndex.build(np.asarray(num_samples)), settings, seed)


def epoch_of(plan, epoch=0):
    return [plan.step_units(epoch, step) for step in range(plan.steps_per_epoch)]


def ids_of(steps):
    return np.concatenate([unit.ids for step in steps for unit in step])


def random_case(number):
    """A corpus and settings of any kind: tiny, of one length, with outliers, units of one utterance or of all."""
    random = np.random.default_rng(number)
    size = int(random.choice([1, 2, 5, 40, 300, 1200]))
    kinds = [
        random.uniform(0.1, 30, size),
        np.full(size, random.uniform(0.5, 20)),
        np.append(np.full(size - 1, 1.0), 30.0),
        random.lognormal(1, 1, size),
        random.choice([1.0, 1.01, 15.0], size),
    ]
    num_samples = (kinds[number % len(kinds)] * S).astype(np.int64) + 1
    settings = PlanSettings(
        unit_audio_s=float(random.choice([0.01, 2, 20, 100, 1000])),
        unit_utterances=int(random.choice([1, 2, 8, 64, 5000])),
        units_per_step=int(random.choice([1, 2, 3, 8, 100])),
        order=("cost", "grouped", "random")[number // len(kinds) % 3],
        quadratic=float(random.choice([0, 1e-4, 1e-2])),
    )
    return num_samples, settings


@pytest.mark.parametrize("number", range(75))
def test_every_utterance_exactly_once_an_epoch_whatever_the_corpus(number):
    num_samples, settings = random_case(number)
    plan = make_plan(num_samples, settings, seed=number)
    assert plan.num_utterances == len(num_samples)
    for epoch in (0, 3):
        steps = epoch_of(plan, epoch)
        assert np.array_equal(np.sort(ids_of(steps)), np.arange(len(num_samples)))
        sizes = {len(step) for step in steps}
        assert max(sizes) <= settings.units_per_step
        assert max(sizes) - min(sizes) <= 1  # no last step of one utterance that takes a full update
        for step, units in enumerate(steps):
            assert plan.num_units_in(epoch, step) == len(units)
            assert plan.num_utterances_in(epoch, step) == sum(len(unit.ids) for unit in units)
        allowed = set(rounded_lengths(int(num_samples.max())).tolist())
        for unit in (unit for step in steps for unit in step):
            assert len(unit.ids) and unit.ids.dtype == np.int64
            assert unit.padded_samples in allowed and unit.padded_samples >= num_samples[unit.ids].max()
            if settings.order != "cost":
                assert len(unit.ids) <= settings.unit_utterances


@pytest.mark.parametrize("settings", [COST, GROUPED, RANDOM], ids=lambda settings: settings.order)
def test_pure_in_epoch_step_and_unit(settings, tmp_path):
    index = LengthIndex.build(librispeech_like(700))
    plan = Plan(index, settings, seed=5)
    steps = epoch_of(plan, epoch=2)
    index.save(tmp_path)
    others = [Plan(LengthIndex.open(tmp_path), settings, seed=5), pickle.loads(pickle.dumps(plan))]
    for other in others:
        assert other.hash == plan.hash
        for step in reversed(range(plan.steps_per_epoch)):
            for k in reversed(range(len(steps[step]))):
                unit = other.unit(2, step, k)
                assert np.array_equal(unit.ids, steps[step][k].ids)
                assert unit.padded_samples == steps[step][k].padded_samples


@pytest.mark.parametrize("settings", [COST, GROUPED, RANDOM], ids=lambda settings: settings.order)
def test_the_same_units_for_every_world_size(settings):
    plan = make_plan(librispeech_like(700), settings)
    for step, units in enumerate(epoch_of(plan)):
        for world_size in (1, 2, 3, 5, 8):
            ranks = [units_of_rank(len(units), rank, world_size) for rank in range(world_size)]
            assert len({len(turns) for turns in ranks}) == 1  # as many turns, and collectives, on every rank
            taken = [plan.unit(0, step, k) for turns in ranks for k in turns if k is not None]
            assert np.array_equal(np.sort(ids_of([taken])), np.sort(ids_of([units])))


def test_units_of_rank_by_hand():
    assert [units_of_rank(8, rank, 2) for rank in range(2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [units_of_rank(3, rank, 2) for rank in range(2)] == [[0, 2], [1, None]]
    assert [units_of_rank(1, rank, 3) for rank in range(3)] == [[0], [None], [None]]


@pytest.mark.parametrize("settings", [COST, GROUPED, RANDOM], ids=lambda settings: settings.order)
def test_epochs_and_seeds_differ_in_all_but_their_constants(settings):
    num_samples = librispeech_like(3000)
    plan = make_plan(num_samples, settings)
    epochs = [epoch_of(plan, epoch) for epoch in (0, 1)] + [epoch_of(make_plan(num_samples, settings, seed=1))]
    for a in range(3):
        for b in range(a):
            same_place = (ids_of(epochs[a]) == ids_of(epochs[b])).mean()
            assert same_place < 0.01
            units = [{tuple(sorted(unit.ids)) for step in epochs[i] for unit in step} for i in (a, b)]
            assert len(units[0] & units[1]) < 0.05 * len(units[0])  # other utterances come together
    shapes = [Counter((len(unit.ids), unit.padded_samples) for step in epoch for unit in step) for epoch in epochs]
    if settings.order != "random":
        assert shapes[0] == shapes[1] == shapes[2]
    assert len({len(epoch) for epoch in epochs}) == 1


@pytest.mark.parametrize("settings", [COST, GROUPED, RANDOM], ids=lambda settings: settings.order)
def test_every_utterance_comes_early_and_late_equally_often(settings):
    num_epochs, num_samples = 200, np.full(96, 4 * S) + np.arange(96) % 3
    plan = make_plan(num_samples, replace(settings, unit_audio_s=17, unit_utterances=4, units_per_step=2))
    assert plan.steps_per_epoch == 12
    counts = np.zeros((len(num_samples), plan.steps_per_epoch))
    for epoch in range(num_epochs):
        for step, units in enumerate(epoch_of(plan, epoch)):
            counts[np.concatenate([unit.ids for unit in units]), step] += 1
    expected = num_epochs / plan.steps_per_epoch
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (len(num_samples) - 1) * (plan.steps_per_epoch - 1)
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_units_change_places_and_company_from_epoch_to_epoch():
    lengths = (2000 * 1.25 ** np.arange(24)).astype(np.int64)  # far apart: each is one unit in every epoch
    plan = make_plan(np.repeat(lengths, 8), replace(GROUPED, units_per_step=2))
    places, company = [], set()
    for epoch in range(60):
        steps = [[unit.padded_samples for unit in step] for step in epoch_of(plan, epoch)]
        place = next(i for i, step in enumerate(steps) if max(lengths) <= max(step))
        places.append(place)
        company.add(min(steps[place]))
    assert len(set(places)) == plan.steps_per_epoch == 12
    assert len(company) > 15  # of 23


def test_costly_steps_come_at_other_times_in_every_epoch():
    plan = make_plan(long_tailed(3000), replace(COST, unit_audio_s=100))

    def audio(epoch, step):
        return sum(len(unit.ids) * unit.padded_samples for unit in plan.step_units(epoch, step))

    of_one_epoch = np.std([audio(0, step) for step in range(plan.steps_per_epoch)])
    of_first_steps = np.std([audio(epoch, 0) for epoch in range(50)])
    assert of_first_steps > 0.7 * of_one_epoch


def test_the_same_plan_on_every_machine_and_version():
    """A run goes on elsewhere only if this holds. When the plan is changed on purpose, raise its _FORMAT too."""
    found = {}
    for settings in (COST, GROUPED, RANDOM):
        num_samples = 1600 + np.arange(5000, dtype=np.int64) * 104_729 % 400_000
        plan = make_plan(num_samples, settings, seed=2**70)
        content = ids_of(epoch_of(plan, 1)).tobytes() + str([len(u.ids) for u in plan.step_units(1, 0)]).encode()
        found[settings.order] = sha256(content).hexdigest()[:16]
    assert found == {"cost": "51c00158eee812e4", "grouped": "c97704561de35984", "random": "8aff5741c966bd6c"}


def test_hash_tells_plans_apart():
    index = LengthIndex.build(librispeech_like(700))
    settings = [COST, GROUPED, RANDOM, replace(COST, units_per_step=5), replace(COST, quadratic=0.0)]
    plans = [Plan(index, each, 0) for each in settings] + [Plan(index, COST, 1)]
    plans.append(make_plan(librispeech_like(701), COST))
    assert len({plan.hash for plan in plans}) == len(plans)
    assert Plan(index, COST, 0).hash == plans[0].hash


def replay(num_samples, settings, worlds):
    """Useful share of the slowest rank's time by world size, and all else that a user would measure."""
    plan = make_plan(num_samples, settings)

    def cost(samples):
        frames = samples / 320
        return frames + Q * frames**2

    slowest, shapes, padded, means = dict.fromkeys(worlds, 0.0), set(), 0, []
    for units in epoch_of(plan):
        costs = np.array([len(unit.ids) * cost(unit.padded_samples) for unit in units])
        for world_size in worlds:
            ranks = np.append(costs, np.zeros(-len(costs) % world_size)).reshape(-1, world_size)
            slowest[world_size] += world_size * ranks.sum(axis=0).max()
        shapes |= {(len(unit.ids), unit.padded_samples) for unit in units}
        padded += sum(len(unit.ids) * unit.padded_samples for unit in units)
        means.append(num_samples[np.concatenate([unit.ids for unit in units])].mean())
    shares = {world_size: cost(num_samples).sum() / total for world_size, total in slowest.items()}
    return plan, shares, 1 - num_samples.sum() / padded, shapes, np.std(means) / num_samples.std()


@pytest.mark.parametrize(
    "num_samples",
    [librispeech_like(450_000), common_voice_like(1_100_000), long_tailed(650_000)],
    ids=["librispeech", "common_voice", "long_tailed"],
)
def test_little_padding_little_waiting_few_shapes_and_mixed_steps(num_samples):
    """The bars that batching is judged by, at 200 s a unit and 512 units a step, over at least 50 steps."""
    settings = replace(COST, unit_audio_s=200, units_per_step=512)
    plan, shares, padding, shapes, spread = replay(num_samples, settings, (8, 64, 512))
    assert plan.steps_per_epoch >= 50
    assert shares[8] >= 0.97 and shares[64] >= 0.96 and shares[512] >= 0.96
    assert padding <= 0.015
    assert len(shapes) <= 300
    assert spread <= 0.3
    statistics = plan.statistics()
    assert statistics.padded_share == pytest.approx(padding)
    assert statistics.num_shapes == len(shapes)
    assert statistics.padded_audio_s / statistics.num_units == pytest.approx(200, rel=0.02)
    assert statistics.max_unit_audio_s < 1.2 * 200


def test_statistics_are_those_of_an_epoch():
    num_samples = long_tailed(3000)
    for settings in (COST, GROUPED, RANDOM):
        plan = make_plan(num_samples, settings)
        statistics = plan.statistics()
        epochs = [[unit for step in epoch_of(plan, epoch) for unit in step] for epoch in range(4)]
        sizes = [[len(unit.ids) * unit.padded_samples / S for unit in units] for units in epochs]
        assert statistics.audio_s == pytest.approx(num_samples.sum() / S)
        # the padding of random units is an expectation
        tolerance = 0.02 if settings.order == "random" else 1e-9
        assert statistics.padded_audio_s == pytest.approx(np.mean([sum(each) for each in sizes]), rel=tolerance)
        assert statistics.padded_share == pytest.approx(1 - statistics.audio_s / statistics.padded_audio_s)
        assert statistics.max_unit_audio_s == pytest.approx(max(map(max, sizes)))
        assert (statistics.num_units, statistics.num_steps) == (len(epochs[0]), plan.steps_per_epoch)
        shapes = {(len(unit.ids), unit.padded_samples) for units in epochs for unit in units}
        assert statistics.num_shapes >= len(shapes)
        if settings.order != "random":
            assert statistics.num_shapes == len(shapes)


def test_one_long_utterance_does_not_pad_the_short_ones():
    num_samples = np.append(np.full(1000, S), 30 * S)
    for settings in (COST, replace(COST, unit_audio_s=200), GROUPED):
        assert make_plan(num_samples, settings).statistics().padded_share < 0.02


def test_units_shorter_than_an_utterance_hold_one():
    num_samples = librispeech_like(700)
    plan = make_plan(num_samples, replace(COST, unit_audio_s=1))
    units = [unit for step in epoch_of(plan) for unit in step]
    assert all(len(unit.ids) == 1 for unit in units)
    assert plan.statistics().padded_share < 0.01


def test_one_length_needs_no_padding_and_full_units():
    plan = make_plan(np.full(700, 32_000), replace(COST, unit_audio_s=41))
    sizes = Counter(len(unit.ids) for step in epoch_of(plan) for unit in step)
    assert sizes[20] >= 700 // 20 - 1
    assert plan.statistics().padded_share == 0


def test_fixed_counts_are_kept():
    num_samples = long_tailed(3001)
    units = [unit for step in epoch_of(make_plan(num_samples, RANDOM)) for unit in step]
    assert Counter(len(unit.ids) for unit in units) == {8: 375, 1: 1}
    units = [unit for step in epoch_of(make_plan(num_samples, GROUPED)) for unit in step]
    assert sum(len(unit.ids) == 8 for unit in units) >= 0.97 * len(units)


def test_steps_of_cost_order_hold_units_of_like_cost():
    num_samples = common_voice_like(60_000)
    plan = make_plan(num_samples, replace(COST, unit_audio_s=100, units_per_step=64))
    ratios = []
    for units in epoch_of(plan):
        frames = np.array([unit.padded_samples / 320 for unit in units])
        costs = np.array([len(unit.ids) for unit in units]) * (frames + Q * frames**2)
        ratios.append(costs.max() / costs.mean())
    assert np.median(ratios) < 1.02


def test_positions_outside_an_epoch_are_errors():
    plan = make_plan(librispeech_like(700), COST)
    for step in (-1, plan.steps_per_epoch):
        with pytest.raises(IndexError, match="step"):
            plan.step_units(0, step)
    with pytest.raises(IndexError, match="unit 4 of a step of 4"):
        plan.unit(0, 0, 4)


def test_unit_seeds_are_distinct_and_fit_torch_and_numpy():
    places = [(seed, e, s, k) for seed in (0, 1, 2**64) for e in range(3) for s in range(40) for k in range(12)]
    seeds = [unit_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert unit_seed(1, 2, 3, 4) == unit_seed(1, 2, 3, 4)


def test_more_processes_than_units_are_refused_with_the_sums():
    with pytest.raises(RecipeError) as error:
        check_world_size(2, 8, allow_idle_ranks=False)
    assert str(error.value) == (
        "units_per_step=2 keeps 2 of 8 processes busy: use --processes 2, "
        "or units_per_step=8 (four times the batch; reconsider lr)"
    )
    with pytest.raises(RecipeError, match=r"keeps 3 of 8 .* \(2\.67 times the batch"):
        check_world_size(3, 8, allow_idle_ranks=False)
    check_world_size(8, 8, allow_idle_ranks=False)
    check_world_size(8, 3, allow_idle_ranks=False)
    check_world_size(2, 8, allow_idle_ranks=True)
