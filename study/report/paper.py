"""What a paper can take over: tables in LaTeX, every run as CSV, the methods with their numbers, and BibTeX."""

from __future__ import annotations

import math
import re

import pandas as pd

from diffvit.protocol import in_order, model_title
from study.report.analysis import Analysis, Subject
from study.report.document import Block, Code, Heading, Paragraph
from study.report.figures import millions
from study.report.first import counted, hours
from study.report.scaling import DOMINATED
from study.report.sentences import between, level_of_intervals, listed, p_value, percent
from study.report.verdict import ALPHA, MARGIN, Answer


def paper_section(analysis: Analysis) -> list[Block]:
    """The methods as text; the rest folded away."""
    csv = analysis.table[[name for name in _OF_RUNS if name in analysis.table]].to_csv(index=False)
    return [
        Heading("For a paper"), *(Paragraph(text) for text in methods(analysis)),
        Code(latex_tables(analysis), "Results in LaTeX (needs \\usepackage{booktabs})"),
        Code(csv.rstrip("\n"), f"Every run as CSV ({len(analysis.table)} rows)", "runs.csv"),
        Code(bibtex(analysis), "BibTeX of what is compared"),
    ]  # fmt: skip


_OF_RUNS = (
    "run_id", "status", "model", "dataset", "overrides", "size", "parameters", "forward_flops", "seed", "steps", "images", "seconds",
    "train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_images", "precision", "device_name", "git_commit",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ methods


def methods(analysis: Analysis) -> list[str]:
    """A paragraph on each data set's training, then one on the runs, and one on the statistics."""
    table, bases = analysis.table, [part for part in analysis.subjects if part.base]
    diverged = int((table["status"] == "diverged").sum())
    conditions = [part.name for part in analysis.subjects if not part.base]
    runs = f"In all, {counted(len(table), 'run')} took {hours(table)} of training; {diverged or 'none'} diverged."
    if conditions:
        runs += f" Further conditions: {'; '.join(conditions)}."
    asked = max((answer.questions for answer in analysis.answers), default=0)
    others = listed([model_title(model) for model in in_order(table["model"]) if model not in analysis.arms])
    compared = f"{analysis.challengers} {'are each' if analysis.several else 'is'} compared with {model_title(analysis.arms[0])}."
    if others:
        compared += f" No question was asked of {others}."
    statistics = (
        f"{compared} Runs of one seed see the same batches in the same order and form a pair. For each size we take the difference of the "
        "two log test errors, and of these the mean over sizes (level) and the change along the least-squares line over log parameters "
        "(trend); whether noise changes the difference is asked on log-odds of an error. "
        f"{100 * (1 - ALPHA):.0f} % intervals and p values are from t tests "
        f"with a variance for each size (Welch), in which the degrees of freedom of the size with the fewest pairs have a weight of "
        f"{DOMINATED:g}; p values are corrected over the {counted(asked, 'question')} (Holm). Architectures count as equivalent where the "
        f"interval lies within ±{100 * MARGIN:.0f} %. "
        + (f"Left out: {'; '.join(analysis.left_out)}." if analysis.left_out else "All finished runs are reported.")
    )
    by_training: dict[str, list[str]] = {}
    for part in bases:
        by_training.setdefault(_training(part), []).append(part.name)
    return [*(f"{' and '.join(names)}: {text}" for text, names in by_training.items()), f"{runs} {statistics}"]


def _training(part: Subject) -> str:
    """How the models of a data set were trained."""
    table, protocol = part.table, part.protocol
    sizes = [_size(runs) for _, runs in sorted(table.groupby("size"), key=lambda of_size: of_size[1]["parameters"].min())]
    models = listed([*map(model_title, in_order(table["model"]))])
    train, validation, _ = protocol.images
    tested = table["test_images"].dropna()
    side, epochs = protocol.image_size, "" if protocol.max_steps else f" ({protocol.epochs} epochs)"
    noise = f", {protocol.label_noise:g} of their labels false" if protocol.label_noise else ""
    noise += f", with noise of standard deviation {protocol.input_noise:g} on their pixels" if protocol.input_noise else ""
    pairs = f", of which the differential model makes {protocol.heads // 2} pairs" if "vit_differential" in set(table["model"]) else ""
    clipping = f"gradients clipped at {protocol.clip_norm:g}" if protocol.clip_norm else "no gradient clipping"
    seeds = int(table.groupby(["model", "size"])["seed"].nunique().min())
    test = f", {int(tested.max()):,} to test the weights of the last step" if len(tested) else ""
    return " ".join([
        f"{models} of width {protocol.d_model} with {'; '.join(sizes)}; they differ in their attention.",
        f"MLP ratio {protocol.mlp_ratio}; {protocol.heads} heads{pairs};",
        f"images of {side} x {side} pixels in patches of {protocol.patch_size}; dropout {protocol.dropout:g}.",
        f"AdamW with a peak learning rate of {protocol.lr:g}, linear warm-up over {protocol.warmup_steps} steps, then a cosine to 0;",
        f"weight decay {protocol.weight_decay:g} on matrices; {clipping}.",
        f"{int(table['steps'].max()):,} steps of {protocol.batch_size} images{epochs} on {train:,} training images{noise}, not augmented;",
        f"{validation:,} images for validation{test}.",
        f"{counted(seeds, 'seed')} for each model and size.",
    ])  # fmt: skip


def _size(runs: pd.DataFrame) -> str:
    layers = f"{runs['depth'].iloc[0]:.0f} layers, " if runs["depth"].notna().all() else ""
    return f"{layers}{millions(runs['parameters'].min())} parameters"


# ------------------------------------------------------------------------------------------------------------------ LaTeX


def latex_tables(analysis: Analysis) -> str:
    """Accuracies and answers as two tables with rules of booktabs."""
    accuracies = [_accuracy_row(part, model, cell) for part in analysis.subjects
                  for (_, model), cell in part.table.groupby(["parameters", "model"])]  # fmt: skip
    header = ["Data set", "Model", "Parameters", "Seeds", "Test accuracy (%)", "Cross-entropy"]
    first = _latex(header, accuracies, "Test accuracy and cross-entropy: mean and standard deviation over seeds.", "tab:accuracy", "llrrrr")
    answers = [[each.subject, each.question, *_numbers(each), each.verdict] for each in analysis.answers]
    header, columns = (
        ["Data set", "Question", "Difference", level_of_intervals(analysis.answers).capitalize(), "p (Holm)", "Verdict"],
        "llrrrl",
    )
    caption = f"{analysis.challengers} against {model_title(analysis.arms[0])}; negative numbers favour {analysis.challengers}."
    if analysis.several:
        answers = [[model_title(each.arms[1]), *row] for each, row in zip(analysis.answers, answers, strict=True)]
        header, columns = ["Model", *header], f"l{columns}"
        caption = f"Against {model_title(analysis.arms[0])}; negative numbers favour the model in the row."
    return f"{first}\n\n{_latex(header, answers, caption, 'tab:answers', columns)}" if answers else first


def _accuracy_row(part: Subject, model: str, cell: pd.DataFrame) -> list[str]:
    done = cell[cell["status"] == "done"]
    measured = [_mean(100 * done["test_accuracy"], 2), _mean(done["test_loss"], 4)] if len(done) else ["diverged", ""]
    return [part.name, model_title(str(model)), millions(cell["parameters"].iloc[0]), str(len(done)), *measured]


def _mean(values: pd.Series, digits: int) -> str:
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def _numbers(answer: Answer) -> list[str]:
    value = "" if math.isnan(answer.estimate.value) else percent(answer.estimate.value)
    interval = between(answer.estimate.interval_at(answer.alpha)) if answer.estimate.known else ""
    return [value, interval, "" if math.isnan(answer.p_holm) else p_value(answer.p_holm).removeprefix("= ")]


def _latex(header: list[str], rows: list[list[str]], caption: str, label: str, columns: str) -> str:
    """A table with escaped text, in which signs stand as mathematics."""
    names = [_escaped(name) for name in header]
    cells = pd.DataFrame([[_escaped(cell) for cell in row] for row in rows], columns=names)
    table = cells.to_latex(index=False, caption=_escaped(caption), label=label, position="t", column_format=columns).rstrip()
    # As wide as a column of article.cls, or nearly.
    return table.replace(
        f"\\begin{{tabular}}{{{columns}}}",
        f"\\par\\medskip\\centering\\footnotesize\\setlength{{\\tabcolsep}}{{3pt}}\n\\begin{{tabular}}{{{columns}}}",
    )


_ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def _escaped(text: str) -> str:
    """Text for LaTeX, with a sign before a number as mathematics, and spaces before units that do not break."""
    escaped = "".join(_ESCAPES.get(character, character) for character in text).replace(r" \%", r"\,\%")
    return re.sub(r"(?<![\w-])([-+])(?=\.?\d)", r"$\1$", escaped)


# ------------------------------------------------------------------------------------------------------------------ BibTeX


def bibtex(analysis: Analysis) -> str:
    """Entries of the architectures, of the data sets and corruptions used, and of this tool."""
    datasets = set(analysis.table["dataset"])
    differential = [model for model in analysis.table["model"].unique() if model.startswith("vit_differential")]
    used = ["vit", *(["differential"] if differential else []), *(key for name, key in _OF_DATASETS.items() if name in datasets)]
    used += ["corruptions"] if analysis.findings_of("corruptions") else []
    versions = " and ".join(sorted({str(version) for version in analysis.table["diffvit"].dropna()}))
    commits = " and ".join(sorted({str(commit) for commit in analysis.table["git_commit"].dropna()}))
    note = f"Version {versions or 'unknown'}" + (f", commit {commits}" if commits else "")
    tool = _entry(
        "misc",
        "diffvit",
        {"title": "{diffvit}: scaling studies of differential and classic Vision Transformers", "note": note, "key": "diffvit"},
    )
    return "\n\n".join([*(_ENTRIES[key] for key in dict.fromkeys(used)), tool])


def _entry(kind: str, key: str, fields: dict[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


_OF_DATASETS = {"CIFAR-100": "cifar", "BACH": "bach", "digits": "digits", "digits-noisy": "digits"}
_ENTRIES = {
    "vit": _entry("inproceedings", "dosovitskiy2021image", {
        "title": "An Image is Worth 16x16 Words: {T}ransformers for Image Recognition at Scale",
        "author": "Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and Zhai, Xiaohua and "
                  "Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and Heigold, Georg and Gelly, Sylvain and "
                  "Uszkoreit, Jakob and Houlsby, Neil",
        "booktitle": "International Conference on Learning Representations", "year": "2021", "eprint": "2010.11929",
        "archiveprefix": "arXiv",
    }),
    "differential": _entry("inproceedings", "ye2025differential", {
        "title": "Differential Transformer",
        "author": "Ye, Tianzhu and Dong, Li and Xia, Yuqing and Sun, Yutao and Zhu, Yi and Huang, Gao and Wei, Furu",
        "booktitle": "International Conference on Learning Representations", "year": "2025", "eprint": "2410.05258",
        "archiveprefix": "arXiv",
    }),
    "cifar": _entry("techreport", "krizhevsky2009learning", {
        "title": "Learning Multiple Layers of Features from Tiny Images", "author": "Krizhevsky, Alex",
        "institution": "University of Toronto", "year": "2009",
    }),
    "bach": _entry("article", "aresta2019bach", {
        "title": "{BACH}: Grand challenge on breast cancer histology images", "author": "Aresta, Guilherme and others",
        "journal": "Medical Image Analysis", "volume": "56", "pages": "122--139", "year": "2019",
        "doi": "10.1016/j.media.2019.05.010",
    }),
    "digits": _entry("misc", "alpaydin1998optical", {
        "title": "Optical Recognition of Handwritten Digits", "author": "Alpaydin, Ethem and Kaynak, Cenk",
        "howpublished": "UCI Machine Learning Repository", "year": "1998", "doi": "10.24432/C50P49",
    }),
    "corruptions": _entry("inproceedings", "hendrycks2019benchmarking", {
        "title": "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
        "author": "Hendrycks, Dan and Dietterich, Thomas",
        "booktitle": "International Conference on Learning Representations", "year": "2019", "eprint": "1903.12261",
        "archiveprefix": "arXiv",
    }),
}  # fmt: skip
