"""results/README.md and results/frontier.csv from results/tables.json, which run.py measured.

    python results/page.py

The sentences are page.md's: where they change, this is run again, and no figure moves.
"""

import csv
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from any folder

from util.configurator import guarded, override

ROOT = Path(__file__).resolve().parents[1]
PASSES = 1, 2, 4
PUBLISHED = {  # enwik8, test split, bits per byte: arXiv 1808.04444 and 1901.02860
    "Transformer of 12 layers, 44M parameters": 1.11, "Transformer of 64 layers, 235M": 1.06,
    "Transformer-XL, 277M": 0.99,
}


def save(path, about, nano, tables):
    """A JSON object with a line for each row of each table: {title: {row: what was measured}}."""
    flat = {"about": about, "nano": nano, **{
        f"{title}: {name}": rows for title, of in tables.items() for name, rows in of.items()}}
    path.write_text("{\n" + ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in flat.items()) + "\n}\n")


def load(path):
    """(about, nano, tables) of a file that `save` wrote."""
    flat, tables = json.loads(path.read_text(encoding="utf-8")), {}
    about, nano = SimpleNamespace(**flat.pop("about")), flat.pop("nano")
    for key, rows in flat.items():
        title, _, name = key.partition(": ")
        tables.setdefault(title, {})[name] = rows
    return about, nano, tables


def block(name, seq_len):
    """S of a model, by its name; of whole sequences their length, of an AR baseline 1."""
    return int((re.findall(r"S = (\d+)", name) or [seq_len if "whole" in name else 1])[0])


def order(name, about):
    """Sorts names: the AR baseline, the cascade, block diffusion, each by block size."""
    return "AR" not in name, "cascade" not in name, block(name, about.seq_len)


def find(rows, *methods):
    """The row of the smallest NLL among those of these methods, or None."""
    return min((r for r in rows if r["method"] in methods), key=lambda r: r["nll"], default=None)


def nll(rows, *methods):
    row = find(rows, *methods)
    return f"{row['nll']:.3f}" if row else ""


def at(K):
    """The methods of K passes a block; the better one is shown."""
    return f"left_to_right {K}", f"confidence {K}"


