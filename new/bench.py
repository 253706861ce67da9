"""How fast, on this machine: training and decoding beside a GPT of the same shape.

    python bench.py train config/nano.py        a training step, and that of the same GPT
    python bench.py decode --out_dir=out/nano   tokens/s of all modes, and how good their text is
    python bench.py memory config/nano.py       memory of a step, by the length of a sequence

A machine's speed drifts. So contestants take turns, and a ratio is that of neighbours: the median
of the rounds, and in brackets the least and the largest.
"""

import csv
import io
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from util.machine import autocast, choose_device, choose_dtype  # first: it checks torch's version

# isort: split
import torch

import eval
import sample
import train
from model import CascadeConfig, CascadeLM
from util import checkpoint
from util.data import Dataset, make_tokenizer, opening
from util.settings import check, guarded, require, settings

# ---- settings, by command; train and memory have those of train.py, too --------------------------
TRAIN = train.DEFAULTS | {"rounds": 5, "steps": 10}  # of each contestant in a round
MEMORY = train.DEFAULTS | {"lengths": "256,512,1024,2048"}  # tokens, at a batch of one
DECODE = {
    "out_dir": "out/nano", "batches": "1,4,16,64", "tokens": 200, "rounds": 5, "windows": 256,
    "temperature": 1.0, "device": "auto", "dtype": "auto",
}
AR = {"context": "causal", "draft_weight": 0.0, "block_size": 1, "local_window": 0, "soft": 0.0}
# --------------------------------------------------------------------------------------------------


def numbers(s, name):
    """A setting such as 1,4,16 as a list of integers."""
    words = getattr(s, name).split(",")
    require(all(word.isdecimal() and int(word) for word in words),
            f"--{name} must be like 1,4,16, not {getattr(s, name)!r}")
    return [int(word) for word in words]


def ratio(over, under):
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


# ---- training ------------------------------------------------------------------------------------


def seconds_a_step(s, steps, **changes):
    """Of `steps` steps of a run of train.py, after as many to warm up."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        s = {name: value for name, value in vars(s).items() if name in train.DEFAULTS} | {
            "out_dir": folder, "max_steps": 2 * steps, "max_minutes": 0.0, "log_every": steps,
            "eval_windows": 1, "final_windows": 1, "sample_tokens": 0, **changes}
        train.train(SimpleNamespace(**s))
        *_, last = csv.DictReader(Path(folder, "log.csv").read_text().splitlines())
    return s["batch_size"] * s["seq_len"] / float(last["tokens_per_second"])


def product(device, dtype):
    """(seconds, FLOPs) of a large matrix product: what the machine can do."""
    n, times = (8192, 10) if device != "cpu" else (2048, 1)
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype)).unbind()
    for _ in range(2):  # the first is a warm-up
        if device != "cpu":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            c = a @ b
        c[0, 0].item()  # waits for the device
        seconds = time.perf_counter() - began
    return seconds, 2 * times * n**3


def bench_train(argv):
    s, _ = settings(TRAIN, argv)
    check(s, least={"rounds": 1, "steps": 1})
    device = choose_device(s.device)
    dtype, why = choose_dtype(s.dtype, device)
    contestants = {"this run": {}, "as a GPT": AR}
    taken, peaks = {name: [] for name in contestants}, []
    for _ in range(s.rounds):
        for name, changes in contestants.items():
            taken[name].append(seconds_a_step(s, s.steps, **changes))
        seconds, flops = product(device, dtype)
        peaks.append(flops / seconds)
    print(f"{dtype}: {why}; a large matrix product runs at {statistics.median(peaks) / 1e9:,.0f} "
          f"GFLOP/s\n           parameters   ms a step    tokens/s   GFLOP    MFU   "
          "of the GPT's time")
    for name, changes in contestants.items():
        how = SimpleNamespace(**vars(s) | changes)
        shape = checkpoint.model_settings(vars(how))
        with torch.device("meta"):
            vocab_size = Dataset(s.dataset).meta["vocab_size"]
            model = CascadeLM(CascadeConfig(**shape | {"vocab_size": vocab_size}))
        flops = train.step_flops(model, how)
        mfu = statistics.median(flops / t / p for t, p in zip(taken[name], peaks, strict=True))
        t = statistics.median(taken[name])
        print(f"{name:9s} {sum(p.numel() for p in model.parameters()):12,} {1e3 * t:11.1f} "
              f"{s.batch_size * s.seq_len / t:11,.0f} {flops / 1e9:7.1f} {mfu:6.1%}   "
              f"{ratio(taken[name], taken['as a GPT'])}")


def peak_memory(s, N):
    """Bytes by which a training step of one sequence of N tokens raises this process's maximum."""
    on_cuda = choose_device(s.device) != "cpu"

    def peak():
        if on_cuda:
            return torch.cuda.max_memory_allocated()
        import resource  # which Windows lacks

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak()
    seconds_a_step(s, 1, seq_len=N, batch_size=1)
    return peak() - before


