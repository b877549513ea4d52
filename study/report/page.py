"""The report as blocks of text, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from diffvit.protocol import in_order, model_title, protocol_of
from study.report import compare, scaling, verdict
from study.report.analysis import Analysis
from study.report.caveats import diverged_counts, equal_parameters
from study.report.choices import choices_section
from study.report.compare import ArmComparison
from study.report.curves import Ratio
from study.report.document import Block, Code, Figures, Heading, Items, Paragraph, Table
from study.report.evaluated import attention_section, noise_section
from study.report.figures import with_wilson
from study.report.first import first_screen, hours
from study.report.focus import focus_section
from study.report.paper import paper_section
from study.report.predictions import predictions_section
from study.report.scaling import Cells, Estimate
from study.report.sentences import between, listed, p_value, relative
from study.report.start import start_section


def page(
    analysis: Analysis, figures: Sequence[Path], command: str, curves: Sequence[Block] = (), price: float | None = None
) -> list[Block]:
    """The report's blocks.

    Args:
        figures: PNG files among these are shown, by the names that draw_figures gives.
        command: lines that reproduce the runs. curves: the section of loss curves to zoom.
        price: dollars an hour of one GPU.
    """
    blocks = [
        *first_screen(analysis, command, price),
        Heading("How the questions were decided"),
        Paragraph(_RULE.format(analysis.challengers)),
    ]
    for source in dict.fromkeys(analysis.noise_sources.values()):
        of = [model_title(pair[1]) for pair, what in analysis.noise_sources.items() if what == source]
        whom = "" if len(of) == len(analysis.pairs) else f", for {listed(of)},"
        blocks.append(Paragraph(f"Noise here{whom} is {source}; its counterpart has clean images."))
    blocks += [Heading("Accuracy"), *_accuracy_tables(analysis)]
    blocks += [*_figures(analysis, figures), *curves, *predictions_section(analysis)]
    blocks += [Heading("Scaling with depth"), Paragraph(_SCALING), *_scaling_tables(analysis)]
    blocks += _tuning_section(analysis)
    blocks += choices_section(analysis.choices, figures)
    blocks += noise_section(analysis, figures)
    blocks += [*attention_section(analysis, figures), *focus_section(analysis), *start_section(analysis)]
    blocks += [Heading("What this does not show"), Items(_limits(analysis))]
    blocks += paper_section(analysis)
    blocks += [Heading("Reproduce"), Code(command), *_provenance(analysis.table)]
    return blocks


_RULE = (
    "The rule, fixed before the data: better or worse if p < 0.05 after Holm's correction over the questions; else equivalent if the 95 % "
    f"interval lies within ±{100 * verdict.MARGIN:.0f} %; else undecided. Each size has its own spread between seeds, and a size with one "
    "pair allows no verdict. Whether noise hits one harder is answered on log-odds of an error, and only where log error, log accuracy and "
    "points agree. Runs that diverged are left out, and a verdict that counting them as chance level would change is none. A question that "
    f"was looked at before, on fewer runs, may spend a part of {100 * verdict.LATER:.0f} % more: looks.json beside this page counts. "
    "Negative numbers favour {}. Intervals are over pairs of runs that share a seed. Everything below is exploratory."
)
_SCALING = (
    "Width is fixed by the protocol, so models scale by depth alone. A slope is what log error (or cross-entropy) falls by for each unit "
    "of log parameters within the measured range, negative where larger models err more: it is not the exponent of a power law."
)


def _accuracy_tables(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    for part in analysis.subjects:
        rows = []
        for (_, model), cell in part.table.groupby(["parameters", "model"]):
            done = cell[cell["status"] == "done"]
            ended_else = len(cell) - len(done)
            parameters, title = f"{cell['parameters'].iloc[0] / 1e6:.3g} M", model_title(model)
            if done.empty:
                rows.append([title, parameters, "diverged", str(len(cell)), "", "", ""])
                continue
            spread = f"{100 * done['test_accuracy'].std():.2f}" if len(done) > 1 else "1 seed"
            rows.append([
                title, parameters, with_wilson(done["test_accuracy"].mean(), done["test_images"].min()),
                str(len(done)) + (f" (+{ended_else} diverged)" if ended_else else ""), spread, f"{done['test_loss'].mean():.4f}",
                f"{done['seconds'].mean() / 60:.1f}",
            ])  # fmt: skip
        images = int(part.table["test_images"].min()) if part.table["test_images"].notna().any() else 0
        header = ["model", "size", "test accuracy (95 % interval)", "seeds", "SD over seeds", "cross-entropy", "minutes a run"]
        blocks.append(Table(header, rows, f"{part.name}: mean over seeds, Wilson's interval over {images:,} test images"))
    runs = [
        [model_title(run.model), run.size, run.dataset, run.overrides or "", str(run.seed), run.run_id, run.status,
         *(["", ""] if run.status != "done" else [with_wilson(run.test_accuracy, run.test_images), f"{run.test_loss:.4f}"])]
        for run in analysis.table.itertuples()
    ]  # fmt: skip
    header = ["model", "size", "data set", "overrides", "seed", "run_id", "status", "test accuracy (95 % interval)", "cross-entropy"]
    blocks.append(Table(header, runs, f"Every run ({len(runs)}), with Wilson's interval over its test images", left=4, closed=True))
    if analysis.left_out:
        blocks.append(Paragraph(f"Left out of the comparisons: {'; '.join(analysis.left_out)}."))
    return blocks


def _figures(analysis: Analysis, figures: Sequence[Path]) -> list[Block]:
    """The user's figures: the overlay, then a row a kind, the architectures side by side."""
    by_name = {path.stem: path for path in figures if path.suffix == ".png"}
    blocks: list[Block] = []
    for part in analysis.subjects:
        rows = [[("scaling_overlay", "Test accuracy over model size, all architectures")]]
        rows += [[(f"{model}_{kind}", f"{model_title(model)}: {shown}") for model in in_order(part.table["model"])]
                 for kind, shown in _FIGURES.items()]  # fmt: skip
        own = [[(by_name[f"{part.stem}_{name}"], title) for name, title in row if f"{part.stem}_{name}" in by_name] for row in rows]
        if any(own):
            blocks += [Heading(part.name, 3), *(Figures(row) for row in own if row)]
    return [Heading("Figures"), *blocks] if blocks else []


