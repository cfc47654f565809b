import io
import math
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.document import (
    Figure,
    Section,
    Table,
    colors,
    file_name,
    latex,
    markdown,
    ordered,
    text_of,
    with_unique_names,
    write_figures,
    write_tables,
)

FRAME = pd.DataFrame(
    {"variant": ["off", "on(mask=a_b)"], "n": [3, 50], "share": [math.nan, 0.123456], "p": [1.0, 2e-7]}
)


def test_a_table_is_written_in_three_forms(tmp_path):
    table = Table("scores_digits-asha", "Scores, 100 % real", FRAME, {"p": lambda p: f"p={p:g}"})
    write_tables([table], tmp_path)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".csv", ".md", ".tex"]
    back = pd.read_csv(io.StringIO((tmp_path / "scores_digits-asha.csv").read_text()))
    pd.testing.assert_frame_equal(back, FRAME)
    assert "on(mask=a\\_b) & 50 & 0.1235 & p=2e-07 \\\\" in latex(table)
    assert r"\caption{Scores, 100 \% real}" in latex(table)
    assert r"\begin{tabular}{lrrr}" in latex(table)
    assert "| off | 3 | - | p=1 |" in markdown(table)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20))
def test_whatever_a_cell_says_latex_has_no_bare_special_characters(text):
    body = (
        latex(Table("t", "c", pd.DataFrame({"a": [text], "b": ["x"]}))).split(r"\midrule")[1].split(r"\bottomrule")[0]
    )
    plain = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater)\{\}|\\[&%$#_{}]", "", body)
    assert plain.count("&") == 1
    assert not set(plain.replace(r"\\", "")) & set("%$#_{}~^")


def test_text_of_numbers():
    assert [text_of(v) for v in (3, 0.5, 1234.5678, 1e-9, math.nan, math.inf, -math.inf, None, "a", True)] == [
        "3", "0.5", "1235", "1.00e-09", "-", "inf", "-inf", "-", "a", "True",
    ]  # fmt: skip


def test_file_names_are_plain():
    assert file_name("tau-sweep", "digits(model=mlp)", "asha") == "tau-sweep_digits-model-mlp-asha"
    assert file_name("effects", "all") == "effects_all"


def test_variants_have_one_order_and_one_colour():
    names = ["random", "normalized(eta=0.2)", "on", "off", "zero", "normalized"]
    assert ordered(names) == ["off", "zero", "on", "normalized", "normalized(eta=0.2)", "random"]
    palette = colors(names)
    assert len(set(palette.values())) == len(names)
    assert colors(names[::-1]) == palette
    many = [f"normalized(eta={i})" for i in range(15)]
    assert len(set(colors(many).values())) == 16


def draw(n):
    from matplotlib.figure import Figure as Canvas

    if n < 0:
        raise ValueError("cannot draw this")
    canvas = Canvas(figsize=(2, 1))
    canvas.subplots().plot(range(n))
    return canvas


@pytest.mark.parametrize("count", [2, 9])  # in this process, and in one a core
def test_figures_are_pdf_and_png_and_one_that_fails_costs_no_other(tmp_path, count):
    figures = [Figure(f"f_{i}", "caption", draw, {"n": i}) for i in range(count)] + [Figure("bad", "", draw, {"n": -1})]
    failures = write_figures(figures, tmp_path)
    assert list(failures) == ["bad"]
    assert "cannot draw this" in failures["bad"]
    for i in range(count):
        assert (tmp_path / f"f_{i}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / f"f_{i}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_data_give_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        write_figures([Figure("f", "", draw, {"n": 5})], tmp_path / folder)
    for ending in ("pdf", "png"):
        assert (tmp_path / "a" / f"f.{ending}").read_bytes() == (tmp_path / "b" / f"f.{ending}").read_bytes()


def test_long_names_are_cut_and_stay_apart():
    names = {file_name("survival", "digits", "x" * 300 + last) for last in "ab"}
    assert len(names) == 2
    assert max(map(len, names)) <= 200


def test_equal_names_get_numbers_across_sections():
    def tables(*names):
        return [Table(name, "", FRAME) for name in names]

    sections = [Section("a", "A", tables=tables("t_x", "t_X"), figures=[Figure("t_x", "", str, {})]),
                Section("b", "B", tables=tables("t_x", "t_x-2"))]  # fmt: skip
    named = with_unique_names(sections)
    assert [table.name for section in named for table in section.tables] == ["t_x", "t_X-2", "t_x-3", "t_x-2-2"]
    assert named[0].figures[0].name == "t_x"
