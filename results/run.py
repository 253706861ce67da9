"""Every table and figure of results/ and of the README, from the commit that this runs on.

    pip install -r requirements.txt matplotlib
    python results/run.py                     hours; the head of results/README.md says how many
    python results/run.py --steps=40 --minutes=0.2 --nano_minutes=0.2 --windows=32 --rounds=1 \
        --page=out/trial/results              the same in small, to see whether it runs

Two models at a time train and are scored, one thread each; what is timed runs alone afterwards.
Started again it goes on: what a command gave is kept until the code, prose aside, or the command
changes. Writes tables.json to `page`, from which page.py writes README.md and frontier.csv, and
the figures to `assets` beside it.
"""

import ast
import csv
import gzip
import json
import lzma
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from any folder

from results import page as pages
from util.configurator import (
    SettingsError,
    check_settings,
    guarded,
    optional,
    override,
    public,
)
from util.dataset import load_dataset

ROOT = Path(__file__).resolve().parents[1]
# ---- settings ------------------------------------------------------------------------------------
steps = 3600  # of every model of the table, 4 windows of seq_len each
seq_len = 256
minutes = 5.0  # of each model of enwik8
nano_minutes = 4.5
windows = 256  # of validation text, evenly spread
rounds = 5  # of each timing
page = "results"
# --------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
RANGES = {"steps": (12, math.inf), "seq_len": (64, math.inf), "windows": (32, math.inf),
          "rounds": (1, math.inf), "minutes": (0.1, math.inf), "nano_minutes": (0.1, math.inf)}

MODELS = {  # name: what differs from train.py's defaults
    **{f"cascade, S = {S}": [f"--block_size={S}"] for S in (8, 16, 32, 4)},
    **{f"cascade, S = 8, seed {seed}": [f"--seed={seed}"] for seed in (1, 2)},
    **{f"block diffusion, S = {S}": ["config/bd3lm.py", f"--block_size={S}"] for S in (8, 16, 4)},
    "block diffusion, whole": ["config/bd3lm.py"],
    "AR baseline": ["--objective=ar"],
    **{f"AR baseline, seed {seed}": ["--objective=ar", f"--seed={seed}"] for seed in (1, 2)},
}
SIZES = {  # of the AR baseline; the table's, 2 layers of 192, is the one between
    "2 layers of 128": ["--n_layer=2", "--n_head=4", "--n_embd=128"],
    "2 layers of 256": ["--n_layer=2", "--n_head=8", "--n_embd=256"],
}
WIKI = {"AR baseline": ["--objective=ar"], "cascade, S = 8": []}
SPEED = {  # what is decoded of each model, and in batches of how many
    "cascade, S = 8": ("gpt,verify,verify:4,block:1,block:2,block:4,block:8", "1,4,16,64"),
    "cascade, S = 16": ("verify,verify:4,block:1,block:2,block:4,block:16", "1,4,16,64"),
    "block diffusion, S = 8": ("block:1,block:2,block:4,block:8", "1,4,16,64"),
    "cascade, S = 4": ("verify,block:1", "1"),
    "cascade, S = 32": ("verify,verify:4,block:1", "1"),
}
DRAWN = ("AR baseline", "cascade, S = 8", "cascade, S = 16", "block diffusion, S = 8")
WIDE = "--n_layer=6 --n_embd=384 --seq_len=256 --block_size=16 --batch_size=16 --rounds=3".split()


def logic(paths):
    """A hash of what Python files do: of their syntax trees without docstrings and comments."""
    def plain(node):
        if isinstance(node, list):
            return [plain(x) for x in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant):
            body.pop(0)
        # empty fields differ between versions of Python
        return [type(node).__name__, [(name, plain(value)) for name, value in ast.iter_fields(node)
                                      if value not in (None, [])]]

    digest = sha256()
    for path in sorted(paths):
        tree = plain(ast.parse(path.read_text(encoding="utf-8")))
        digest.update(repr((path.relative_to(ROOT).as_posix(), tree)).encode())
    return digest.hexdigest()[:12]


def trained_by():
    """The files that decide what a model learns and how it is scored."""
    roots = [ROOT / f"{name}.py" for name in ("corrupt", "model", "train", "sample", "eval")]
    return [*roots, *ROOT.glob("util/*.py"), ROOT / "config/bd3lm.py", ROOT / "config/nano.py"]


def measured_by():
    """All code that a figure of results/ comes from."""
    return [*trained_by(), ROOT / "bench.py", ROOT / "results/run.py", ROOT / "tools/animate.py"]


def words(name):
    return re.sub(r"\W+", "-", name).strip("-").lower()