def bench_memory(argv):
    s, _ = settings(MEMORY, argv)
    print("tokens   MiB")
    for N in numbers(s, "lengths"):  # each in a process of its own, whose maximum is its own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            print(f"{N:6d} {pool.submit(peak_memory, s, N).result() / 2**20:5.0f}", flush=True)


# ---- decoding ------------------------------------------------------------------------------------


def contestants(model, state, data, windows):
    """{name: (options of generate, (NLL, error) of the text)} of all ways to decode."""
    N, S, ar = model.config.seq_len, model.config.block_size, state["settings"]["draft_weight"] == 0
    x0 = eval.cut_windows(data.split("val"), N, windows)
    if model.config.context == "block":
        found = {}
        for K in sorted({1, 2, S}):
            nll, _ = eval.replay(model, x0.to(model.cos.device), "left_to_right", K)
            how = {"mode": "block", "rule": "left_to_right", "passes": K}
            found[f"block, K = {K}"] = how, eval.mean_and_error(nll.cpu())
        return found
    nll = eval.evaluate(model, x0, ar).nll
    names = {"gpt": "gpt"} if ar else {"gpt": "gpt", "verify": "gpt", "block": "draft"}
    return {mode: ({"mode": mode}, nll[level]) for mode, level in names.items()}


def bench_decode(argv):
    s, _ = settings(DECODE, argv)
    check(s, least={"tokens": 1, "rounds": 1, "windows": 2})
    device = choose_device(s.device)
    dtype = sample.decoding_dtype(s.dtype, device)
    model, state = checkpoint.load_model(s.out_dir, device)
    data = Dataset(state["settings"]["dataset"], model.config.seq_len)
    start = opening(make_tokenizer(state["meta"]))
    found = contestants(model, state, data, s.windows)
    first = next(iter(found))
    print(f"{s.out_dir} in {dtype}, {s.tokens} tokens a row at temperature {s.temperature:g}\n"
          f"batch  mode           tokens/s   a pass   {f'of {first}':18s}  nats/token of its text")
    for batch in numbers(s, "batches"):
        seconds, last = {name: [] for name in found}, {}
        for i in range(s.rounds + 1):
            for name, (how, _) in found.items():
                began = time.perf_counter()
                with autocast(device, dtype):
                    *_, last[name] = sample.generate_stream(
                        model, [start] * batch, s.tokens, temperature=s.temperature, seed=i, **how)
                if i:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - began)
        for name, (_, (nll, error)) in found.items():
            speed = batch * s.tokens / statistics.median(seconds[name])
            a_pass = last[name].tokens / last[name].passes
            print(f"{batch:5d}  {name:12s} {speed:10,.0f} {a_pass:8.2f}"
                  f"   {ratio(seconds[first], seconds[name]):18s}  {nll:.3f} +- {error:.3f}",
                  flush=True)


COMMANDS = {"train": bench_train, "decode": bench_decode, "memory": bench_memory}


@guarded
def main(argv):
    require(argv and argv[0] in COMMANDS, f"say what to measure: python bench.py "
            f"{' | '.join(COMMANDS)}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
