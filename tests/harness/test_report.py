import json
import math
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from harness.record import CellPaths, EventLog, read_config, set_aside, write_config
from harness.report import ResultsError, load_results, print_summary, summary_json, summary_tables
from harness.report.__main__ import main
from harness.report.compare import ranges
from harness.report.tables import memory, number, p_value, percent
from harness.runner import run_sweep
from harness.sweep import make_plan
from tests.harness.fake_results import FakeCell, write_study

GOOD, NEVER = [(0.5, 0.5), (0.95, 0.95)], [(0.5, 0.5), (0.6, 0.6)]


@pytest.fixture
def run(capsys):
    """The command in this process: exit code, stdout, stderr."""

    def command(*arguments):
        code = main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return command


def only(path):
    results = load_results(path)
    (comparison,) = summary_tables(results)
    return comparison, {v.variant: v for v in comparison.variants}, results


def times(seed, variant, t, tmp_path, **more):
    """A cell of 100 s which reaches tau at ``t`` seconds (None: never)."""
    scores = [(0.95 if t and s >= t else 0.5,) * 2 for s in range(10, 101, 10)]
    return FakeCell(scores, seconds=10, variant=variant, seed=seed, **more).write(tmp_path)


def test_numbers_of_a_small_study_by_hand(tmp_path):
    for seed, (off, on) in enumerate([(40, 20), (50, 40), (80, 20), (None, 50), (None, None)]):
        times(seed, "off", off, tmp_path)
        times(seed, "on", on, tmp_path, warm_seconds=1.0)
    _, by_name, _ = only(tmp_path / "default")
    off, on = by_name["off"], by_name["on"]
    assert {unit: effect.budget for unit, effect in on.effect.items()} == pytest.approx(
        {"wallclock": 100, "gpu_hours": 100 / 3600}
    )
    assert (off.time["wallclock"].median, off.time["wallclock"].censored) == (80, 2)
    assert (on.time["wallclock"].median, on.time["wallclock"].q75) == (40, 50)
    effect = on.effect["wallclock"]  # 0.5, 0.2, 0.75, (0.5 to 1), 0
    assert (effect.pairs, effect.low, effect.high) == pytest.approx((5, 0.5, 0.5))
    assert effect.preliminary
    # |d| = 20, 10, 60, 50, 0: all four non-zero positive, so 2 of the 16 sign patterns are as far
    assert effect.p == pytest.approx(2 / 16)
    assert on.busy_hours["warm_start"] == pytest.approx(4 / 3600)
    assert on.warm_start_share["busy"] == pytest.approx(0.04)
    assert on.warm_start_share["flops"] == pytest.approx(200 / 10_200)
    assert (on.fallback_share, on.warm_started) == (0.0, 20)
    assert math.isnan(off.fallback_share)
    assert off.effect == {}
    assert on.peak_memory == {"train": 4e6, "warm_start": 5e6}


def test_summary_of_the_cells_equals_the_table(tmp_path):
    path = write_study(tmp_path, seeds=range(3))
    _, by_name, results = only(path)
    recorded = [json.loads(CellPaths.of(path / cell).summary.read_text()) for cell in results.cells["cell"]]
    for row, summary in zip(results.cells.to_dict("records"), recorded, strict=True):
        assert row["best_validation_score"] == summary["best_validation_score"]
        assert row["busy_train"] == summary["busy"]["train"]
    times = [s["t_tau"]["0.9"]["wallclock"] for s in recorded if s["labels"]["variant"] == "on"]
    assert by_name["on"].time["wallclock"].median == np.median(times)


def test_all_censored_is_a_tie(tmp_path):
    for seed in range(3):
        FakeCell(NEVER, variant="off", seed=seed).write(tmp_path)
        FakeCell(NEVER, variant="on", seed=seed, warm_seconds=0.1).write(tmp_path)
    _, by_name, results = only(tmp_path / "default")
    effect = by_name["on"].effect["wallclock"]
    assert (effect.low, effect.high, effect.p) == (0.0, 0.0, 1.0)
    assert "not reached [not reached, not reached]" in printed(results)