_FIGURES = {"scaling": "test accuracy over model size", "train_loss": "training loss per batch", "val_loss": "validation loss per batch"}


def _scaling_tables(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    for pair in analysis.pairs:
        compared = [each for each in analysis.comparisons if each.arms == pair]
        if compared and analysis.several:
            blocks.append(Heading(" against ".join(map(model_title, reversed(pair))), 3))
        blocks += _pair_tables(pair, compared) if compared else []
    return blocks + _controls(analysis)


def _controls(analysis: Analysis) -> list[Block]:
    """The other architectures, of which nothing was asked."""
    levels = {(each.arms[1], each.subject): each.answers[0] for each in analysis.controls}
    rows = []
    for part in analysis.subjects:
        for model in in_order(part.table["model"]):
            if model in analysis.arms:
                continue
            title = f"{model_title(model)} against {model_title(analysis.arms[0])} on {part.name}"
            level = levels.get((model, part.name))
            number = [relative(level.estimate), str(level.pairs)] if level else ["nothing to compare", "0"]
            rows.append([title, *number, diverged_counts(part.table, [model])])
    header = ["control", "difference in error (95 % interval)", "pairs", "diverged"]
    return [Heading("Other architectures", 3), Table(header, rows, "Controls, of which no question was asked")] if rows else []


def _pair_tables(pair: tuple[str, str], comparisons: Sequence[ArmComparison]) -> list[Block]:
    """Lines, contrasts and cost ratios of two arms on all subjects."""
    rows: list[list[str]] = []
    for comparison in comparisons:
        shown = [_quantities(comparison, measure) for measure in _MEASURES]
        rows += [[comparison.subject, quantity, *(of.get(quantity, "") for of in shown)] for quantity in shown[0]]
    header = ["data set", "quantity", "error (95 % interval)", "cross-entropy (95 % interval)"]
    lines = Table(header, rows, "Lines and contrasts", left=2)
    rows = [
        [each.subject, cost, *(_ratio(each.ratios[measure, cost]) if (measure, cost) in each.ratios else "" for measure in _MEASURES)]
        for each in comparisons
        for cost in compare.COSTS.values()
    ]
    first, second = map(model_title, pair)
    header = ["data set", "cost", "at equal error (95 % interval)", "at equal cross-entropy (95 % interval)"]
    costs = Table(header, rows, f"What {second} costs, as a share of the {first} that is as good", left=2)
    return [lines, costs, *(Items([*_match_sentences(each.subject, each), *_secondary(each.subject, each)]) for each in comparisons)]


_MEASURES = ("error", "cross-entropy")


def _quantities(comparison: ArmComparison, measure: str) -> dict[str, str]:
    """Name -> value with interval, of a measure; what too few runs have is not there."""
    if measure not in comparison.cells:
        return {}
    cells = comparison.cells[measure]
    first, second = map(model_title, comparison.arms)
    shown = {f"level: {second} / {first}": relative(scaling.level(cells))}
    if measure in comparison.lines:
        shown["trend: its change over the sizes"] = relative(scaling.trend(cells))
        lines = list(zip((first, second), comparison.lines[measure], strict=True))
        shown |= {f"line at {line.middle / 1e6:.3g} M, {title}": _at_middle(line.intercept, measure) for title, line in lines}
        shown |= {f"slope, {title}": _number(line.slope) for title, line in lines}
        shown[f"slope, difference (+: {second} gains more from size)"] = _slope_difference(cells)
    return shown


def _at_middle(intercept: Estimate, measure: str) -> str:
    """A line's value at the middle of the sizes: an error in percent, or nats."""
    factor, unit = (100, " %") if measure == "error" else (1, "")
    value, low, high = (factor * math.exp(each) for each in (intercept.value, *intercept.interval))
    return f"{value:.3g}{unit} " + (f"({low:.3g} to {high:.3g})" if intercept.known else "(no interval)")


def _slope_difference(cells: Cells) -> str:
    """Second less first: the trend, per unit of log parameters."""
    return _number(scaling.contrast(cells, -scaling.slope_weights(cells.x)))


def _match_sentences(name: str, comparison: ArmComparison) -> list[str]:
    """Which size of the first arm has the error of a size of the second, where larger models of the first are always better."""
    first, second = map(model_title, comparison.arms)
    sentences = []
    for parameters, equal in comparison.matches:
        if equal is not None:
            of_size = f"{equal / 1e6:.3g} M: it needs {parameters / equal:.2f} of its parameters"
            sentences.append(f"{name}: {second} of {parameters / 1e6:.3g} M has the error of {first} of {of_size}.")
    if not sentences:
        sentences.append(f"{name}: no measured {second} has an error that a size of {first} within the measured range has.")
    return sentences


def _secondary(name: str, comparison: ArmComparison) -> list[str]:
    """Sign flips, the crossed bootstrap, the correlation within pairs and the power law, a sentence each."""
    sentences = []
    for answer in comparison.answers:
        if math.isnan(answer.flips):
            continue
        text = f"{name}, {answer.question}: sign flips over {answer.pairs} pairs give p {p_value(answer.flips)}, not corrected"
        if answer.new_images and answer.seeds > 1:
            text += f"; seeds and test images both resampled: 95 % interval {between(answer.new_images)}"
        elif answer.new_images:
            text += f"; test images alone resampled: 95 % interval {between(answer.new_images)}"
        sentences.append(text + ".")
    if not math.isnan(correlation := comparison.cells["error"].correlation()):
        sentences.append(f"{name}: correlation of the two architectures' errors within pairs of a seed: {correlation:+.2f}.")
    for measure, law in comparison.laws.items():
        if law:
            exponents = " and ".join(f"{value:.2f}" for value in law.exponents)
            freedom = f"{law.df} degree{'s' if law.df != 1 else ''} of freedom"
            floor = f"{100 * law.floor:.1f} %" if measure == "error" else f"{law.floor:.3g} nats"
            fits = f"a power law of {measure} with one floor for both fits with exponents {exponents} and a floor of {floor}"
            sentences.append(f"{name}: {fits}; with {freedom} these are not to be trusted.")
    return sentences


def _tuning_section(analysis: Analysis) -> list[Block]:
    """The arms at several learning rates: would another one turn the comparison round?"""
    blocks: list[Block] = []
    for dataset in dict.fromkeys(part.dataset for part in analysis.subjects):
        rates = [part for part in analysis.subjects if part.dataset == dataset and part.overrides <= {"lr"}]
        if len(rates) < 2:
            continue
        runs = pd.concat([part.table.assign(rate=part.condition or f"lr={protocol_of(dataset).lr}") for part in rates])
        runs = runs[(runs["status"] == "done") & runs["model"].isin(analysis.arms)]
        if runs.empty:
            continue
        by_rate = runs.pivot_table(index=["model", "size"], columns="rate", values="val_accuracy")
        names = sorted(by_rate.columns, key=lambda name: float(name.partition("=")[2]))
        images = protocol_of(dataset).images[1]
        rows = [[f"{model_title(model)}, {size}", *(with_wilson(value, images) if value == value else "diverged" for value in row)]
                for (model, size), row in zip(by_rate.index, by_rate[names].to_numpy(), strict=True)]  # fmt: skip
        blocks.append(Table(["model", *names], rows, f"{dataset}: validation accuracy by learning rate (95 % interval), mean over seeds"))
        best = by_rate.idxmax(axis=1)
        chosen = runs[[best[model, size] == rate for model, size, rate in zip(runs["model"], runs["size"], runs["rate"], strict=True)]]
        tuned = [comparison for pair in analysis.pairs if (comparison := compare.compare(chosen, dataset, pair))]
        if tuned:
            changes = [
                relative(each.answers[0].estimate) + (f" for {model_title(each.arms[1])}" if analysis.several else "") for each in tuned
            ]
            text = f"Each at its own best of these, chosen on the validation split: difference in test error {', '.join(changes)}."
            blocks.append(Paragraph(text))
    return [Heading("Learning rates"), *blocks] if blocks else []


def _limits(analysis: Analysis) -> list[str]:
    """What a reader must not conclude."""
    limits = []
    for part in analysis.subjects:
        if not part.base:
            continue
        done = part.table[part.table["status"] == "done"]
        protocol = part.protocol
        tokens, usual = ((each.image_size // each.patch_size) ** 2 + 1 for each in (protocol, protocol_of(part.dataset)))
        if tokens < usual:
            limits.append(
                f"{part.name}: {tokens} tokens instead of {usual}. It shows how the "
                "architectures compare where attention chooses among few coarse patches, and how much seeds scatter; a difference that "
                "needs many tokens may be missing here, so it does not replace the full study."
            )
        if protocol.heads < 16 and set(part.table["model"]) & {"vit_differential", "vit_differential_v2"}:
            minimum = 'its authors recommend at least 8, "the minimum used in the paper"; `study --grid controls` has more'
            limits.append(f"{part.name}: differential attention has {protocol.heads // 2} heads here; {minimum}.")
        if warning := protocol.warmup_warning(int(part.table["steps"].max())):
            limits.append(f"{part.name}: {warning}.")
        if len(done):
            images, accuracy = int(done["test_images"].min()), done["test_accuracy"].mean()
            half = 196 * math.sqrt(accuracy * (1 - accuracy) / images)
            near = f"a single accuracy near {100 * accuracy:.0f} % is uncertain by {half:.1f} points"
            limits.append(f"{part.name}: with {images:,} test images {near}.")
            if done.groupby(["model", "size"])["seed"].nunique().min() == 1:
                limits.append(f"{part.name}: one seed for some model and size, so that nothing is known of its spread between seeds.")
        for flag in part.table["flags"].unique():
            if flag:
                limits.append(f"{part.name}: {flag}.")
    parameters = analysis.table.groupby("dataset")["parameters"]
    factor = (parameters.max() / parameters.min()).max()
    limits += [
        f"Sizes over a factor of {factor:.1f} say nothing about larger models, and only depth varies.",
        equal_parameters(analysis.table),
        "One protocol for all, without augmentation. " + _tuning(analysis),
        "Intervals hold for these test images. The bootstrap over images too is given beside them, and it is on the wide side.",
        "No claim about the best size for a budget of compute.",
    ]
    return limits


def _tuning(analysis: Analysis) -> str:
    if any("lr" in part.overrides for part in analysis.subjects):
        return "Learning rates were tried with the same budget for all; nothing else was tuned."
    return "Whether another learning rate would favour another one is what `study --grid lr` answers; it is not answered here."


def _provenance(table: pd.DataFrame) -> list[Block]:
    facts = {"code": "git_commit", "device": "device_name", **{name: name for name in ("precision", "torch", "diffvit", "attention")}}
    rows = [[what, "; ".join(sorted({str(value) for value in table[column].dropna()}))] for what, column in facts.items()]
    fingerprints = table[["dataset", "fingerprint"]].drop_duplicates()
    rows += [[f"data of {row.dataset}", row.fingerprint] for row in fingerprints.itertuples()]
    rows.append(["training time of all runs", hours(table)])
    return [Table(["", ""], rows, left=2)]


def _number(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.value:+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if estimate.known else " (no interval)")


def _ratio(ratio: Ratio) -> str:
    if math.isnan(ratio.value):
        return ratio.note
    return f"{ratio.value:.2f} " + (f"({ratio.low:.2f} to {ratio.high:.2f})" if not math.isnan(ratio.low) else f"({ratio.note})")