def markdown(header, rows):
    """A table: the first column is text, the others are figures."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(about, found):
    rows = []
    for name in sorted(found["levels"], key=lambda name: order(name, about)):
        if "seed" in name:
            continue
        levels, S, ar = found["levels"][name], block(name, about.seq_len), "AR" in name
        speed = {r["mode"]: f"{r['of_ar'][0]:.2f}" for r in found["speed"].get(name, [])
                 if r["batch"] == 1}
        step = found["step"].get(name, [{"of_ar": [1.0 if ar else math.nan]}])[0]["of_ar"][0]
        drafts = found["drafts"].get(name, [])
        rows.append([
            name, nll(levels, "gpt"), nll(levels, "bound"),
            *(nll(levels, *at(K)) if K <= S else "" for K in PASSES), nll(levels, *at(S)),
            " (5-gram: ".join(f"{r['tokens_per_pass']:.2f}" for r in drafts) + ")" * bool(drafts),
            "1" if ar else "; ".join(speed[mode] for mode in ("verify", "verify:4")
                                     if mode in speed),
            "" if math.isnan(step) else f"{step:.2f}"])
    rows.append(["5-gram", nll(found["levels"]["AR baseline"], "5-gram"), *[""] * 8])
    return markdown(["", "GPT level", "bound <=", *(f"K = {K}" for K in PASSES), "K = S",
                     "tokens a pass", "tokens/s", "a step"], rows)


def seeds(found):
    """What three seeds gave, in a sentence."""
    def three(name, *methods):
        return ", ".join(nll(rows, *methods) for of, rows in found["levels"].items()
                         if of == name or of.startswith(f"{name}, seed"))

    S8 = "cascade, S = 8"
    return (f"AR baseline {three('AR baseline', 'gpt')}; {S8}: GPT level {three(S8, 'gpt')}, one "
            f"pass {three(S8, *at(1))}, bound <= {three(S8, 'bound')}")


def frontier(about, found):
    """Rows (method, passes per token, NLL, its error) of the figure."""
    rows, gpt = [], {name: find(levels, "gpt") for name, levels in found["levels"].items()}
    for name in sorted(found["levels"], key=lambda name: order(name, about)):
        S, levels = block(name, about.seq_len), found["levels"][name]
        for K in sorted({*PASSES, S}):
            if "seed" not in name and K <= S <= 32 * K and (r := find(levels, *at(K))):
                rows.append((name, K / S, r["nll"], r["nll_error"]))
    for name in sorted(found["drafts"], key=lambda name: order(name, about)):
        drafts = found["drafts"][name]
        rows.append((f"verify, {name.partition(', ')[2]}", 1 / drafts[0]["tokens_per_pass"],
                     gpt[name]["nll"], gpt[name]["nll_error"]))
    control = find(found["levels"]["AR baseline"], "5-gram")
    rows += [("AR baseline", 1, gpt["AR baseline"]["nll"], gpt["AR baseline"]["nll_error"]),
             ("5-gram", "", control["nll"], control["nll_error"])]
    name, levels = min(found["sizes"].items(), key=lambda of: find(of[1], "gpt")["nll"])
    best = find(levels, "gpt")
    return [*rows, (f"larger AR, {name}, above the entropy", "", best["nll"], best["nll_error"])]


def sweep(found):
    rows = []
    for name in sorted(found["curves"]):
        log = found["curves"][name]
        marks = [log[round(len(log) * part) - 1] for part in (0.25, 0.5, 0.75)]
        levels = found["sizes"].get(name, found["levels"]["AR baseline"])
        rows.append([name, *(f"{loss:.3f} ({minutes:.1f})" for minutes, loss in marks),
                     f"{nll(levels, 'gpt')} ({log[-1][0]:.1f})"])
    return markdown(["", "a quarter", "half", "three quarters", "all steps"], rows)


def decoding(found):
    """Tokens/s by batch size beside the exact NLL of what is written."""
    rows, batches = {}, []
    for name, measured in found["speed"].items():
        if len({r["batch"] for r in measured}) == 1:
            continue
        for r in measured:
            kind, _, K = r["mode"].partition(":")
            if r["batch"] not in batches:
                batches.append(r["batch"])
            if kind == "ar":
                what, exact = "AR baseline", nll(found["levels"]["AR baseline"], "gpt")
            elif kind == "block":
                what = f"{name}: {K} pass{'es' * (K != '1')} a block"
                exact = nll(found["levels"][name], f"left_to_right {K}")
            else:
                what = f"{name}: `{kind}`" + f", {K} drafts" * bool(K)
                exact = nll(found["levels"][name], "gpt")
            cells = rows.setdefault(what, [exact])
            if len(cells) <= len(batches):  # the AR baseline beside the first model
                cells.append(f"{r['tokens_per_s']:,.0f} ({r['of_ar'][0]:.2f})")
    return markdown(["", "NLL", *(f"batch {b}" for b in batches)],
                    [[what, *cells[: 1 + len(batches)]] for what, cells in rows.items()])


def training_steps(found):
    return markdown(["", "parameters", "ms", "times the AR baseline's", "in FLOPs", "MFU"], [
        [name, f"{r['parameters']:,}", f"{r['ms']:.0f}",
         "{:.2f} ({:.2f}-{:.2f})".format(*r["of_ar"]), f"{r['gflop'] / ar['gflop']:.2f}",
         f"{r['mfu']:.0%}"] for name, (r, ar, _) in found["step"].items()])


def accepted(found):
    return markdown(["", "drafts by the", "tokens a pass", "accepted: drafts 1 to 7"], [
        [name, r["drafter"], f"{r['tokens_per_pass']:.2f}",
         " ".join(f"{x:.2f}" for x in r["accepted"][:7])]
        for name in sorted(found["drafts"], key=lambda name: block(name, 0))
        for r in found["drafts"][name]])


def choices(found):
    """What the choice of two passes a block can win."""
    rows = []
    for name, levels in found["schedules"].items():
        equal = find(levels, "equal 2")
        kinds = ("average 2", "oracle's K 2", "oracle 2", "KL oracle 2")
        rows.append([name, nll(levels, "equal 2"), *(nll(levels, kind) for kind in kinds),
                     f"{equal['oracle_passes']:.2f}"])
    return markdown(["", "equal cuts", "best on average", "K by the oracle", "all by the oracle",
                     "by expected losses", "the oracle's passes for as much as equal cuts"], rows)


def wiki(found):
    ar, cascade = found["wiki"]["AR baseline"], found["wiki"]["cascade, S = 8"]
    rows = [[f"{name}, the test split by itself", f"{bits:.3f}"]
            for name, bits in found["general"]["compressors"].items()]
    for levels, method, label in (
        (ar, "5-gram", "5-gram of the first 10,000,000 bytes"), (ar, "gpt", "AR baseline"),
        (cascade, "gpt", "cascade, S = 8: GPT level"),
        (cascade, "left_to_right 1", "cascade, S = 8: one pass a block"),
        (cascade, "bound", "cascade, S = 8: bound, <="),
    ):
        r = find(levels, method)
        rows.append([label, f"{r['bits_per_byte']:.3f} +- {r['nll_error'] / math.log(2):.3f}"])
    rows += [[f"published: {name}", f"{bits:.2f}"] for name, bits in PUBLISHED.items()]
    return markdown(["", "bits per byte"], rows)


def render(template, about, nano, found):
    """page.md with its {names} filled in."""
    errors = [r["nll_error"] for rows in found["levels"].values() for r in rows
              if r["windows"] == about.windows]
    memory = found["memory"]["N"]
    step = re.compile(r"step +(\d+)[^|]*\|")
    lines = [line for line in nano.splitlines()
             if not (found_at := step.match(line)) or int(found_at[1]) % 500 == 0]
    return template.format(
        **vars(about), tokens=f"{about.steps * 4 * about.seq_len:,}", least=min(errors),
        most=max(errors), every=about.steps // 12, some=about.windows // 8,
        table=main_table(about, found), seeds=seeds(found), sweep=sweep(found),
        accepted=accepted(found), choices=choices(found), decoding=decoding(found),
        training_steps=training_steps(found), wiki=wiki(found),
        memory=markdown(["N", *(f"{r['N']:,}" for r in memory)],
                        [["MiB", *(f"{r['bytes'] / 2**20:,.0f}" for r in memory)]]),
        nano="\n".join(f"    {line}".rstrip() for line in lines))


@guarded
def main(argv):
    folder = Path(override({"page": str(ROOT / "results")}, argv)["page"])
    about, nano, found = load(folder / "tables.json")
    template = (ROOT / "results/page.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(render(template, about, nano, found), encoding="utf-8")
    with open(folder / "frontier.csv", "w", newline="", encoding="utf-8") as f:
        f.write(f"# commit {about.commit}, {about.machine}, seed 1337\n")
        columns = "method", "passes_per_token", "nll", "nll_error"
        csv.writer(f, lineterminator="\n").writerows([columns, *frontier(about, found)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