def test_an_unidentified_median_is_printed_as_a_bound(tmp_path):
    for seed in range(3):
        times(seed, "off", None, tmp_path)
        times(seed, "on", 20, tmp_path)
        times(seed, "random", None, tmp_path, scheduler="asha")
        times(seed, "off", 50, tmp_path, scheduler="asha")
    text = printed(load_results(tmp_path / "default"))
    assert "> 80.0%" in text
    assert "< -100.0%" in text


def test_a_time_beyond_the_configured_budget_is_censored(tmp_path):
    for seed in range(2):
        times(seed, "off", 90, tmp_path, budget={"wallclock": 80.0})
        times(seed, "on", 80, tmp_path, budget={"wallclock": 80.0})
    _, by_name, _ = only(tmp_path / "default")
    assert by_name["on"].effect["wallclock"].budget == 80
    assert by_name["off"].time["wallclock"].censored == 2
    assert by_name["on"].time["wallclock"].reached == 2
    assert by_name["on"].effect["wallclock"].p == 0.5  # wins both, if only just


def test_unfinished_cells_count_but_form_no_pairs(tmp_path):
    write_study(tmp_path, seeds=range(4))
    FakeCell(NEVER, variant="on", seed=4, warm_seconds=0.1, close=None).write(tmp_path)
    FakeCell(GOOD, variant="off", seed=4).write(tmp_path)
    FakeCell((), variant="on", seed=5, close="interrupted").write(tmp_path)
    _, by_name, results = only(tmp_path / "default")
    on = by_name["on"]
    assert (on.n, on.unfinished, on.time["wallclock"].pending) == (6, 2, 2)
    assert on.effect["wallclock"].pairs == 4
    assert on.missing == {"only_here": [5], "only_off": [], "unfinished": [4]}
    text = printed(results)
    assert "9 finished, 1 running or killed, 1 interrupted" in text
    assert "seeds 5 (no off cell)" in text
    assert "seeds 4 (not both finished)" in text
    assert "preliminary: fewer than 30 pairs: on (4)" in text


def test_thirty_pairs_are_not_preliminary(tmp_path):
    results = load_results(write_study(tmp_path, seeds=range(30), steps=6))
    assert "preliminary" not in printed(results)


def test_missing_pairs_are_listed_on_both_sides(tmp_path):
    write_study(tmp_path, ("off",), range(0, 6))
    write_study(tmp_path, ("on",), range(2, 9))
    _, by_name, _ = only(tmp_path / "default")
    assert by_name["on"].missing == {"only_here": [6, 7, 8], "only_off": [0, 1], "unfinished": []}


def test_a_comparison_does_not_depend_on_other_variants_or_unpaired_cells(tmp_path):
    for seed, (off, on) in enumerate([(40, 20), (50, None), (80, 20), (None, 50), (90, None), (None, 60)]):
        times(seed, "off", off, tmp_path)
        times(seed, "on", on, tmp_path, warm_seconds=1.0)
    before = only(tmp_path / "default")[1]["on"]
    long = [(0.5, 0.5)] * 500
    FakeCell(long, seconds=10, variant="random", seed=0, warm_seconds=1.0).write(tmp_path)  # another variant
    FakeCell(long, seconds=10, variant="on", seed=6, warm_seconds=1.0).write(tmp_path)  # no off cell
    FakeCell(long, seconds=10, variant="on", seed=7, warm_seconds=1.0, close=None).write(tmp_path)  # unfinished
    FakeCell(long, seconds=10, variant="off", seed=7).write(tmp_path)
    _, by_name, results = only(tmp_path / "default")
    assert by_name["on"].effect == before.effect
    assert by_name["on"].effect["wallclock"].budget == 100
    assert by_name["random"].effect["wallclock"].budget == 5000
    assert "\nB: on 100 s, 0.0278 h; random 5000 s, 1.39 h\n" in printed(results)


