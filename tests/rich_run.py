"""A run directory as a cluster leaves it, without a training: four attempts on two nodes, a start that came to none.

Steps take a second. What every second went to is kept beside the files, for tests to compare a report with.

    start 7.0  attempt 1   steps 1-34, the newest checkpoint at 30; node n2 was lost, nobody wrote an outcome
    start 7.1  none        n2 refused by the check of its node
    start 7.2  attempt 2   from 30; preempted, saved at 47
    start 8.0  attempt 3   from 47, the newest checkpoint at 50; rank 2 out of memory in step 56
    start 9.0  attempt 4   from 50 to the end at 60
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from asr_train.files import append_jsonl, write_json
from asr_train.metrics import align_words
from asr_train.recipe import recipe_hash
from asr_train.run_dir import RunDir
from launch.ending.starts import Start
from launch.jobs.submit import Submission
from launch.verdict import Line, Verdict

EPOCH = 1_790_000_000.0
RANKS = 4
MAX_STEPS = 60
EVALUATION_S, SAVE_S, STARTUP_S = 6.0, 0.5, 12.0
# What a second of a step goes to, on an even rank and on rank 3, for which all others wait.
USUAL = {"compute_s": 0.6, "padding_s": 0.05, "data_wait_s": 0.05, "peer_wait_s": 0.28, "other_s": 0.02}
SLOW = {"compute_s": 0.84, "padding_s": 0.07, "data_wait_s": 0.05, "peer_wait_s": 0.02, "other_s": 0.02}


@dataclass
class Truth:
    """What happened, as the report should say it; seconds by the ledger's parts are means over ranks."""

    spent_s: Counter = field(default_factory=Counter)
    wall_s: float = 0.0
    lost_steps: dict = field(default_factory=dict)


