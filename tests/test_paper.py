"""What the page offers a paper: LaTeX that compiles, CSV, methods with the runs' own numbers, BibTeX of what was used."""

from __future__ import annotations

import io
import re

import pandas as pd
from tables import study_table

from study.report.analysis import analyse
from study.report.document import Code, Heading, Paragraph
from study.report.paper import bibtex, latex_tables, methods, paper_section


def _analysis():
    noisy = study_table(level=0.1, overrides="input_noise=0.1", seed=4)
    noisy.loc[0, "status"] = "diverged"
    table = pd.concat([study_table(level=-0.12, trend=-0.2, spread=0.008), noisy], ignore_index=True)
    table["device"], table["workers"], table["depth"] = "cuda", 2, table["size"].map({"10B": 12, "25B": 31, "50B": 63})
    return analyse(table, None)


def test_the_tables_are_latex_with_a_row_a_cell_and_a_row_an_answer() -> None:
    text = latex_tables(_analysis())
    assert (
        text.isascii()
        and text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    )
    assert text.count("{") == text.count("}") and not re.search(r"(?<!\\)[%#_]", text) and text.count("$") % 2 == 0
    for tabular, columns, rows in zip(re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.DOTALL), (6, 6), (12, 3), strict=True):
        lines = tabular.strip().splitlines()
        assert len(lines) == rows and all(line.count("&") == columns - 1 and line.endswith(r"\\") for line in lines)
    assert re.search(r"CIFAR-100 & level & \$-\$1\d\.\d\\,\\% & \$-\$1\d\.\d\\,\\% to \$-\$1\d\.\d\\,\\% & \$<\$ 0.001 & better", text)
    assert r"CIFAR-100 (input\_noise=0.1) & Classic ViT & 9.75 M & 2 & " in text and r" $\pm$ " in text


def test_the_csv_has_every_run_and_the_methods_their_numbers() -> None:
    analysis = _analysis()
    heading, *texts = [block for block in paper_section(analysis) if not isinstance(block, Code)]
    assert isinstance(heading, Heading) and all(isinstance(text, Paragraph) for text in texts)
    (csv,) = [block for block in paper_section(analysis) if isinstance(block, Code) and block.file == "runs.csv"]
    read = pd.read_csv(io.StringIO(csv.text))
    assert set(read["run_id"]) == set(analysis.table["run_id"]) and read["status"].eq("diverged").sum() == 1
    pd.testing.assert_series_equal(read["test_accuracy"], analysis.table["test_accuracy"].astype(float), check_index=False)
    training, statistics = methods(analysis)
    for said in ("CIFAR-100: Classic ViT and Differential ViT of width 256", "31 layers, 24.8 M parameters", "8 heads", "makes 4 pairs",
                 "learning rate of 0.0001", "4,400 steps of 512 images (50 epochs) on 45,000", "10,000 to test", "3 seeds"):  # fmt: skip
        assert said in training
    spent = 2 * analysis.table["seconds"].sum() / 3600  # of two workers
    for said in (
        f"36 runs took {spent:.3g} GPU hours of training; 1 diverged",
        "CIFAR-100 (input_noise=0.1)",
        "corrected over the 3 questions",
        "±2 %",
    ):
        assert said in statistics


def test_what_was_left_out_is_said_and_a_name_with_underscores_is_escaped() -> None:
    assert methods(analyse(study_table(), None))[-1].endswith("All finished runs are reported.")
    table = study_table().replace({"model": {"vit_differential": "My_Idea-12345678"}})
    table.loc[table.index[-1], "precision"] = "fp32"
    analysis = analyse(table, None, ("vit_classic", "My_Idea-12345678"))
    assert "Left out: 1 runs of CIFAR-100 in fp32" in methods(analysis)[-1] and "All finished runs" not in methods(analysis)[-1]
    table = latex_tables(analysis)
    assert r"\caption{My\_Idea-12345678 against Classic ViT; negative numbers favour My\_Idea-12345678.}" in table


def test_bibtex_is_of_what_was_compared() -> None:
    entries = re.findall(r"@(\w+)\{(\w+),\n(.*?)\n\}", bibtex(_analysis()), re.DOTALL)
    assert [key for _, key, _ in entries] == ["dosovitskiy2021image", "ye2025differential", "krizhevsky2009learning", "diffvit"]
    assert all(re.fullmatch(r"  \w+ = \{.*\},", line) for *_, fields in entries for line in fields.splitlines())
    both = bibtex(analyse(pd.concat([study_table(dataset="digits"), study_table(dataset="BACH", seed=1)], ignore_index=True), None))
    assert "aresta2019bach" in both and both.count("alpaydin1998optical") == 1 and "krizhevsky" not in both
