"""Draw the README's figures: quality against passes, and training against time.

    python tools/plot.py                                     results/frontier.csv alone
    python tools/plot.py --runs=nano:out/nano,AR:out/ar      and these runs' logs; --frontier= alone

frontier.svg  NLL against forward passes per token, of rows method,passes_per_token,nll,nll_error.
              A method with several rows is a line, with one a point; an empty passes_per_token (the
              n-gram's) makes a dashed line across.
training.svg  the validation terms against minutes of training, of the log.csv of runs label:path
"""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from any folder

from util.configurator import SettingsError, guarded, optional, override, public

# ---- settings ------------------------------------------------------------------------------------
frontier = "results/frontier.csv"  # empty: do not draw it
runs = ""  # label:folder or label:log.csv, comma-separated; empty: do not draw them
out_dir = "assets"
# --------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vP"
DASHES = {"bound": (":", "bound (\u2264)"), "gpt": ("-", "GPT level"),
          "joint": ("--", "one pass a block")}


def pyplot():
    """matplotlib's pyplot, drawing to files: the same bytes from the same figures."""
    optional("matplotlib", "plot.py").use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.hashsalt": "cascade", "font.size": 11, "axes.grid": True, "grid.color": "#e5e5e5",
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "savefig.pad_inches": 0.2, "savefig.bbox": "tight", "figure.figsize": (7.6, 4.4),
    })
    return pyplot


def read_table(path, names, remedy):
    """The rows of a CSV file: `names[0]` as text, the others as floats, NaN where empty; a line
    that begins with # is a remark."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            lines = (line for line in f if not line.startswith("#"))
            rows = [{k: row[k] if k == names[0] else float(row[k] or "nan") for k in names}
                    for row in csv.DictReader(lines)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as e:
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
        raise SettingsError(f"{path} is no such table ({reason}): {remedy}") from None
    if not rows:
        raise SettingsError(f"{path} has no rows: {remedy}")
    return rows


def draw_frontier(plt, rows):
    """NLL against passes per token: lines of methods with several rows, points of the others. What
    stands before a comma in a method's name gives the colour, the rest the marker."""
    figure, axes = plt.subplots()
    rest = [r for r in rows if 0 < r["passes_per_token"] < math.inf]
    kinds = list(dict.fromkeys(r["method"].partition(",")[0] for r in rest))
    sorts = list(dict.fromkeys(r["method"].partition(",")[2] for r in rest))
    for name in dict.fromkeys(r["method"] for r in rest):
        line = sorted((r for r in rest if r["method"] == name), key=lambda r: r["passes_per_token"])
        kind, _, sort = name.partition(",")
        axes.errorbar(
            [r["passes_per_token"] for r in line], [r["nll"] for r in line],
            [r["nll_error"] for r in line], label=name, capsize=3,
            color=COLORS[kinds.index(kind) % len(COLORS)],
            marker=MARKERS[sorts.index(sort) % len(MARKERS)], markersize=6 + 3 * (len(line) == 1),
            linestyle="-" if len(line) > 1 else "none", zorder=3 if len(line) == 1 else 2,
        )
    across = [r for r in rows if r not in rest]
    for r, dash in zip(across, ("--", ":", "-.") * len(across), strict=False):
        axes.axhline(r["nll"], color="#666666", linestyle=dash, label=r["method"])
    axes.set_xscale("log", base=2)
    ticks = sorted({2.0 ** round(math.log2(r["passes_per_token"])) for r in rest})
    axes.set_xticks(ticks, [f"1/{1 / t:.0f}" if t < 1 else f"{t:.0f}" for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="forward passes per token (further left: fewer)",
             ylabel="NLL of what is written, nats per token")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3, fontsize=9)
    return figure


def draw_training(plt, tables):
    """The validation terms against minutes: a colour for each run, a dash for each term."""
    figure, axes = plt.subplots()
    for (label, rows), color in zip(tables.items(), COLORS * len(tables), strict=False):
        for term, (dash, name) in DASHES.items():
            line = [(r["seconds"] / 60, r[f"val_{term}"]) for r in rows
                    if math.isfinite(r["seconds"] + r[f"val_{term}"])]
            if line:
                axes.plot(*zip(*line, strict=True), color=color, linestyle=dash, linewidth=1.8,
                          label=f"{label}: {name}")
    axes.set(xlabel="minutes of training", ylabel="validation text, nats per token")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize=9)
    return figure


@guarded
def main(argv):
    s, figures = SimpleNamespace(**override(DEFAULTS, argv)), {}
    if s.frontier:
        columns = ("method", "passes_per_token", "nll", "nll_error")
        remedy = f"give --frontier=FILE.csv with the columns {','.join(columns)}"
        rows = read_table(s.frontier, columns, remedy)
        figures["frontier"] = draw_frontier(pyplot(), rows)
    if s.runs:
        columns, tables = ("step", "seconds", *(f"val_{term}" for term in DASHES)), {}
        for run in s.runs.split(","):
            label, _, path = run.partition(":")
            path = Path(path) / "log.csv" if Path(path).is_dir() else path
            tables[label] = read_table(path, columns, "write --runs=label:folder,label:folder")
        figures["training"] = draw_training(pyplot(), tables)
    for name, figure in figures.items():
        path = Path(s.out_dir) / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
