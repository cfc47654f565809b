import json
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness.record import BUSY_KINDS
from harness.report import load_results
from harness.report.document import latex, markdown
from harness.report.stats import signed_differences, wilcoxon_signed_rank
from harness.report.study import Study
from harness.report.verdict import (
    FAIL,
    PASS,
    UNDECIDED,
    _gpu_hours,
    _score,
    _sooner,
    judge,
    print_verdict,
    section,
)
from harness.seeds import rng
from tests.harness.fake_results import FakeCell


def write(tmp_path, off, variant, name="on", **more):
    """Pairs of cells of 100 s that reach tau at the given seconds (None: never); a warm start costs 1 %."""
    for seed, (t_off, t_on) in enumerate(zip(off, variant, strict=True)):
        for label, t in (("off", t_off), (name, t_on)):
            scores = [(0.95 if t is not None and s >= t else 0.5,) * 2 for s in range(1, 101)]
            cell = FakeCell(scores, seconds=1, epochs_per_trial=10, variant=label, seed=seed, warm_peak=4_200_000,
                            warm_seconds=0.0 if label == "off" else 0.1, **more)  # fmt: skip
            if not (tmp_path / "default" / cell.folder).exists():
                cell.write(tmp_path)
    return Study(load_results(tmp_path / "default"))


def only(study):
    (entry,) = judge(study).tuples
    return entry


def times(n, factor, noise=0.0):
    gen = rng(0, "verdict", n)
    off = [int(t) for t in gen.integers(30, 80, n)]
    return off, [max(1, min(100, round(t * factor * math.exp(noise * gen.normal())))) for t in off]


def statuses(entry):
    return {name: criterion.status for name, criterion in entry.criteria.items()}


def test_a_clear_reduction_passes_all_five_criteria(tmp_path):
    study = write(tmp_path, *times(12, 0.5, 0.05))
    entry = only(study)
    assert statuses(entry) == dict.fromkeys(("sooner", "score", "gpu_hours", "memory", "spread"), PASS)
    assert entry.status == PASS
    assert judge(study).answer == "yes"
    assert "1 of 1" in judge(study).sentence
    assert "preliminary" in judge(study).sentence
    assert entry.criteria["gpu_hours"].value == pytest.approx(1 / 99)
    assert entry.criteria["memory"].value == pytest.approx(0.05)
    assert entry.criteria["sooner"].value == pytest.approx(0.5, abs=0.03)


def test_a_variant_that_is_later_fails(tmp_path):
    study = write(tmp_path, *times(12, 1.2, 0.05))
    assert only(study).criteria["sooner"].status == FAIL
    assert judge(study).answer == "no"


def test_too_few_pairs_are_undecided_however_they_look(tmp_path):
    for factor in (0.5, 1.3):
        entry = only(write(tmp_path / str(factor), *times(4, factor)))
        assert entry.status == UNDECIDED
        assert entry.criteria["sooner"].status == UNDECIDED
        assert entry.seeds >= 6


def test_noise_is_undecided_and_says_how_many_seeds_would_do(tmp_path):
    study = write(tmp_path, *times(8, 0.95, 0.5))
    entry = only(study)
    assert entry.criteria["sooner"].status == UNDECIDED
    assert 8 < entry.criteria["sooner"].seeds <= 2000
    assert judge(study).answer == UNDECIDED
    assert f"{entry.seeds:.0f}" in judge(study).sentence


def test_enough_seeds_without_the_reduction_fail_instead_of_staying_undecided(tmp_path):
    off, on = times(40, 0.9, 0.1)  # a true reduction of 10 % with little noise: 40 pairs would have seen 15 %
    assert only(write(tmp_path, off, on)).criteria["sooner"].status == FAIL


def test_all_censored_does_not_decide_that_it_is_sooner(tmp_path):
    entry = only(write(tmp_path, [None] * 8, [None] * 8))
    assert entry.criteria["sooner"].status == UNDECIDED
    assert entry.criteria["spread"].status == UNDECIDED
    assert entry.criteria["gpu_hours"].status == PASS


def test_costly_warm_starts_fail_by_their_cost(tmp_path):
    off, on = times(8, 0.5)
    for seed in range(8):
        scores = [(0.95 if s >= on[seed] else 0.5,) * 2 for s in range(1, 101)]
        FakeCell(scores, seconds=1, epochs_per_trial=10, variant="on", seed=seed, warm_seconds=0.9,
                 warm_peak=5_000_000).write(tmp_path)  # fmt: skip
    entry = only(write(tmp_path, off, on))
    assert entry.criteria["gpu_hours"].value == pytest.approx(9 / 91)
    assert (entry.criteria["gpu_hours"].status, entry.criteria["memory"].status) == (FAIL, FAIL)
    assert entry.status == FAIL


def test_controls_are_judged_but_do_not_count(tmp_path):
    off, on = times(8, 0.5)
    write(tmp_path, off, on)
    for path in sorted((tmp_path / "default").glob("*-on-*")):
        text = (path / "config.yaml").read_text().replace("estimator: lookahead", "estimator: random")
        (path / "config.yaml").write_text(text)
    verdict = judge(Study(load_results(tmp_path / "default")))
    assert verdict.tuples[0].control
    assert verdict.counted == []
    assert "no variant to judge" in verdict.sentence


