"""How fast: decoding and training against the autoregressive twin, on whatever machine this is.

    python bench.py decode                            with both KV caches, a small model
    python bench.py decode --n_layer=7 --n_head=6 --n_embd=384     the nano as on a GPU
    python bench.py decode --batches=1 --pairs=16:4 --json=true
    python bench.py train                             one training step, 6 layers, width 384
    python bench.py train --lengths=256,2048 --block_sizes=4,16,N --profile=true
    python bench.py train --lengths=1024,2048,4096,8192 --batch=1  peak memory, linear in N
    python bench.py gpu                               the list for a GPU, about 8 minutes

Speeds are ratios of interleaved runs: a machine's speed drifts, a ratio of neighbours does not.
Weights and tokens are random, since speed does not depend on them.
"""

import contextlib
import gc
import io
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
import train
from configurator import SettingsError, fail, override
from corrupt import check_blocks, masked_diffusion_loss
from dataset import CharTokenizer, DataError, DatasetWriter, data_root
from machine import Processes, choose_machine, peak_flops
from model import (
    BlockCache,
    CascadeConfig,
    CascadeLM,
    build_two_stream_mask,
    chunked_two_stream_attention,
    flex_block_mask,
    flex_two_stream_attention,
)
from sample import generate_stream

# ---- settings, by command ----------------------------------------------------------------------
SHARED = {
    "n_kv_head": 0,  # 0: as many as n_head
    "neighbours": 3,
    "device": "auto",
    "dtype": "auto",
    "json": False,  # one JSON object instead of the table
}
DECODE = SHARED | {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "vocab_size": 84,
    "seq_len": 512,
    "tokens": 128,  # new tokens of each row
    "batches": "1,4,16,64",
    "pairs": "16:1,16:4,16:8,8:4,4:2",  # block size : passes per block
    "repeats": 5,  # interleaved runs of each contestant, after one that is not counted
    "near": 100,  # positions whose passes are compared: work must not grow with the text
    "far": 2000,
    "cuda_graphs": False,  # on CUDA: both contestants replay recorded passes
}
TRAIN = SHARED | {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "n_hidden": 0,  # 0: 8/3 n_embd
    "vocab_size": 65,
    "tie_embeddings": False,
    "lengths": "256",  # N, sequence lengths
    "block_sizes": "16",  # S, each with each length; N: the whole sequence is one block
    "tokens_per_step": 16 * 256,  # the same at every length: a batch is tokens_per_step / N
    "batch": 0,  # sequences at every length instead, so that memory is seen to grow with N
    "optimizer": "muon",
    "copies": 1,  # noisy copies of each sequence; the plain step always has one
    "repeats": 5,
    "plain": True,  # also the plain two-stream step: O(N^2) memory, slow at large N
    "memory": True,  # peak memory; on a CPU each in a fresh process
    "traffic": True,  # count the bytes of a step
    "profile": False,  # where the time goes, by part
    "product": 0,  # side of the square matrix product that is the peak; 0: 2048, on a GPU 8192
    "copy_mb": 256,  # megabytes of the copy that is the memory's speed
    "attention": "auto",
    "compile": "auto",
}
GPU = SHARED | {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,  # 50,304 x 768 = 38.6M tied embeddings + 12 layers of 7.1M = 123.6M
    "n_hidden": 0,
    "vocab_size": 50304,
    "tie_embeddings": True,
    "neighbours": 0,
    "seq_len": 1024,
    "block_size": 16,
    "tokens_per_step": 16 * 1024,
    "memory_lengths": "1024,2048,4096,8192",  # at batch 1
    "batches": "1,8,64",
    "pairs": "16:4",
    "tokens": 128,
    "steps": 500,  # of config/shakespeare_char.py
    "repeats": 10,
    "minutes": 8.0,  # a part that would begin later is left out, and says so
}
# -------------------------------------------------------------------------------------------------


def make_model(s, objective, block_size, context):
    """A model of the settings' shape with random weights, ready to decode."""
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "neighbours")
    shape = {k: getattr(s, k) for k in names}
    config = CascadeConfig(
        **shape, seq_len=context, block_size=block_size, objective=objective
    )
    torch.manual_seed(0)
    return CascadeLM(config).to(s.device).eval()


def on_cuda(s):
    return s.device.startswith("cuda")


def seconds(s, work):
    """Wall-clock seconds of work(), the device drained on both sides."""
    torch.cuda.synchronize() if on_cuda(s) else None
    began = time.perf_counter()
    work()
    torch.cuda.synchronize() if on_cuda(s) else None
    return time.perf_counter() - began


