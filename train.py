"""Train CASCADE, block diffusion or a GPT, on one or many processes.

    python train.py config/nano.py                       minutes, on a GPU or on two CPU cores
    python train.py config/nano.py --max_minutes=20 --out_dir=out/nano20
    python train.py config/ar.py                         the same network as a GPT: the baseline
    torchrun --nproc_per_node=8 train.py                 the same batches and noise, shared out
    python train.py --out_dir=out/nano --init_from=resume
    python train.py --init_from=out/ar --local_window=6 --out_dir=out/drafts    from a GPT's weights

A run leaves last.pt, best.pt and log.csv in out_dir. Batches and noise are pure functions of (seed,
step), drawn for the global batch and then sliced. So a resumed run is the uninterrupted one, and
processes that divide the batch, or micro-batches, change nothing but rounding. With max_minutes the
learning rate follows the clock, which no seed repeats.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import corrupt
import eval
import sample
from model import CascadeConfig, CascadeLM
from util import checkpoint, machine
from util.data import Dataset, make_tokenizer, opening, prepare_shipped, writing
from util.muon import Muon
from util.settings import check, guarded, optional, public, require, settings
from util.view import printable

# ---- settings: each can be set in a config file or as --name=value -------------------------------
# where
out_dir = "out/train"
dataset = "shakespeare"  # a folder of data/, prepared by its prepare.py
init_from = "scratch"  # or "resume": go on from out_dir/last.pt; or another run's folder, or
# hf:DIR, a Llama or Qwen3 as Hugging Face keeps it: start from its weights, with its shape
overwrite = False  # true: the first checkpoint replaces the run that out_dir holds
seed = 1337
# the model: see model.CascadeConfig. These are a cascade's; a GPT (config/ar.py) or block diffusion
# (config/bd3lm.py) differ in several settings at once
seq_len = 256  # N
block_size = 16  # S, tokens in a diffusion block
n_layer = 6  # each of 4 x 384 x 384 + 3 x 384 x 1024 = 1.77M parameters
n_head = 6
n_kv_head = 0  # 0: as many as n_head
n_embd = 384  # with a local head of 3.5M parameters 14M in all
n_hidden = 0  # width of the MLP; 0: 8/3 n_embd
tie_embeddings = False
qk_norm = True
context = "causal"  # finished text is read as by a GPT; or "block", block-causally
local_window = 6  # w, tokens to the left that the local head sees; 0: no local head
local_hidden = 0  # width of the local head; 0: 4 n_embd
# the loss, by terms in nats per token:
#   cascade           NLL of the next token + draft_weight * [(1 - soft) * NLL of the drafts
#                     + soft * their cross-entropy against the GPT level's distribution]
#   no local head     NLL of the next token + draft_weight * bound
#   context="block"   draft_weight * bound
draft_weight = 1.0  # 0: a GPT alone
soft = 0.5
teacher = ""  # another run, whose distribution replaces the GPT level's; it teaches both terms then
# the noise: see corrupt.py
noise = "full"
corruption = "all"  # every block of a sequence; or "target", one
weighting = "elbo"  # or "cascade"
m_min = 1e-3
clip_low = 0.3
clip_high = 0.8
# the budget: whichever ends first; 0: no such limit
max_steps = 5000
max_minutes = 0.0
batch_size = 64  # sequences in a step, over all processes: 64 x 256 = 16,384 tokens
micro_batch = 0  # sequences in a forward pass of a process; 0: all that it has
# the optimizer
optimizer = "muon"  # for the matrices of the layers, AdamW for the rest; or "adamw" for all
learning_rate = 1e-3  # AdamW's peak
muon_lr = 4e-3  # Muon's peak
weight_decay = 0.1  # of matrices and tables
beta1 = 0.9
beta2 = 0.98
grad_clip = 1.0  # 0: none
warmup_steps = 100
final_lr = 0.0  # the learning rate falls linearly to this share of its peak
# reports
log_every = 50
eval_every = 250  # steps from one validation, with its checkpoint, to the next
eval_windows = 64
final_windows = 512  # for the figures at the end
sample_tokens = 300  # of the sample at the end; 0: none
wandb = False  # besides out_dir/log.csv
# the machine
device = "auto"  # cuda if there is one, else cpu
dtype = "auto"  # bfloat16 where the hardware multiplies it, else float32
compile = "auto"  # torch.compile: true on CUDA; on a CPU a tenth faster, after 40 s of compiling
# --------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
CHOICES = {
    "context": ("causal", "block"), "noise": corrupt.SCHEDULES, "corruption": ("all", "target"),
    "weighting": corrupt.WEIGHTINGS, "optimizer": ("muon", "adamw"),
    "dtype": ("auto", "float32", "bfloat16"), "compile": ("auto", "true", "false"),
}
LEAST = dict.fromkeys("batch_size log_every eval_every eval_windows final_windows".split(), 1)
MOST = {"soft": 1, "beta1": 0.9999, "beta2": 0.9999, "seed": 2**32, "batch_size": 2**24}
# log.csv: gpt, draft and bound are the terms of the loss, with soft targets; val_ are plain NLLs
COLUMNS = ("step", "seconds", "gpt", "draft", "bound", "val_gpt", "val_draft", "val_bound",
           "tokens_a_round", "lr", "tokens_per_second", "mfu")


# ---- batches, noise and loss ---------------------------------------------------------------------


def draw_batches(s, mask_id, tokens, step, rank=0, world=1):
    """(micro-batches of process `rank` in a step, number of target blocks in the global batch). A
    micro-batch is x0, xt (B, N); index (M,), the masked positions that have a loss, flat in (B, N);
    weight (M,). The last three are None for a GPT alone."""
    generator = torch.Generator().manual_seed((s.seed * 1_000_003 + step) % 2**63)
    starts = torch.randint(len(tokens) - s.seq_len + 1, (s.batch_size,), generator=generator)
    x0 = np.stack([tokens[i : i + s.seq_len] for i in starts.tolist()])
    x0, share = torch.from_numpy(x0.astype(np.int64)), s.batch_size // world
    shares = torch.arange(rank * share, (rank + 1) * share).split(s.micro_batch or share)
    if s.draft_weight == 0:
        return [(x0[rows], None, None, None) for rows in shares], 0
    all_blocks = s.corruption == "all"
    draw = corrupt.corrupt_all_blocks if all_blocks else corrupt.corrupt_target_block
    rates, batches = corrupt.Rates(s.m_min, s.clip_low, s.clip_high), []
    noisy = draw(x0, s.block_size, mask_id, generator, s.noise, rates, s.weighting)
    for rows in shares:
        index = noisy.mask[rows].flatten().nonzero()[:, 0]
        batches.append((x0[rows], noisy.xt[rows], index, noisy.weight[rows].flatten()[index]))
    return batches, noisy.block.numel()


def loss_weights(s):
    """{term of the loss: its weight}, "gpt" before "draft" or "bound"."""
    weights = {"gpt": 1.0} if s.context == "causal" else {}
    if s.draft_weight:
        weights["draft" if s.local_window else "bound"] = s.draft_weight
    return weights


def loss_terms(s, nlls, weight, num_blocks):
    """The terms in the order of loss_weights, (1,) or (2,), in nats per token: this micro-batch's
    share of means over the global batch. nlls: model.NLLs."""
    terms = []
    if nlls.gpt is not None:
        terms.append(nlls.gpt.sum() / (s.batch_size * (s.seq_len - 1)))
    if nlls.masked is not None:
        terms.append(corrupt.masked_diffusion_loss(nlls.masked, weight, num_blocks))
    return torch.stack(terms)


# ---- optimizers ----------------------------------------------------------------------------------


def make_optimizers(model, s):
    """[AdamW, Muon], or [AdamW]. Muon takes the matrices of the layers, those of attention head by
    head; AdamW the rest."""
    c, matrices, tables, vectors = model.config, {}, [], []
    for name, p in model.named_parameters():
        if s.optimizer == "muon" and name.startswith("layers.") and p.ndim == 2:
            module = name.split(".")[-2]  # q_proj of layers.0.self_attn.q_proj.weight
            matrices.setdefault(module, []).append(p)
        else:
            (tables if p.ndim == 2 else vectors).append(p)
    groups = [{"params": tables, "weight_decay": s.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, s.learning_rate, (s.beta1, s.beta2), fused=True)]
    if matrices:
        heads = {"q_proj": c.n_head, "k_proj": c.n_kv_head, "v_proj": c.n_kv_head,
                 "o_proj": c.n_head}
        groups = [{"params": params, "heads": heads.get(name, 1), "by_columns": name == "o_proj"}
                  for name, params in matrices.items()]
        optimizers.append(Muon(groups, s.muon_lr, s.weight_decay))
    return optimizers


# ---- the run -------------------------------------------------------------------------------------


def budget_used(s, now):
    """Share of the budget, in [0, 1]."""
    by_steps = now.step / s.max_steps if s.max_steps else 0.0
    by_clock = now.seconds / 60 / s.max_minutes if s.max_minutes else 0.0
    return min(1.0, max(by_steps, by_clock))


def require_finite(what, finite, step):
    require(finite, f"{what} is not finite at step {step}, which was not saved: start again with a "
            "lower --learning_rate and --muon_lr or more --warmup_steps")


def log_line(s, row, now, weights, used):
    """Terms of the training loss, in brackets NLLs of the last validation; speed; minutes to go."""
    of, terms = f"/{s.max_steps}" if s.max_steps else "", []
    for name in weights:
        val = f"{now.figures['nll'][name][0]:.3f}" if now.figures else "  -  "
        terms.append(f"{name} {row[name]:.3f} ({val})")
    mfu = f" | mfu {row['mfu']:3.0%}" if "mfu" in row else ""
    left = now.seconds / 60 * (1 / max(used, 1e-9) - 1)
    return (f"step {now.step:6d}{of} | {' | '.join(terms)} | lr {row['lr']:.1e} | "
            f"{row['tokens_per_second']:7,.0f} tok/s{mfu} | eta {left:.1f}m")


def train(s, given=()):
    """Train by settings s, of which the user chose those `given`. Returns an exit code."""
    processes = machine.Processes()
    rank, world, say = processes.rank, processes.world, processes.say

    # ---- settings and data: rank 0 prepares in the first part what all read in the second
    with processes.together():
        start = checkpoint.starting_point(s, given, DEFAULTS)
        check(s, CHOICES, LEAST, MOST)
        require(s.max_steps or s.max_minutes,
                "set --max_steps or --max_minutes: the learning rate falls towards an end")
        require(s.batch_size % world == 0,
                f"--batch_size={s.batch_size} is no multiple of the {world} processes")
        resumed, ar = s.init_from == "resume", s.draft_weight == 0
        device = machine.choose_device(s.device, processes.local_rank, world)
        online = optional("wandb") if s.wandb and processes.main else None
        if processes.main:
            prepare_shipped(s.dataset)
    with processes.together():
        data, teacher, out = Dataset(s.dataset, s.seq_len), None, Path(s.out_dir)
        shape = checkpoint.model_settings(vars(s))
        if start:  # head_dim, rope_base and norm_eps are not settings
            shape = start["config"] | shape
        config = CascadeConfig(**shape | {"vocab_size": data.meta["vocab_size"]})
        config.check_training(s.noise, s.corruption, s.draft_weight, s.soft, s.teacher != "")
        eval.check_scoring(config, ar)
        require(not resumed or start["meta"] == data.meta,
                f"{data.folder} is other data than this run began with: prepare that again")
        if start:
            data.require_vocabulary(start["meta"], s.init_from)
        if s.teacher:
            teacher, other = checkpoint.load_model(s.teacher, device)
            data.require_vocabulary(other["meta"], s.teacher)
            require(teacher.config.context == "causal" and teacher.config.seq_len >= s.seq_len,
                    f"{s.teacher} cannot teach: it needs context=causal and this seq_len or more")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        samples = s.sample_tokens and processes.main
        tokenizer = make_tokenizer(data.meta) if samples else None  # its package may be missing
    on_cuda = device != "cpu"
    dtype, why = machine.choose_dtype(s.dtype, device)
    compiled = s.compile == "true" or (s.compile == "auto" and on_cuda)
    flex = on_cuda and compiled and config.head_dim >= 16  # its kernels start at 16

    # ---- model and optimizers
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on CUDA
    model = CascadeLM(config, flex).to(device)
    optimizers, origin = make_optimizers(model, s), "fresh weights"
    # what is saved beside weights and optimizers: seconds of training with its validations; figures
    # of the last validation and of the evaluation at the end; the least validation loss; log.csv
    now = SimpleNamespace(step=0, seconds=0.0, figures=None, final=None, best=math.inf, best_step=0,
                          log=[",".join(COLUMNS)])
    if resumed:
        model.load_state_dict(start["model"])
        for optimizer, state in zip(optimizers, start["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        vars(now).update((name, start[name]) for name in vars(now))
        now.final, origin = None, f"step {now.step} of {s.out_dir}"
    elif start:
        new = checkpoint.take_weights(model, start["model"])
        origin = f"weights of {s.init_from}; fresh: {', '.join(new) or 'none'}"
    wrapped = torch.compile(model) if compiled else model
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, [device] if on_cuda else None)
    weights, tokens, val = loss_weights(s), data.split("train"), data.split("val")
    term_weights = torch.tensor([*weights.values()], device=device)
    flops, peak = machine.step_flops(model, s) / world, machine.peak_flops(device, dtype)

    # ---- what will run, and why
    name = torch.cuda.get_device_name(device) if on_cuda else device
    say(f"device     {name}, processes: {world}")
    say(f"dtype      {dtype}: {why}")
    say(f"attention  {'FlexAttention' if flex else 'dense masks'}, "
        f"{'compiled' if compiled else 'not compiled: that pays on a GPU'}")
    say(f"data       {data.name}: {len(tokens):,} train and {len(val):,} validation tokens")
    say(f"model      {sum(p.numel() for p in model.parameters()):,} parameters, {origin}")
    say(f"step       {s.batch_size} sequences of {s.seq_len} tokens")
    say("loss       " + " + ".join(f"{weight:g} {name}" for name, weight in weights.items()))
    if not on_cuda and not resumed and not {"n_embd", "batch_size", "max_steps"} & set(given):
        say("note       size, batch and steps are for a GPU; config/nano.py has those for a CPU")
    if online:
        online.init(project="cascade", name=s.out_dir, config=public(vars(s)))

    def evaluate(windows):
        x0 = eval.cut_windows(val, s.seq_len, windows)
        return eval.evaluate(model, x0, ar, s.micro_batch or 16, processes)

    def validate():  # sets now.figures, and now.best if these are the best
        with machine.autocast(device, dtype):
            found = evaluate(s.eval_windows)
        loss = sum(weight * found.nll[name][0] for name, weight in weights.items())
        require_finite("the validation loss", math.isfinite(loss), now.step)
        now.figures = found._asdict()
        if loss < now.best:
            now.best, now.best_step = loss, now.step

    def save():  # last.pt and log.csv; best.pt if this step is the best, or none was validated yet
        state = {"config": asdict(config), "settings": public(vars(s)), "meta": data.meta,
                 "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        with processes.together(), writing(s.out_dir):
            if processes.main:
                if now.best_step == now.step or now.best_step == 0:
                    checkpoint.save(out / "best.pt", state | vars(now))
                (out / "log.csv").write_text("\n".join(now.log) + "\n")
                checkpoint.save(out / "last.pt", state | vars(now))

    # ---- the loop
    began = time.perf_counter() - now.seconds
    # since the last line of the log: when that was, sums of loss terms and gradient norms, steps
    mark, term_sum, norm_sum, steps = time.perf_counter(), 0.0, 0.0, 0
    used, stopped = budget_used(s, now), 0  # share of the budget; number of a signal
    with machine.Stop() as stop:
        while used < 1 and not stopped:
            factor = min(1.0, (now.step + 1) / max(1, s.warmup_steps))
            factor *= s.final_lr + (1 - s.final_lr) * (1 - used)
            for optimizer, peak_lr in zip(optimizers, (s.learning_rate, s.muon_lr), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * factor
            batches, num_blocks = draw_batches(s, config.mask_id, tokens, now.step, rank, world)
            for i, batch in enumerate(batches):
                x0, xt, index, weight = (t if t is None else t.to(device) for t in batch)
                # gradients are exchanged once, after the last micro-batch
                hold = world > 1 and i < len(batches) - 1
                with wrapped.no_sync() if hold else nullcontext():
                    with machine.autocast(device, dtype):
                        nlls = wrapped(x0, xt, index, s.soft, teacher)
                        terms = loss_terms(s, nlls, weight, num_blocks)
                    # DDP takes the mean over processes; these are shares of a global mean
                    (terms @ term_weights * world).backward()
                term_sum += terms.detach()
            norm_sum += nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            now.step, steps = now.step + 1, steps + 1
            now.seconds = time.perf_counter() - began
            # the clock and the signals of rank 0 decide for all
            used, stopped = processes.from_main(budget_used(s, now), stop.asked)
            validates = used >= 1 or now.step % s.eval_every == 0
            if not (validates or stopped or now.step % s.log_every == 0):
                continue

            require_finite("a gradient", math.isfinite(norm_sum), now.step)  # a GPU is awaited here
            per_second = steps / (time.perf_counter() - mark)
            row = dict(zip(weights, (processes.sum(term_sum) / steps).tolist(), strict=True)) | {
                "step": now.step, "seconds": now.seconds, "lr": s.learning_rate * factor,
                "tokens_per_second": per_second * s.batch_size * s.seq_len}
            if peak:
                row["mfu"] = per_second * flops / peak
            if validates:
                validate()
                now.seconds = time.perf_counter() - began
                row |= {f"val_{name}": now.figures["nll"][name][0] for name in weights}
                if now.figures["acceptance"]:
                    row["tokens_a_round"] = eval.tokens_a_round(now.figures["acceptance"])
            now.log.append(",".join(f"{row[c]:.8g}" if c in row else "" for c in COLUMNS))
            if online:
                online.log(row, step=now.step)
            if validates or stopped:
                save()
            say(log_line(s, row, now, weights, used))
            mark, term_sum, norm_sum, steps = time.perf_counter(), 0.0, 0.0, 0
        (stopped,) = processes.from_main(stopped or stop.asked)  # also during the last save

    # ---- the end: figures in float32, as eval.py has them
    if stopped:
        say(f"stopped at step {now.step}, saved; go on with\n  {machine.resume_command(s.out_dir)}")
        return 128 + int(stopped)
    found = evaluate(s.final_windows)
    now.final = found._asdict()
    save()
    say(f"\nafter {now.step} steps = {now.step * s.batch_size * s.seq_len:,} tokens in "
        f"{now.seconds / 60:.1f} minutes; scored are the last {s.seq_len - s.seq_len // 4} tokens "
        f"of {min(s.final_windows, len(val) // s.seq_len)} windows of {s.seq_len}\n{eval.HEAD}")
    for line in eval.table_rows(found, data.bytes_per_token("val")):
        say(line)
    if samples:
        begin, mode = opening(tokenizer), "gpt" if ar else "auto"
        *_, step = sample.generate_stream(model, [begin], s.sample_tokens, mode=mode)
        say(f"\n{printable(tokenizer.decode(step.rows[0][len(begin) :]))}\n\n{step}")
    best = now.best_step or now.step  # 0: none was validated, and best.pt is last.pt
    say(f"\nthat is {out}/last.pt; sample.py and eval.py read best.pt, which is of step {best}\n"
        f"next: python sample.py --out_dir={out}\n      python eval.py --out_dir={out}")
    return 0


@guarded
def main(argv):
    s, given = settings(DEFAULTS, argv)
    try:
        return train(s, given)
    finally:
        machine.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
