"""The numbers that benchmarks/results.py makes of runs, what it refuses, and the page it writes."""

import csv
import json
import os

import numpy as np
import pytest
import results
from matplotlib.figure import Figure
from test_benchmarks import write_run

TASK = "cube-double-play-singletask-task{}-v0".format
BUDGET, TAU = dict(kl_budget=0.5), dict(inverse_temperature=3.0)
DATA = "path, sha256 000000000000"


def write_arm(folder, scores, script="trqam_offline", task=1, first=0, measure="success", **args):
    """A run for each score: the mean of its last three evaluations."""
    for seed, score in enumerate(scores, first):
        curve = [("bc", 9, 0.1), ("offline", 50_000, 0.9), ("offline", 100_000, score - 0.1)]
        curve += [("offline", 150_000, score + 0.2), ("offline", 200_000, score - 0.1)]
        rows = [dict(stage="offline", step=step, loss=step / 7) for step in range(500)]
        run, own = folder / f"s{seed}", dict(BUDGET if script[:2] == "tr" else TAU)
        folder.mkdir(parents=True, exist_ok=True)
        write_run(run, script, seed, curve, rows, **dict(own, env_id=TASK(task)) | args)
        table = (run / "eval.csv").read_text()
        (run / "eval.csv").write_text(table.replace("success", measure))
    return folder


@pytest.fixture
def report(tmp_path, capsys, monkeypatch):
    """(task, method) -> the other cells of its row; A and B, for improvements. Draws nothing."""
    monkeypatch.setattr(results, "figure_of", lambda *words: Figure((1, 1)))

    def report(*folders, **flags):
        results.main(results.Args(runs=folders, output=tmp_path / "out" / "x", **flags))
        text = flags["page"].read_text() if "page" in flags else capsys.readouterr().out
        rows = [x[2:-2].split(" | ") for x in text.splitlines() if x[:2] == "| " and "---" not in x]
        return {tuple(row[: 2 + (len(row) == 4)]): row[2 + (len(row) == 4) :] for row in rows}

    return report


def test_statistics_have_their_closed_forms():
    one, two = np.array([0.0, 1, 2, 3]), np.array([4.0, 5, 6, 100])
    assert results.iqm(one, two) == 3.5 and results.mean(one, two) == (1.5 + 28.75) / 2
    assert results.mean(one, two[:1]) == 2.75  # tasks count alike
    better = results.improvement
    assert better(two, one) == 1 and better(one, two) == 0 and better(one, one) == 0.5
    assert better(np.ones(2), np.array([1.0, 0])) == 0.75
    assert better(two, one[:2], one, one[:3]) == pytest.approx((1 + 1 / 3) / 2)


def test_intervals_are_drawn_within_tasks():
    same = [np.full(4, 0.3), np.full(3, 0.3)]
    assert {results.cell(x, same) for x in (results.mean, results.iqm)} == {"0.30 [0.30, 0.30]"}
    apart = [np.zeros(5), np.ones(5)]
    assert results.cell(results.mean, apart) == "0.50 [0.50, 0.50]"
    low, high = results.interval(results.mean, [np.concatenate(apart)])
    assert low <= 0.2 and high >= 0.8  # and not so where tasks are mixed
    assert results.cell(results.improvement, apart[::-1]) == "1.00 [1.00, 1.00]"
    assert results.cell(results.improvement, apart[:1] * 2) == "0.50 [0.50, 0.50]"
    assert results.cell(results.mean, [apart[0], np.ones(1)]) == "0.50 (1 seed)"
    scores = np.random.default_rng(0).normal(size=400)
    exact = scores.mean() + 1.96 * scores.std() / 20 * np.array([-1, 1])
    np.testing.assert_allclose(results.interval(results.mean, [scores]), exact, atol=0.005)
    first, second = (results.interval(results.mean, [scores]) for _ in range(2))
    assert first == second
    many = results.interval(results.mean, [np.stack([scores, 2 * scores], 1)], axis=0)
    np.testing.assert_allclose(many, np.outer(exact, [1, 2]), atol=0.01)