def test_a_cell_is_censored_at_its_own_end(tmp_path):
    times(0, "off", 40, tmp_path)
    times(1, "off", 80, tmp_path)
    FakeCell([(0.5, 0.5)] * 3, seconds=10, seed=2).write(tmp_path)  # its epochs were over after 30 s
    off = only(tmp_path / "default")[1]["off"].time["wallclock"]
    assert (off.q25, off.median, off.q75) == (40, 60, 80)  # S(40) = 1/2: the cell that ended is no longer at risk
    assert off.censored == 1


def test_under_an_epoch_budget_one_sided_censoring_is_read_at_the_pairs_longest_end(tmp_path):
    for seed in range(3):
        times(seed, "off", 80, tmp_path)
        FakeCell([(0.5, 0.5)] * 5, seconds=10, variant="on", seed=seed, warm_seconds=1.0).write(tmp_path)
    effect = only(tmp_path / "default")[1]["on"].effect["wallclock"]
    assert effect.budget == 100
    assert (effect.low, effect.high) == pytest.approx((-math.inf, 1 - 100 / 80))
    assert effect.p == 0.25


def test_no_pairs_no_budget(tmp_path):
    write_study(tmp_path, ("off",), range(2))
    write_study(tmp_path, ("on",), range(2, 4))
    _, by_name, results = only(tmp_path / "default")
    effect = by_name["on"].effect["wallclock"]
    assert effect.pairs == 0
    assert math.isnan(effect.budget)
    assert json.loads(json.dumps(summary_json(results), allow_nan=False))["comparisons"][0]["variants"][1]["n"] == 2


PROGRAM = "/somewhere/harness/__main__.py"


def test_without_off_cells_the_commands_that_add_them_are_printed(tmp_path):
    typed = ["-v", "backend.threads=2", "ohgw=on,random", "budget.epochs=null", "ohgw.eta=.1", "results_dir=a b"]
    for seed in range(3):
        FakeCell(GOOD, variant="on", seed=seed, command=[PROGRAM, *typed, "seed=0..2"]).write(tmp_path)
    FakeCell(GOOD, variant="random", seed=3, command=[PROGRAM, "seed=3", *typed, "--json"]).write(tmp_path)
    comparison, by_name, results = only(tmp_path / "default")
    words = "backend.threads=2 budget.epochs=null 'results_dir=a b'"
    first = f"python -m harness {words} seed=0..2 ohgw=off"
    second = f"python -m harness seed=3 {words} ohgw=off"
    assert (comparison.add_off, comparison.no_command) == ([first, second], {})
    assert by_name["on"].effect == {}
    assert f"these commands add them: {first}; {second}" in printed(results)


@pytest.mark.parametrize(
    "words",
    [
        ["backend.threads=2", "budget.epochs=null", "budget.trials=9"],
        ["experiment=smoke", "budget.wallclock=5"],
        ["task.spaces.study5.lr.upper=0.5", "scheduler=asha", "scheduler.eta=4", "n_workers=3"],
    ],
)
def test_the_printed_command_adds_exactly_the_missing_off_cells(tmp_path, words):
    words = [*words, "seed=0,1", f"results_dir={tmp_path}", "name=x"]
    on = make_plan([*words, "ohgw=on", "ohgw.eta=0.2"])
    for cell in on.cells:
        FakeCell(GOOD, planned=cell, command=[PROGRAM, *words, "ohgw=on", "ohgw.eta=0.2"]).write(tmp_path, "x")
    (command,) = only(tmp_path / "x")[0].add_off
    off = make_plan(shlex.split(command)[3:])
    assert [(cell.seed, cell.variant) for cell in off.cells] == [(0, "off"), (1, "off")]
    for cell in off.cells:
        FakeCell(GOOD, planned=cell).write(tmp_path, "x")
    comparison, by_name, _ = only(tmp_path / "x")
    assert (comparison.add_off, comparison.no_command) == ([], {})
    assert by_name["on(eta=0.2)"].effect["wallclock"].pairs == 2


