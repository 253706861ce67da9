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
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
    Skip,
    arguments,
    call_main,
    checkpoint_folder,
    command,
    data_folder,
    diff,
    read_log,
    refuses,
    refuses_command,
    tiny_model,
    tiny_settings,
    tokens_for,
    train_tiny,
    weights,
    within,
    write_dataset,
)
from util import checkpoint, configurator, log, machine

try:
    import resource
except ImportError:
    resource = None

# ---- settings ------------------------------------------------------------------------------------


def test_configurator():
    """Typed overrides; wrong names, types and files are refused by name, with the nearest one."""
    defaults = {"steps": 100, "rate": 1e-3, "name": "a", "flag": True}
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder, "good.py"), Path(folder, "bad.py")
        good.write_text("import math\nfrom numpy import float32\nsteps = 8 * 4\nrate = 1\n"
                        "_private = [1]\ndef half(x):\n    return x / 2\n")
        cases = [
            (["--steps=1e3"], "steps", 1000), (["--steps=0"], "steps", 0),
            (["--rate=1"], "rate", 1.0), (["--rate=-2.5e-4"], "rate", -2.5e-4),
            (["--flag=false"], "flag", False), (["--flag=0"], "flag", False),
            (["--flag=True"], "flag", True), (["--name=a=b"], "name", "a=b"),
            (["--name="], "name", ""), (["--name=1e3"], "name", "1e3"),
            ([str(good)], "steps", 32), ([str(good)], "rate", 1.0),
            ([str(good), "--steps=7"], "steps", 7), (["--steps=7", str(good)], "steps", 32),
            (["--steps=12345678901234567"], "steps", 12345678901234567),
        ]
        for argv, key, value in cases:
            got = configurator.override(defaults, argv)[key]
            assert got == value and type(got) is type(value), (argv, got)
        refused = ["--steps=1.5", "--steps=x", "--rate=fast", "--flag=yes", "--steps=nan",
                   "--steps=inf", "--steps", "-steps=1", "nowhere.py", "--steps=\u00b2"]
        for arg in refused:
            refuses(lambda a=arg: configurator.override(defaults, [a]), arg.strip("-")[:5])
        refuses(lambda: configurator.override(defaults, ["--stesp=1"]), "did you mean steps?")
        texts = {
            "stesp = 3": "did you mean steps?", "steps = 'x'": "steps must be int",
            "steps = 1.5": "steps", "flag = 2": "flag", "1 +": "SyntaxError", "1 / 0": "ZeroDiv",
            "rate = 1e-3,": "rate must be float", "rate = None": "rate", "name = ['a']": "name",
            "import numpy as np\nrate = np.float32(1e-3)": "rate", "stesp = [3]": "steps?",
            "flag = [True]": "flag", "raise SystemExit": "SystemExit", "steps = 3\0": "bad.py",
            "raise ValueError('a\\nb')": "ValueError: a",
        }
        for text, word in texts.items():
            bad.write_text(text)
            refuses(lambda: configurator.override(defaults, [str(bad)]), word)
        for name, content in (("good.txt", b"steps = 1"), ("good", b"steps = 1"),
                              ("latin.py", b"name = '\xe9'"), ("zip.py", None)):
            path = Path(folder, name)
            if content is None:
                with zipfile.ZipFile(path, "w") as z:
                    z.writestr("__main__.py", "steps = 1")
            else:
                path.write_bytes(content)
            refuses(lambda p=path: configurator.override(defaults, [str(p)]), name)
    assert configurator.override(defaults, []) == defaults
    return f"{len(cases)} good, {len(refused) + len(texts) + 5} refused"


# ---- checkpoints ---------------------------------------------------------------------------------


@contextlib.contextmanager
def trained(**settings):
    """The folder of a dataset and, in out/, a finished run of 2 steps on it."""
    with data_folder() as folder:
        train_tiny(folder, **{"max_steps": 2, **settings})
        yield folder


def full_state(net, **more):
    """What a run of this model would save."""
    return {"config": asdict(net.config), "settings": {}, "model": net.state_dict(), "step": 3,
            "meta": {"vocab_size": net.config.vocab_size}, "optimizers": [], "seconds": 1.0,
            "val": {}, "final": {}, "best": math.inf, "best_step": 0, **more}