class Runs:
    """Commands, and what they printed: kept until the code that matters, the machine or the command
    changes. A command that reads a model names its folder, which is named by how it was trained."""

    def __init__(self, s):
        self.s, self.out, self.machine = s, Path("out/results"), machine()
        self.minutes = {0: 0.0, 1: 0.0}  # of all commands: alone on all cores, and on one thread
        self.code = logic(trained_by()), logic([ROOT / "bench.py"])
        self.folders = {}
        self.out.mkdir(parents=True, exist_ok=True)

    def key(self, name, argv):
        code = self.code[: 1 + (argv[0] == "bench.py")]
        text = f"{shlex.join(argv)} {code} {self.machine}"
        return self.out / f"{words(name)}-{sha256(text.encode()).hexdigest()[:8]}"

    def text(self, name, argv, threads=0):
        """What `python *argv` prints, on one thread or, with 0, on all."""
        kept = self.key(name, argv).with_suffix(".json")
        if not kept.exists():
            began, env = time.monotonic(), dict(os.environ)
            env.pop("OMP_NUM_THREADS", None)
            if threads:
                env["OMP_NUM_THREADS"] = str(threads)
            done = subprocess.run([sys.executable, *argv], env=env, text=True, check=False,
                                  stdout=subprocess.PIPE)
            if done.returncode:
                raise SettingsError(f"python {shlex.join(argv)} ended with {done.returncode}: see "
                                    "why, and start this again")
            minutes = (time.monotonic() - began) / 60
            kept.with_suffix(".part").write_text(json.dumps([minutes, done.stdout]))
            kept.with_suffix(".part").rename(kept)
            print(f"{minutes:6.1f} minutes  {name}", flush=True)
        minutes, text = json.loads(kept.read_text())
        self.minutes[threads] += minutes
        return text

    def rows(self, name, argv, threads=0):
        return json.loads(self.text(name, [*argv, "--json=true"], threads))["rows"]

    def train(self, name, argv, threads=1):
        """(what train.py printed, the run's folder)"""
        folder = self.folders[name] = self.key(name, argv)
        return self.text(name, [
            "train.py", *argv, f"--out_dir={folder}", "--overwrite=true"], threads), folder

    def settings(self, name):
        """What differs from train.py's defaults, in the shape of the network and its objective."""
        whole = [f"--block_size={self.s.seq_len}"] * name.endswith("whole")
        return MODELS.get(name, ["--objective=ar"]) + whole

    def model(self, name, extra=()):
        """A row of the table: a model of `steps` steps, trained and scored."""
        s, S = self.s, pages.block(name, self.s.seq_len)
        _, folder = self.train(name, [
            *self.settings(name), *extra, f"--seq_len={s.seq_len}", "--max_minutes=0",
            f"--max_steps={s.steps}", f"--eval_every={max(1, s.steps // 12)}", "--sample_tokens=0"])
        score = ["eval.py", f"--out_dir={folder}", f"--windows={s.windows}"]
        if "AR" in name:
            return self.rows(f"{name} levels", score, 1)
        rows = [f"left_to_right:{K}" for K in sorted({1, 2, 4, S}) if K <= S]
        if "seed" in name:
            rows = rows[:1]
        if "diffusion" in name:
            rows += ["confidence:2", "confidence:4"]
        # a pass for every token of a whole window is dear
        some = s.windows // 8 if S == s.seq_len else s.windows
        return self.rows(f"{name} levels", [
            *score, f"--rows={','.join(rows)}", f"--rule_windows={some}"], 1)

    def wiki(self, name):
        """A model of enwik8, by minutes, and its figures on the test split."""
        s, argv = self.s, [*WIKI[name], "--dataset=enwik8", f"--seq_len={self.s.seq_len}"]
        _, folder = self.train(f"enwik8 {name}", [
            *argv, f"--max_minutes={s.minutes}", "--eval_every=1000", "--sample_tokens=0"])
        return self.rows(f"enwik8 {name} levels", [
            "eval.py", f"--out_dir={folder}", "--split=test", f"--windows={s.windows}",
            "--rows=left_to_right:1", f"--rule_windows={s.windows}"], 1)

    def asked(self, name, what):
        """--drafts or --schedules of a trained model."""
        return self.rows(f"{name} {what}", [
            "eval.py", f"--out_dir={self.folders[name]}", f"--{what}=true",
            *[f"--windows={self.s.windows}"] * (what == "schedules")], 1)


def compressed():
    """{name: bits per byte} of general compressors at their strongest, on the test split of enwik8
    by itself: they begin with nothing, where a model has read the training text."""
    split = load_dataset("enwik8").split("test")
    text = split.window([0], len(split))[0].astype("uint8").tobytes()
    small = {"gzip -9": gzip.compress(text, 9), "lzma -9e": lzma.compress(text, preset=9 | 1 << 31)}
    return {name: 8 * len(packed) / len(text) for name, packed in small.items()}