@pytest.mark.parametrize(
    "meta",
    [None, "{", "[]", '{"command": "x"}', '{"command": []}', '{"command": ["my/script.py", "seed=1"]}',
     '{"command": [1, 2]}', '{"command": ["/x/harness/__main__.py", 2]}'],
)  # fmt: skip
def test_without_a_recorded_command_the_cells_without_off_are_named(tmp_path, meta):
    for seed in (0, 1, 2, 7):
        paths = FakeCell(GOOD, variant="on", seed=seed, warm_seconds=0.1).write(tmp_path)
        paths.meta.unlink() if meta is None else paths.meta.write_text(meta)
    comparison, _, results = only(tmp_path / "default")
    assert (comparison.add_off, comparison.no_command) == ([], {"on": [0, 1, 2, 7]})
    assert "the command that ran them is not recorded: on seeds 0..2,7" in printed(results)


def test_cells_of_different_settings_are_not_compared(tmp_path):
    FakeCell(GOOD, seed=0, n_workers=2).write(tmp_path)
    FakeCell(GOOD, seed=0, n_workers=4, variant="on", warm_seconds=0.1).write(tmp_path)
    results = load_results(tmp_path / "default")
    two, four = summary_tables(results)
    assert (two.setting, four.setting) == ({"n_workers": 2}, {"n_workers": 4})
    assert four.no_command == {"on": [0]}
    assert "digits / pasha, n_workers=4" in printed(results)


def test_settings_without_a_nameable_difference_are_told_apart_by_their_digest(tmp_path):
    for seed, setting in enumerate(("0a", "0b")):  # as if the order of a space's names differed
        paths = FakeCell(GOOD, seed=seed).write(tmp_path)
        config = read_config(paths)
        config["labels"]["setting"] = setting
        write_config(paths, config)
    assert [c.setting for c in summary_tables(load_results(tmp_path / "default"))] == [
        {"setting": "0a"},
        {"setting": "0b"},
    ]


def test_cells_of_one_setting_are_compared_whatever_their_labels_say(tmp_path):
    """What a YAML said at the time and what was typed may be the same."""
    FakeCell(GOOD, seed=0).write(tmp_path)
    paths = FakeCell(GOOD, seed=0, variant="on", warm_seconds=0.1).write(tmp_path)
    config = read_config(paths)
    config["labels"]["task"] = "digits(batch_size=64)"
    config["task"]["data_dir"] = "elsewhere"
    write_config(paths, config)
    comparison, by_name, _ = only(tmp_path / "default")
    assert comparison.setting == {}
    assert by_name["on"].effect["wallclock"].pairs == 1


def test_another_tau_may_be_asked_for_later(tmp_path, run):
    path = write_study(tmp_path, seeds=range(3))
    (low,), (high,) = (summary_tables(load_results(path), tau) for tau in (0.3, 0.999))
    assert low.variants[0].time["wallclock"].reached == 3
    assert high.variants[0].time["wallclock"].reached == 0
    (asked,) = json.loads(run(path, "--json", "--tau", 0.3).stdout)["comparisons"]
    assert (asked["tau"], asked["variants"][0]["time"]["wallclock"]["reached"]) == (0.3, 3)


def test_another_tau_may_be_asked_of_the_sweep_later(tmp_path, capsys):
    def sweep(*words):
        return make_plan(["ohgw=off,on", f"results_dir={tmp_path}", *words])

    for cell in [*sweep("seed=0,1", "n_workers=2").cells, *sweep("seed=0,1", "n_workers=7").cells]:
        FakeCell(NEVER, planned=cell).write(tmp_path)
    for cell in sweep("seed=2", "n_workers=2", "task.tau=0.8").cells:
        FakeCell(NEVER, planned=cell).write(tmp_path)
    words = ("seed=0,1", "n_workers=2")
    assert run_sweep(sweep(*words, "task.tau=0.55"), json_output=True) == 0
    out, err = capsys.readouterr()
    assert "different tau" not in err
    two, seven = sorted(json.loads(out)["comparisons"], key=lambda comparison: comparison["setting"]["n_workers"])
    assert (two["tau"], seven["tau"]) == (0.55, 0.97)  # n_workers=7 is not in the plan: as recorded
    assert [v["time"]["wallclock"]["reached"] for v in two["variants"]] == [3, 3]
    assert run_sweep(sweep(*words, "task.tau=0.5")) == 0
    assert "n_workers=2: accuracy, tau = 0.5\n" in capsys.readouterr().out
    assert run_sweep(sweep("seed=0,1", "n_workers=7")) == 0
    assert "different tau (0.8, 0.97)" in capsys.readouterr().out  # of the cells the plan does not have