def test_intervals_are_those_of_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    generator = np.random.default_rng(1)
    a, b = (np.round(generator.beta(2 + i, 3, size=(6, 4)), 1) for i in range(2))  # with ties
    a += np.linspace(0, 1, 4)
    b += np.linspace(0, 1, 4)
    np.random.seed(0)  # of rliable's draws
    for theirs, ours, arrays in (
        (metrics.aggregate_mean, results.mean, a),
        (metrics.aggregate_iqm, results.iqm, a),
        (metrics.probability_of_improvement, results.improvement, [a, b]),
    ):
        samples = [task for array in (arrays if arrays is not a else [a]) for task in array.T]
        points, ends = library.get_interval_estimates(
            dict(x=arrays), lambda *x, f=theirs: np.array([f(*x)]), reps=1_500)
        assert ours(*samples) == pytest.approx(points["x"][0], abs=1e-12)
        tolerance = 0.1 * (ends["x"][1, 0] - ends["x"][0, 0])
        mine = results.interval(ours, samples)
        np.testing.assert_allclose(mine, ends["x"][:, 0], rtol=0, atol=tolerance)


def test_a_task_has_its_scores_beside_its_published_numbers(tmp_path, report):
    write_arm(tmp_path / "b", [0.2, 0.4], "qam_baseline", commits=("a" * 40,))
    write_arm(tmp_path / "b", [0.3], "qam_baseline", first=2, commits=("f" * 40 + "+changes",))
    write_arm(tmp_path / "a", [0.5], task=2)
    rows, facts = report(tmp_path), ["200,000", "success, 3 × 50 episodes", DATA, "a processor"]
    [seeds, mean, iqm, *other] = rows[TASK(1), "QAM, τ = 3"]
    assert (seeds, mean[:6], iqm[:6]) == ("3", "0.30 [", "0.30 [")
    assert other == [*facts, "aaaaaaa; fffffff+changes"]
    one = "0.50 (1 seed)"
    assert rows[TASK(2), "TRQAM, budget 0.5"] == ["1", one, one, *facts, "abc"]
    assert (TASK(1), "TRQAM, budget 0.5") not in rows
    for task in (1, 2):
        [x] = [x for x in results.published(TASK(task)) if x["method"] == "QAM"]
        i = [*x["steps"]].index(200_000)
        seeds, mean, _, step, *_ = rows[TASK(task), "QAM, published"]
        assert (seeds, mean[:4], step) == ("12", f"{x['mean'][i]:.2f}", "200,000")
    values = [rows[TASK(task), "QAM, published"][1] for task in (1, 2)]
    assert values[0] != values[1]
    scores = [*csv.DictReader((tmp_path / "out" / "x.csv").read_text().splitlines())]
    assert [(x["arm"], x["seed"], x["score"]) for x in scores] == [
        ("a", "0", "0.5"), ("b", "0", "0.2"), ("b", "1", "0.4"), ("b", "2", "0.3")]


def test_the_figure_has_the_curves_of_each_task(tmp_path):
    write_arm(tmp_path / "a", [0.2, 0.6])
    write_arm(tmp_path / "b", [0.5], task=2)
    runs = results.find_runs(results.Args(runs=(tmp_path,)))
    figure = results.figure_of(results.pool(runs), [TASK(1), TASK(2)], dict(a="A", b="B"))
    labels, means, heights = ("A (2 seeds)", "B (1 seeds)"), (0.4, 0.5), (0.4, 0)
    for task, axis, label, mean, height in zip((1, 2), figure.axes, labels, means, heights):
        own, *dashed = axis.lines
        assert own.get_label() == label and TASK(task) in axis.get_title()
        np.testing.assert_allclose(own.get_ydata(), [0.1, 0.9, mean - 0.1, mean + 0.2, mean - 0.1])
        [band] = axis.collections[0].get_paths()
        at_end = band.vertices[band.vertices[:, 0] == 200_000, 1]
        assert at_end.max() - at_end.min() == pytest.approx(height)  # of two seeds: both
        expected = results.published(TASK(task))
        for line, x in zip(dashed, expected, strict=True):
            assert line.get_linestyle() == "--" and x["method"] in line.get_label()
            np.testing.assert_array_equal(line.get_ydata(), x["mean"])


