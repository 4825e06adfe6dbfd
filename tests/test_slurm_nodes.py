"""Bad nodes on a real Slurm: one that fails its check is excluded, and the run goes on elsewhere to its end."""

import json

from survivor import expected, profile, recipe, reference, survivor  # noqa: F401  fixtures

from launch.site import exclusions

# ruff: noqa: F811  their names as arguments

ALL_BUT_N2 = 'test "$SLURMD_NODENAME" != n2 || { echo /scratch is not mounted; exit 1; }'


def preflight(line):
    return f"cluster.preflight={json.dumps(line)}"


def excluded(run):
    return json.loads(run.wavefleet("nodes", "--cluster", run.profile, "--json"))


def expanded(run, job):
    return run.cluster.run("scontrol", "show", "hostnames", run.cluster.job(job)["NodeList"]).split()


def test_a_node_that_always_fails_its_check_is_excluded_and_the_run_goes_on_elsewhere(survivor, expected, tmp_path):
    """The corpus is read from each node's own disk meanwhile, which is clean at the end."""
    run, scratch = survivor(), tmp_path / "scratch"
    job = run.submit(preflight(ALL_BUT_N2), f"cluster.stage_corpus_to={scratch}")
    verdict = run.verdict(1)
    assert (verdict["kind"], verdict["action"], verdict["hosts"]) == ("preflight", "continue", ["n2"])
    assert "/scratch is not mounted" in verdict["message"]
    run.until(lambda: run.cluster.job(job)["ExcNodeList"] == "n2")

    # What was learned is there for people and for other runs.
    (row,) = excluded(run)
    assert (row["host"], row["run"]) == ("n2", str(run.path))
    assert "/scratch is not mounted" in row["reason"]
    other = ["submit", run.recipe_file, f"run_dir={tmp_path / 'other'}", "cluster.sbatch.begin=now+1hour"]
    run.wavefleet(*other, "--cluster", run.profile)
    waiting = json.loads(run.wavefleet("status", tmp_path / "other", "--json"))["job_id"]
    assert run.cluster.job(waiting)["ExcNodeList"] == "n2"
    run.wavefleet("cancel", tmp_path / "other")

    run.ends_as(expected)
    found = run.status()
    assert (found["job_id"], found["attempts"]) == (job, 1)  # nobody began on n2
    assert [line["kind"] for line in run.verdicts()] == ["preflight", "done"]
    said = "".join(path.read_text() for path in run.path.glob("slurm/*_log.err"))
    said += "".join(path.read_text() for path in run.path.glob("logs/**/stderr.log"))
    for number in (0, 1):
        assert f"/scratch/wavefleet-{run.run.run_id}-{number}/" in said
    assert list(scratch.iterdir()) == []


def test_what_is_wrong_on_all_nodes_stops_the_run(survivor):
    """Excluding them would only have others fail, too."""
    run = survivor()
    run.submit(preflight("echo the licence server is down; exit 1"))
    verdict = run.verdict(1)
    assert (verdict["kind"], verdict["action"]) == ("preflight", "stop")
    assert "the licence server is down" in verdict["message"]
    assert excluded(run) == []


def test_a_node_is_not_excluded_where_too_few_others_are_left(survivor, tmp_path):
    """The job would wait for ever."""
    run = survivor()
    run.submit(preflight(ALL_BUT_N2), "allow_idle_ranks=true", "--nodes", "4")
    verdict = run.verdict(1)
    assert (verdict["kind"], verdict["action"], verdict["exclude_hosts"]) == ("preflight", "stop", [])
    assert "There is no other node to go on with" in verdict["message"]
    assert exclusions.live(tmp_path / "learned" / "small") == []


def test_a_successor_is_kept_off_the_node_too(survivor):
    """Where another job goes on in place of the same one."""
    run = survivor()
    job = run.submit(preflight(ALL_BUT_N2), "cluster.continuation=successor")
    successor = run.until(lambda: next((path.stem for path in run.path.glob("jobs/*.json") if path.stem != job), None))
    assert run.cluster.job(successor)["ExcNodeList"] == "n2"
    run.cluster.wait_for(successor, "RUNNING")
    assert "n2" not in expanded(run, successor)
    run.wavefleet("cancel", run.path)