def test_no_tau_and_tau_by_setting(tmp_path):
    path = write_study(tmp_path, seeds=range(2))
    results = load_results(path)
    (setting,) = results.cells["setting"].unique()
    assert math.isnan(summary_tables(results, {setting: None})[0].tau)
    assert summary_tables(results, {"other": 0.1})[0].tau == 0.9


def test_cells_recorded_with_different_tau_are_read_with_one_and_a_warning(tmp_path):
    FakeCell(GOOD, seed=0, tau=0.9).write(tmp_path)
    FakeCell(GOOD, seed=1, tau=0.99).write(tmp_path)
    comparison, by_name, results = only(tmp_path / "default")
    assert comparison.tau in (0.9, 0.99)
    assert by_name["off"].n == 2
    assert "different tau (0.9, 0.99)" in results.warnings[0]


def test_a_copied_cell_is_counted_once(tmp_path):
    paths = FakeCell(GOOD).write(tmp_path)
    shutil.copytree(paths.root, paths.root.with_name("copy"))
    _, by_name, results = only(tmp_path / "default")
    assert by_name["off"].n == 1
    assert "repeats copy" in results.warnings[0]


@pytest.mark.parametrize("damage", ["middle", "cut", "config", "summary", "form", "gone"])
def test_a_corrupt_cell_is_named_and_left_out_of_n(run, tmp_path, damage):
    path = write_study(tmp_path, seeds=range(3))
    paths = CellPaths.of(next(path.glob("*-on-1-*")))
    lines = paths.events.read_text().splitlines(keepends=True)
    if damage == "middle":
        paths.events.write_text("".join([*lines[:3], "garbage\n", *lines[4:]]))
    elif damage == "cut":  # at the end of a line: only the summary tells
        paths.events.write_text("".join(lines[:6]))
    elif damage == "config":
        paths.config.unlink()
    elif damage == "summary":
        paths.summary.write_text("{")
    elif damage == "form":
        paths.config.write_text(paths.config.read_text().replace("scheduler: pasha", "x: y"))
    else:
        paths.events.unlink()
    done = run(path, "--summary")
    assert done.returncode == 0
    assert f"warning: cell {paths.folder} is corrupt and left out: " in done.stderr
    assert {"middle": "line 4", "config": "config.yaml is missing", "summary": "summary.json"}.get(
        damage, ""
    ) in done.stderr
    assert "5 finished, 1 corrupt and left out" in done.stdout
    assert "seeds 1 (no on cell)" in done.stdout


def test_a_torn_last_line_is_a_warning(run, tmp_path):
    path = write_study(tmp_path, ("off",), range(2))
    paths = FakeCell(GOOD, variant="on", seed=0, close=None).write(tmp_path)
    paths.events.write_bytes(paths.events.read_bytes()[:-20])
    done = run(path, "--summary")
    assert done.returncode == 0
    assert f"{paths.events} line 4: is torn by a kill and was skipped" in done.stderr
    assert "1 running or killed" in done.stdout


def test_cells_set_aside_are_mentioned_and_not_counted(run, tmp_path):
    path = write_study(tmp_path, ("off",), range(2))
    aside = set_aside(CellPaths.of(next(path.glob("*-off-1-*"))))
    done = run(path, "--summary")
    assert aside.name in done.stderr
    assert "1 finished" in done.stdout


