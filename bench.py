"""How fast, on this machine: training and decoding beside a GPT of the same shape.

    python bench.py train config/nano.py        a training step, and that of the same GPT
    python bench.py memory config/nano.py       memory of a step, by the length of a sequence
    python bench.py decode --out_dir=out/nano   tokens/s of all modes, and how good their text is
    python bench.py rounds                      what a round costs in passes of the GPT, by size

A machine's speed drifts. So contestants take turns, and a ratio is that of neighbours: the median
of the rounds, and in brackets the least and the largest.
"""

import csv
import io
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch.utils.benchmark import Timer

import eval
import sample
import train
from model import CascadeConfig, CascadeLM
from util import checkpoint, machine
from util.data import Dataset, make_tokenizer, opening
from util.settings import UserError, check, guarded, require, settings

# ---- settings, by command ------------------------------------------------------------------------
TRAIN = train.DEFAULTS | {"rounds": 5, "steps": 10}  # of each contestant in a round
MEMORY = train.DEFAULTS | {"lengths": "256,512,1024,2048", "batch_size": 1}
DECODE = {"out_dir": "out/nano", "batches": "1,4,16,64", "tokens": 200, "rounds": 5, "windows": 256,
          "temperature": 1.0, "device": "auto", "dtype": "auto"}
ROUNDS = {"sizes": "nano,12M,40M,124M", "batches": "1,16", "drafts": "1,3,7,15", "seconds": 2.0,
          "device": "auto", "dtype": "auto"}
# --------------------------------------------------------------------------------------------------
SHAPES = {  # all of blocks of 16
    "nano": {"n_layer": 2, "n_head": 6, "n_embd": 192, "vocab_size": 84, "seq_len": 128},
    "12M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 84, "seq_len": 256},
    "40M": {"n_layer": 8, "n_head": 10, "n_embd": 640, "vocab_size": 84, "seq_len": 512},
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "seq_len": 1024,
             "tie_embeddings": True},
}
AR = {"context": "causal", "draft_weight": 0.0, "block_size": 1, "local_window": 0, "soft": 0.0}


def numbers(s, name):
    """A setting such as 1,4,16 as a list of integers above 0."""
    words = getattr(s, name).split(",")
    require(all(word.isdecimal() and int(word) for word in words),
            f"--{name} must be like 1,4,16, not {getattr(s, name)!r}")
    return [int(word) for word in words]


def ratio(over, under):
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


# ---- training ------------------------------------------------------------------------------------


def seconds_a_step(s, steps):
    """Of `steps` steps of train.py by settings s, after as many to warm up."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        code = train.train(SimpleNamespace(**{n: getattr(s, n) for n in train.DEFAULTS} | {
            "out_dir": folder, "max_steps": 2 * steps, "max_minutes": 0.0, "log_every": steps,
            "eval_windows": 1, "final_windows": 1, "sample_tokens": 0, "wandb": False}))
        if code != 0:  # a signal ended it
            raise KeyboardInterrupt
        *_, last = csv.DictReader(Path(folder, "log.csv").read_text().splitlines())
    return s.batch_size * s.seq_len / float(last["tokens_per_second"])


def product_flops(device, dtype):
    """FLOP/s of a large matrix product: what the machine can do."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype)).unbind()
    threads = torch.get_num_threads()
    return 2 * n**3 / Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads).timeit(5).median


def bench_train(argv):
    s, _ = settings(TRAIN, argv)
    check(s, least={"rounds": 1, "steps": 1})
    require(s.init_from == "scratch" and not s.teacher,
            "a fresh run is measured: leave --init_from and --teacher out")
    device = machine.choose_device(s.device)
    dtype, why = machine.choose_dtype(s.dtype, device)
    contestants = {"this run": s, "as a GPT": SimpleNamespace(**vars(s) | AR)}
    taken, peaks = {name: [] for name in contestants}, []
    for _ in range(s.rounds):
        for name, how in contestants.items():
            taken[name].append(seconds_a_step(how, s.steps))
        peaks.append(product_flops(device, dtype))
    print(f"{dtype}: {why}; a large matrix product runs at {median(peaks) / 1e9:,.0f} GFLOP/s\n"
          "            parameters  ms a step   tokens/s   GFLOP   of it  times the GPT")
    vocab_size = Dataset(s.dataset).meta["vocab_size"]
    for name, how in contestants.items():
        with torch.device("meta"):
            shape = checkpoint.model_settings(vars(how)) | {"vocab_size": vocab_size}
            model = CascadeLM(CascadeConfig(**shape))
        flops, t = machine.step_flops(model, how), median(taken[name])
        mfu = median(flops / t / p for t, p in zip(taken[name], peaks, strict=True))
        print(f"{name:9s} {sum(p.numel() for p in model.parameters()):12,} {1e3 * t:10.1f} "
              f"{s.batch_size * s.seq_len / t:10,.0f} {flops / 1e9:7.1f} {mfu:6.1%}  "
              f"{ratio(taken[name], taken['as a GPT'])}")