def interleave(s, contestants):
    """{name: [seconds]} of `repeats` rounds, each contestant once in each, after a warm-up."""
    taken = {name: [] for name in contestants}
    for i in range(s.repeats + 1):
        for name, work in contestants.items():
            spent = seconds(s, work)
            if i:
                taken[name].append(spent)
    return taken


def spread(over, under):
    """(median, smallest, largest) of the rounds' ratios over / under."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def numbers(s, name, whole=None):
    """Setting `name`, such as "4,16", as a list of ints of at least 1; N is `whole`, if given."""
    try:
        words = getattr(s, name).split(",")
        given = [whole if whole and word == "N" else int(word) for word in words]
        assert min(given) >= 1
    except (ValueError, AssertionError):
        raise SettingsError(
            f"--{name} must be numbers of at least 1 such as 4,16, not {getattr(s, name)!r}"
        ) from None
    return given


# ---- decoding ----------------------------------------------------------------------------------


def decode_row(s, gpt, model, K, batch, cuda_graphs=False):
    """One row of the table: a dict of figures for one (S, K) and one batch size."""
    nfe = {}

    def contest(name, net, steps):
        def work():
            with torch.autocast(s.device.split(":")[0], torch.bfloat16, s.dtype == "bfloat16"):
                *_, last = generate_stream(
                    net, [[]] * batch, s.tokens, rule="random", steps=steps,
                    cuda_graphs=cuda_graphs,
                )
            nfe[name] = last.nfe

        return work

    taken = interleave(s, {"ours": contest("ours", model, K), "gpt": contest("gpt", gpt, 1)})
    ratios = [g / o for o, g in zip(taken["ours"], taken["gpt"], strict=True)]
    S, made = model.config.block_size, s.tokens * batch
    return {
        "batch": batch, "S": S, "K": K,
        "tokens_per_pass": s.tokens / nfe["ours"],
        "tokens_per_s": made / statistics.median(taken["ours"]),
        "gpt_tokens_per_s": made / statistics.median(taken["gpt"]),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "memory_bound": S / K, "compute_bound": 1 / (K + 1),
    }


def position_ratio(s, block_size):
    """(ms of a denoising pass at position `near`, at `far`): batch 1, the context raised."""
    context = (s.far // block_size + 3) * block_size
    model = make_model(s, "diffusion", block_size, context)
    block = torch.full((1, block_size), model.config.mask_id, device=s.device)
    contestants = {}
    for place in (s.near, s.far):
        cache = BlockCache(model.config, 1, context, device=s.device)
        cache.length = place // block_size * block_size

        def work(cache=cache):
            for _ in range(20):
                model.decode(block, cache, 0)

        contestants[place] = work
    taken = interleave(s, contestants)
    return [1000 / 20 * statistics.median(taken[place]) for place in (s.near, s.far)]


def block_pairs(s):
    """Setting `pairs`, "16:4,8:4", as a list of (S, K)."""
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in s.pairs.split(",")]
        assert all(len(pair) == 2 for pair in pairs)
    except (ValueError, AssertionError):
        raise SettingsError(f"write --pairs=16:4,8:4 (S:K), not {s.pairs!r}") from None
    return pairs


def decode(s):
    """Measure and print the decoding table."""
    pairs, batches = block_pairs(s), numbers(s, "batches")
    if min(s.tokens, s.repeats, s.near) < 1 or s.far < s.near:
        raise SettingsError("tokens, repeats and near must be at least 1, far >= near")
    gpt = make_model(s, "ar", 1, s.seq_len)
    rows = []
    for S, K in pairs:
        model = make_model(s, "diffusion", S, s.seq_len)
        for batch in batches:
            rows.append(decode_row(s, gpt, model, K, batch, s.cuda_graphs))
            if not s.json:
                print_decode_row(rows[-1], first=len(rows) == 1)
    near, far = position_ratio(s, pairs[0][0])
    if s.json:
        print(dumps({"settings": vars(s), "rows": rows, "near_ms": near, "far_ms": far}))
        return
    for S, K in pairs:
        lost = [r["batch"] for r in rows if (r["S"], r["K"]) == (S, K) and r["ratio"] < 1]
        says = f"the GPT wins from batch {min(lost)}" if lost else "ahead at every batch size here"
        print(f"S={S} K={K}: {says}")
    print(f"a pass at {s.near}: {near:.2f} ms, at {s.far}: {far:.2f} ms = {far / near:.2f}x")


def print_decode_row(r, first):
    if first:
        print(
            "batch   S   K  tokens/pass  tokens/s  GPT tokens/s  ratio (min-max)     "
            "S/K  1/(K+1)"
        )
    print(
        f"{r['batch']:5d} {r['S']:3d} {r['K']:3d}  {r['tokens_per_pass']:11.2f} "
        f"{r['tokens_per_s']:9.0f}  {r['gpt_tokens_per_s']:12.0f}  "
        f"{r['ratio']:5.2f} ({r['ratio_min']:.2f}-{r['ratio_max']:.2f})  "
        f"{r['memory_bound']:6.2f}  {r['compute_bound']:7.2f}",
        flush=True,
    )


# ---- one training step: the contestants ----------------------------------------------------------


class PlainLoss(nn.Module):
    """train.Loss as block-diffusion trainers commonly compute it; same weights, same noise.

    Both streams go whole through every layer, under one dense (2N, 2N) mask, and the head runs on
    all N noisy positions. The loss is the same number.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        c = model.config
        self.mask = build_two_stream_mask(c.seq_len, c.block_size, str(model.cos.device))

    def attend(self, q, k, v):
        """q (2, B, H, N, D), k and v (2, B, Hkv, N, D), [clean, noisy] -> the shape of q."""
        q, k, v = (torch.cat(x.unbind(), dim=2) for x in (q, k, v))  # (B, heads, 2N, D)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1]
        )
        return torch.stack(y.chunk(2, dim=2))

    def forward(self, num_blocks, x0, xt, weight, _index):
        model, N = self.model, x0.shape[1]
        rope = model.cos[:N], model.sin[:N]
        past = torch.nn.functional.pad(x0, (model.config.neighbours, 0), value=model.config.mask_id)
        h = model.embedded(torch.stack([x0, xt]), past)  # (2, B, N, C)
        for block in model.blocks:
            h = block(h, rope, self.attend)
        return masked_diffusion_loss(model.logits(h[1]), x0, weight, num_blocks)


