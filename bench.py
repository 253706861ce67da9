"""How fast: decoding against the autoregressive twin, both with their KV cache.

    python bench.py decode                            the shape of train.py's defaults
    python bench.py decode --n_layer=7 --n_head=6 --n_embd=384     the nano as on a GPU
    python bench.py decode --batches=1 --pairs=16:4 --json=true

Speeds are ratios of interleaved runs: a machine's speed drifts, a ratio of neighbours does not.
Weights are random, since speed does not depend on them; S / K positions are revealed a pass.
"""

import statistics
import sys
import time
from json import dumps
from types import SimpleNamespace

import torch

from configurator import SettingsError, fail, override, public
from machine import choose_machine
from model import BlockCache, CascadeConfig, CascadeLM
from sample import generate_stream

# ---- settings ----------------------------------------------------------------------------------
n_layer = 4
n_head = 4
n_kv_head = 0  # 0: as many as n_head
n_embd = 128
vocab_size = 84
seq_len = 512
tokens = 128  # new tokens of each row
batches = "1,4,16,64"
pairs = "16:1,16:4,16:8,8:4,4:2"  # block size : passes per block
repeats = 5  # interleaved runs of each contestant, after one that is not counted
near = 100  # positions whose passes are compared: work must not grow with the text
far = 2000
device = "auto"
dtype = "auto"
json = False  # one JSON object instead of the table
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))


def make_model(s, objective, block_size, context):
    """A model of the settings' shape with random weights, ready to decode."""
    shape = {k: getattr(s, k) for k in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size")}
    config = CascadeConfig(
        **shape, seq_len=context, block_size=block_size, objective=objective
    )
    torch.manual_seed(0)
    return CascadeLM(config).to(s.device).eval()


def seconds(s, work):
    """Wall-clock seconds of work(), the device drained on both sides."""
    on_cuda = s.device.startswith("cuda")
    torch.cuda.synchronize() if on_cuda else None
    began = time.perf_counter()
    work()
    torch.cuda.synchronize() if on_cuda else None
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


def decode_row(s, gpt, model, K, batch):
    """One row of the table: a dict of figures for one (S, K) and one batch size."""
    nfe = {}

    def contest(name, net, steps):
        def work():
            with torch.autocast(s.device.split(":")[0], torch.bfloat16, s.dtype == "bfloat16"):
                *_, last = generate_stream(
                    net, [[]] * batch, s.tokens, rule="random", steps=steps
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


def decode(s):
    """Measure and print the decoding table."""
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in s.pairs.split(",")]
        batches = [int(batch) for batch in s.batches.split(",")]
        assert all(len(pair) == 2 for pair in pairs)
    except (ValueError, AssertionError):
        raise SettingsError("write --pairs=16:4,8:4 (S:K) and --batches=1,4") from None
    if min(s.tokens, s.repeats, s.near, *batches) < 1 or s.far < s.near:
        raise SettingsError("tokens, repeats, batches and near must be at least 1, far >= near")
    gpt = make_model(s, "ar", 1, s.seq_len)
    rows = []
    for S, K in pairs:
        model = make_model(s, "diffusion", S, s.seq_len)
        for batch in batches:
            rows.append(decode_row(s, gpt, model, K, batch))
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


def main(argv):
    try:
        if argv[:1] != ["decode"]:
            raise SettingsError("say what to measure: python bench.py decode")
        s = SimpleNamespace(
            **override(DEFAULTS, argv[1:]), attention="chunk", compile="false", objective="ar"
        )
        lines = choose_machine(s)
        if not s.json:
            print("\n".join(lines) + f"\nthreads    {torch.get_num_threads()}")
        decode(s)
    except (SettingsError, ValueError) as e:
        fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
