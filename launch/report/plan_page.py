"""The page of a plan: its facts, the lengths of the speech, and what each number of processes would make of it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch import plan_text
from launch.report.charts import COLOURS, Chart, Table, bar_layout
from launch.report.page import render


def plan_page(name: str, found: Mapping[str, Any]) -> str:
    """The plan as HTML.

    Args:
        name: the recipe's.
        found: what `plan --json` prints; its training half is known.
    """
    training = found["training"]
    content = {
        "title": name,
        "state": f"What a training would be, before it is started. Run directory: {found['run_dir']}",
        "made": time.time(),
        "notices": [warning["text"] for warning in training["warnings"]],
        "cards": cards(found),
        "facts": Table(("what", "in words"), list(plan_text.facts(found))),
        "lengths": lengths_chart(training["lengths"]),
        "ranks": ranks_chart(found),
        "memory": memory_chart(training["memory"]) if training["memory"] else None,
        "memory_problem": training["model_problem"],
        "job": found.get("sbatch"),
        "sections": [
            ("plan", "The plan"), ("speech", "Speech"), ("processes", "Processes"), ("memory", "Memory"),
            *([("job", "The job")] if "sbatch" in found else []),
        ],
    }  # fmt: skip
    return render("plan.html.j2", content)


def cards(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The figures at the top."""
    training, cost = found["training"], found["cost"]
    epoch, chosen = training["epoch"], training["chosen"]
    shown: list[tuple[str, Any]] = [
        ("steps", f"{training['max_steps']:,}"),
        ("steps an epoch", f"{epoch['num_steps']:,}"),
        ("speech", plan_text.hours(epoch["audio_s"])),
        ("padding", f"{100 * epoch['padded_share']:.2f} %"),
        ("processes", f"{training['world_size']:,}"),
    ]
    if chosen["balance"] is not None:
        shown.append(("useful computing", f"{100 * chosen['balance']['useful_share']:.1f} %"))
    if training["memory"]:
        shown.append(("memory a process", plan_text.size(training["memory"][0]["total_bytes"])))
    if chosen["total_s"] is not None:
        shown += [("a step", plan_text.seconds(chosen["step_s"])), ("in all", plan_text.duration(chosen["total_s"]))]
    if cost["hours"] is not None:
        shown.append((cost["kind"], plan_text.number(cost["hours"])))
    if cost.get("slices"):
        shown.append(("jobs", f"{cost['slices']:,}"))
    if training["checkpoints"]["most_bytes"] is not None:
        shown.append(("room for checkpoints", plan_text.size(training["checkpoints"]["most_bytes"])))
    return shown


def lengths_chart(bins: Sequence[Mapping[str, Any]]) -> Chart:
    """How many utterances have which length."""
    names = [f"{each['from_s']:g} to {each['to_s']:g} s" for each in bins]
    most = max(range(len(bins)), key=lambda number: bins[number]["num_utterances"])
    total = sum(each["num_utterances"] for each in bins)
    return Chart(
        key="lengths", title="Lengths of the training utterances", height=280,
        alt=f"Lengths of {total:,} training utterances, up to {bins[-1]['to_s']:g} s. Most, "
        f"{bins[most]['num_utterances']:,}, are of {names[most]}.",
        data=[{
            "type": "bar", "x": [(each["from_s"] + each["to_s"]) / 2 for each in bins],
            "y": [each["num_utterances"] for each in bins], "marker": {"color": COLOURS[0]}, "text": names,
            "textposition": "none", "hovertemplate": "%{text}: %{y:,} utterances<extra></extra>",
        }],
        layout=bar_layout("seconds", "utterances", bargap=0.05),
        table=Table(("length", "utterances", "hours"), [
            [name, each["num_utterances"], f"{each['audio_s'] / 3600:.3f}"]
            for name, each in zip(names, bins, strict=True)
        ]),
    )  # fmt: skip


def ranks_chart(found: Mapping[str, Any]) -> Chart:
    """What processes do with their computing time, by their number."""
    known = [each for each in found["training"]["ranks"] if each["balance"] is not None]
    sizes = [f"{each['world_size']:,}" for each in known]
    looks = {"useful": (2, ""), "padding": (4, "/"), "waiting": (1, "x")}
    data = [
        {
            "type": "bar", "name": name, "x": sizes,
            "y": [each["balance"][f"{name}_share"] for each in known],
            "marker": {"color": COLOURS[look], "pattern": {"shape": shape, "size": 7, "solidity": 0.35}},
            "hovertemplate": f"%{{x}} processes, {name}: %{{y:.1%}}<extra></extra>",
        }
        for name, (look, shape) in looks.items()
    ]  # fmt: skip
    header, rows = plan_text.rank_rows(found)
    said = "; ".join(f"{size}: {each['balance']['useful_share']:.1%}" for size, each in zip(sizes, known, strict=True))
    layout = bar_layout("processes", "", barmode="stack", showlegend=True)
    layout["xaxis"] = {**layout["xaxis"], "type": "category"}
    layout["yaxis"] = {**layout["yaxis"], "tickformat": ".0%", "range": [0, 1]}
    return Chart(
        key="processes", title="Computing time by number of processes", data=data, layout=layout, is_open=True,
        alt=f"Useful share of the computing time by number of processes. {said}.",
        note=plan_text.rank_note(found["training"]), table=Table(header, rows),
    )  # fmt: skip


def memory_chart(units: Sequence[Mapping[str, Any]]) -> Chart:
    """What the memory of one process goes to, with gradient checkpointing and without."""
    names = ["with" if each["gradient_checkpointing"] else "without" for each in units]
    kinds = ("parameters", "gradients", "optimizer", "saved", "recomputed", "working")
    patterns = ("", "/", "x", "", ".", "-")
    data = [
        {
            "type": "bar", "orientation": "h", "name": kind, "y": names,
            "x": [each["parts"][kind] / 1e9 for each in units],
            "marker": {"color": COLOURS[look], "pattern": {"shape": patterns[look], "size": 7, "solidity": 0.35}},
            "hovertemplate": f"{kind}: %{{x:.3g}} GB<extra>%{{y}}</extra>",
        }
        for look, kind in enumerate(kinds)
    ]  # fmt: skip
    totals = ", ".join(f"{name} {plan_text.size(each['total_bytes'])}" for name, each in zip(names, units, strict=True))
    layout = bar_layout("GB", "", barmode="stack", showlegend=True)
    layout["yaxis"] = {**layout["yaxis"], "autorange": "reversed", "type": "category"}
    return Chart(
        key="memory", title="Memory of one process, with and without gradient checkpointing", data=data, height=240,
        layout=layout, is_open=True,
        alt=f"Predicted peak memory of one process for the largest unit, by gradient checkpointing: {totals}.",
        table=Table(("part", *names), [
            [kind, *(plan_text.size(each["parts"][kind]).replace(" ", "\u202f") for each in units)] for kind in kinds
        ], totals=[["in all", *(plan_text.size(each["total_bytes"]).replace(" ", "\u202f") for each in units)]]),
    )  # fmt: skip