def test_checkpoint_round_trip():
    """A checkpoint rebuilds its own model, with settings far from the defaults; the digest sees
    every part: optimizers, settings, dtypes, keys."""
    net = tiny_model(
        n_kv_head=2, tie_embeddings=True, qk_norm=False, rope_base=500.0, norm_eps=1e-4
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.pt")
        state = full_state(net, val={"bound": (1.5, 0.25)})
        checkpoint.save_checkpoint(path, state)
        other, loaded = checkpoint.load_model(folder)
        x0 = tokens_for(net)
        assert other.config == net.config and (other(x0) == net(x0)).all()
        assert loaded["val"] == {"bound": (1.5, 0.25)} and not list(Path(folder).glob("*.tmp"))
        order = []
        with mock.patch.object(os, "replace", lambda old, new: order.append((old.name, new.name))):
            checkpoint.save_checkpoint(path, state, Path(folder, "best.pt"),
                                       before=lambda: order.append("log"))
        assert order == ["log", *((f"{n}.tmp", n) for n in ("best.pt", "last.pt"))], order
        checkpoint.save_checkpoint(path, state, Path(folder, "best.pt"))
        assert checkpoint.find_checkpoint(folder).name == "best.pt"
    one = {"a": torch.zeros(2), "o": [{"m": torch.zeros(2)}], "s": {"lr": 1}}
    others = [{**one, "a": one["a"].int()}, {**one, "a": one["a"][None]}, {**one, "s": {}},
              {**one, "o": [{"m": torch.ones(2)}]}, {**one, "o": []}, {**one, "s": {"lr": 1.0}},
              {**one, "s": {"lR": 1}}, {"b": one["a"], "o": one["o"], "s": one["s"]}]
    seen = {checkpoint.digest(x) for x in (one, *others)}
    assert len(seen) == len(others) + 1
    assert checkpoint.digest(one) == checkpoint.digest(dict(reversed(one.items())))
    return f"config equal, logits bitwise equal; {len(others)} changes change the digest"


def test_checkpoint_damage():
    """Truncated, bit-flipped, foreign, malicious and compressed files: one line, no code run."""
    net = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        path, proof = Path(folder, "last.pt"), Path(folder, "proof")
        state = full_state(net)
        checkpoint.save_checkpoint(path, state)
        good = path.read_bytes()
        checkpoint.load_model(folder)  # so that what follows is refused for its damage

        class Evil:
            def __reduce__(self):
                return (os.system, (f"touch {proof}",))

        flips = harmless = 0
        for position in range(0, len(good), len(good) // 200):
            damaged = bytearray(good)
            damaged[position] ^= 16
            path.write_bytes(damaged)
            try:
                other, _ = checkpoint.load_model(folder)
            except configurator.SettingsError as e:
                assert "\n" not in str(e)
                flips += 1
                continue
            harmless += 1  # a byte of padding in the archive: nothing that was stored has changed
            assert checkpoint.digest(other.state_dict()) == checkpoint.digest(state["model"])
        assert flips > harmless, (flips, harmless)
        saved = {}
        for how in (True, False):  # torch's old format has no sizes to check first
            torch.save({"format": 1, "x": Evil()}, path, _use_new_zipfile_serialization=how)
            saved[how] = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(good)) as z, zipfile.ZipFile(path, "w", 8) as packed:
            for name in z.namelist():
                packed.writestr(name, z.read(name))
        foreign = [good[: len(good) // 2], good[:50], b"", b"not one", path.read_bytes(),
                   *saved.values()]
        for content in foreign:
            path.write_bytes(content)
            refuses(lambda: checkpoint.load_model(folder), "is damaged or no checkpoint")
        assert not proof.exists(), "a checkpoint ran code"
        path.unlink()
        refuses(lambda: checkpoint.load_model(folder), "no checkpoint")
    return (f"{flips} of {flips + harmless} bit flips (the others hit padding) and "
            f"{len(foreign) + 1} other files refused")


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
    with trained() as folder:
        last = folder / "out/last.pt"
        good = torch.load(last, weights_only=True)
        (folder / "out/best.pt").unlink()
        size, began = last.stat().st_size, time.perf_counter()
        resume = arguments(tiny_settings(folder, max_steps=3, init_from="resume"))
        before = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for word, change in (BAD_STATES | BAD_MOMENTS).items():
            state = torch.load(last, weights_only=True)
            change(state)
            write_state(folder / "bad.pt", state, word not in ("unfolds", "more than its size"))
            if word in BAD_STATES:
                refuses(lambda: checkpoint.load_model(folder / "bad.pt"), word)
            else:
                os.replace(last, folder / "good.pt")
                os.replace(folder / "bad.pt", last)
                refuses_command(train, resume, "optimizer state", "start again")
                checkpoint.load_model(last)
                os.replace(folder / "good.pt", last)
        after = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = time.perf_counter() - began
        write_state(folder / "nan.pt", {**good, "model": {
            k: v * math.nan for k, v in good["model"].items()}})
        for script in (sample, evaluation):
            refuses_command(script, [f"--out_dir={folder}/nan.pt"], "not all of its numbers")
        assert call_main(train, resume)[0] == 0
    return within(resource and (after - before) / 1024 or 0, 200,
                  f"{len(BAD_STATES)} states and {len(BAD_MOMENTS)} optimizers refused "
                              f"of {size >> 10} kB in {seconds:.1f} s; MiB more")


def write_state(path, state, true=True):
    """A checkpoint file of this state, whatever it is, with a true digest if that is to be."""
    rest = {k: v for k, v in state.items() if k != "digest"}
    torch.save({**rest, "digest": checkpoint.digest(rest) if true else ""}, path)


# ---- mistakes ------------------------------------------------------------------------------------

NEW = "@new"  # stands for the arguments of a run that would work
MISTAKES = (
    (train, ["--lerning_rate=1"], "did you mean learning_rate"),
    (train, ["--seed=abc"], "seed must be int"),
    (train, ["config/nowhere.py"], "no config file"),
    (train, ["README.md"], "ends in .py"),
    (train, [NEW, "--dataset=nowhere"], "no dataset"),
    (train, [NEW, "--seq_len=18"], "multiple of block_size"),
    (train, [NEW, "--n_head=3"], "not divisible"),
    (train, [NEW, "--n_head=16"], "even head dimension"),
    (train, [NEW, "--noise=white"], "--noise must be one of"),
    (train, [NEW, "--max_steps=0"], "set --max_steps or --max_minutes"),
    (train, [NEW, "--batch_size=0"], "must be 1 or more"),
    (train, [NEW, "--seed=99999999999999999999"], "between 0 and"),
    (train, [NEW, "--seed=-1"], "between 0 and"),
    (train, [NEW, "--micro_batch=-1"], "must be 0 or more"),
    (train, [NEW, "--muon_lr=-1"], "must be 0 or more"),
    (train, [NEW, "--learning_rate=nan"], "must be 0 or more"),
    (train, [NEW, "--device=tpu"], "not on this machine"),
    (train, [NEW, "--optimizer=sgd"], "muon, adamw"),
    (train, [NEW, "--attention=flex"], "needs CUDA"),
    (train, [NEW, "--attention=all"], "--attention must be one of"),
    (train, [NEW, "--dtype=float8"], "--dtype must be"),
    (train, [NEW, "--seq_len=4000"], "fewer than a sequence"),
    (train, [NEW, "--m_min=0"], "mask rates"),
    (train, [NEW, "--init_from=resume"], "no last.pt to resume"),
    (train, [NEW, "--out_dir={folder}/out", "--overwrite=false"], "holds a run already"),
    (train, [NEW, "--out_dir={folder}/meta.json"], "cannot write"),
    (train, [NEW, "--out_dir={folder}/" + "x" * 300], "cannot write"),
    (train, [NEW, "--shard=true"], "torchrun"),
    (train, [NEW, "--learning_rate=1e30", "--optimizer=adamw", "--max_steps=9", "--warmup_steps=0",
             "--grad_clip=0"], "not finite"),
    (train, [NEW, "--n_embd=20000000000", "--local_window=0"], ""),
    (sample, ["--out_dir={folder}/" + "x" * 300], "no checkpoint"),
    (sample, ["--out_dir=\x1b[2J\n"], "no checkpoint in \\x1b[2J\\n"),
    (sample, ["--out_dir={folder}/out", "--seed=9223372036854775808"], "--seed must be"),
    (sample, ["--out_dir={folder}/out", "--delay=inf"], "--delay must be"),
    (evaluation, ["--out_dir={folder}/out", "--seed=-1"], "--seed must be"),
    (evaluation, ["--out_dir={folder}/out", "--csv={folder}/cut.csv", "--windows=2"], "columns"),
    (bench, ["memory", "--lengths=8:0"], "--lengths must be"),
)


def test_run_mistakes():
    """A user's mistake ends in one line with the remedy, exit code 1 or 2, no traceback; a whole
    one for those who ask."""
    with trained() as folder:
        new = arguments(tiny_settings(folder, max_steps=1, out_dir=folder / "new"))
        (folder / "cut.csv").write_text("a,b\n1,")
        for script, given, word in MISTAKES:
            argv = [x for a in given for x in (new if a == NEW else [a.format(folder=folder)])]
            refuses_command(script, argv, word)
        for rank, world in (("x", "2"), ("2", "2"), ("-1", "1"), ("0", "0"), ("", "2")):
            with mock.patch.dict(os.environ, {"RANK": rank, "WORLD_SIZE": world}):
                refuses_command(train, new, "torchrun sets them")
        failing = mock.patch.object(train.Run, "train_step", side_effect=RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"))
        with failing:
            refuses_command(train, new, "out of memory", "smaller batch")
            try:
                call_main(train, [*new, "--traceback=true"])
                raise AssertionError("no traceback")
            except RuntimeError as e:
                assert "\n" in str(e)
        code, _, err = command("train.py", "--lerning_rate=1")
        assert code == 2 and err.count("\n") == 1, err
    return f"{len(MISTAKES) + 7} mistakes, one line each"


def test_streams():
    """An ASCII terminal, a closed and a full standard output; a Ctrl-C while the modules load."""
    with checkpoint_folder() as (folder, *_):
        argv = ["sample.py", f"--out_dir={folder}", "--temperature=9"]
        code, said, err = command(*argv, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
        assert code == 0 and "\\xe9" in said and not err, (code, said, err)
        for shell, code, word in ((">&-", 0, ""), (">/dev/full", 2, "No space left"),
                                  ("| true; exit ${PIPESTATUS[0]}", 1, "")):
            run = subprocess.run(["bash", "-c", f"{sys.executable} {' '.join(argv)} {shell}"],
                                 cwd=HERE, capture_output=True, text=True, check=False)
            assert run.returncode == code and run.stderr.count("\n") == (word != ""), run
            assert word in run.stderr, run
        process = subprocess.Popen([sys.executable, "-X", "importtime", *argv], cwd=HERE,
                                   stderr=subprocess.PIPE, text=True)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "util.configurator" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait() in (-signal.SIGINT, 130), process.returncode
        assert "Traceback" not in "".join(lines) and len(lines) > 20, lines[-5:]
    return "decoded in ASCII; nothing, one line, nothing; ended by the signal"


# ---- runs: what is replaced, saved and refused ---------------------------------------------------


def contents(folder):
    """{name: bytes} of the files in a folder that a run may not lose."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "lock"}


def at(step, act):
    """A train.Run that calls act() before it takes the step after `step`."""
    class Acting(train.Run):
        def train_step(self, progress):
            if self.step == step:
                act()
            return super().train_step(progress)
    return mock.patch.object(train, "Run", Acting)


def fails(error):
    """A function that raises."""
    def act(*_, **__):
        raise error
    return act


def test_overwrite():
    """--overwrite=true destroys nothing before there is a whole new checkpoint, then all of it; an
    odd file, a link or a folder under one of the names stops a run, and is not written through."""
    with trained(seed=1) as folder:
        out, old = folder / "out", contents(folder / "out")
        new = arguments(tiny_settings(folder, max_steps=4, eval_every=2, seed=2))
        assert set(old) == set(checkpoint.WRITTEN), old.keys()
        half = mock.patch.object(torch, "save", side_effect=OSError(28, "No space left on device"))
        for failing, argv, word in (
            (contextlib.nullcontext(), ["--noise=white"], "--noise"),
            (at(0, fails(RuntimeError("a bug"))), [], "RuntimeError: a bug"),
            (at(1, fails(ValueError("of step 2"))), [], "of step 2"),
            (half, [], "free some space"),
        ):
            with failing:
                refuses_command(train, [*new, *argv], word)
            kept = {k: v for k, v in contents(out).items() if not k.endswith(".tmp")}
            assert kept == old, (word, [k for k in old if old[k] != kept.get(k)])
        with at(3, fails(KeyboardInterrupt())):  # dead after its first checkpoint, of step 2
            assert call_main(train, new)[0] == 130
        found = contents(out)
        assert set(found) == set(old), found.keys()
        seeds = [checkpoint.load_checkpoint(out / n)["settings"]["seed"] for n in checkpoint.WRITTEN
                 if n.endswith(".pt")]
        assert seeds == [2, 2] and b"seed = 2" in found["settings.py"], seeds
        assert [int(r["step"]) for r in read_log(out / "log.csv")] == [2]
        code, _, err = call_main(train, [*new, "--overwrite=false", "--init_from=resume"])
        assert code == 0, err
        victim = folder / "victim"
        for name in (*checkpoint.WRITTEN, "lock", "last.pt.tmp", "log.csv.tmp", "wandb"):
            for make in (lambda p: p.symlink_to(victim), os.mkdir, os.mkfifo):
                if (name, make) == ("wandb", os.mkdir):
                    continue
                victim.write_text("keep")
                path = folder / "odd" / name
                path.parent.mkdir(exist_ok=True)
                make(path)
                refuses_command(train, [*new, f"--out_dir={path.parent}"], "is a link or no file")
                assert victim.read_text() == "keep" and len(list(path.parent.iterdir())) == 1, name
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in ("settings.py", "log.csv"):  # without a checkpoint they are kept as well
            (path.parent / name).write_text("x = 1\n")
            refuses_command(train, [*new, f"--out_dir={path.parent}", "--overwrite=false"],
                            "holds a run already", "overwrite")
            (path.parent / name).unlink()
    return "4 failures left the old run as it was; links, folders and pipes refused"


def test_tables():
    """eval.py --csv goes on behind a last line without its end; a chart of nothing but zeros."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "new/table.csv")
        for _ in range(3):
            evaluation.append_csv(path, [{"a": 1, "b": 0.5, "list": [1]}])
            path.write_text(path.read_text().rstrip("\n"))
        assert path.read_text() == "a,b\n1,0.5\n1,0.5\n1,0.5", path.read_text()
        path.write_text("a,b")
        evaluation.append_csv(path, [{"a": 1, "b": 2}])
        assert path.read_text() == "a,b\n1,2\n", path.read_text()
        for content in (b"\xff\xfe", b"a,c\n", b"\0"):
            path.write_bytes(content)
            refuses(lambda: evaluation.append_csv(path, [{"a": 1, "b": 2}]), "another file")
            assert path.read_bytes() == content
    lines = evaluation.chart(torch.zeros(4), torch.ones(4)).splitlines()
    assert len(lines) == 5 and not any("#" in line for line in lines), lines
    return "3 rows, each on its line"


class Deaf(io.StringIO):
    """A standard output that takes no more from the report of step 3 on."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        if text.startswith("step      3"):
            raise self.error
        return super().write(text)


def test_signals_save():
    """SIGINT, SIGTERM, SIGHUP, a closed and a full standard output end a run as it is saved, with
    the signal's exit code; in the last step too; what was trained is saved before it is judged."""
    with data_folder() as folder:
        s = tiny_settings(folder, max_steps=6, log_every=1)
        argv, last = arguments(s), folder / "out/last.pt"
        for number, step in ((2, 3), (15, 3), (1, 3), (2, 5)):
            with at(step, lambda n=number: os.kill(os.getpid(), n)):
                code, said, _ = call_main(train, argv)
            state = checkpoint.load_checkpoint(last)
            assert code == 128 + number and state["step"] == step + 1 and not state["final"], code
            assert f"stopped at step {step + 1}, saved; go on with\n  python train.py" in said, said
        for error in (BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")):
            err = io.StringIO()
            with contextlib.redirect_stdout(Deaf(error)), contextlib.redirect_stderr(err):
                with contextlib.suppress(SystemExit):
                    raise AssertionError(train.main(list(argv)))
            assert checkpoint.load_checkpoint(last)["step"] == 4, err.getvalue()
            assert error.strerror in err.getvalue() and "saved; go on with" in err.getvalue()
            assert err.getvalue().count("\n") == 1, err.getvalue()
        whole, _ = train_tiny(folder, max_steps=6)
        for name, error, code in (("evaluate", KeyboardInterrupt(), 130),
                                  ("evaluate", RuntimeError("a bug"), 1)):
            with mock.patch.object(train.Run, name, fails(error)):
                assert call_main(train, argv)[0] == code
            state = checkpoint.load_checkpoint(last)
            assert state["step"] == 6 and not state["final"]
            assert (state["model"]["norm.weight"] == whole.model.norm.weight).all()
        code, said, _ = call_main(train, [*argv, "--init_from=resume"])
        assert code == 0 and "| gpt" not in said and checkpoint.load_checkpoint(last)["final"], said
        with mock.patch.object(train, "generate_stream", fails(RuntimeError("a bug"))):
            assert call_main(train, [*argv, "--sample_tokens=4"])[0] == 1
        assert checkpoint.load_checkpoint(last)["final"] == whole.final
        with mock.patch.object(train.Run, "evaluate", fails(KeyboardInterrupt())):
            assert call_main(train, [*argv, "--init_from=resume"])[0] == 130
        assert checkpoint.load_checkpoint(last)["final"] == whole.final
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        with machine.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)
        assert stop.asked == 0
    return "exit codes 130, 143, 129, 130; saved at the step, and before the last evaluation"


def test_resume_compares():
    """Other data, numbers or dtype than the run began with are refused; moved data is not, nor is
    another end. The first row after a resume is the mean of the steps since."""
    with data_folder() as folder:
        s = {"max_steps": 6, "log_every": 4, "eval_every": 3, "out_dir": f"{folder}/out"}
        again = tiny_settings(folder, **s, init_from="resume")
        with at(3, fails(KeyboardInterrupt())):
            assert call_main(train, arguments(tiny_settings(folder, **s)))[0] == 130
        for name, value in (("dtype", "bfloat16"), ("weight_decay", 0.3), ("noise", "balanced"),
                            ("beta2", 0.9), ("copies", 1), ("warmup_steps", 9), ("grad_clip", 2)):
            refuses_command(train, arguments({**again, name: value}), "other settings", name)
        text = "".join("abcdef\n"[i] for i in (torch.arange(4000) ** 2 // 5 % 7).tolist())
        for name, chars, words in (("other", "\nabcdef", ("train, val of",)),
                                   ("fewer", "abcdef\n", ("vocabulary",)),
                                   ("more", "\nabcdefg", ("vocabulary",))):
            write_dataset(folder / name, text, chars)
            other = {**again, "dataset": f"{folder / name}"}
            refuses_command(train, arguments(other), "other data", "--any_data=true", *words)
        refuses_command(train, arguments({**other, "any_data": True}), "other data")
        other = arguments({**again, "dataset": f"{folder / 'other'}", "any_data": True})
        state = (folder / "out/last.pt").read_bytes()
        code, _, err = call_main(train, other)
        assert code == 0 and "resumed on other data, as asked: train, val" in err, err
        (folder / "out/last.pt").write_bytes(state)
        for name in ("train.bin", "val.bin", "meta.json"):
            (folder / "moved").mkdir(exist_ok=True)
            (folder / "moved" / name).write_bytes((folder / name).read_bytes())
        moved = {**again, "dataset": f"{folder / 'moved'}", "log_every": 1}
        assert call_main(train, arguments({**moved, "log_every": 4}))[0] == 0
        rows = {int(r["step"]): r for r in read_log(folder / "out/log.csv")}
        train_tiny(folder, **{**s, "log_every": 1, "out_dir": f"{folder}/each"})
        each = {int(r["step"]): float(r["gpt"]) for r in read_log(folder / "each/log.csv")}
        assert sorted(rows) == [3, 4, 6] and not rows[3]["gpt"], rows
        off = max(abs(float(rows[4]["gpt"]) - each[4]),
                  abs(float(rows[6]["gpt"]) - (each[5] + each[6]) / 2))
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
    if tamper:
        tamper()
    sys.exit(train.main(argv))


def start(folder, said, tamper=None, env=None, **settings):
    """A started process that trains as train_tiny does; `tamper` is called in it first."""
    argv = arguments({**TINY, "dataset": folder, **settings})
    process = FORKS.Process(target=train_body, args=(argv, said, env or {}, tamper), daemon=True)
    process.start()
    return process


def start_two(folder, said, **settings):
    """Two gloo processes of one run, without torchrun; rank i prints to the file `said` + i."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(folder, f"{said}{i}", env={**group, "RANK": f"{i}", "LOCAL_RANK": f"{i}"},
                  **settings) for i in (0, 1)]


def ended(process, said, limit=150.0):
    """(exit code, what it printed) of a process that must end within `limit` seconds."""
    process.join(limit)
    alive = process.is_alive()
    process.kill()
    text = Path(said).read_text() if Path(said).exists() else ""
    assert not alive, f"still running after {limit:.0f} s: {text[-300:]}"
    return process.exitcode, text


def wait_for_steps(process, said, count):
    """Until the process has reported `count` steps, or has ended."""
    while process.is_alive():
        if Path(said).exists() and Path(said).read_text().count("| eta") >= count:
            break
        time.sleep(0.002)


def die_in_save(nth, moment):
    """Have this process kill itself in its nth write of last.pt, at one of three moments."""
    count, save, replace = itertools.count(1), torch.save, os.replace

    def half_saved(state, f):
        if "last.pt" not in f.name or next(count) < nth:
            return save(state, f)
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def renamed(old, new):
        dies = Path(new).name == "last.pt" and next(count) >= nth
        if not dies or moment == "after":
            replace(old, new)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "half":
        torch.save = half_saved
    else:
        os.replace = renamed


def half_files(folder):
    """The temporary files of checkpoints in a folder, as a set of (name, time)."""
    return {(p.name, p.stat().st_mtime_ns) for p in folder.glob("*.pt.tmp")}


def survive(kills, steps):
    """One run, killed once per item of `kills` and resumed: it must end as if never killed.

    An item is (n, "half" | "before" | "after"): in the nth write of last.pt, with half of it
    written, before or after its rename. Or (n, x): n reported steps after the start, and x of a
    step's time later. Returns how many kills left a half-finished file behind.
    """
    settings = {"max_steps": steps, "eval_every": 2, "log_every": 1, "eval_windows": 2}
    torn = 0
    with data_folder() as folder:
        whole, _ = train_tiny(folder, **settings, out_dir=f"{folder}/a")
        a, b, last = Path(folder, "a"), Path(folder, "b"), Path(folder, "b/last.pt")
        for i, (n, moment) in enumerate(kills):
            said, inside, old = f"{folder}/said{i}", isinstance(moment, str), half_files(b)
            process = start(
                folder, said, functools.partial(die_in_save, n, moment) if inside else None,
                **settings, out_dir=b, overwrite=True,
                init_from="resume" if last.exists() else "scratch",
            )
            if not inside:
                wait_for_steps(process, said, n)
                time.sleep(moment * whole.seconds / steps)
                process.kill()
            code, text = ended(process, said)
            assert code == -signal.SIGKILL, (i, code, text[-300:])
            left = bool(half_files(b) - old)
            assert left == (moment in ("half", "before")) or not inside, (i, moment, left)
            torn += left
            # step N + 1 is reported after the save of step N, which is even
            seen = max(map(int, re.findall(r"^step +(\d+)/.*eta", text, re.M)), default=0)
            saved = checkpoint.load_checkpoint(last)["step"] if last.exists() else 0
            assert saved >= (seen - 1) // 2 * 2, f"step {seen} reported, {saved} saved"
        train_tiny(folder, **settings, out_dir=b, overwrite=True,
                   init_from="resume" if last.exists() else "scratch")
        assert not list(b.glob("*.tmp")), "the half files of killed runs stay"
        for name in ("last.pt", "best.pt"):
            states = [checkpoint.load_checkpoint(p / name) for p in (a, b)]
            for part in ("model", "optimizers", "val", "final", "best", "best_step", "step"):
                first, second = (checkpoint.digest(s[part]) for s in states)
                assert first == second, f"{part} of {name} differs"
        rows = [read_log(p / "log.csv") for p in (a, b)]
        for row in itertools.chain(*rows):
            del row["seconds"], row["tokens_per_second"]
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
        path = Path(folder, "out/log.csv")
        rows = read_log(path)
        assert list(rows[0]) == list(log.COLUMNS), rows[0]
        assert [int(r["step"]) for r in rows] == [3, 4, 6, 8, 9, 10], rows
        assert ["gpt" * bool(r["gpt"]) + "val" * bool(r["val_gpt"]) for r in rows] == [
            "val", "gpt", "val", "gpt", "val", "gptval"], rows
        printed = [re.search("gpt ([0-9.]+)", x)[1] for x in said.splitlines() if "| eta" in x]
        assert printed == [f"{float(r['gpt']):.3f}" for r in rows if r["gpt"]], (printed, rows)
        assert float(rows[-1]["val_gpt"]) == float(f"{run.val['gpt'][0]:.8g}"), rows[-1]
        # a run that was killed at step 13, while writing a row, with a checkpoint of step 10
        good = path.read_bytes()
        path.write_bytes(good + b"12,1,2" + b"," * 9 + b"\nnot a row\n13,1,2,,")
        train_tiny(folder, **s, init_from="resume")  # nothing left to do: the last row stays one
        assert read_log(path) == rows, read_log(path)
        train_tiny(folder, **{**s, "max_steps": 16}, init_from="resume")
        steps = [int(r["step"]) for r in read_log(path)]
        assert steps == [3, 4, 6, 8, 9, 10, 12, 15, 16] and path.read_bytes().startswith(good[:300])
        # the settings beside it start the same run again
        config = f"{folder}/out/settings.py"
        got = configurator.override(train.DEFAULTS, [config])
        asked = {**train.DEFAULTS, **TINY, **s, "max_steps": 16, "dataset": f"{folder}"}
        assert got == asked, {k: (v, asked[k]) for k, v in got.items() if v != asked[k]}
        refuses_command(train, [config], "holds a run already (last.pt)")
        log.write_settings(Path(folder, "odd.py"), {"max_minutes": math.inf, "noise": 'a"\n\'b'})
        odd = configurator.override({"max_minutes": 1.0, "noise": ""}, [f"{folder}/odd.py"])
        assert odd == {"max_minutes": math.inf, "noise": 'a"\n\'b'}, odd
    return f"{len(rows)} rows, then {len(steps)} after a torn one; settings.py equals the settings"


def test_wandb():
    """--wandb=true: the same numbers go to wandb; without the package, how to install it."""
    logged, fake = [], ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})
    fake.init = lambda **k: logged.append(k["id"]) or SimpleNamespace(
        id="abc", log=lambda values, step: logged.append((step, sorted(values))),
        finish=lambda: logged.append("finish"))
    with data_folder() as folder:
        s = {"max_steps": 4, "log_every": 2, "eval_every": 2, "wandb": True}
        with importing_wandb(None):
            refuses(lambda: train_tiny(folder, **s), "pip install wandb")
        with importing_wandb(fake):
            train_tiny(folder, **s)
            train_tiny(folder, **{**s, "max_steps": 6}, init_from="resume")
    report = sorted(("bound", "gpt", "joint", "lr", "seconds", "tokens_per_second"))
    rows = [[(n, x) for x in (report, sorted(log.VAL))] for n in (2, 4, 6)]
    assert logged == [None, *rows[0], *rows[1], "finish", "abc", *rows[2], "finish"], logged
    return "a stand-in got every row, and the run's name when it was resumed"


@contextlib.contextmanager
def importing_wandb(module):
    """`import wandb` finds this module or, None, fails as where it is not installed."""
    before, sys.modules["wandb"] = sys.modules.get("wandb"), module
    try:
        yield
    finally:
        sys.modules.pop("wandb")
        sys.modules.update({"wandb": before} if before else {})


def test_sharded():
    """--shard=true on 2 processes: the weights, checkpoints and resumptions of the plain run."""
    with data_folder() as folder:
        s = {"log_every": 1, "warmup_steps": 1, "seed": 3}
        for out in ("plain", "mixed"):
            train_tiny(folder, **s, max_steps=4, out_dir=f"{folder}/{out}")
        for out, more in (  # the accumulation leaves 2 sequences to a forward pass
            ("sharded", {"max_steps": 4, "micro_batch": 2, "sample_tokens": 4}),
            ("mixed", {"max_steps": 7, "init_from": "resume"}),
        ):
            two = start_two(folder, f"{folder}/{out}.said", **s, **more, shard="true",
                            out_dir=f"{folder}/{out}")
            for i, process in enumerate(two):
                code, text = ended(process, f"{folder}/{out}.said{i}")
                assert code == 0 and "a sample" not in text, text[-1000:]
        states = [checkpoint.load_checkpoint(f"{folder}/{n}/last.pt") for n in ("plain", "sharded")]
        worst = [state_difference(*states)]
        for out in ("plain", "sharded"):
            train_tiny(folder, **s, max_steps=7, out_dir=f"{folder}/{out}", init_from="resume")
        states = [checkpoint.load_checkpoint(f"{folder}/{n}/last.pt")
                  for n in ("plain", "sharded", "mixed")]
        worst += [state_difference(states[0], other) for other in states[1:]]
        finals = [x["final"]["bound"][0] for x in states]
        assert max(finals) - min(finals) < 1e-5, finals
        o = "blocks.0.attn.o.weight"  # starts at zero
        assert states[0]["model"][o].abs().max() > 1e-3, "nothing was learnt"
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


def test_not_finite():
    """A loss, gradient, bound, weight or moment that is not finite: what, when, what is saved."""
    def weight(run):
        with torch.no_grad():
            run.model.blocks[0].attn.q.weight[0, 0] = math.nan

    def moment(run):
        run.optimizers[1].state[run.model.blocks[0].attn.q.weight]["momentum"][0, 0] = math.inf

    cases = {"gradient": (lambda terms: terms * math.nan, None), "validation bound": (None, weight),
             "loss": (lambda terms: terms + math.inf, None), "model": (None, moment)}
    with data_folder() as folder:
        for what, (spoil, after) in cases.items():
            class Spoilt(train.Run):
                def terms(self, *args, spoil=spoil):
                    found = super().terms(*args)
                    return spoil(found) if self.step == 5 and spoil else found

                def train_step(self, progress, after=after):
                    total = super().train_step(progress)
                    if self.step == 6 and after:
                        after(self)
                    return total

            s = {"max_steps": 20, "eval_every": 2, "log_every": 1}
            step = 5 if what == "gradient" else 6
            refuses(lambda c=Spoilt, s=s: train_tiny(folder, c, **s),
                    f"the {what} is not finite at step {step} ", "last.pt is good, of step 4",
                    "--learning_rate", "--out_dir")
            assert checkpoint.load_checkpoint(f"{folder}/out/last.pt")["step"] == 4, what
    return f"{len(cases)} kinds stopped; the checkpoint of step 4 stands"


def test_lock():
    """A second run in one out_dir is refused; a file that a dead run left is no matter."""
    with data_folder() as folder:
        argv, out = arguments(tiny_settings(folder, max_steps=2)), folder / "out"
        out.mkdir()
        with checkpoint.lock(out):
            refuses_command(train, argv, f"another run (process {os.getpid()})")
            assert not (out / "log.csv").exists()
        (out / "lock").write_text("99999")
        assert call_main(train, argv)[0] == 0 and (out / "last.pt").exists()
    return "refused while held, with the holder's id; not by a file left behind"


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


def test_full_disk():
    """A save that the system refuses: one line, and the old checkpoint as it was."""
    if not resource:
        raise Skip("no module resource here to limit the size of files with")
    with trained() as folder:
        last = folder / "out/last.pt"
        before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        argv = arguments(tiny_settings(folder, max_steps=4, init_from="resume"))
        for size in (len(before) // 2, 10):  # in the checkpoint; already in settings.py
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                refuses_command(train, argv, "cannot write", "free some space")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert last.read_bytes() == before and not list(last.parent.glob("*.pt.tmp"))
    return "refused in the middle of a checkpoint and before the first step"


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
            two = start_two(folder, said, **s, **out)
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
        for argv, expected in ((["--lerning_rate=1"], "did you mean learning_rate"),
                               ([f"--dataset={folder}", f"--out_dir={folder}/meta.json"],
                                "cannot write")):
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
