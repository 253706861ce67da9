"""What the tests share: verdicts, tiny models, tiny datasets, tiny runs, and refusals."""

import contextlib
import csv
import functools
import io
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import corrupt
import model as cascade
import train
from eval import Score
from util import checkpoint, dataset, machine
from util.configurator import SettingsError
from util.dataset import CharTokenizer, DataError

HERE = Path(__file__).resolve().parents[1]


class Skip(Exception):
    """A check that cannot run here; the message says why."""


def within(measured, allowed, what="max|diff|"):
    """The test's line; AssertionError when measured > allowed, or is not a number."""
    line = f"{what} = {measured:.2g}, allowed {allowed:.2g}"
    assert measured <= allowed, line
    return line


def diff(a, b):
    """Largest absolute difference of two tensors of one shape, in float64."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a.detach().double() - b.detach().double()).abs().max().item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- refusals ------------------------------------------------------------------------------------


def refuses(call, *words, kind=(ValueError, SettingsError, DataError)):
    """`call()` must raise `kind` with one line that contains all of `words`; returns the line."""
    try:
        call()
    except kind as e:
        assert str(e) and "\n" not in str(e) and all(w in str(e) for w in words), (words, str(e))
        return str(e)
    raise AssertionError(f"nothing was refused, though {words} was expected")


def call_main(script, argv):
    """(exit code, stdout, stderr) of a script's main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            code = script.main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def succeeds(script, *argv):
    """What a script's main prints on stdout; it must succeed and say nothing on stderr."""
    code, said, err = call_main(script, argv)
    assert code in (0, None) and not err, (argv, code, err)
    return said


def refuses_command(script, argv, *words):
    """A mistake on a command line: exit code 1 or 2, one line on stderr with all of `words`."""
    code, _, said = call_main(script, argv)
    assert code in (1, 2) and said.startswith("error: ") and said.count("\n") == 1, (argv, said)
    assert all(w in said for w in words) and "\x1b" not in said, (argv, words, said)


def command(*argv, env=None, timeout=170, cwd=HERE):
    """Run one of the scripts as a user does: (exit code, stdout, stderr)."""
    run = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, check=False,
        timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    return run.returncode, run.stdout, run.stderr


# ---- models, noise and the oracle ----------------------------------------------------------------

# the shapes that parity is tested on: odd block size, S = 1, S = N, grouped heads, tied head, a
# local window shorter than a block, as long, longer, and none, heads wider than n_embd / n_head
SHAPES = (
    {"block_size": 3, "n_kv_head": 1, "local_window": 2},
    {"block_size": 1, "tie_embeddings": True, "qk_norm": False, "local_window": 3},
    {"block_size": 15, "n_kv_head": 2, "qk_norm": False, "local_window": 0},
    {"block_size": 5, "n_kv_head": 2, "tie_embeddings": True, "local_window": 7, "head_dim": 12},
)
DRAFTS = {"block_size": 3, "n_kv_head": 2, "draft_rank": 2}  # with a causal context alone
CONTEXTS = ("causal", "block")


def tiny_model(seed=0, std=0.3, attention="chunk", **shape):
    """A small random model whose every weight matters: initialisation leaves some at zero."""
    shape = {
        "vocab_size": 11, "seq_len": 15, "block_size": 3, "n_layer": 2, "n_head": 4, "n_embd": 32,
        "n_hidden": 40, "local_window": 2, **shape,
    }
    net = cascade.CascadeLM(cascade.CascadeConfig(**shape), attention)
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return net.eval()


def tokens_for(net, batch=3, seed=1):
    shape = batch, net.config.seq_len
    return torch.randint(net.config.vocab_size, shape, generator=generator(seed))


def noisy_for(net, x0, seed=2, schedule="balanced", copies=1):
    """`Noisy` with a dimension of copies in front, and the flat indices of the masked positions."""
    c = net.config
    noisy = corrupt.corrupt_all_blocks(
        x0, c.block_size, c.mask_id, generator(seed), schedule, copies=copies
    )
    noisy = corrupt.Noisy(*(t.view(copies, *x0.shape) for t in noisy[:3]), *noisy[3:])
    return noisy, noisy.mask.flatten().nonzero()[:, 0]


def terms_of(net, x0, noisy, index, target="text"):
    """{term: scalar} of the loss by `Score`, as training adds them up; both weights are 1 / k."""
    gpt, single, joint, _ = Score(net, target)(x0, noisy.xt, index)
    weight = noisy.weight.flatten()[index]
    blocks = noisy.mask.numel() // net.config.block_size
    terms = {"bound": (single * weight).sum() / blocks, "joint": (joint * weight).sum() / blocks}
    return terms | ({} if gpt is None else {"gpt": gpt.mean()})