def test_many_tasks_are_pooled_by_arm_and_domain(tmp_path, report):
    for task, budget in ((1, 0.5), (2, 1.0)):
        write_arm(tmp_path / f"{task}" / "trqam", [0.4 * task] * 2, task=task, kl_budget=budget)
        write_arm(tmp_path / f"{task}" / "qam", [0.4, 0.4], "qam_baseline", task=task)
    scene, own = dict(env_id="scene-play-singletask-task1-v0"), dict(env_id="Own-v0")
    write_arm(tmp_path / "scene" / "trqam", [0.9] * 3, **scene)
    write_arm(tmp_path / "own" / "trqam", [-7.5] * 2, measure="return", **own)
    # What is named twice counts once, and first.
    rows, domain = report(tmp_path / "1" / "trqam", tmp_path), "cube-double-play, 2 tasks"
    assert rows[domain, "trqam"][:3] == ["2", *["0.60 [0.60, 0.60]"] * 2]
    assert rows[domain, "QAM, τ = 3"][:3] == ["2", *["0.40 [0.40, 0.40]"] * 2]
    assert rows["all 3 tasks", "trqam"][:2] == ["2; 3", "0.70 [0.70, 0.70]"]
    assert rows["all 3 tasks", "QAM, τ = 3"][0] == "only 2 of the tasks"
    assert rows["Own-v0", "trqam"][1:5:3] == ["-7.50 [-7.50, -7.50]", "return, 3 × 50 episodes"]
    better = {key: cells for key, cells in rows.items() if len(key) == 3 and key[0] != "task"}
    assert better == {(TASK(1), "trqam", "QAM, τ = 3"): ["0.50 [0.50, 0.50]"],
                      (TASK(2), "trqam", "QAM, τ = 3"): ["1.00 [1.00, 1.00]"],
                      (domain, "trqam", "QAM, τ = 3"): ["0.75 [0.75, 0.75]"]}


def test_methods_of_one_name_go_by_their_folders(tmp_path, report):
    write_arm(tmp_path / "slow", [0.5], tau=0.01)
    write_arm(tmp_path / "fast", [0.5], tau=0.1)
    write_arm(tmp_path / "prior", [0.5], offline_steps=0)
    rows = report(tmp_path, last=1)
    labels = {key[1] for key in rows if key[0] == TASK(1) and "published" not in key[1]}
    assert labels == {"slow", "fast", "behaviour cloning"}


@pytest.mark.parametrize("seed, different, words", [
    (1, dict(tau=0.5), "tau 0.5"), (1, dict(sha256="1" * 64), "data 111111111111"),
    (1, dict(eval_episodes=100), "eval_episodes 100"),
    (1, dict(bc_checkpoint="bc_checkpoint.pt"), "clone loaded"),
    (1, dict(kl_budget=1.0), "budget 1"), (0, {}, "second run")])
def test_what_differs_is_not_pooled(tmp_path, report, seed, different, words):
    folders = [write_arm(tmp_path / f"{i}" / "arm", [0.5], first=x, **own)
               for i, (x, own) in enumerate(((0, {}), (seed, different)))]
    with pytest.raises(SystemExit, match=words) as told:
        report(tmp_path)
    for folder, number in zip(folders, (0, seed)):
        assert str(folder / f"s{number}") in told.value.code
    if seed:  # each alone, and with what may differ, is fine
        report(folders[1])
        write_arm(folders[0], [0.5], first=1, run_dir="x", dataset_dir="y", commits=("d", "e"))
        assert report(folders[0])[TASK(1), "TRQAM, budget 0.5"][0] == "2"


def test_other_updates_are_not_pooled_and_unfinished_runs_are_left_out(tmp_path, capsys, report):
    write_arm(tmp_path / "arm", [0.5, 0.5])
    shorter = tmp_path / "arm" / "s1"
    shorter.joinpath("eval.csv").write_text("stage,step,success\nbc,9,0.1\noffline,150000,0.5\n")
    assert report(tmp_path)[TASK(1), "TRQAM, budget 0.5"][0] == "1"
    report(tmp_path, page=(page := page_of(tmp_path)), section="a")
    assert capsys.readouterr().err == f"left out, not finished: {shorter}\n"
    config = json.loads((shorter / "config.json").read_text())
    config["args"]["offline_steps"] = 150_000
    (shorter / "config.json").write_text(json.dumps(config))
    before = page.read_bytes()
    with pytest.raises(SystemExit, match="evaluated_at 150000"):
        report(tmp_path, page=page, section="a")
    assert page.read_bytes() == before
    config["dataset"] = None  # of a run that is still collecting
    (shorter / "config.json").write_text(json.dumps(config))
    (shorter / "eval.csv").write_text("\n")
    assert report(tmp_path)[TASK(1), "TRQAM, budget 0.5"][0] == "1"
    for runs, words in ((tmp_path / "nowhere", "no run in"), (shorter, "no finished run")):
        with pytest.raises(SystemExit, match=words):
            report(runs)