def peak_memory(s):
    """Bytes that a training step needs: by which it raises the most memory that this process has
    had, or on a GPU all that it has allocated."""
    if machine.choose_device(s.device) != "cpu":
        seconds_a_step(s, 1)
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows lacks

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds_a_step(s, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def bench_memory(argv):
    s, _ = settings(MEMORY, argv)
    lengths = numbers(s, "lengths")
    print(f"tokens   MiB, of a step of {s.batch_size} sequences")
    for N in lengths:  # each in a process of its own, which has a maximum of its own
        s.seq_len = N
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                print(f"{N:6d} {pool.submit(peak_memory, s).result() / 2**20:5.0f}", flush=True)
        except BrokenExecutor:
            raise UserError(f"{N} tokens were too many for this machine's memory") from None


# ---- decoding ------------------------------------------------------------------------------------


def contestants_of(model, state, data, windows):
    """({name: (options of generate, (NLL, error) of the text)}: all ways to decode; acceptances)"""
    x0 = eval.cut_windows(data.split("val"), model.config.seq_len, windows)
    if model.config.context == "block":
        found, x0 = {}, x0.to(model.cos.device)
        S = model.config.block_size
        for K in sorted({1, min(2, S), S}):
            nll, _ = eval.replay(model, x0, "left_to_right", K)
            how = {"mode": "block", "rule": "left_to_right", "passes": K}
            found[f"K = {K}"] = how, eval.mean_and_error(nll.cpu())
        return found, []
    ar = state["settings"]["draft_weight"] == 0
    nll, acceptance = eval.evaluate(model, x0, ar)
    levels = {"gpt": "gpt"} if ar else {"gpt": "gpt", "verify": "gpt", "block": "draft"}
    found = {mode: ({"mode": mode}, nll[level]) for mode, level in levels.items()}
    return found, acceptance


def bench_decode(argv):
    s, _ = settings(DECODE, argv)
    check(s, {"dtype": ("auto", "float32", "bfloat16")}, {"tokens": 1, "rounds": 1, "windows": 2})
    batches = numbers(s, "batches")
    device = machine.choose_device(s.device)
    model, state = checkpoint.load_model(s.out_dir, device)
    dtype = machine.decode_in(s.dtype, model)
    data = Dataset(state["settings"]["dataset"], model.config.seq_len)
    data.require_vocabulary(state["meta"], s.out_dir)
    start = opening(make_tokenizer(state["meta"]))
    contestants, acceptance = contestants_of(model, state, data, s.windows)
    first = next(iter(contestants))
    print(f"{s.out_dir} in {dtype}: {s.tokens} tokens a row, temperature {s.temperature:g}\n"
          f"batch  mode     tokens/s  a pass  {f'of {first}':16s}  nats a token of its text")
    for batch in batches:
        if "verify" in contestants:
            D, why = sample.choose_drafts(model, [start] * batch, acceptance,
                                          temperature=s.temperature)
            contestants["verify"][0].update(mode="verify" if D else "gpt", drafts=D)
            print(why)
        taken, steps = ({name: [] for name in contestants} for _ in range(2))
        for i in range(s.rounds + 1):
            for name, (how, _) in contestants.items():
                began = time.perf_counter()
                *_, step = sample.generate_stream(
                    model, [start] * batch, s.tokens, temperature=s.temperature, seed=i, **how)
                if i:  # the first round is a warm-up
                    taken[name].append(time.perf_counter() - began)
                    steps[name].append(step)
        for name, (_, (nll, error)) in contestants.items():
            speed = batch * s.tokens / median(taken[name])
            a_pass = sum(x.tokens for x in steps[name]) / sum(x.passes for x in steps[name])
            print(f"{batch:5d}  {name:7s} {speed:9,.0f} {a_pass:7.2f}  "
                  f"{ratio(taken[first], taken[name]):16s}  {nll:.3f} +- {error:.3f}", flush=True)


def bench_rounds(argv):
    s, _ = settings(ROUNDS, argv)
    check(s, {"dtype": ("auto", "float32", "bfloat16")}, {"seconds": 0.1}, {"seconds": 3600})
    drafts, device = numbers(s, "drafts"), machine.choose_device(s.device)
    require(max(drafts) < 16, "--drafts must be below 16, the block size of these models")
    unknown = set(s.sizes.split(",")) - SHAPES.keys()
    require(not unknown, f"--sizes must be of {','.join(SHAPES)}, not {','.join(unknown)}")
    print("A round of D drafts in passes of the GPT, and behind / with how many tokens\n"
          "a round, those of its reading pass, `verify` is as fast. Random weights: only costs.\n"
          "size  parameters  dtype     batch  ms of gpt    "
          + "".join(f"{f'D = {D}':13s}" for D in drafts))
    for size in s.sizes.split(","):
        model = CascadeLM(CascadeConfig(**SHAPES[size])).to(device).eval()
        dtype = machine.decode_in(s.dtype, model)
        for batch in numbers(s, "batches"):
            taken = sample.time_rounds(model, [[0]] * batch, [0, *drafts], s.seconds)
            costs = [taken[D] / taken[0] for D in drafts]
            print(f"{size:5s} {sum(p.numel() for p in model.parameters()):10,}  {dtype:8s}  "
                  f"{batch:5d}  {1e3 * taken[0]:9.2f}    "
                  + "".join(f"{f'{x:.2f} / {x - 1:.2f}':13s}" for x in costs), flush=True)


COMMANDS = {"train": bench_train, "memory": bench_memory, "decode": bench_decode,
            "rounds": bench_rounds}


@guarded
def main(argv):
    known = " | ".join(COMMANDS)
    require(argv and argv[0] in COMMANDS, f"say what to measure: python bench.py {known}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
