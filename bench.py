"""How fast: training steps and decoding beside the AR baseline, on whatever machine this is.

    python bench.py train                              one training step, of what trains by default
    python bench.py train config/base.py --batch_size=16     of any config of train.py
    python bench.py memory --lengths=1024,2048,4096    peak memory of a step at batch 1, by length
    python bench.py decode --out_dir=out/nano --ar_dir=out/ar     all modes, with their NLL
    python bench.py gpu                                the list for a GPU, about 8 minutes

Speeds are medians of interleaved rounds, and ratios those of neighbouring runs: a machine's speed
drifts, a ratio of neighbours does not. Decoding is measured on trained checkpoints, since tokens a
pass depend on what a model has learned.
"""

import contextlib
import functools
import gc
import io
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from json import dumps
from types import SimpleNamespace

from util.configurator import SettingsError, guarded, override

# isort: split
import torch

import eval as evaluation
import reference
import train
from model import chunked_attention, flex_block_mask, flex_stream_attention, stream_parts
from sample import generate_stream
from util.checkpoint import load_model
from util.dataset import data_root, load_dataset
from util.machine import (
    Processes,
    autocast,
    choose_device,
    choose_dtype,
    choose_machine,
    lacks_flash,
    peak_flops,
    train_flops,
)

# ---- settings, by command ------------------------------------------------------------------------
TRAIN = train.DEFAULTS | {"rounds": 7, "steps": 3, "json": False}
MEMORY = train.DEFAULTS | {"lengths": "1024,2048,4096,8192,16384", "batch_size": 1, "json": False}
DECODE = {
    "out_dir": "out/nano",
    "ar_dir": "out/ar",  # the AR baseline, trained by the same code
    "batches": "1,4,16,64",
    "modes": "gpt,verify,block:1,block:2,block:4",  # block:K, verify:D for a number of drafts
    "drafts": 0,  # of verify; 0: S - 1
    "branches": 0,
    "tokens": 128,  # new tokens of each row
    "rounds": 5,
    "windows": 256,  # validation windows for the NLL beside each speed
    "temperature": 1.0,
    "device": "auto",
    "dtype": "auto",
    "json": False,
}
GPU = train.DEFAULTS | {
    "n_layer": 12, "n_head": 12, "n_embd": 768, "seq_len": 1024, "block_size": 16,
    "batch_size": 16, "tie_embeddings": True,
    "lengths": "1024,2048,4096,8192,16384",
    "rounds": 5, "steps": 5, "shakespeare_steps": 300, "minutes": 8.0, "json": False,
}
# --------------------------------------------------------------------------------------------------