def plain_flops(model, batch):
    """Matrix FLOPs of a step with PlainLoss, counted as in CascadeLM.train_flops: 6 per weight and
    token, 12 D per head and entry, for 2N tokens and (2N)^2 entries in every layer."""
    c = model.config
    kv = 2 * c.n_embd * c.n_kv_head * c.head_dim
    layer = 2 * c.n_embd**2 + kv + 3 * c.n_embd * c.n_hidden
    tokens, entries = batch * c.seq_len, batch * (2 * c.seq_len) ** 2
    mix = model.near.mix.weight.numel() if model.near else 0
    weights = 2 * tokens * (c.n_layer * layer + mix) + tokens * c.n_embd * c.vocab_size
    return 6 * weights + c.n_layer * 12 * entries * c.n_embd


@contextlib.contextmanager
def random_data(vocab_size, length):
    """The folder of a dataset of random tokens, enough for windows of `length`."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=max(20 * length, 10_000))
    letters = CharTokenizer("".join(map(chr, range(0x20, 0x20 + vocab_size))))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "random")
        with DatasetWriter(folder, letters, source="random tokens of bench.py") as writer:
            for split in ("train", "val"):
                writer.add(split, tokens, len(tokens))
            writer.finish()
        yield folder


def make_run(s, folder, kind, N, S, **settings):
    """The train.Run of a contestant, so that what is measured is what trains: with `copies` noisy
    copies, one by default, and `balanced` noise, so that every step masks as many tokens.

    kind: "ours"; "gpt", its autoregressive twin; "plain", ours with PlainLoss.
    """
    gpt = kind == "gpt"
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "tie_embeddings", "optimizer",
             "neighbours", "copies", "device", "dtype", "attention")
    settings = {
        **train.DEFAULTS, **{k: getattr(s, k) for k in names}, "compile": str(s.compile).lower(),
        "objective": "ar" if gpt else "diffusion", "block_size": 1 if gpt else S, "seq_len": N,
        "batch_size": sequences(s, N), "max_steps": 10**9, "max_minutes": 0.0,
        "dataset": str(folder), "out_dir": f"{folder}/{kind}", "overwrite": True,
        "noise": "balanced",
        **settings,
    }
    if kind == "plain":
        settings["copies"] = 1
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.Run(SimpleNamespace(**settings), Processes())
    if kind == "plain":
        run.loss = PlainLoss(run.model)
    return run


def fresh_compiler(s):
    """Forget the last shape's runs and compiled code: torch gives up compiling after 8 variants of
    one function, silently, and a Run is a cycle that only the collector frees."""
    gc.collect()
    if s.compile:
        torch._dynamo.reset()


def sequences(s, N):
    """The batch at length N; SettingsError where tokens_per_step is not a multiple of N."""
    if not s.batch and s.tokens_per_step % N:
        raise SettingsError(
            f"--tokens_per_step={s.tokens_per_step} is not a multiple of N = {N}: "
            f"set it to one, or set --batch"
        )
    return s.batch or s.tokens_per_step // N


# ---- one training step: memory and bytes ---------------------------------------------------------


def resident(what):
    """This process's VmRSS (now) or VmHWM (highest so far) in bytes, or None without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(what)), None)