def page_of(folder):
    (folder / "docs").mkdir()
    page = folder / "docs" / "page.md"
    text = "# By hand\n\n<!-- results.py: {} -->\nold\n<!-- end -->\n\nmore\n"
    page.write_text(text.format("a") + text.format("b"))
    return page


def test_a_page_is_written_again_to_the_byte_and_only_in_its_section(
        tmp_path, report, monkeypatch):
    monkeypatch.undo()  # with its figure
    page, files = page_of(tmp_path), [tmp_path / "out" / f"x.{ending}" for ending in ("png", "csv")]
    before = page.read_text()
    write_arm(tmp_path / "runs" / "a", [0.1, 0.25, 0.4])
    write_arm(tmp_path / "runs" / "b", [0.3, 0.2, 0.5], "qam_baseline")
    once, again = ([report(tmp_path / "runs", page=page, section="b"),
                    *(file.read_bytes() for file in (page, *files))] for _ in range(2))
    assert once == again
    start, middle, end = page.read_text().partition("<!-- results.py: b -->\n")
    assert before.startswith(start + middle + "old") and end.endswith("<!-- end -->\n\nmore\n")
    assert "old" not in end and "](../out/x.png)" in end and "](../out/x.csv)" in end
    for section in ("", "c"):
        with pytest.raises(SystemExit, match="needs two lines, <!-- results.py: "):
            report(tmp_path / "runs", page=page, section=section)
    page.write_text(page.read_text().replace("<!-- end -->", "", 1))  # of section a: b is not its
    with pytest.raises(SystemExit, match="needs two lines"):
        report(tmp_path / "runs", page=page, section="a")


@pytest.mark.parametrize("tasks", [1, 2])
def test_kept_runs_are_small_nameless_and_give_the_same_table(tmp_path, report, tasks):
    for task in range(1, tasks + 1):
        folder = tmp_path / "home" / f"{task}" / "arm"
        write_arm(folder, [0.2, 0.4], task=task, bc_checkpoint=f"{tmp_path}/bc_checkpoint.pt")
        for run in folder.iterdir():
            config = json.loads((run / "config.json").read_text())
            config["args"] |= dict(run_dir=str(run), dataset_dir="~/.ogbench/data")
            config["dataset"]["files"] = [f"{tmp_path}/a.npz"]
            config["command"] = f"{tmp_path}/trqam_offline.py quick --run-dir={run} --seed 0"
            config["sittings"][0] |= dict(command=[f"{tmp_path}/x.py", "--run-dir", f"{run}"])
            (run / "config.json").write_text(json.dumps(config))
    kept, again = tmp_path / "kept", tmp_path / "again"
    first, table = report(tmp_path / "home", keep=kept), (tmp_path / "out" / "x.csv").read_bytes()
    assert report(kept, keep=again) == first
    assert (tmp_path / "out" / "x.csv").read_bytes() == table
    runs = sorted(x.parent.relative_to(kept) for x in kept.rglob("config.json"))
    arms = [f"{TASK(task)}/arm" for task in (1, 2)] if tasks == 2 else ["arm"]
    assert [*map(str, runs)] == [f"{arm}/seed{seed}" for arm in arms for seed in range(2)]
    for run in runs:
        assert {*os.listdir(kept / run)} == {"config.json", "eval.csv", "train.csv"}
        text = (kept / run / "config.json").read_text()
        assert "/" not in text and '"a.npz"' in text and "x.py" in text
        assert f"trqam_offline.py quick --run-dir=s{str(run)[-1]} --seed 0" in text
        head, *rows, last = (kept / run / "train.csv").read_text().splitlines()
        assert head == "stage,step,loss" and 100 < len(rows) < 200 and "offline,499," in last
        for name in ("config.json", "eval.csv", "train.csv"):  # of what is small, no less is kept
            assert (kept / run / name).read_bytes() == (again / run / name).read_bytes()