def drain(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def interleave(device, rounds, contestants):
    """{name: [seconds]} of `rounds` rounds, each contestant once in each, after a warm-up."""
    taken = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            drain(device)
            began = time.perf_counter()
            work()
            drain(device)
            if i:
                taken[name].append(time.perf_counter() - began)
    return taken


def ratio(over, under):
    """(median, smallest, largest) of the rounds' ratios over / under."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def numbers(s, name):
    """Setting `name`, such as "4,16", as a list of ints of at least 1."""
    words = getattr(s, name).split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise SettingsError(
            f"--{name} must be numbers of at least 1 such as 4,16, not {getattr(s, name)!r}"
        )
    return [int(word) for word in words]


# ---- the training step ---------------------------------------------------------------------------


@contextlib.contextmanager
def training(s, **changes):
    """A train.Run of the settings, changed, in a folder that vanishes: what is measured trains."""
    with tempfile.TemporaryDirectory() as folder:
        s = {k: v for k, v in vars(s).items() if k in train.DEFAULTS} | {
            "out_dir": folder, "max_steps": 10**9, "max_minutes": 0.0, "init_from": "scratch",
            **changes}
        with contextlib.redirect_stdout(io.StringIO()):
            run = train.Run(SimpleNamespace(**s), Processes())
        try:
            yield run
        finally:
            run.batches.pool.shutdown(wait=False, cancel_futures=True)


def product(s):
    """(work, FLOPs) of a large matrix product in the settings' dtype: the machine's peak."""
    side, times = (8192, 10) if s.device.startswith("cuda") else (2048, 1)
    a, b, c = torch.randn(3, side, side, device=s.device).to(getattr(torch, s.dtype)).unbind()

    def work():
        for _ in range(times):
            torch.mm(a, b, out=c)

    return work, 2 * times * side**3


def bench_train(s):
    """Rows of figures: our step and the AR baseline's. MFU is FLOPs of the model (train_flops) per
    second over those of a matrix product in the same round."""
    with training(s) as ours, training(s, objective="ar") as ar:
        runs = {"ours": ours, "ar": ar}

        def steps(run):
            for _ in range(s.steps):
                run.train_step(0.0)

        peak, peak_flop = product(ours.s)
        work = {name: functools.partial(steps, run) for name, run in runs.items()}
        taken = interleave(ours.s.device, s.rounds, work | {"product": peak})
        table, sheet = [], peak_flops(ours.s)
        for name, run in runs.items():
            masked = run.masked / run.step
            flops = train_flops(run.config, run.s.batch_size, masked, run.s.copies)
            seconds = statistics.median(taken[name]) / s.steps
            share = ratio(taken["product"], taken[name])[0] * s.steps * flops / peak_flop
            row = {"step": name, "ms": 1e3 * seconds, "gflop": flops / 1e9, "mfu": share,
                   "tokens_per_s": run.s.batch_size * run.s.seq_len / seconds,
                   "of_ar": ratio(taken[name], taken["ar"]),
                   "parameters": run.model.count_parameters()}
            if sheet:
                row["mfu_of_sheet"] = flops / seconds / sheet
            table.append(row)
        rate = peak_flop / statistics.median(taken["product"])
        table.append({"step": "product", "gflop_per_s": rate / 1e9})
    return table


def print_train(s, table):
    *rows, peak = table
    print(f"a large product in {s.dtype} runs at {peak['gflop_per_s']:,.0f} GFLOP/s\n"
          "step       parameters        ms    tok/s    MFU      GFLOP   times the AR baseline's")
    for r in rows:
        print("{step:6s} {parameters:14,d} {ms:9.2f} {tokens_per_s:8,.0f} {mfu:6.1%} {gflop:10.1f}"
              "   ".format(**r) + times_ar(r, rows))


def times_ar(r, rows):
    """How row r compares with the AR baseline's, the last of rows."""
    middle, low, high = r["of_ar"]
    sheet = f", {r['mfu_of_sheet']:.1%} of the data sheet's" if "mfu_of_sheet" in r else ""
    flops = r["gflop"] / rows[-1]["gflop"]
    return f"{middle:.2f} ({low:.2f}-{high:.2f}), in FLOPs {flops:.2f}{sheet}"


def peak_of_step(s, N):
    """Bytes by which two training steps at length N raise this process's highest memory; on a GPU
    the allocator's peak."""
    with training(s, seq_len=N, batch_size=s.batch_size) as run:
        if s.device.startswith("cuda"):
            run.train_step(0.0)
            torch.cuda.reset_peak_memory_stats(s.device)
            run.train_step(0.0)
            return torch.cuda.max_memory_allocated(s.device)
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            run.train_step(0.0)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def bench_memory(s, argv):
    """Rows (N, bytes): on a CPU each length in a fresh process, whose highest memory it is."""
    table = []
    for N in numbers(s, "lengths"):
        if s.device.startswith("cuda") or len(numbers(s, "lengths")) == 1:
            peak = peak_of_step(s, N)
        else:
            command = [sys.executable, __file__, "memory", *argv, f"--lengths={N}", "--json=true"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SettingsError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
            peak = float(done.stdout.split('"bytes": ')[1].split("}")[0])
        table.append({"N": N, "bytes": peak})
        if not s.json:
            grown = f"  {peak / table[-2]['bytes']:.2f} times" if len(table) > 1 else ""
            print(f"N = {N:6d}: {peak / 2**20:8.0f} MiB{grown}", flush=True)
    return table


# ---- decoding ------------------------------------------------------------------------------------


def decode_contestants(s):
    """{name: (model, options)} and {name: (NLL, error)}: the AR baseline and the model's modes."""
    ar, state = load_model(s.ar_dir, s.device)
    if ar.config.objective != "ar":
        raise SettingsError(f"--ar_dir={s.ar_dir} is not autoregressive: python train.py "
                            f"--objective=ar --out_dir={s.ar_dir} makes one")
    data = load_dataset(state["settings"]["dataset"]).split("val")
    found = {"ar": (ar, {"mode": "gpt"})}
    nll = {"ar": evaluation.evaluate(evaluation.Score(ar), data, s.windows)["gpt"]}
    model, _ = load_model(s.out_dir, s.device)
    score = evaluation.Score(model)
    terms = evaluation.evaluate(score, data, s.windows)
    windows = min(s.windows, len(data) // model.config.seq_len)
    starts = torch.linspace(0, len(data) - model.config.seq_len, windows).long().numpy()
    x0 = torch.from_numpy(data.window(starts, model.config.seq_len))
    for name in s.modes.split(","):
        mode, _, K = name.partition(":")
        how, nll[name] = {"mode": mode}, terms.get("gpt", (math.nan, math.nan))
        if mode == "verify":
            how |= {"drafts": int(K or s.drafts), "branches": s.branches}
        if mode == "block":
            how |= {"rule": "left_to_right", "steps": int(K or 1)}
            each, _ = evaluation.score_rule(score, x0, "left_to_right", int(K or 1))
            nll[name] = each.mean().item(), evaluation.window_error(each)
        found[name] = model, how
    return found, nll


def bench_decode(s, contestants=None):
    """Rows of figures, one for each batch size and mode: tokens a pass, tokens/s as a multiple of
    the AR baseline's, and the NLL of what the mode writes."""
    batches, table = numbers(s, "batches"), []
    found, nll = contestants or decode_contestants(s)
    for batch in batches:
        passes = {}

        def write(name, batch=batch, passes=passes):
            model, how = found[name]
            with autocast(s):
                *_, last = generate_stream(model, [[]] * batch, s.tokens, seed=0,
                                           temperature=s.temperature, **how)
            passes[name] = last.nfe

        work = {name: functools.partial(write, name) for name in found}
        taken = interleave(s.device, s.rounds, work)
        for name in found:
            table.append({
                "batch": batch, "mode": name, "tokens_per_pass": s.tokens / passes[name],
                "tokens_per_s": batch * s.tokens / statistics.median(taken[name]),
                "of_ar": ratio(taken["ar"], taken[name]),
                "nll": nll[name][0], "nll_error": nll[name][1],
            })
            if not s.json:
                if len(table) == 1:
                    print("batch  mode       tokens/pass  tokens/s   times the AR baseline   "
                          "NLL of its text")
                print("{batch:5d}  {mode:9s} {tokens_per_pass:12.2f} {tokens_per_s:9,.0f}   "
                      "{of_ar[0]:6.2f} ({of_ar[1]:.2f}-{of_ar[2]:.2f})      "
                      "{nll:.3f} +- {nll_error:.3f}".format(**table[-1]), flush=True)
    return table


# ---- the list for a GPU --------------------------------------------------------------------------


def parity(device, dtype, N, S, copies, causal, skip, path):
    """(output's, gradients') largest difference from the oracle's loop on the same rounded numbers,
    over its own largest entry, of one attention path at D = 64."""
    ins = torch.randn(3, 1 + copies, 1, N, 1, 64, generator=torch.Generator().manual_seed(7))
    q, k, v = (x.to(dtype) for x in ins)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = reference.oracle_streams(*exact, S, causal, skip)
    g = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad((truth * g).sum(), exact)
    q, k, v = (x.to(device).requires_grad_() for x in (q, k, v))
    if path != "chunk":
        attend = torch.compile(flex_stream_attention, dynamic=False)
        y = attend(q[skip:], k, v, flex_block_mask(N, S, 1 + copies, skip, causal, device),
                   "FLASH" if path == "flash" else "AUTO")
    else:
        parts = stream_parts(N, S, 1 + copies, skip, causal, device)
        y = chunked_attention(q[skip:], k, v, parts)
    got = torch.autograd.grad((y.float() * g.float().to(device)).sum(), (q, k, v))

    def off(a, b):
        return ((a.detach().cpu().double() - b.detach()).abs().max() / b.abs().max()).item()

    return off(y, truth), max(off(a, b) for a, b in zip(got, wanted, strict=True))


def gpu_parity(s):
    """Every attention path against the oracle on the device, both contexts"""
    shapes = ((256, 16, 1, True, 0), (256, 16, 2, False, 1), (192, 4, 1, False, 0))
    lacks = lacks_flash(s) if s.device.startswith("cuda") else "it needs CUDA"
    if lacks:
        yield "attention by flash", f"SKIPPED: {lacks}"
    for path in ("chunk", "flex", "flash")[: 1 if s.device == "cpu" else 2 + (not lacks)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[path == "flash" :]:
            torch._dynamo.reset()
            errors = [parity(s.device, dtype, *shape, path) for shape in shapes]
            y, grad = (max(e) for e in zip(*errors, strict=True))
            allowed = 2e-3 if dtype == torch.float32 else 1e-2  # TF32 products; rounded outputs
            verdict = "PASS" if y <= allowed and grad <= 2 * allowed else "FAIL"
            yield (f"attention by {path} in {str(dtype)[6:]}, from the oracle",
                   f"{verdict}: {y:.1g} of the largest, allowed {allowed:g}; gradients {grad:.1g}")


def gpu_train(s):
    """The training step at the settings' size, ours and the AR baseline's"""
    *rows, peak = bench_train(s)
    yield "large products", f"{peak['gflop_per_s'] / 1e3:,.0f} TFLOP/s in {s.dtype}"
    for r in rows:
        yield (f"step of {r['step']}, {r['parameters'] / 1e6:.1f}M parameters, N={s.seq_len}, "
               f"S={s.block_size}, batch {s.batch_size}",
               f"{r['ms']:.1f} ms, {r['tokens_per_s']:,.0f} tokens/s, MFU {r['mfu']:.1%}, "
               f"times the AR baseline's: {times_ar(r, rows)}")


def gpu_memory(s):
    """Peak memory of a step at batch 1, by length"""
    s = SimpleNamespace(**{**vars(s), "batch_size": 1, "json": True})
    table = bench_memory(s, [])
    for i, row in enumerate(table):
        grown = f", {row['bytes'] / table[i - 1]['bytes']:.2f} times the row before" if i else ""
        yield f"peak memory, N={row['N']}, batch 1", f"{row['bytes'] / 2**20:,.0f} MiB{grown}"


def gpu_shakespeare(s):
    """The first steps of config/shakespeare_char.py, the whole run's time, decoding in all modes"""
    chosen = override(train.DEFAULTS, ["config/shakespeare_char.py"])
    if not (data_root() / chosen["dataset"] / "meta.json").exists():
        chosen["dataset"] = "shakespeare"  # the text that ships here; the row names it
    whole, steps = chosen["max_steps"], s.shakespeare_steps
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        chosen |= {"out_dir": out, "max_steps": steps, "device": s.device, "eval_every": 10**9}
        run = train.Run(SimpleNamespace(**chosen), Processes())
        train.train_loop(run)
        terms = run.evaluate(run.s.eval_windows)
    said = ", ".join(f"{name} {mean:.3f} +- {error:.3f}" for name, (mean, error) in terms.items())
    yield (f"{chosen['dataset']}, {steps} steps of {run.model.count_parameters() / 1e6:.1f}M",
           f"{said} nats/token in {run.seconds:.0f} s with compiling; {whole} steps at this pace: "
           f"{run.seconds / steps * whole / 60:.1f} minutes")
    modes = {"ar": {"mode": "gpt"}, "verify": {"mode": "verify"},
             "block:1": {"mode": "block", "rule": "left_to_right", "steps": 1}}
    model, nll = run.uncompiled(), dict.fromkeys(modes, (0.0, 0.0))
    found = {name: (model, how) for name, how in modes.items()}
    how = SimpleNamespace(batches="1,64", tokens=128, temperature=1.0, **vars(s) | {"json": True})
    for r in bench_decode(how, (found, nll)):
        yield (f"its decoding, {r['mode']} ('ar': its GPT level), batch {r['batch']}",
               f"{r['tokens_per_s']:,.0f} tokens/s, {r['of_ar'][0]:.2f} of its GPT level's")


GPU_LIST = (gpu_parity, gpu_train, gpu_memory, gpu_shakespeare)


def bench_gpu(s):
    """Rows (what, figure) of the whole list; a part that fails or is left out says so."""
    began, rows = time.perf_counter(), []
    for part in GPU_LIST:
        gc.collect()
        torch._dynamo.reset()
        spent = (time.perf_counter() - began) / 60
        if spent > s.minutes:
            rows.append((part.__doc__, f"left out: --minutes={s.minutes:g} are over"))
            continue
        try:
            for row in part(s):
                rows.append(row)
                if not s.json:
                    print(f"{row[0]:60s} | {row[1]}", flush=True)
        except torch.OutOfMemoryError:
            rows.append((part.__doc__, f"FAIL: out of memory; lower --batch_size={s.batch_size}"))
        except RuntimeError as e:  # of torch or its compiler: the other parts are still worth a run
            traceback.print_exc()
            rows.append((part.__doc__, f"FAIL: {type(e).__name__}; its traceback is on stderr"))
    rows.append(("minutes for all this", f"{(time.perf_counter() - began) / 60:.1f}"))
    if any("FAIL" in figure for _, figure in rows):
        print("\n".join(f"{what}: {figure}" for what, figure in rows if "FAIL" in figure))
        sys.exit(1)
    return rows


# ---- the command line ----------------------------------------------------------------------------

COMMANDS = {"train": TRAIN, "memory": MEMORY, "decode": DECODE, "gpu": GPU}


@guarded
def main(argv):
    command, argv = argv[0] if argv else "", argv[1:]
    if command not in COMMANDS:
        raise SettingsError(f"say what to measure: python bench.py {' | '.join(COMMANDS)}")
    s = SimpleNamespace(**override(COMMANDS[command], argv))
    if command == "decode":
        s.device = choose_device(s.device)
        lines = [f"device     {s.device}",
                 f"dtype      {choose_dtype(s, s.device, small=True)}: {s.dtype}"]
    else:
        lines = choose_machine(s)
        s.compile = str(s.compile).lower()
    if command == "gpu" and not s.device.startswith("cuda"):
        raise SettingsError("no CUDA device here for bench.py gpu: use train or decode")
    if min(getattr(s, name, 1) for name in ("rounds", "steps", "tokens", "windows")) < 1:
        raise SettingsError("rounds, steps, tokens and windows must be at least 1")
    if not s.json:
        print("\n".join(lines) + f"\nthreads    {torch.get_num_threads()}", flush=True)
    if command == "memory":
        table = bench_memory(s, argv)
    else:
        table = {"train": bench_train, "decode": bench_decode, "gpu": bench_gpu}[command](s)
    if s.json:
        print(dumps({"settings": vars(s), "rows": table}))
    elif command == "train":
        print_train(s, table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