def memory_of_process(settings, threads, kind, N, S):
    """Run in a fresh process: by how many bytes two training steps raise its highest residency.

    A step of a tiny model comes first: it loads what torch loads on first use, some 90 MB.
    """
    torch.set_num_threads(threads)
    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 16, "n_hidden": 16, "vocab_size": 9, "batch": 1}
    for shape, length, steps in ((tiny, S, 1), ({}, N, 2)):
        s, before = SimpleNamespace(**{**settings, **shape}), resident("VmRSS")
        with random_data(s.vocab_size, length) as folder:
            run = make_run(s, folder, kind, length, S)
            for _ in range(steps):
                run.train_step(0.0)
    return resident("VmHWM") - before


def peak_memory(s, run, kind, N, S):
    """Peak bytes of training one contestant: weights, optimizer state, gradients, activations.

    CUDA: the allocator's peak during a step, less what the other contestants hold. On a CPU torch
    keeps no such count, so a fresh process takes two steps and the system says what it took, the
    libraries' own buffers included. None where there is no /proc to ask.
    """
    if not on_cuda(s):
        if resident("VmHWM") is None:
            return None
        # spawned, not forked: a fork would begin with this process's memory
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            threads = torch.get_num_threads()
            return pool.submit(memory_of_process, vars(s), threads, kind, N, S).result()
    states = [o.state[p] for o in run.optimizers for p in o.state]
    own = sum(t.nbytes for t in tree_leaves([states, list(run.model.parameters())])
              if isinstance(t, torch.Tensor) and t.is_cuda)
    before = torch.cuda.memory_allocated(s.device)
    torch.cuda.reset_peak_memory_stats(s.device)
    run.train_step(0.0)
    return torch.cuda.max_memory_allocated(s.device) - before + own


class Traffic(TorchDispatchMode):
    """Counts in `bytes` what passes between operators and memory: each reads its inputs once and
    writes its outputs once.

    A count of the uncompiled operators, not an estimate, but of traffic that caches absorb in part
    and that compiled kernels, which fuse operators, largely avoid. Views move nothing; a lookup
    reads what it returns; a broadcast tensor counts as the memory behind it; what a fused operator
    (attention, AdamW) moves inside is not seen.
    """

    LOOKUPS = ("embedding", "index", "index_select", "gather")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return out  # a view
        read, written = self.size((args, kwargs)), self.size(out)
        if not returns:  # in place on lists of tensors, as the optimizers' operators
            changed = [a.alias_info is not None for a in func._schema.arguments]
            written = self.size([a for a, c in zip(args, changed, strict=False) if c])
        if func.overloadpacket.__name__ in self.LOOKUPS:
            read = written
        self.bytes += read + written
        return out

    @staticmethod
    def size(tree):
        """Bytes of memory behind the tensors in a nest of arguments."""
        tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)


def step_bytes(s, folder, kind, N, S):
    """Bytes of one uncompiled training step by Traffic, the optimizers included."""
    eager = SimpleNamespace(**{**vars(s), "attention": "chunk", "compile": "false"})
    run = make_run(eager, folder, kind, N, S)
    run.train_step(0.0)  # the optimizers' state is made by the first step
    with Traffic() as traffic:
        run.train_step(0.0)
    return traffic.bytes


# ---- one training step: where the time goes ------------------------------------------------------

# a part is the first one with a word in the name of an operator or GPU kernel, in this order
PARTS = (
    ("head and loss", ("log_softmax", "nll_loss", "cross_entropy")),
    ("attention", ("attention", "flash", "fmha", "bmm", "softmax")),
    ("norms, rotary, element-wise", ("triton_", "rms_norm")),  # fused kernels list what they fuse
    ("weight products", ("mm", "gemm", "cutlass", "nvjet")),
    ("clipping", ("_foreach", "vector_norm")),
    ("copies, casts", ("copy", "cat", "stack", "clone", "Memcpy")),
    ("lookups", ("embedding", "index", "gather")),
    ("norms, rotary, element-wise", ("aten::", "Kernel", "kernel", "Memset")),
)


