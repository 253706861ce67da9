"""Random mutations of checkpoints, settings, config files and command lines: every outcome is
success or one line with exit code 1 or 2, and nothing outside of the folders named is touched.

    python test_all.py fuzz             20 s with a fixed seed, then 3 minutes with a new one
"""

import contextlib
import io
import math
import os
import random
import re
import time
from unittest import mock

import torch

import bench
import eval as evaluation
import sample
import train
from tests.common import HERE, arguments, call_main, data_folder, tiny_settings, train_tiny
from util import checkpoint

WORDS = ("", "x", "nan", "inf", "-inf", "-1", "0", "1", "2", "3", "0.5", "1e3", "1e30", "9" * 30,
         "true", "None", "[1]", "\x1b[2J", "\n", "\xe9", "\udc80", "a,b:c", "random:0", "8:0",
         "x" * 300, "block", "gpt", "target", "-", "False", "\u00b2", "..", "FILE:/", "FILE:no")
VALUES = ("1", "-1", "0.5", "None", "(1e-3,)", "[1]", "'x'", "float('nan')", "1 / 0", "'\\x1b'",
          "True", "10**30", "print", "{}", "b'x'", "1j", "object()", "exit()", "x", "]", "\0")
# what these ask for takes the time and memory that it takes: only small numbers, and no words that
# start other programs or wait
GROWS = re.compile("n_|local_|batch|seq_len|size|windows|tokens|samples|max_|copies|_every|delay|"
                   "compile|wandb|judge|dataset|ngram|rounds|threads")
SMALL = ("", "x", "-1", "0", "1", "2", "3", "nan", "\x1b[2J", "0.5", "[1]")


def mutated(state, r):
    """The state with one to three of its parts replaced, removed, or doubled under another key."""
    for _ in range(r.randint(1, 3)):
        key, old = None, state
        while isinstance(old, (dict, list)) and old and (key is None or r.random() < 0.8):
            where, key = old, r.choice(list(old) if isinstance(old, dict) else range(len(old)))
            old = where[key]
        new = [None, -1, 0, 1.5, math.nan, math.inf, "x\x1b[2J", [], {}, True, 2**70, (1, 2),
               torch.ones(3), {"x": where}]
        if isinstance(old, torch.Tensor):
            new += [old.double(), old.flatten(), old.flatten()[:1].clone(), old * math.inf,
                    old.mT if old.ndim > 1 else old.bool(), torch.ones(1).expand(10**4, 10**5),
                    old.to_sparse()]
        elif isinstance(old, (int, float)):
            new += [old + 1, -old, old * 10**6, float(old)] * 2
        if r.random() < 0.15:
            del where[key]
        else:
            where[r.choice(["x", 0]) if isinstance(where, dict) and r.random() < 0.1 else key] = (
                r.choice([*new, old]))
    return state


def fuzzed_checkpoint(folder, good, r):
    """Write a mutated checkpoint in folder/out; the commands to read it with."""
    last, data = folder / "out/last.pt", bytearray(good)
    if r.random() < 0.3:
        for _ in range(r.choice((1, 1, 8, 200))):
            data[r.randrange(len(data))] = r.randrange(256)
        last.write_bytes(data[: r.choice((len(data), len(data), r.randrange(len(data))))])
    else:
        state = mutated(torch.load(io.BytesIO(good), weights_only=True), r)
        rest = {k: v for k, v in state.items() if k != "digest"}
        with contextlib.suppress(RecursionError, RuntimeError):
            state["digest"] = checkpoint.digest(rest)
        torch.save(state, last)
    resume = arguments(tiny_settings(folder, max_steps=3, init_from="resume"))
    return [(sample, [f"--out_dir={last}", "--max_new_tokens=5"]), (train, resume),
            (evaluation, [f"--out_dir={last}", "--windows=1", "--rule_windows=1"])]


def fuzzed_command(folder, r):
    """A script with a few random settings, on its command line or in a config file."""
    script = r.choice((train, train, sample, sample, evaluation, bench))
    argv = {train: arguments(tiny_settings(folder, max_steps=1)),
            sample: [f"--out_dir={folder}/whole", "--max_new_tokens=5"],
            bench: ["decode", f"--out_dir={folder}/whole", f"--ar_dir={folder}/whole"],
            evaluation: [f"--out_dir={folder}/whole", "--windows=1", "--rule_windows=1"]}[script]
    for _ in range(r.randint(1, 3)):
        name = r.choice(list(bench.DECODE if script is bench else script.DEFAULTS))
        if name in ("out_dir", "csv", "ar_dir", "prompt"):
            argv.append(f"--{name}={folder}/out/{r.choice(WORDS[:-3])}")
        elif script is train and r.random() < 0.4:
            config = folder / r.choice(("config.py", "config.py", "config.txt"))
            value = r.choice(VALUES[1:9] if GROWS.search(name) else VALUES)
            config.write_text(f"_x = []\n{name if r.random() < 0.8 else name[1:]} = {value}\n")
            argv.append(str(config))
        else:
            argv.append(f"--{name}={r.choice(SMALL if GROWS.search(name) else WORDS)}")
    return [(script, argv + ["--max_steps=1"] * (script is train))]


def outside(folder):
    """What lies in the repository and in an empty folder, with times."""
    return {p: p.stat().st_mtime_ns for root in (HERE, folder) for p in root.rglob("*")
            if p.is_file() and not re.search(r"/(\.|__pyc)", str(p.relative_to(root.parent)))}


def fuzz(seconds, seed):
    r, count, bugs, here = random.Random(seed), {0: 0, 1: 0, 2: 0}, 0, os.getcwd()
    with data_folder() as folder:
        train_tiny(folder, max_steps=2)
        os.rename(folder / "out", folder / "whole")
        good, empty = (folder / "whole/last.pt").read_bytes(), folder / "empty"
        for name in ("empty", "out"):
            (folder / name).mkdir()
        before, end = outside(empty), time.monotonic() + seconds
        os.chdir(empty)
        try:
            while time.monotonic() < end:
                commands = fuzzed_checkpoint(folder, good, r) if r.random() < 0.5 else (
                    fuzzed_command(folder, r))
                for script, argv in commands:
                    with mock.patch("sys.stdin", io.StringIO("\udc80")):
                        code, _, err = call_main(script, argv)
                    said = f"seed {seed}: {script.__name__}.py {argv}: {code}, {err!r}"
                    line = "error: [^\x00-\x1f\x7f-\x9f\ud800-\udfff]+\n"
                    assert code in count and (not code or re.fullmatch(line, err)), said
                    count[code] += 1
                    bugs += "shows where" in err
                assert outside(empty) == before, said
        finally:
            os.chdir(here)
    return (f"seed {seed}: {count[0]} went well, {count[2]} refused, {count[1]} others in one "
            f"line, {bugs} of them unforeseen")


def test_fuzz():
    return fuzz(15, 1)


def faults_fuzz():
    """3 minutes, with a new seed each time."""
    return fuzz(180, time.time_ns() % 10**6)