def curve(folder):
    """[(minutes, validation NLL of the GPT level)] of a run's log.csv."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as f:
        return [(float(r["seconds"]) / 60, float(r["val_gpt"])) for r in csv.DictReader(f)
                if r["val_gpt"]]


def machine():
    """In words, what this runs on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = (re.findall(r"model name\s*: (.*)", info) or [platform.processor()])[0]
    units = "with" if re.search("avx512_bf16|amx_bf16", info) else "without"
    torch = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__)"],
                           capture_output=True, text=True, check=True).stdout.strip()
    return f"{name}, {os.cpu_count()} shared cores {units} bf16 units, torch {torch}"


def gather(runs):
    """{table: {row: what was measured}}, and what the nano printed."""
    s = runs.s
    shown = [name for name in MODELS if "seed" not in name]
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            "levels": {name: pool.submit(runs.model, name) for name in MODELS},
            "sizes": {name: pool.submit(runs.model, f"AR baseline, {name}", extra)
                      for name, extra in SIZES.items()},
            "wiki": {name: pool.submit(runs.wiki, name) for name in WIKI},
            "drafts": {name: pool.submit(runs.asked, name, "drafts")
                       for name in shown if "cascade" in name},
            "schedules": {name: pool.submit(runs.asked, name, "schedules") for name in DRAWN[1:2]},
            "general": {"compressors": pool.submit(compressed)},
        }
        try:
            found = {title: {name: job.result() for name, job in of.items()}
                     for title, of in jobs.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the queue would run for hours
            raise
    found["curves"] = {name: curve(runs.folders[f"AR baseline, {name}"]) for name in SIZES}
    found["curves"]["2 layers of 192"] = curve(runs.folders["AR baseline"])
    nano, _ = runs.train("nano", ["config/nano.py", f"--max_minutes={s.nano_minutes}"], 0)
    found["step"] = {name: runs.rows(f"{name} step", [
        "bench.py", "train", *runs.settings(name), f"--seq_len={s.seq_len}",
        f"--rounds={s.rounds}"]) for name in shown if "AR" not in name}
    found["step"]["the nano"] = runs.rows("nano step", [
        "bench.py", "train", f"--rounds={s.rounds}"])
    found["step"]["cascade, S = 16, 6 layers of 384"] = runs.rows("wide step", [
        "bench.py", "train", *WIDE])
    found["speed"] = {name: runs.rows(f"{name} speed", [
        "bench.py", "decode", f"--out_dir={runs.folders[name]}",
        f"--ar_dir={runs.folders['AR baseline']}",
        f"--modes={modes}", f"--batches={batches}", f"--rounds={s.rounds}", "--windows=2"])
        for name, (modes, batches) in SPEED.items()}
    found["memory"] = {"N": runs.rows("memory", ["bench.py", "memory"])}
    return found, nano


def git(*argv):
    return subprocess.run(["git", *argv], capture_output=True, text=True, check=True).stdout.strip()


@guarded
def main(argv):
    s = SimpleNamespace(**override(DEFAULTS, argv))
    check_settings(s, {}, RANGES)
    optional("matplotlib", "results/run.py")
    os.chdir(ROOT)
    if git("status", "--porcelain", "--", "*.py") and s.page == "results":
        raise SettingsError("uncommitted code: commit it, or try it with --page=out/trial/results")
    if not (ROOT / "data/enwik8/meta.json").exists():
        subprocess.run([sys.executable, "data/enwik8/prepare.py", "--from_pip"], check=True)
    runs, folder = Runs(s), Path(s.page)
    stamp = git("rev-parse", "--short", "HEAD"), logic(measured_by())
    found, nano = gather(runs)
    if stamp[1] != logic(measured_by()):
        raise SettingsError("the code changed under way: start this again")
    figures = folder.resolve().parent / "assets"
    folder.mkdir(parents=True, exist_ok=True)
    about = {**vars(s), "commit": stamp[0], "code": stamp[1], "machine": runs.machine,
             "wide": " ".join(WIDE), "lanes": runs.minutes[1] / 2, "alone": runs.minutes[0]}
    pages.save(folder / "tables.json", about, nano, found)
    pages.main([f"--page={folder}"])
    logs = ",".join(f"{name.replace(', ', ' ')}:{runs.folders[name]}" for name in DRAWN)
    for argv in (["plot.py", f"--frontier={folder}/frontier.csv", f"--runs={logs}",
                  f"--out_dir={figures}"],
                 ["animate.py", f"--out_dir={runs.folders['nano']}", "--prompt=KING.", "--seed=3",
                  "--max_new_tokens=240", f"--svg={figures}/crystallise.svg"]):
        subprocess.run([sys.executable, f"tools/{argv[0]}", *argv[1:]], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