def part_of(event, name, vocab_size):
    """The part of a training step that a profiler's event belongs to."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step#"):
            return above.name.split("#")[1].split(".")[0]  # Muon, AdamW
        above = above.cpu_parent
    part = next((p for p, words in PARTS if any(w in name for w in words)), "Python, autograd")
    if part == "weight products" and any(vocab_size in shape for shape in event.input_shapes or ()):
        return "head and loss"
    return part


def where_time_goes(s, run, steps=3):
    """{part: milliseconds of a step} by torch's profiler: on a CPU each operator's own time, on a
    GPU that of the kernels it launched. "waiting for data" is the wall clock's.

    The profiler itself slows a step of small operators: believe the shares, not the sum.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda(s)
    run.train_step(0.0)
    waited = run.batches.waited
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            with record_function("training step"):
                run.train_step(0.0)
        torch.cuda.synchronize() if on_cuda(s) else None
    parts = {"waiting for data": 1e3 * (run.batches.waited - waited) / steps}
    for event in profiler.events():
        spent = [(f"{event.name} {k.name}", k.duration) for k in event.kernels]
        if not on_cuda(s):
            spent = [(event.name, event.self_cpu_time_total)]
        for name, micros in spent:
            part = part_of(event, name, run.config.vocab_size)
            parts[part] = parts.get(part, 0.0) + micros / 1e3 / steps
    # the wait happens in Python, inside the step, on a CPU
    if not on_cuda(s):
        parts["Python, autograd"] -= parts["waiting for data"]
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


# ---- one training step: the table ----------------------------------------------------------------


def machine_contestants(s):
    """({name: work}, FLOPs of "product", bytes of "copy"): the machine's two limits."""
    side, times = s.product or (8192 if on_cuda(s) else 2048), 10 if on_cuda(s) else 1
    a, b, c = torch.randn(3, side, side, device=s.device).to(getattr(torch, s.dtype)).unbind()
    source = torch.ones(s.copy_mb * 2**18, device=s.device)  # float32: 2^20 bytes per MB
    target = torch.empty_like(source)

    def product():
        for _ in range(times):
            torch.mm(a, b, out=c)

    def copy():
        for _ in range(times):
            target.copy_(source)

    return {"product": product, "copy": copy}, times * 2 * side**3, times * 2 * source.nbytes


def train_row(s, N, S):
    """Figures of one (N, S): a flat dict, and {contestant: its parts} with --profile.

    Times are medians in milliseconds, ratios those of neighbouring runs. MFU is FLOPs of the model
    (CascadeLM.train_flops) per second over those of the matrix product of the same round.
    """
    fresh_compiler(s)
    kinds = ["ours", "gpt"] + ["plain"] * s.plain
    batch = sequences(s, N)
    with random_data(s.vocab_size, N) as folder:
        runs = {kind: make_run(s, folder, kind, N, S) for kind in kinds}
        work, product_flops, copy_bytes = machine_contestants(s)
        work |= {kind: lambda run=run: run.train_step(0.0) for kind, run in runs.items()}
        taken = interleave(s, work)
        peaks = {k: peak_memory(s, r, k, N, S) if s.memory else None for k, r in runs.items()}
        profiles = {k: where_time_goes(s, r) for k, r in runs.items() if s.profile}
        copies = runs["ours"].copies
        masked = copies * batch * N * (S + 1) // (2 * S)
        flops = {
            kind: runs[kind].model.train_flops(batch, masked, copies) for kind in ("ours", "gpt")
        }
        if s.plain:
            flops["plain"] = plain_flops(runs["plain"].model, batch)
        for holder in (runs, work):
            holder.clear()
        gc.collect()
        moved = {k: step_bytes(s, folder, k, N, S) if s.traffic else None for k in kinds}
    names = ("ratio", "ratio_min", "ratio_max")
    row = {"N": N, "S": S, "batch": batch,
           **dict(zip(names, spread(taken["ours"], taken["gpt"]), strict=True)),
           "flops_ratio": flops["ours"] / flops["gpt"],
           "peak_flops": product_flops / statistics.median(taken["product"]),
           "bandwidth": copy_bytes / statistics.median(taken["copy"])}
    if s.plain:
        names = ("plain_ratio", "plain_ratio_min", "plain_ratio_max")
        row |= dict(zip(names, spread(taken["plain"], taken["ours"]), strict=True))
    for kind in kinds:
        median = statistics.median(taken[kind])
        utilisation = spread(taken["product"], taken[kind])[0] * flops[kind] / product_flops
        row |= {f"{kind}_ms": 1e3 * median, f"{kind}_tokens_per_s": batch * N / median,
                f"{kind}_mfu": utilisation, f"{kind}_flops": flops[kind],
                f"{kind}_bytes": moved[kind], f"{kind}_memory": peaks[kind]}
    return row, profiles