def test_holm_takes_all_tuples_as_one_family(tmp_path):
    off, on = times(8, 0.5)
    write(tmp_path, off, on, "on")
    study = write(tmp_path, off, on, "normalized")
    for entry in judge(study).tuples:
        assert entry.p == pytest.approx(2 / 2**8)
        assert entry.holm_p == pytest.approx(2 * entry.p)


def test_without_off_cells_there_is_nothing_to_decide_with(tmp_path):
    for seed in range(7):
        FakeCell(variant="on", seed=seed, warm_seconds=0.1).write(tmp_path)
    entry = only(Study(load_results(tmp_path / "default")))
    assert (entry.status, entry.pairs) == (UNDECIDED, 0)
    assert entry.criteria["sooner"].why == "no pairs"
    assert math.isnan(entry.seeds)


def test_without_a_target_only_the_criteria_that_need_none_are_decided(tmp_path):
    study = write(tmp_path, *times(8, 0.5), tau=None)
    assert statuses(only(study))["sooner"] == UNDECIDED
    assert statuses(only(study))["score"] == PASS


def test_only_off_cells_and_one_seed(tmp_path):
    FakeCell().write(tmp_path)
    study = Study(load_results(tmp_path / "default"))
    assert judge(study).tuples == []
    assert section(study).text[0] == judge(study).sentence


def test_the_section_and_the_json_hold_the_same_verdict(tmp_path):
    study = write(tmp_path, *times(12, 0.5, 0.05))
    part = section(study)
    table = part.tables[0]
    assert table.frame["verdict"].tolist() == [PASS]
    assert r"\toprule" in latex(table)
    assert markdown(table).count("\n|") == 3
    splits = part.tables[1].frame
    assert set(splits["by"]) == {"scheduler", "variant", "task family", "discrete share"}
    assert splits["pass"].tolist() == [1] * len(splits)
    data = json.loads(json.dumps(judge(study).as_dict(), allow_nan=False))
    assert data["answer"] == "yes"
    assert data["tuples"][0]["criteria"]["sooner"]["status"] == PASS
    assert data["share_passed"] == 1.0


def test_the_terminal_shows_what_keeps_a_tuple_from_passing(tmp_path):
    study = write(tmp_path, *times(8, 0.95, 0.5))
    console = Console(width=40, no_color=True)
    with console.capture() as capture:
        print_verdict(study, console)
    text = capture.get()
    assert "undecided  digits / pasha / on, 8 pairs: sooner undecided (" in text
    assert "seeds needed:" in text
    assert text.splitlines()[-1] == judge(study).sentence


def test_a_reduction_of_most_pairs_does_not_pass_where_the_test_favours_off():
    short, long = 10 + 0.01 * np.arange(26), 50 + 0.1 * np.arange(24)
    off, on = np.concatenate([short, long]), np.concatenate([0.8 * short, 1.9 * long])
    p = wilcoxon_signed_rank(signed_differences(on, off, 100.0))
    found = _sooner(on, off, 100.0, p, ("long",))
    assert found.value == pytest.approx(0.2)
    assert p < 0.05
    assert found.status != PASS
    assert "in favour of off" in found.why


def test_a_reduction_that_censoring_leaves_open_is_undecided_however_many_seeds():
    reached = 60.0 + np.arange(22)
    off, on = np.append(reached, np.full(28, np.inf)), np.append(0.88 * reached, np.linspace(86, 95, 28))
    p = wilcoxon_signed_rank(signed_differences(on, off, 100.0))
    found = _sooner(on, off, 100.0, p, ("open",))  # between 12 % and 100 %
    assert found.status == UNDECIDED
    assert math.isnan(found.seeds)
    assert "longer budget" in found.why


def test_the_spread_of_a_side_that_never_reached_the_target_is_not_known(tmp_path):
    on = [30, 40, 50, 45, 35, 25, 20, 55]
    entry = only(write(tmp_path / "off", [None] * 8, on))
    assert statuses(entry)["sooner"] == PASS
    assert statuses(entry)["spread"] == UNDECIDED
    assert entry.criteria["spread"].why == "off never reached the target"
    assert only(write(tmp_path / "on", on, [None] * 8)).criteria["spread"].why == "the variant never reached the target"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_cells_without_a_score_are_worse_than_any(mode):
    scores = [0.9] * 5 + [math.nan] * 7
    pairs = pd.DataFrame({"incumbent_test_score_on": scores, "incumbent_test_score_off": [0.9] * 12})
    assert _score(pairs, mode).status != PASS
    assert "7 without a score" in _score(pairs, mode).why
    assert _score(pairs.iloc[:6], mode).status == PASS  # one of six: the median stays


def test_cells_that_did_nothing_have_no_share_of_gpu_hours():
    pairs = pd.DataFrame(
        {f"busy_{kind}_on": np.zeros(4) for kind in BUSY_KINDS}
        | {"busy_warm_start_on": [0.0, 1.0, 1.0, 2.0], "busy_train_on": [0.0, 50.0, 50.0, 0.0]}
    )
    assert _gpu_hours(pairs).value == pytest.approx(0.02)
    assert _gpu_hours(pairs.iloc[:1]).why == "not recorded"
    assert _gpu_hours(pairs.iloc[3:]).status == FAIL  # nothing but warm starts


def test_without_a_target_it_says_so_and_few_pairs_promise_nothing(tmp_path):
    entry = only(write(tmp_path / "no", *times(3, 0.5), tau=None))
    assert entry.criteria["sooner"].why == "no target is set"
    assert "would decide them: at least 6 a variant" in judge(write(tmp_path / "few", *times(3, 0.5))).sentence