def masked_logits(net, x0, xt, joint=False):
    """(copies, B, N, V): what the heads make of noisy copies xt beside x0, at every position."""
    c, skip = net.config, int(net.config.context == "causal")
    h = net.stream_trunk(torch.cat([x0[None], xt]))[skip:]
    if net.local is not None:
        left = cascade.left_tokens(
            x0, x0.expand_as(xt) if joint else xt, c.block_size, c.local_window, c.mask_id
        )
        h = net.local(h, left)
    return net.logits(h)


# ---- data and runs -------------------------------------------------------------------------------


def write_dataset(folder, text, chars="\nabcdef", val=0.25):
    """A prepared dataset of `text` in `folder`, by character."""
    tokenizer = CharTokenizer(chars)
    with dataset.DatasetWriter(folder, tokenizer, source="a test") as writer:
        cut = int(len(text) * (1 - val))
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            writer.add(split, np.asarray(tokenizer.encode(part)), len(part.encode()))
        writer.finish()


@contextlib.contextmanager
def data_folder(tokens=4000, letters="abcdef\n"):
    """A small prepared dataset of 7 characters, in a folder of its own."""
    with tempfile.TemporaryDirectory() as root:
        text = "".join(letters[i] for i in (torch.arange(tokens) ** 2 // 3 % 7).tolist())
        folder = Path(root) / "tiny"
        write_dataset(folder, text, "".join(sorted(letters)))
        yield folder


TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "seq_len": 16, "block_size": 4, "batch_size": 8,
    "local_window": 2, "local_hidden": 16, "max_steps": 0, "max_minutes": 0, "log_every": 100,
    "eval_every": 1000, "final_windows": 8, "eval_windows": 8, "sample_tokens": 0, "device": "cpu",
    "dtype": "float32", "warmup_steps": 4, "learning_rate": 1e-2, "muon_lr": 5e-3,
}


def tiny_settings(folder, **settings):
    return {**TINY, "dataset": f"{folder}", "out_dir": f"{folder}/out", "overwrite": True,
            **settings}


def arguments(settings):
    """{name: value} as a command line."""
    return [f"--{k}={v}" for k, v in settings.items()]


def train_tiny(folder, run_class=train.Run, **settings):
    """A finished `train.Run` of a tiny model in this process, quietly, and what it printed."""
    s = tiny_settings(folder, **settings)
    processes = machine.Processes()
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.closing(processes):
        run = run_class(SimpleNamespace(**{**train.DEFAULTS, **s}), processes, set(settings))
        train.finish(run, train.train_loop(run))
    return run, out.getvalue()


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def read_log(path):
    """The rows of a log.csv, as dicts of text."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


CHARS = "\n !,.abcdefghijklmnopqrstuvwxyz\xe9"


@contextlib.contextmanager
def checkpoint_folder(chars=CHARS, **shape):
    """(a folder with a random tiny model's best.pt, that model, its tokenizer)."""
    net = tiny_model(1, **{"seq_len": 32, "block_size": 4, "n_kv_head": 2, "n_layer": 1,
                           "vocab_size": len(chars), **shape})
    tokenizer = CharTokenizer(chars)
    state = {
        "config": asdict(net.config), "settings": {}, "meta": tokenizer.meta(),
        "model": net.state_dict(), "optimizers": [], "step": 0, "seconds": 0.0, "val": {},
        "final": {}, "best": 1.0, "best_step": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_checkpoint(Path(folder) / "best.pt", state)
        yield Path(folder), net, tokenizer


@functools.cache
def chi_square_bound(free):
    """The 0.9999 quantile of chi2 with `free` degrees of freedom, by Wilson and Hilferty:
    (chi2 / free)^(1/3) is nearly normal, and 3.719 is the normal's quantile."""
    return free * (1 - 2 / (9 * free) + 3.719 * (2 / (9 * free)) ** 0.5) ** 3


def chi_square(counts, wanted):
    """(statistic, its 0.9999 quantile) of observed counts against probabilities, both dicts."""
    n = sum(counts.values())
    assert set(counts) <= set(wanted), "an outcome of probability 0"
    assert abs(sum(wanted.values()) - 1) < 1e-9
    rare = sorted(wanted, key=wanted.get)
    groups, group = [], []  # outcomes too rare for the approximation are counted together
    for outcome in rare:
        group.append(outcome)
        if sum(wanted[x] for x in group) * n >= 5:
            groups.append(group)
            group = []
    groups[-1] += group
    statistic = 0.0
    for group in groups:
        expected = n * sum(wanted[x] for x in group)
        statistic += (sum(counts.get(x, 0) for x in group) - expected) ** 2 / expected
    return statistic, chi_square_bound(max(1, len(groups) - 1))