def train_shapes(s):
    """[(N, S)] of the settings; everything that can be refused is refused before measuring."""
    if min(s.repeats, s.tokens_per_step, s.copy_mb) < 1 or min(s.batch, s.product) < 0:
        raise SettingsError("repeats, tokens_per_step and copy_mb must be at least 1")
    shapes = [(N, S) for N in numbers(s, "lengths") for S in numbers(s, "block_sizes", whole=N)]
    for N, S in shapes:
        sequences(s, N)
        check_blocks(N, S)
    return list(dict.fromkeys(shapes))


def bench_train(s):
    """Measure and print the table of training steps."""
    rows, shapes = [], train_shapes(s)
    if s.memory and not on_cuda(s) and resident("VmHWM") is None and not s.json:
        print("peak memory is left out: this system has no /proc to read it from")
    for N, S in shapes:
        row, profiles = train_row(s, N, S)
        rows.append(row | {"profile": profiles})
        if not s.json:
            print_train_row(s, row, first=len(rows) == 1)
            for kind, parts in profiles.items():
                print_parts(kind, parts)
    if s.json:
        print(dumps({"settings": vars(s), "rows": rows}))


def print_train_row(s, r, first):
    """One (N, S): a line for each contestant. Bytes and memory are `-` where not measured."""
    if first:
        print(f"peak {r['peak_flops'] / 1e9:.0f} GFLOP/s in {s.dtype} products, "
              f"copies {r['bandwidth'] / 1e9:.1f} GB/s\n"
              "     N     S batch  step       ms  tok/s    MFU   GFLOP  moved GB  peak MB  "
              "times (min-max), in FLOPs")
    for kind in ("gpt", "ours", "plain"):
        if f"{kind}_ms" not in r:
            continue
        moved, peak = r[f"{kind}_bytes"], r[f"{kind}_memory"]
        line = (f"{r['N']:6d} {r['S']:5d} {r['batch']:5d}  {kind:5s} {r[f'{kind}_ms']:7.1f} "
                f"{r[f'{kind}_tokens_per_s']:6.0f} {r[f'{kind}_mfu']:6.1%} "
                f"{r[f'{kind}_flops'] / 1e9:7.1f} {f'{moved / 1e9:.2f}' if moved else '-':>9s} "
                f"{f'{peak / 1e6:.0f}' if peak else '-':>8s}")
        if kind == "ours":
            line += (f"  {r['ratio']:.2f} ({r['ratio_min']:.2f}-{r['ratio_max']:.2f}), "
                     f"{r['flops_ratio']:.2f} of gpt")
        if kind == "plain":
            line += (f"  {r['plain_ratio']:.2f} ({r['plain_ratio_min']:.2f}-"
                     f"{r['plain_ratio_max']:.2f}), "
                     f"{r['plain_flops'] / r['ours_flops']:.2f} of ours")
        print(line, flush=True)


def print_parts(kind, parts):
    total = sum(parts.values())
    for part, ms in parts.items():
        print(f"    {kind:5s} {part:30s} {ms:9.2f} ms {ms / total:6.1%}", flush=True)


# ---- the list for a GPU --------------------------------------------------------------------------


