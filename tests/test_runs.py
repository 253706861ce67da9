"""The trade's tests of settings, checkpoints and runs: mistakes, damage, kills, full disks."""

import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

import bench
import eval as evaluation
import sample
import train
from tests.common import (
    HERE,
    TINY,
    arguments,
    call_main,
    checkpoint_folder,
    command,
    data_folder,
    diff,
    read_log,
    refuses,
    refuses_command,
    tiny_settings,
    tokens_for,
    train_tiny,
    weights,
    within,
    write_dataset,
)
from util import checkpoint, configurator, log, machine

# ---- settings ------------------------------------------------------------------------------------


def test_configurator():
    """Typed overrides; wrong names, types and files are refused by name, with the nearest one."""
    defaults = {"steps": 100, "rate": 1e-3, "name": "a", "flag": True}
    refused = ["--steps=1.5", "--steps=x", "--rate=fast", "--flag=yes", "--steps=nan", "--steps",
               "--steps=inf", "-steps=1", "nowhere.py", "--steps=\u00b2"]
    texts = {
        "stesp = 3": "did you mean steps?", "steps = 'x'": "steps must be int",
        "steps = 1.5": "steps", "flag = 2": "flag", "1 +": "SyntaxError", "1 / 0": "ZeroDiv",
        "rate = 1e-3,": "rate must be float", "rate = None": "rate", "name = ['a']": "name",
        "import numpy as np\nrate = np.float32(1e-3)": "rate", "stesp = [3]": "steps?",
        "flag = [True]": "flag", "raise SystemExit": "SystemExit", "steps = 3\0": "bad.py",
        "raise ValueError('a\\nb')": "ValueError: a", "name = '\xe9'": "bad.py",
    }
    with tempfile.TemporaryDirectory() as folder:
        good, bad, packed = (Path(folder, name) for name in ("good.py", "bad.py", "zip.py"))
        good.write_text("import math\nfrom numpy import float32\nsteps = 8 * 4\nrate = 1\n"
                        "_private = [1]\ndef half(x):\n    return x / 2\n")
        cases = {
            "--steps=1e3 --rate=1 --name=a=b --flag=false": (1000, 1.0, "a=b", False),
            "--steps=0 --rate=-2.5e-4 --name= --flag=0": (0, -2.5e-4, "", False),
            "--steps=12345678901234567 --name=1e3": (12345678901234567, 1e-3, "1e3", True),
            "--flag=false --flag=True": (100, 1e-3, "a", True), f"{good}": (32, 1.0, "a", True),
            f"{good} --steps=7": (7, 1.0, "a", True), f"--steps=7 {good}": (32, 1.0, "a", True),
            "": tuple(defaults.values()),
        }
        for argv, values in cases.items():
            got = configurator.override(defaults, argv.split())
            assert repr(tuple(got.values())) == repr(values), (argv, got)
        for arg in refused:
            refuses(lambda a=arg: configurator.override(defaults, [a]), arg.strip("-")[:5])
        refuses(lambda: configurator.override(defaults, ["--stesp=1"]), "did you mean steps?")
        for text, word in texts.items():
            bad.write_text(text, encoding="latin-1")
            refuses(lambda: configurator.override(defaults, [str(bad)]), word)
        with zipfile.ZipFile(packed, "w") as z:
            z.writestr("__main__.py", "steps = 1")
        for path in (packed, good.rename(good.with_suffix("")), good.with_suffix("").parent):
            refuses(lambda p=path: configurator.override(defaults, [str(p)]), path.name)
    return f"{len(cases)} good, {len(refused) + len(texts) + 4} refused"


# ---- checkpoints ---------------------------------------------------------------------------------


def test_digest():
    """The digest sees every part: optimizers, settings, dtypes, shapes, keys; not their order."""
    one = {"a": torch.zeros(2), "o": [{"m": torch.zeros(2)}], "s": {"lr": 1}}
    others = [{**one, "a": one["a"].int()}, {**one, "a": one["a"][None]}, {**one, "s": {}},
              {**one, "o": [{"m": torch.ones(2)}]}, {**one, "o": []}, {**one, "s": {"lr": 1.0}},
              {**one, "s": {"lR": 1}}, {"b": one["a"], "o": one["o"], "s": one["s"]}]
    assert len({checkpoint.digest(x) for x in (one, *others)}) == len(others) + 1
    assert checkpoint.digest(one) == checkpoint.digest(dict(reversed(one.items())))
    return f"{len(others)} changes change it"


