"""Draw the README's figures from the tables that eval.py --csv wrote.

    python plot.py                            both, from results/*.csv into assets/
    python plot.py --samples=                 without the second
    python plot.py --likelihood=FILE.csv --out_dir=DIR

likelihood.svg: quality against block size. samples.svg: quality against forward passes per token,
a panel for each run. Several rows of one block size (seeds) are joined through their mean.
"""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

from configurator import SettingsError, fail, override, public

# ---- settings ----------------------------------------------------------------------------------
likelihood = "results/likelihood.csv"  # empty: do not draw it
samples = "results/samples.csv"
out_dir = "assets"
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))

# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
)
RULES = {"random": GREY, "left_to_right": GREEN, "confidence": BLUE, "threshold": ORANGE,
         "entropy": RED}


def pyplot():
    """matplotlib's pyplot, drawing to files: the same bytes from the same figures."""
    try:
        import matplotlib
    except ImportError:
        raise SettingsError("plot.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "svg.hashsalt": "cascade", "svg.fonttype": "none", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    })
    from matplotlib import pyplot

    return pyplot


def read_table(path, numbers, names):
    """The rows of a CSV file as dicts, the columns `numbers` as floats. SettingsError otherwise."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            table = list(csv.DictReader(f))
        rows = [SimpleNamespace(**{k: float(row[k]) for k in numbers}, **{k: row[k] for k in names})
                for row in table]
    except OSError as e:
        raise SettingsError(f"{path}: {e.strerror}; eval.py --csv={path} writes it") from None
    except (KeyError, TypeError, ValueError) as e:
        raise SettingsError(f"{path} is no table of eval.py --csv ({e}): write it anew") from None
    if not rows:
        raise SettingsError(f"{path} has no rows: python eval.py --csv={path} writes them")
    return rows


def draw_likelihood(plt, rows):
    """Bound and chain against block size, the autoregressive twin as a line."""
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    runs = [r for r in rows if r.objective == "diffusion"]
    sizes = sorted({int(r.block_size) for r in runs})
    for name, label, color, marker in (
        ("bound", "CASCADE, bound (\u2264)", BLUE, "v"), ("chain", "CASCADE, chain", GREEN, "o")
    ):
        found = {S: [getattr(r, name) for r in runs if r.block_size == S] for S in sizes}
        axes.plot(sizes, [sum(v) / len(v) for v in found.values()], color=color, linewidth=1.5)
        axes.errorbar(
            [r.block_size for r in runs], [getattr(r, name) for r in runs],
            [getattr(r, f"{name}_error") for r in runs], fmt=marker, color=color, markersize=4,
            capsize=2, label=label,
        )
    for i, r in enumerate(r for r in rows if r.objective == "ar"):
        label = None if i else "autoregressive twin"
        axes.axhline(r.chain, color=RED, linewidth=1.2, linestyle="--", label=label)
    axes.set_xscale("log", base=2)
    whole = {int(r.seq_len) for r in rows}
    axes.set_xticks(sizes, [f"{S}\n(whole)" if S in whole else str(S) for S in sizes])
    axes.set(xlabel="block size S, tokens", ylabel="nats per token, validation text")
    axes.minorticks_off()
    axes.legend()
    return figure


def draw_samples(plt, rows):
    """The judge's score against passes per token, a panel for each diffusion run."""
    held_out = [r for r in rows if math.isnan(r.nfe_per_token)]
    made = [r for r in rows if r not in held_out]
    runs = list(dict.fromkeys(r.run for r in made if r.objective == "diffusion"))
    if not runs:
        raise SettingsError("no samples of a diffusion run to draw: leave it out with --samples=")
    figure, panels = plt.subplots(
        1, len(runs), figsize=(2.6 + 3.2 * len(runs), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )
    for axes, run in zip(panels[0], runs, strict=True):
        mine = [r for r in made if r.run == run]
        for rule, color in RULES.items():
            line = sorted((r for r in mine if r.rule == rule), key=lambda r: r.nfe_per_token)
            if line:
                axes.errorbar(
                    [r.nfe_per_token for r in line], [r.judge_nll for r in line],
                    [r.judge_error for r in line], marker="o", markersize=4, linewidth=1.3,
                    capsize=2, color=color, label=rule.replace("_", " "),
                )
        text = next((r for r in held_out if r.run == run), None)
        if text:
            axes.axhline(text.judge_nll, color="black", linewidth=1, label="held-out text")
        twin = next((r for r in made if r.objective == "ar"), None)
        if twin:
            axes.axhline(
                twin.judge_nll, color=PURPLE, linewidth=1.2, linestyle="--",
                label="autoregressive twin, 1 pass",
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({2.0 ** round(math.log2(r.nfe_per_token)) for r in mine})
        axes.set_xticks(ticks, [f"1/{1 / t:.0f}" if t < 1 else f"{t:.0f}" for t in ticks])
        axes.minorticks_off()
        axes.set(xlabel="forward passes per token", title=f"S = {mine[0].block_size:.0f}")
    panels[0][0].set_ylabel("judge's nats per token (lower: more likely)")
    handles = panels[0][-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=7)
    return figure


DRAW = {
    "likelihood": (draw_likelihood, ("objective",), (
        "block_size", "seq_len", "bound", "bound_error", "chain", "chain_error",
    )),
    "samples": (draw_samples, ("run", "objective", "rule"), (
        "block_size", "nfe_per_token", "judge_nll", "judge_error",
    )),
}


def main(argv):
    try:
        s = SimpleNamespace(**override(DEFAULTS, argv))
        for name, (draw, names, numbers) in DRAW.items():
            if not getattr(s, name):
                continue
            rows = read_table(getattr(s, name), numbers, names)
            path = Path(s.out_dir) / f"{name}.svg"
            figure = draw(pyplot(), rows)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, metadata={"Date": None})
            except OSError as e:
                raise SettingsError(f"cannot write {path} ({e.strerror}): set --out_dir") from None
            print(path)
    except SettingsError as e:
        fail(e)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