def test_one_cell_alone_can_be_summarised_by_the_command(tmp_path):
    paths = FakeCell(GOOD).write(tmp_path)
    command = [sys.executable, "-m", "harness.report", str(paths.root), "--summary"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cells: 1 finished" in done.stdout


def test_wrong_paths_are_one_sentence_and_exit_2(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write_study(tmp_path / "results", ("off",), range(1))
    sentences = {
        "none": "does not exist",
        "empty": "has no cells in it; expected a folder of cells",
        "file": "is a file, not a folder",
        "results": f"give one of {tmp_path / 'results' / 'default'}",
    }
    for name, sentence in sentences.items():
        done = run(tmp_path / name)
        assert (done.returncode, done.stdout) == (2, "")
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
        with pytest.raises(ResultsError):
            load_results(tmp_path / name)


def test_results_of_which_nothing_is_usable_exit_2(tmp_path, capsys):
    paths = FakeCell(GOOD).write(tmp_path)
    paths.config.unlink()
    assert main([str(tmp_path / "default")]) == 2
    assert "none of the 1 cells" in capsys.readouterr().err


def test_json_has_the_same_numbers_and_is_strict(run, tmp_path):
    path = write_study(tmp_path, seeds=range(3))
    done = run(path, "--json")
    data = json.loads(done.stdout, parse_constant=pytest.fail)
    (comparison,) = data["comparisons"]
    (expected,) = summary_json(load_results(path))["comparisons"]
    assert comparison == json.loads(json.dumps(expected))
    assert data["cells"] == {"finished": 6, "corrupt": 0}
    assert comparison["variants"][0]["fallback_share"] is None


def test_numbers_do_not_depend_on_the_order_of_folders_or_on_chance(tmp_path):
    path = write_study(tmp_path, seeds=range(6))
    before = summary_json(load_results(path))["comparisons"]
    for folder in path.iterdir():
        folder.rename(folder.with_name("z" + str(9 - int(folder.name.split("-")[3])) + folder.name))
    assert summary_json(load_results(path))["comparisons"] == before


def test_min_mode_and_trials_that_fail(tmp_path):
    paths = FakeCell([(3.0, 3.0), (0.5, 0.5)], tau=1.0, close=None).write(tmp_path)
    paths.config.write_text(paths.config.read_text().replace("mode: max", "mode: min"))
    with EventLog(paths.events) as log:
        log.append({"e": "error", "t": 5.0, "trial": 0, "reason": "diverged"})
    _, by_name, _ = only(tmp_path / "default")
    assert by_name["off"].failures == 1
    assert by_name["off"].time["wallclock"].median == 4.0
    assert by_name["off"].best_validation_score == 0.5


def printed(results, terminal=False, width=200):
    console = Console(force_terminal=terminal, width=width, no_color=True)
    with console.capture() as capture:
        print_summary(results, console)
    return capture.get()


def test_nothing_is_cut_off_on_a_narrow_terminal_or_in_a_pipe(tmp_path):
    results = load_results(write_study(tmp_path, seeds=range(3)))
    wide, narrow, pipe = printed(results, True, 200), printed(results, True, 50), printed(results, False, 20)
    for text in (wide, narrow, pipe):
        assert "…" not in text
    assert "[" in wide
    assert max(map(len, pipe.splitlines())) > 100  # lines are not wrapped


def test_a_bracket_in_a_variant_is_text_and_not_markup(tmp_path):
    FakeCell(GOOD, variant="masked(mask=[lr,wd])", warm_seconds=0.1).write(tmp_path)
    assert "masked(mask=[lr,wd])" in printed(load_results(tmp_path / "default"), terminal=True)


def test_formatting():
    assert [number(v, 3) for v in (0, 0.5, 12.345, 1234.5, 3.2e-5, math.nan)] == [
        "0", "0.500", "12.3", "1234", "3.20e-05", "-",
    ]  # fmt: skip
    assert (percent(0.1234), percent(-math.inf), percent(math.nan)) == ("12.3%", "-inf", "-")
    assert (memory(0), memory(4_000_000)) == ("-", "4.00 MB")
    assert (p_value(0.5), p_value(1e-7), p_value(math.nan)) == ("0.500", "1e-07", "-")
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0..3,7,9,10"