def test_checkpoint_file():
    """A checkpoint rebuilds its own model, with settings far from the defaults. Truncated, flipped,
    foreign, malicious and compressed files: one line, no code run."""
    far = {"tie_embeddings": True, "qk_norm": False, "rope_base": 500.0, "norm_eps": 1e-4}
    with checkpoint_folder(**far) as (folder, net, _):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {folder}/proof",)

        path, last, flips, foreign, order = folder / "best.pt", folder / "last.pt", 0, [], []
        state = {**checkpoint.load_checkpoint(path), "val": {"bound": (1.5, 0.25)}}
        del state["digest"]
        with mock.patch.object(os, "replace", lambda old, new: order.append((old.name, new.name))):
            checkpoint.save_checkpoint(last, state, path, before=lambda: order.append("log"))
        assert order == ["log", *((f"{n}.tmp", n) for n in ("best.pt", "last.pt"))], order
        checkpoint.save_checkpoint(path, state)
        (other, loaded), x0 = checkpoint.load_model(folder), tokens_for(net)
        assert other.config == net.config and (other(x0) == net(x0)).all()
        assert loaded["val"] == state["val"] and {p.name for p in folder.iterdir()} == {
            "best.pt", "last.pt.tmp"}  # of the save that was left unfinished above
        good, whole = path.read_bytes(), checkpoint.digest(net.state_dict())
        places = range(0, len(good), len(good) // 200)
        for position in places:
            damaged = bytearray(good)
            damaged[position] ^= 16
            path.write_bytes(damaged)
            try:
                other, _ = checkpoint.load_model(folder)
            except configurator.SettingsError as e:
                assert "\n" not in str(e)
                flips += 1
            else:  # a byte of padding in the archive: nothing that was stored has changed
                assert checkpoint.digest(other.state_dict()) == whole
        assert flips > len(places) / 2, flips
        for how in (True, False):  # torch's old format has no sizes to check first
            torch.save({"format": 1, "x": Evil()}, path, _use_new_zipfile_serialization=how)
            foreign.append(path.read_bytes())
        with zipfile.ZipFile(io.BytesIO(good)) as z, zipfile.ZipFile(path, "w", 8) as packed:
            for name in z.namelist():
                packed.writestr(name, z.read(name))
        foreign += [path.read_bytes(), good[: len(good) // 2], good[:50], b"", b"not one"]
        # with another pickle protocol, of which torch would warn
        foreign.append(good.replace(b"\x80\x02", b"\x80\x74", 1).replace(b"format", b"farmat", 1))
        for content in foreign:
            path.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                refuses_command(sample, [f"--out_dir={folder}"], "is damaged or no checkpoint")
        assert not (folder / "proof").exists(), "a checkpoint ran code"
    return (f"logits bitwise equal; {flips} of {len(places)} bit flips (the others hit padding) "
            f"and {len(foreign)} other files refused")


def laughs(depth=60):
    """A nest of 2^depth references to itself, of a few hundred bytes."""
    nest = ["ha"]
    for _ in range(depth):
        nest = [nest, nest]
    return nest


def put(*path):
    """A change of a checkpoint's state: the last of `path` becomes the value at the keys before."""
    def change(state):
        *keys, last, value = path
        for key in keys:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value
    return change


BAD_STATES = {
    "not all of": put("model", "norm.weight", lambda w: w * math.nan),
    "larger than": put("config", "n_layer", 10**7), "config is la": put("config", "seq_len", 2**42),
    "its config is larger": put("config", "n_embd", 2 * 10**8),
    "not fit its weights": put("config", "local_window", 12),
    "n_layer": put("config", "n_layer", 2.0),
    "rope_base": put("config", "rope_base", math.nan), "norm_eps": put("config", "norm_eps", 0.0),
    "float32": put("model", "norm.weight", lambda w: w.double()),
    "does not fit": put("model", "norm.weight", lambda w: w[:-1].clone()),
    "not fit": put("model", lambda m: {k: v for k, v in m.items() if k != "norm.weight"}),
    "config does": put("model", "more", torch.ones(1)),
    "more than its size": put("model", "norm.weight", torch.ones(1).expand(10**6, 10**6)),
    "unfolds": put("final", {"x": laughs()}), "best_step": put("best_step", True),
    "no sense": put("step", -1), "step": put("step", "3"), "figures": put("best", math.nan),
    "make no": put("val", {"bound": (math.nan, 0.0)}), "TypeError)": put("val", {"gpt": 1}),
    "vocabulary": put("meta", "vocab_size", 3), "sense": put("settings", "x", [1]),
    "model is": put("model", []), "(TypeError": put("config", "unknown", 1),
    "not a CASCADE": put("format", 2),
}
BAD_MOMENTS = {
    "another shape": put("optimizers", 0, "state", 0, "exp_avg", lambda x: x[:1, :1].clone()),
    "a shape that has as many": put("optimizers", 0, "state", 0, "exp_avg_sq", lambda x: x.mT),
    "another dtype": put("optimizers", 1, "state", 0, "momentum", lambda x: x.double()),
    "no tensor": put("optimizers", 1, "state", 0, "momentum", 1.0),
    "one too few": put("optimizers", 0, "state", 0, lambda x: {"step": x["step"]}),
    "a parameter too many": put("optimizers", 1, "state", 999, {}),
    "before the first step": put("optimizers", 0, "state", 0, "step", torch.tensor(-1.0)),
    "a step for each weight": put("optimizers", 0, "state", 0, "step", torch.ones(8, 16)),
    "one optimizer": put("optimizers", lambda x: x[:1]), "no optimizer": put("optimizers", [[], 3]),
}


def test_checkpoint_structure():
    """States with a true digest that are wrong in one part: refused before anything is allocated,
    by sampling and by resuming; optimizer states that do not fit the weights, by resuming."""
    with data_folder() as folder:
        train_tiny(folder, max_steps=2)
        last = folder / "out/last.pt"
        (folder / "out/best.pt").unlink()
        good, began = last.read_bytes(), time.perf_counter()
        resume = arguments(tiny_settings(folder, max_steps=3, init_from="resume"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for word, change in (BAD_STATES | BAD_MOMENTS).items():
            state = torch.load(io.BytesIO(good), weights_only=True)
            del state["digest"]
            change(state)
            true = word not in ("unfolds", "more than its size")  # their digest would take forever
            torch.save({**state, "digest": checkpoint.digest(state) if true else ""}, last)
            if word in BAD_MOMENTS:
                refuses_command(train, resume, "optimizer state", "start again")
                checkpoint.load_model(last)
                continue
            refuses(lambda: checkpoint.load_model(last), word)
            for script in (sample, evaluation) if word == "not all of" else ():
                refuses_command(script, [f"--out_dir={folder}/out"], word)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        seconds = time.perf_counter() - began
        last.write_bytes(good)
        assert call_main(train, resume)[0] == 0
    return within(more, 200, f"{len(BAD_STATES)} states and {len(BAD_MOMENTS)} optimizers refused "
                             f"of {len(good) >> 10} kB in {seconds:.1f} s; MiB more")


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    train: {
        "--lerning_rate=1": "did you mean learning_rate", "--seed=abc": "seed must be int",
        "config/nowhere.py": "no config file", "README.md": "ends in .py",
        "--dataset=nowhere": "no dataset", "--n_head=16": "even head dimension",
        "--noise=white": "--noise must be one of", "--batch_size=0": "must be 1 or more",
        "--max_steps=0": "set --max_steps or --max_minutes", "--optimizer=sgd": "muon, adamw",
        "--seed=99999999999999999999": "between 0 and", "--seed=-1": "between 0 and",
        "--micro_batch=-1": "must be 0 or more", "--muon_lr=-1": "must be 0 or more",
        "--learning_rate=nan": "must be 0 or more", "--dtype=float8": "--dtype must be",
        "--attention=flex": "needs CUDA", "--attention=all": "--attention must be one of",
        "--seq_len=4000": "fewer than a sequence", "--m_min=0": "mask rates",
        "--init_from=resume": "no last.pt to resume", "--shard=true": "torchrun",
        "--out_dir={folder}/out --overwrite=false": "holds a run already (last.pt)",
        "--out_dir={folder}/meta.json": "cannot write", "--out_dir=" + "x" * 300: "cannot write",
        "--n_embd=20000000000 --local_window=0": "",
        "--learning_rate=1e30 --optimizer=adamw --max_steps=9 --warmup_steps=0 --grad_clip=0":
            "not finite",
    },
    sample: {
        "--out_dir=" + "x" * 300: "no checkpoint", "--seed=9223372036854775808": "--seed must be",
        "--out_dir=\x1b[2J\n": "no checkpoint in \\x1b[2J\\n", "--delay=inf": "--delay must be",
    },
    evaluation: {
        "--seed=-1": "--seed must be", "--csv={folder}/cut.csv --windows=2": "columns",
    },
    bench: {"decode --batches=8:0": "--batches must be"},  # before a checkpoint is looked for
}


def test_run_mistakes():
    """A user's mistake ends in one line with the remedy, exit code 1 or 2, no traceback; a whole
    one for those who ask."""
    with data_folder() as folder:
        train_tiny(folder, max_steps=2)
        new = arguments(tiny_settings(folder, max_steps=1, out_dir=folder / "new"))
        (folder / "cut.csv").write_text("a,b\n1,")
        for script, table in MISTAKES.items():
            usual = {train: new, bench: []}.get(script, [f"--out_dir={folder}/out"])
            for given, word in table.items():
                refuses_command(script, usual + given.format(folder=folder).split(" "), word)
        for rank, world in (("x", "2"), ("2", "2"), ("-1", "1"), ("0", "0"), ("", "2")):
            with mock.patch.dict(os.environ, {"RANK": rank, "WORLD_SIZE": world}):
                refuses_command(train, new, "torchrun sets them")
        error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")
        with at(1, fails(error)):
            refuses_command(train, new, "out of memory", "smaller batch")
            with contextlib.suppress(RuntimeError):
                raise AssertionError(call_main(train, [*new, "--traceback=true"]))
        code, _, err = command("train.py", "--lerning_rate=1")
        assert code == 2 and err.count("\n") == 1, err
    return f"{sum(map(len, MISTAKES.values())) + 7} mistakes, one line each"


def test_streams():
    """An ASCII terminal, a closed and a full standard output; a Ctrl-C while the modules load."""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    with checkpoint_folder() as (folder, *_):
        argv = ["sample.py", f"--out_dir={folder}", "--temperature=9"]
        for shell, code, word in (("", 0, "\\xe9"), (">&-", 0, ""), (">/dev/full", 2, "No space"),
                                  ("| true; exit ${PIPESTATUS[0]}", 1, "")):
            run = subprocess.run(["bash", "-c", f"{sys.executable} {' '.join(argv)} {shell}"],
                                 cwd=HERE, capture_output=True, text=True, env=ascii_only)
            assert run.returncode == code and run.stderr.count("\n") == (code == 2), run
            assert word in run.stdout + run.stderr, run
    # when the first module of ours is there, before a script has done anything
    ctrl_c = "import signal, util.configurator; signal.raise_signal(2); print('went on')"
    assert command("-c", ctrl_c) == (-signal.SIGINT, "", "")
    return "decoded in ASCII; nothing, one line, nothing; ended by the signal"


# ---- runs: what is replaced, saved and refused ---------------------------------------------------


def at(step, act):
    """A train.Run that calls act(run) when it has taken the step that makes it `step` steps."""
    class Acting(train.Run):
        def train_step(self, progress):
            total = super().train_step(progress)
            if self.step == step:
                act(self)
            return total
    return mock.patch.object(train, "Run", Acting)


def fails(error):
    """A function that raises."""
    return mock.Mock(side_effect=error)


def test_overwrite():
    """--overwrite=true destroys nothing before there is a whole new checkpoint, then all of it; nor
    does a second run beside a living one. A dead run's lock is no matter."""
    with data_folder() as folder:
        train_tiny(folder, max_steps=2, seed=1)
        out, new = folder / "out", tiny_settings(folder, max_steps=4, eval_every=2, seed=2)

        def contents():
            return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix != ".tmp"}

        (out / "lock").write_text("99999")
        old, pid = contents(), f"another run (process {os.getpid()})"
        assert set(old) == {*checkpoint.WRITTEN, "lock"}, old.keys()
        for failing, more, word in (
            (contextlib.nullcontext, {"noise": "white"}, "--noise"),
            (lambda: checkpoint.lock(out), {}, pid),
            (lambda: at(1, fails(RuntimeError("a bug"))), {}, "RuntimeError: a bug"),
            (lambda: at(2, fails(ValueError("of step 2"))), {}, "of step 2"),
            (lambda: mock.patch.object(torch, "save", fails(OSError(28, "full"))), {}, "free some"),
        ):
            with failing():
                refuses_command(train, arguments(new | more), word)
            kept = contents() | {"lock": old["lock"]}
            assert kept == old, (word, [k for k in old if old[k] != kept.get(k)])
        with at(3, fails(KeyboardInterrupt())):  # dead after its first checkpoint, of step 2
            assert call_main(train, arguments(new))[0] == 130
        found = contents()
        assert set(found) == set(old) and not list(out.glob("*.tmp")), found.keys()
        for name in ("last.pt", "best.pt"):
            assert checkpoint.load_checkpoint(out / name)["settings"]["seed"] == 2, name
        assert b"seed = 2" in found["settings.py"]
        assert [int(r["step"]) for r in read_log(out / "log.csv")] == [2]
        train_tiny(folder, **new | {"overwrite": False, "init_from": "resume"})
    return "5 failures left the old run as it was"


def test_odd_files():
    """A link, a folder or a pipe under one of a run's names stops it, and is not written through; a
    log or settings without a checkpoint are kept."""
    with data_folder() as folder:
        out, victim = folder / "out", folder / "victim"
        out.mkdir()
        new = arguments(tiny_settings(folder, max_steps=1))
        names = (*checkpoint.WRITTEN, "lock", "last.pt.tmp", "log.csv.tmp", "wandb")
        makes = (lambda path: path.symlink_to(victim), os.mkfifo, os.mkdir)
        odd = [*itertools.product(names, makes)][:-1]  # wandb may be a folder
        for name, make in odd:
            victim.write_text("keep")
            make(out / name)
            refuses_command(train, new, "is a link or no file")
            assert victim.read_text() == "keep" and len(list(out.iterdir())) == 1, name
            (out / name).rmdir() if make is os.mkdir else (out / name).unlink()
        for name in ("settings.py", "log.csv"):
            (out / name).write_text("x = 1\n")
            refuses_command(train, [*new, "--overwrite=false"], "holds a run already", "overwrite")
            (out / name).unlink()
    return f"{len(odd)} links, pipes and folders refused"


def test_tables():
    """eval.py --csv goes on behind a last line without its end; a chart of nothing but zeros."""
    row, new = [{"a": 1, "b": 0.5, "list": [1]}], "a,b\n1,0.5\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "new/table.csv")
        evaluation.append_csv(path, row)
        assert path.read_text() == new, path.read_text()
        for content in ("a,b", "a,b\n2,3", "a,b\n2,3\n", "\xff\xfe", "a,c\n", "\0"):
            path.write_text(content, encoding="latin-1")
            if content.startswith("a,b"):
                evaluation.append_csv(path, row)
                content = content.rstrip("\n") + new.removeprefix("a,b")
            else:
                refuses(lambda: evaluation.append_csv(path, row), "another file")
            assert path.read_text(encoding="latin-1") == content
    lines = evaluation.chart(torch.zeros(4), torch.ones(4)).splitlines()
    assert len(lines) == 5 and not any("#" in line for line in lines), lines
    return "4 rows, each on its line"


def ask(number):
    """An act that sends this process a signal."""
    return lambda run: signal.raise_signal(number)


def room(size=None):
    """Let no file here grow beyond `size` bytes, as on a full disk; without a size, lift that."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def spoil(part, value):
    """An act that fills a weight, or its moment, with a number that is not finite."""
    def act(run):
        weight = run.model.blocks[0].attn.q.weight
        {"weight": weight.data, **run.optimizers[1].state[weight]}[part].fill_(value)
    return act


def deaf(error):
    """An act after which standard output takes no more."""
    return lambda run: setattr(sys.stdout, "write", fails(error))


GO_ON = "saved; go on with\n  python train.py"
GOOD = "last.pt is good, of step 2", "--learning_rate", "--out_dir"
ENDINGS = (  # after this step, this happens: exit code, the step that is saved, words
    (4, ask(signal.SIGINT), 130, 4, f"stopped at step 4, {GO_ON}"),
    (4, ask(signal.SIGTERM), 143, 4, f"stopped at step 4, {GO_ON}"),
    (4, ask(signal.SIGHUP), 129, 4, f"stopped at step 4, {GO_ON}"),
    (6, ask(signal.SIGINT), 130, 6, f"stopped at step 6, {GO_ON}"),
    (2, deaf(BrokenPipeError(32, "Broken pipe")), 2, 3, "Broken pipe", "saved; go on with"),
    (2, deaf(OSError(28, "No space left")), 2, 3, "No space left", "saved; go on with"),
    (3, lambda run: room(50_000), 2, 2, "cannot write", "free some space"),  # half a checkpoint
    (3, spoil("weight", math.nan), 2, 2, "the gradient is not finite at step 3 ", *GOOD),
    (3, lambda run: setattr(run, "terms", lambda *_: torch.full((3,), math.inf).requires_grad_()),
     2, 2, "the loss is not finite at step 4 ", *GOOD),
    (4, spoil("weight", math.nan), 2, 2, "validation bound is not finite at step 4 ", *GOOD),
    (4, spoil("momentum", math.inf), 2, 2, "the model is not finite at step 4 ", *GOOD),
    (6, lambda run: setattr(run, "evaluate", fails(KeyboardInterrupt())), 130, 6),
    (6, lambda run: setattr(run, "evaluate", fails(RuntimeError("a bug"))), 1, 6, "a bug"),
)


def test_endings():
    """A signal, a closed or full standard output, a disk that fills up, numbers that are not
    finite, a failing evaluation: what is said and saved, and that it resumes as if nothing was."""
    with data_folder() as folder:
        s, last = {"max_steps": 6, "log_every": 1, "eval_every": 2}, folder / "out/last.pt"
        whole, _ = train_tiny(folder, **s, out_dir=f"{folder}/whole")
        argv = arguments(tiny_settings(folder, **s))
        for step, act, code, saved, *words in ENDINGS:
            with at(step, act), contextlib.ExitStack() as end:
                end.callback(room)
                found, said, err = call_main(train, argv)
            assert found == code and all(w in said + err for w in words), (words, found, said, err)
            assert err.count("\n") == (code < 3) and not list(last.parent.glob("*.pt.tmp")), err
            state = checkpoint.load_checkpoint(last)
            assert state["step"] == saved and not state["final"], (words, state["step"])
            rest, _ = train_tiny(folder, **s, init_from="resume")
            assert (weights(rest) == weights(whole)).all() and rest.final == whole.final, words
        for more, target, name, error, code in (  # a finished run keeps what it has
            ("--init_from=resume", train.Run, "evaluate", KeyboardInterrupt(), 130),
            ("--sample_tokens=4", train, "generate_stream", RuntimeError("a bug"), 1),
        ):
            with mock.patch.object(target, name, fails(error)):
                found, said, _ = call_main(train, [*argv, more])
            assert found == code and ("| gpt" in said) == (code == 1), said
            assert checkpoint.load_checkpoint(last)["final"] == whole.final
        room(10)  # already settings.py does not fit
        try:
            refuses_command(train, argv, "cannot write", "free some space")
        finally:
            room()
        assert checkpoint.load_checkpoint(last)["final"] == whole.final
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        with machine.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)
        assert stop.asked == 0
    return f"{len(ENDINGS)} endings: 0 bits of difference after each"


def test_resume_compares():
    """Other data, numbers or dtype than the run began with are refused; moved data is not, nor is
    another end. The first row after a resume is the mean of the steps since."""
    with data_folder() as folder:
        s = {"max_steps": 6, "log_every": 4, "eval_every": 3, "out_dir": f"{folder}/out"}
        again, last = tiny_settings(folder, **s, init_from="resume"), folder / "out/last.pt"
        with at(4, fails(KeyboardInterrupt())):
            assert call_main(train, arguments(tiny_settings(folder, **s)))[0] == 130
        for name, value in (("dtype", "bfloat16"), ("weight_decay", 0.3), ("noise", "balanced"),
                            ("beta2", 0.9), ("copies", 1), ("warmup_steps", 9), ("grad_clip", 2)):
            refuses_command(train, arguments({**again, name: value}), "other settings", name)
        text = "".join("abcdef\n"[i] for i in (torch.arange(4000) ** 2 // 5 % 7).tolist())
        for name, chars, words in (("fewer", "abcdef\n", "vocabulary"), ("more", "\nabcdefg", ""),
                                   ("other", "\nabcdef", "train, val of")):
            write_dataset(folder / name, text, chars)
            other = {**again, "dataset": f"{folder / name}"}
            refuses_command(train, arguments(other), "other data", "--any_data=true", words)
            if name == "more":
                refuses_command(train, arguments({**other, "any_data": True}), "other data")
        state = last.read_bytes()
        code, _, err = call_main(train, arguments({**other, "any_data": True}))
        assert code == 0 and "resumed on other data, as asked: train, val" in err, err
        last.write_bytes(state)
        moved = folder.rename(folder.with_name("moved"))
        train_tiny(moved, **s | {"out_dir": f"{moved}/out"}, init_from="resume")
        train_tiny(moved, **s | {"log_every": 1, "out_dir": f"{moved}/each"})
        rows, each = ({int(r["step"]): r["gpt"] and float(r["gpt"]) for r in read_log(path)}
                      for path in (moved / "out/log.csv", moved / "each/log.csv"))
        assert sorted(rows) == [3, 4, 6] and not rows[3], rows
        off = max(abs(rows[4] - each[4]), abs(rows[6] - (each[5] + each[6]) / 2))
    return within(off, 1e-6, "7 settings, 3 data sets refused; means since the resume off by")


# ---- long runs -----------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")  # its children find these imported already
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp"])


def train_body(argv, said, env, tamper):
    """In a process of its own: train.py's command line, with what it prints in the file `said`."""
    os.environ.update(env)
    with open(said, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    tamper()
    sys.exit(train.main(argv))


def start(folder, said, world=1, tamper=int, **settings):
    """The started processes of a run like train_tiny's, by gloo and without torchrun: each calls
    `tamper` first, and rank i prints to the file `said` + i."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {"WORLD_SIZE": f"{world}", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": f"{s.getsockname()[1]}"}
    argv, processes = arguments({**TINY, "dataset": folder, **settings}), []
    for i in range(world):
        args = argv, f"{said}{i}", env | {"RANK": f"{i}", "LOCAL_RANK": f"{i}"}, tamper
        processes.append(FORKS.Process(target=train_body, args=args, daemon=True))
        processes[-1].start()
    return processes


def ended(process, said, limit=150.0):
    """(exit code, what it printed) of a process that must end within `limit` seconds."""
    process.join(limit)
    alive = process.is_alive()
    process.kill()
    text = Path(said).read_text()
    assert not alive, f"still running after {limit:.0f} s: {text[-300:]}"
    return process.exitcode, text


def wait_for_steps(process, said, count):
    """Until the process has reported `count` steps, or has ended."""
    while process.is_alive() and not (
            os.path.exists(said) and Path(said).read_text().count("| eta") >= count):
        time.sleep(0.002)


def die_in_save(nth, moment):
    """Have this process kill itself in its nth write of last.pt, at one of three moments."""
    count, save, replace = itertools.count(1), torch.save, os.replace

    def half_saved(state, f):
        save(state, f)
        if "last.pt" in f.name and next(count) == nth:
            f.truncate(f.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def renamed(old, new):
        dies = Path(new).name == "last.pt" and next(count) == nth
        if not dies or moment == "after":
            replace(old, new)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "half":
        torch.save = half_saved
    else:
        os.replace = renamed


def survive(kills, steps):
    """One run, killed once per item of `kills` and resumed: it must end as if never killed.

    An item is (n, "half" | "before" | "after"): in the nth write of last.pt, with half of it
    written, before or after its rename. Or (n, x): n reported steps after the start, and x of a
    step's time later. Returns how many of the kills in a save left a half-finished file behind.
    """
    settings = {"max_steps": steps, "eval_every": 2, "log_every": 1, "eval_windows": 2}
    torn = 0
    with data_folder() as folder:
        whole, _ = train_tiny(folder, **settings, out_dir=f"{folder}/a")
        a, b, last = folder / "a", folder / "b", folder / "b/last.pt"

        def again():
            how = "resume" if last.exists() else "scratch"
            return {**settings, "out_dir": b, "overwrite": True, "init_from": how}

        for i, (n, moment) in enumerate(kills):
            said, inside = f"{folder}/said{i}.", isinstance(moment, str)
            tamper = functools.partial(die_in_save, n, moment) if inside else int
            [process] = start(folder, said, tamper=tamper, **again())
            if not inside:
                wait_for_steps(process, f"{said}0", n)
                time.sleep(moment * whole.seconds / steps)
                process.kill()
            code, text = ended(process, f"{said}0")
            assert code == -signal.SIGKILL, (i, code, text[-300:])
            if inside:
                left = any(b.glob("*.pt.tmp"))
                assert left == (moment != "after"), (i, moment, left)
                torn += left
            # step N + 1 is reported after the save of step N, which is even
            seen = max(map(int, re.findall(r"^step +(\d+)/.*eta", text, re.M)), default=0)
            saved = checkpoint.load_checkpoint(last)["step"] if last.exists() else 0
            assert saved >= (seen - 1) // 2 * 2, f"step {seen} reported, {saved} saved"
        train_tiny(folder, **again())
        assert not list(b.glob("*.tmp")), "the half files of killed runs stay"
        for name in ("last.pt", "best.pt"):
            first, second = (checkpoint.load_checkpoint(p / name) for p in (a, b))
            for part in ("model", "optimizers", "val", "final", "best", "best_step", "step"):
                assert checkpoint.digest(first[part]) == checkpoint.digest(second[part]), (
                    f"{part} of {name} differs")
        rows = [[{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
                 for row in read_log(p / "log.csv")] for p in (a, b)]
        assert rows[0] == rows[1] and len(rows[0]) == steps, rows
    return torn


def test_killed_runs():
    """Killed in a half-written checkpoint, before its rename and at a random moment; resumed."""
    kills = [(2, "half"), (3, "before"), (3, random.random())]
    torn = survive(kills, 20)
    assert torn >= 2, torn
    return f"{len(kills)} kills, {torn} inside a save, 0 bits of difference"


def test_log():
    """One row per step that was reported or evaluated; cut and continued where a run is resumed."""
    with data_folder() as folder:
        s = {"max_steps": 10, "log_every": 4, "eval_every": 3, "out_dir": f"{folder}/out"}
        run, said = train_tiny(folder, **s)
        path, config, odd = (folder / f"out/{n}" for n in ("log.csv", "settings.py", "odd.py"))
        rows = read_log(path)
        assert list(rows[0]) == list(log.COLUMNS), rows[0]
        kinds = [r["step"] + " gpt" * bool(r["gpt"]) + " val" * bool(r["val_gpt"]) for r in rows]
        assert kinds == ["3 val", "4 gpt", "6 val", "8 gpt", "9 val", "10 gpt val"], rows
        printed = re.findall(r"gpt ([0-9.]+) .*\| eta", said)
        assert printed == [f"{float(r['gpt']):.3f}" for r in rows if r["gpt"]], (printed, rows)
        assert float(rows[-1]["val_gpt"]) == float(f"{run.val['gpt'][0]:.8g}"), rows[-1]
        # a run that was killed at step 13, while writing a row, with a checkpoint of step 10
        good = path.read_bytes()
        path.write_bytes(good + b"12,1,2" + b"," * 10 + b"\nnot a row\n13,1,2,,")
        train_tiny(folder, **s, init_from="resume")  # nothing left to do: the last row stays one
        assert read_log(path) == rows, read_log(path)
        train_tiny(folder, **s | {"max_steps": 16}, init_from="resume")
        steps = [int(r["step"]) for r in read_log(path)]
        assert steps == [3, 4, 6, 8, 9, 10, 12, 15, 16] and path.read_bytes().startswith(good[:300])
        # the settings beside it start the same run again
        got = configurator.override(train.DEFAULTS, [str(config)])
        asked = {**train.DEFAULTS, **TINY, **s, "max_steps": 16, "dataset": f"{folder}"}
        assert got == asked, {k: (v, asked[k]) for k, v in got.items() if v != asked[k]}
        hard = {"max_minutes": math.inf, "noise": 'a"\n\'b'}
        log.write_settings(odd, hard)
        assert configurator.override({"max_minutes": 1.0, "noise": ""}, [str(odd)]) == hard
    return f"{len(rows)} rows, then {len(steps)} after a torn one; settings.py equals the settings"


def test_wandb():
    """--wandb=true: the same numbers go to wandb; without the package, how to install it."""
    logged = []
    run = SimpleNamespace(id="abc", finish=lambda: logged.append("finish"),
                          log=lambda values, step: logged.append((step, sorted(values))))
    fake = SimpleNamespace(Error=OSError, init=lambda **k: logged.append(k.get("id")) or run)
    with data_folder() as folder, contextlib.ExitStack() as end:
        s = {"log_every": 2, "eval_every": 2, "wandb": True}
        end.callback(sys.modules.pop, "wandb")
        sys.modules["wandb"] = None  # as where it is not installed
        refuses(lambda: train_tiny(folder, **s, max_steps=4), "pip install wandb")
        sys.modules["wandb"] = fake
        train_tiny(folder, **s, max_steps=4)
        train_tiny(folder, **s, max_steps=6, init_from="resume")
    report = sorted(("bound", "gpt", "joint", "lr", "seconds", "tokens_per_second"))
    rows = [[(n, x) for x in (report, sorted(log.VAL))] for n in (2, 4, 6)]
    assert logged == [None, *rows[0], *rows[1], "finish", "abc", *rows[2], "finish"], logged
    return "a stand-in got every row, and the run's name when it was resumed"


def test_sharded():
    """--shard=true on 2 processes: the weights, checkpoints and resumptions of the plain run."""
    with data_folder() as folder:
        s = {"log_every": 1, "warmup_steps": 1, "seed": 3}

        def states(*names):
            return [checkpoint.load_checkpoint(f"{folder}/{name}/last.pt") for name in names]

        for out in ("plain", "mixed"):
            train_tiny(folder, **s, max_steps=4, out_dir=f"{folder}/{out}")
        for out, more in (  # the accumulation leaves 2 sequences to a forward pass
            ("sharded", {"max_steps": 4, "micro_batch": 2, "sample_tokens": 4}),
            ("mixed", {"max_steps": 7, "init_from": "resume"}),
        ):
            two = start(folder, f"{folder}/{out}.said", 2, **s, **more, shard="true",
                        out_dir=f"{folder}/{out}")
            for i, process in enumerate(two):
                code, text = ended(process, f"{folder}/{out}.said{i}")
                assert code == 0 and "a sample" not in text, text[-1000:]
        worst = [state_difference(*states("plain", "sharded"))]
        for out in ("plain", "sharded"):
            train_tiny(folder, **s, max_steps=7, out_dir=f"{folder}/{out}", init_from="resume")
        plain, *others = states("plain", "sharded", "mixed")
        worst += [state_difference(plain, other) for other in others]
        finals = [x["final"]["bound"][0] for x in (plain, *others)]
        assert max(finals) - min(finals) < 1e-5, finals
        o = "blocks.0.attn.o.weight"  # starts at zero
        assert plain["model"][o].abs().max() > 1e-3, "nothing was learnt"
    return within(max(worst), 5e-4, "sharded, and resumed both ways: weights, moments max|diff|")


def state_difference(a, b):
    """Largest difference of two checkpoints' tensors: weights, and moments as shares of theirs."""
    assert a["model"].keys() == b["model"].keys() and a["step"] == b["step"]
    worst = max(diff(v, b["model"][k]) for k, v in a["model"].items())
    for x, y in zip(tree_leaves(a["optimizers"]), tree_leaves(b["optimizers"]), strict=True):
        if isinstance(x, torch.Tensor):
            worst = max(worst, diff(x, y) / max(1e-12, x.abs().max().item()))
        else:
            assert x == y, (x, y)
    return worst


def test_shared_errors():
    """Under torchrun an error of all processes is printed by the main one, any other by its own."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}",
           "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said = []
    for rank, message in ((0, "shared"), (1, "shared"), (1, "mine alone")):
        with mock.patch.dict(os.environ, {**env, "RANK": f"{rank}"}), mock.patch.object(
                train, "Run", fails(configurator.SettingsError(message))):
            said.append(call_main(train, [])[2])
    assert said == ["error: shared\n", "", "error: mine alone\n"], said
    return "shared: printed once; a rank's own: printed"


# ---- faults: python test_all.py faults -----------------------------------------------------------


def faults_kills():
    """SIGKILL at 20 moments, 8 of them inside a save for certain, with a save every 2 steps."""
    r = random.Random(time.time_ns())
    kills = [(r.randint(1, 5), m) for m in ("half", "before", "after") * 3][:8]
    kills += [(r.randint(0, 6), r.random()) for _ in range(12)]
    r.shuffle(kills)
    torn = survive(kills, 160)
    return f"{len(kills)} kills, {torn} left a torn file; 0 steps lost, 0 bits of difference"


def faults_lost_process():
    """One of two processes is killed: the other ends by itself with one line; then resumed."""
    waited = []
    with data_folder() as folder:
        s = {"max_steps": 40, "eval_every": 2, "log_every": 1, "eval_windows": 2}
        whole, _ = train_tiny(folder, **s, out_dir=f"{folder}/a")
        for victim in (1, 0):
            said, out = f"{folder}/said{victim}.", {"out_dir": f"{folder}/b{victim}"}
            two = start(folder, said, 2, **s, **out)
            wait_for_steps(two[0], f"{said}0", 6)
            two[victim].kill()
            began = time.perf_counter()
            code, text = ended(two[1 - victim], f"{said}{1 - victim}", 60)
            waited.append(time.perf_counter() - began)
            lines = [x for x in text.splitlines() if x.startswith("error: ")]
            assert code == 2 and len(lines) == 1 and "--init_from=resume" in lines[0], text
            assert "Traceback" not in text, text
            assert checkpoint.load_checkpoint(f"{folder}/b{victim}/last.pt")["step"] >= 4
            rest, _ = train_tiny(folder, **s, **out, init_from="resume")
            within(diff(weights(whole), weights(rest)), 1e-4, "weights max|diff|")
    return within(max(waited), 30, "seconds until the other has ended")


def faults_torchrun():
    """torchrun: an error of all processes is one line; SIGTERM saves, and says how to go on."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    with data_folder() as folder:
        taken = [f"--dataset={folder}", f"--out_dir={folder}/meta.json"]
        for argv, expected in ((["--lerning_rate=1"], "did you mean"), (taken, "cannot write")):
            code, _, err = command(*torchrun, *argv)
            lines = [x for x in err.splitlines() if x.startswith("error: ")]
            assert code and len(lines) == 1 and expected in lines[0], err[-2000:]
        s = tiny_settings(folder, max_steps=100_000, log_every=1)
        process = subprocess.Popen([sys.executable, *torchrun, *arguments(s)], cwd=HERE, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        while "| eta" not in (line := process.stdout.readline()):
            assert line, "torchrun ended before the first step"
        process.terminate()
        said, _ = process.communicate(timeout=60)
        step = checkpoint.load_checkpoint(f"{folder}/out/last.pt")["step"]
        assert f"stopped at step {step}, saved" in said and "--init_from=resume" in said, said
    return f"2 mistakes, one line each from two processes; SIGTERM saved step {step}"