def attention_errors(attend, dtype, N, S, D, device, noisy_only=False, gradient=True):
    """(output's max|diff|, gradients' max|diff| over their largest entry) of a two-stream attention
    from the oracle's float64 loop on the same rounded numbers; the second 0 without `gradient`.

    attend(q, k, v): q (1 or 2, 1, 1, N, D), k and v (2, 1, 1, N, D) -> the shape of q.
    """
    g = torch.Generator().manual_seed(7)
    q, k, v = (0.2 * torch.randn(3, 2, 1, 1, N, D, generator=g)).to(dtype).unbind()
    direction = torch.randn(2, 1, 1, N, D, generator=g)
    first = 1 if noisy_only else 0
    ins = [x.to(device).requires_grad_(gradient) for x in (q[first:], k, v)]
    y = attend(*ins)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    q2, k2, v2 = (torch.cat([x[0], x[1]], dim=2)[0, 0] for x in exact)
    rule = reference.two_stream_rule(N, S)
    truth = reference.reference_attention(q2, k2, v2, rule).view(2, 1, 1, N, D)[first:]
    error = (y.detach().cpu().double() - truth.detach()).abs().max().item()
    if not gradient:
        return error, 0.0
    got = torch.autograd.grad((y.float() * direction[first:].to(device)).sum(), ins)
    wanted = torch.autograd.grad((truth * direction[first:].double()).sum(), exact)
    pairs = zip(got, (wanted[0][first:], *wanted[1:]), strict=True)
    return error, max(
        ((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in pairs
    )


def gpu_parity(s):
    """Both attention paths against the oracle: FlexAttention as it trains, compiled."""
    cases = ((256, 16, False), (192, 4, True)) if on_cuda(s) else ((32, 4, False), (32, 4, True))
    worst = {}
    for dtype, (N, S, noisy_only) in itertools.product((torch.bfloat16, torch.float16), cases):
        paths = {"chunk": lambda q, k, v, S=S: chunked_two_stream_attention(q, k, v, S)}
        if on_cuda(s):
            fresh_compiler(s)
            flex = torch.compile(flex_two_stream_attention, dynamic=False)
            mask = flex_block_mask(N, S, 1, noisy_only, s.device)
            paths["flex"] = lambda q, k, v, f=flex, m=mask: f(q, k, v, m)
        for name, path in paths.items():
            errors = attention_errors(path, dtype, N, S, 64, s.device, noisy_only)
            key = f"{name}, {str(dtype)[6:]}"
            worst[key] = tuple(map(max, errors, worst.get(key, (0.0, 0.0))))
    for key, (error, gradient) in worst.items():
        verdict = "PASS" if error <= 1e-3 and gradient <= 1e-2 else "FAIL"
        yield (f"attention by {key}, from the oracle",
               f"{verdict}: {error:.1g}, allowed 1e-03; gradients {gradient:.1g}, allowed 1e-02")


def gpu_train(s):
    """The training step at the settings' size, in the figures of `bench.py train`."""
    s = SimpleNamespace(**{**TRAIN, **vars(s), "traffic": False})
    r, _ = train_row(s, s.seq_len, s.block_size)
    size = f"N={s.seq_len}, S={s.block_size}, {s.tokens_per_step:,} tokens"
    name = torch.cuda.get_device_name(s.device) if on_cuda(s) else s.device
    sheet = peak_flops(name) if s.dtype == "bfloat16" else None
    yield "peak of products, measured", f"{r['peak_flops'] / 1e12:.1f} TFLOP/s in {s.dtype}"
    for kind in ("ours", "gpt", "plain"):
        mfu = f"MFU {r[f'{kind}_mfu']:.1%} of the measured peak"
        if sheet:
            rate = r[f"{kind}_flops"] / r[f"{kind}_ms"] * 1e3
            mfu += f", {rate / sheet:.1%} of the data sheet's"
        peak = r[f"{kind}_memory"]
        yield (f"step of {kind}, {size}",
               f"{r[f'{kind}_ms']:.1f} ms, {r[f'{kind}_tokens_per_s']:,.0f} tokens/s, {mfu}, "
               f"{f'{peak / 2**30:.2f} GiB' if peak else 'memory not measured'}")
    yield ("step of ours / gpt", f"{r['ratio']:.2f} ({r['ratio_min']:.2f}-{r['ratio_max']:.2f}), "
           f"in FLOPs {r['flops_ratio']:.2f}")
    yield ("step of plain / ours", f"{r['plain_ratio']:.2f} ({r['plain_ratio_min']:.2f}-"
           f"{r['plain_ratio_max']:.2f})")


def gpu_memory(s):
    """Peak memory of a step at batch 1 by sequence length: linear, or not."""
    lengths, peaks = numbers(s, "memory_lengths"), []
    for N in lengths:
        fresh_compiler(s)
        one = SimpleNamespace(**{**TRAIN, **vars(s), "batch": 1})
        with random_data(s.vocab_size, N) as folder:
            run = make_run(one, folder, "ours", N, s.block_size)
            run.train_step(0.0)
            peaks.append(peak_memory(one, run, "ours", N, s.block_size))
        del run
        yield f"peak memory, N={N}, batch 1", f"{peaks[-1] / 2**20:,.0f} MiB"
    slopes = [(b - a) / (n - m) / 2**10 for m, n, a, b in
              zip(lengths, lengths[1:], peaks, peaks[1:], strict=False)]
    yield ("memory of a further token (equal: linear in N)",
           ", ".join(f"{slope:.0f}" for slope in slopes) + " KiB")


def gpu_decode(s):
    """Decoding against the twin, as in `bench.py decode`."""
    gpt = make_model(s, "ar", 1, s.seq_len)
    for S, K in block_pairs(s):
        model = make_model(s, "diffusion", S, s.seq_len)
        ways = (False, True) if on_cuda(s) else (False,)  # of passes: launched, or recorded
        for batch, graphs in itertools.product(numbers(s, "batches"), ways):
            r = decode_row(s, gpt, model, K, batch, graphs)
            yield (f"decoding, S={S}, K={K}, batch {batch}" + ", CUDA graphs" * graphs,
                   f"{r['tokens_per_s']:,.0f} tokens/s, {r['ratio']:.2f} ({r['ratio_min']:.2f}-"
                   f"{r['ratio_max']:.2f}) of the GPT's")


def gpu_shakespeare(s, *settings):
    """The first steps of config/shakespeare_char.py, and what the whole run would take."""
    chosen = override(train.DEFAULTS, ["config/shakespeare_char.py", *settings])
    dataset, whole = chosen["dataset"], chosen["max_steps"]
    if not (data_root() / dataset / "meta.json").exists():
        dataset = "shakespeare"  # the text that ships here; the row names it
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        chosen |= {"dataset": dataset, "out_dir": out, "max_steps": s.steps, "device": s.device,
                   "eval_every": 10**9}
        run = train.Run(SimpleNamespace(**chosen), Processes())
        train.train_loop(run)
        mean, error = run.evaluate(run.s.eval_windows)
    minutes = run.seconds / run.step * whole / 60
    yield (f"{dataset}, {run.step} steps of {run.model.count_parameters() / 1e6:.1f}M parameters",
           f"bound <= {mean:.3f} +- {error:.3f} nats/token in {run.seconds:.0f} s with "
           f"compiling; {whole} steps at this pace: {minutes:.1f} minutes")


GPU_LIST = (gpu_parity, gpu_train, gpu_memory, gpu_decode, gpu_shakespeare)


def gpu_table(s):
    """Yield the rows (what, figure) of the whole list; a part that fails or is left out says so."""
    began = time.perf_counter()
    for part in GPU_LIST:
        fresh_compiler(s)
        name, spent = part.__doc__.split("\n")[0], (time.perf_counter() - began) / 60
        if spent > s.minutes:
            yield name, f"left out: --minutes={s.minutes:g} are over"
            continue
        try:
            yield from part(s)
        except torch.OutOfMemoryError:
            yield name, f"out of memory: lower --tokens_per_step={s.tokens_per_step}"
            torch.cuda.empty_cache()
        except RuntimeError as e:  # of torch or its compiler: the other parts are still worth a run
            traceback.print_exc()
            yield name, f"FAIL: {type(e).__name__}; its traceback is on stderr"
    yield "minutes for all this", f"{(time.perf_counter() - began) / 60:.1f}"


def bench_gpu(s):
    """Print the table of a GPU as it fills; exit code 1 if something in it failed."""
    sequences(s, s.seq_len), check_blocks(s.seq_len, s.block_size)
    for N in numbers(s, "memory_lengths"):
        check_blocks(N, s.block_size)
    numbers(s, "batches"), block_pairs(s)
    rows = []
    for what, figure in gpu_table(s):
        rows.append((what, figure))
        if not s.json:
            print(f"{what:52s} | {figure}", flush=True)
    if s.json:
        print(dumps({"settings": vars(s), "rows": rows}))
    if any(figure.startswith("FAIL") for _, figure in rows):
        sys.exit(1)


# ---- the command line ----------------------------------------------------------------------------

COMMANDS = {"decode": (DECODE, decode), "train": (TRAIN, bench_train), "gpu": (GPU, bench_gpu)}


def settings_of(command, argv):
    """(settings with the machine resolved, lines that say how) of one command."""
    defaults = COMMANDS[command][0]
    path = {"attention": "chunk", "compile": "false"} if command == "decode" else {
        "attention": "auto", "compile": "auto", "optimizer": train.optimizer, "batch": 0}
    objective = "ar" if command == "decode" else "diffusion"  # decoding has no attention paths
    s = SimpleNamespace(**{**path, **override(defaults, argv)}, objective=objective)
    return s, choose_machine(s)


def main(argv):
    try:
        if not argv or argv[0] not in COMMANDS:
            raise SettingsError(f"say what to measure: python bench.py {' | '.join(COMMANDS)}")
        s, lines = settings_of(argv[0], argv[1:])
        if argv[0] == "gpu" and not on_cuda(s):
            raise SettingsError("no CUDA device here for bench.py gpu: use decode or train")
        if not s.json:
            print("\n".join(lines) + f"\nthreads    {torch.get_num_threads()}", flush=True)
        COMMANDS[argv[0]][1](s)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --tokens_per_step or --batch, or set --plain=false")
    except (SettingsError, DataError, ValueError) as e:
        fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