class Writer:
    """Writes the lines of one attempt, and keeps the time."""

    def __init__(self, run, hosts, attempt, start, first_step, lowest_wer):
        self.hosts = hosts
        self.run, self.attempt, self.step, self.lowest_wer = run, attempt, first_step, lowest_wer
        self.now = start
        self.sums = [Counter() for _ in range(RANKS)]
        self.at_step = {}

    def spend(self, kind, seconds):
        self.now += seconds
        for sums in self.sums:
            sums[kind] += seconds

    def log(self, **line):
        append_jsonl(self.run.metrics, {"attempt": self.attempt, **line, "time": self.now})

    def ledger(self):
        kinds = (*USUAL, "checkpoint_s", "evaluation_s", "startup_s")
        ranks = [
            {
                "rank": rank,
                "host": self.hosts[rank // 2],
                **{kind: sums[kind] for kind in kinds},
                "wall_s": sum(sums.values()),
                "cost": 100.0 * self.step,
                "straggler": 0.4 if rank == 3 else 0.0,
            }
            for rank, sums in enumerate(self.sums)
        ]
        self.log(event="ledger", step=self.step, ranks=ranks)

    def train(self, last_step, saves_until):
        while self.step < last_step:
            self.step += 1
            self.now += 1.0
            for rank, sums in enumerate(self.sums):
                sums.update(SLOW if rank == 3 else USUAL)
            self.log(
                step=self.step, epoch=self.step // 20, loss=3.0 / self.step**0.5, grad_norm=1.0 + 5.0 / self.step,
                lr=1e-4 * min(1.0, self.step / 20), num_utterances=8, audio_s=23.0, padded_audio_s=25.0,
                step_time_s=1.0, data_wait_s=0.05, audio_s_per_s=23.0, memory_bytes=3 * 2**30 + self.step * 2**20,
                loss_scale=65536.0 / 2 ** (self.step // 25), num_infinite_losses=0, num_skipped_steps=0,
            )  # fmt: skip
            if self.step == 13:
                self.log(event="skipped", step=13, ids=["train-007"], cause="gradient")
            if self.step % 20 == 0:
                self.evaluate()
            if self.step % 10 == 0 and self.step <= saves_until:
                self.save()
            if self.step % 5 == 0:
                self.ledger()
                self.at_step[self.step] = mean(self.sums)

    def save(self):
        self.spend("checkpoint_s", SAVE_S)
        self.log(event="saved", step=self.step, seconds=3.0, blocked_s=SAVE_S)

    def evaluate(self):
        self.spend("evaluation_s", EVALUATION_S)
        for name in ("dev", "noisy"):
            wer = self.lowest_wer + 0.1 * (name == "noisy") + 0.5 * (1 - self.step / MAX_STEPS)
            counts = {"hits": 80, "substitutions": 12, "deletions": 5, "insertions": 3}
            self.log(
                step=self.step, set=name, wer=wer, cer=wer / 3, num_rows=12, num_refused=1, words=counts,
                seconds=EVALUATION_S / 2,
            )  # fmt: skip


def mean(sums):
    kinds = {kind for rank in sums for kind in rank}
    return Counter({kind: sum(rank[kind] for rank in sums) / len(sums) for kind in kinds})


def write_rich_run(path, recipe, corpus, *, pairs, message="out of memory", host="n2", lowest_wer=0.2):
    """Write the run; returns what the report should say.

    Args:
        path: the run directory.
        recipe, corpus: what it pretends to have been trained with.
        pairs: id -> (reference, hypothesis), the rows of its evaluations.
        message: what the rank says that failed.
        host: name of the second node.
        lowest_wer: at the end, on `dev`.
    """
    run = RunDir(path)
    run.make()
    run.claim(recipe)
    truth = Truth()
    facts = {"world_size": RANKS, "recipe_hash": recipe_hash(recipe)}

    def begin(name, when, attempt, first_step):
        start = Start(name=name, hosts=("n1", host), processes_per_node=2, time=when, job_id=name.split(".")[0])
        start.write(run)
        if attempt is None:
            return None
        resumed = f"step-{first_step:010d}" if first_step else None
        write_json(
            path / "attempts" / f"attempt-{attempt:03d}.json",
            {"attempt": attempt, "start": name, "started": when + 2, "host": "n1", "python": "3.11.9",
             "platform": "Linux", "versions": {"wavefleet": "0.1.0", "torch": "2.13.0"},
             "git": {"commit": "0123abc", "uncommitted_changes": False}, **facts, "resumed_from": resumed},
        )  # fmt: skip
        writer = Writer(run, ("n1", host), attempt, when, first_step, lowest_wer)
        writer.spend("startup_s", STARTUP_S)
        writer.log(
            event="restored" if first_step else "started", step=first_step, world_size=RANKS, strategy="ddp",
            precision="fp16", device="NVIDIA H200", steps_per_epoch=20, max_steps=MAX_STEPS, num_parameters=94_000_000,
            corpus_hash=corpus.hash, plan_hash="f" * 64, versions={"wavefleet": "0.1.0", "torch": "2.13.0"},
        )  # fmt: skip
        return writer

    def finish(writer, committed, status, kept_step=None):
        """Outcomes of the ranks, and what the attempt adds to the truth."""
        writer.ledger()
        record = path / "attempts" / f"attempt-{writer.attempt:03d}.json"
        write_json(record, {**json.loads(record.read_text()), "committed": f"step-{committed:010d}"})
        if status is not None:
            write_outcomes(writer, status, message)
        total = mean(writer.sums)
        kept = total if kept_step is None else writer.at_step[kept_step]
        truth.spent_s.update({kind.removesuffix("_s"): seconds for kind, seconds in kept.items()})
        truth.spent_s["lost"] += total.total() - kept.total()
        truth.wall_s += total.total()
        truth.lost_steps[writer.attempt] = writer.step - (kept_step or writer.step)

    def end(name, when, kind, text, **more):
        verdict = Verdict(kind=kind, message=text, evidence=(Line(text=text),), **more)
        append_jsonl(path / "verdicts.jsonl", {"start": name, "time": when, **verdict.to_json()})

    def submit(job, when):
        write_json(path / "jobs" / f"{job}.json", asdict(Submission(job, "cluster", 2, when, "code")))

    clock = EPOCH
    submit("7", clock)
    writer = begin("7.0", clock + 30, 1, 0)
    writer.train(34, saves_until=30)
    finish(writer, 30, status=None, kept_step=30)
    end("7.0", writer.now + 1, "node_failure", f"{host} was lost.", host=host, num_lost_steps=4)

    begin("7.1", writer.now + 15, None, 0)
    end("7.1", writer.now + 20, "preflight", f"{host} refuses: a GPU is missing.", host=host)
    second = begin("7.2", writer.now + 50, 2, 30)
    second.train(47, saves_until=46)
    second.save()
    second.log(event="stopped", step=47, reason="preempted")
    finish(second, 47, status="stopped")
    end("7.2", second.now, "preempted", "Put back into the queue.")

    submit("8", second.now + 20)
    third = begin("8.0", second.now + 60, 3, 47)
    third.train(55, saves_until=50)
    finish(third, 50, status="failed", kept_step=50)
    end("8.0", third.now, "out_of_memory", message, rank=2, host=host, step=56)

    submit("9", third.now)
    fourth = begin("9.0", third.now + 25, 4, 50)
    fourth.train(60, saves_until=60)
    finish(fourth, 60, status="done")
    end("9.0", fourth.now, "done", "Done.")
    write_json(run.done, {"step": 60, "audio_s": 60 * 23.0, "best_metric": "dev/wer", "best_value": lowest_wer})

    # in the queue: 30 s, from the end of 7.0 to 7.1 (15), from the end of 7.1 to 7.2 (30), 40, and 25
    truth.spent_s["queue"] = 30 + 15 + 30 + 40 + 25
    truth.spent_s["startup"] += 5  # of 7.1, which never trained
    truth.wall_s += 5 + truth.spent_s["queue"]
    for step in (20, 40, 60):
        for name in ("dev", "noisy"):
            write_rows(run.evaluation(step, name), pairs)
    return truth


def write_outcomes(writer, status, message):
    """What every rank says of its end; where it failed, rank 2 by itself, the others for want of it."""
    for rank in range(RANKS):
        failed = status == "failed" and rank == 2
        write_json(
            writer.run.path / "outcome" / f"attempt-{writer.attempt:03d}" / f"rank-{rank}.json",
            {"status": status, "exit_code": 4 if status == "failed" else 0, "step": writer.step, "time": writer.now,
             "host": writer.hosts[rank // 2], "message": message if failed else status, "lost_peer": not failed},
        )  # fmt: skip


def write_rows(path, pairs):
    """The rows of an evaluation, worst first, as `asr_train.score` writes them."""
    rows = []
    for number, (name, (reference, hypothesis)) in enumerate(pairs.items()):
        counts, edits = align_words(reference, hypothesis)
        rows.append({
            "id": name, "wer": counts.error_rate, "num_errors": counts.num_errors, "reference": reference,
            "hypothesis": hypothesis, "raw_reference": reference, "duration_s": 0.7 + 0.4 * number,
            **asdict(counts), "alignment": edits,
        })  # fmt: skip
    rows.sort(key=lambda row: (-row["wer"], -row["num_errors"], row["id"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
