"""Train CASCADE, or its AR baseline, on one or many processes.

    python train.py                                      the nano on the text that ships here
    python train.py config/nano.py --max_minutes=20      a config file, then overrides
    python train.py --objective=ar --block_size=1 --out_dir=out/ar      the same network as a GPT
    torchrun --nproc_per_node=8 train.py                 the same batches and noise, shared out
    python train.py config/nano.py --init_from=resume    go on from out_dir/last.pt
    python train.py --init_from=out/nano --train=draft --draft_rank=16 --out_dir=out/draft
                                                         keep its GPT level, learn to draft
    python train.py --init_from=hf:DIR --dataset=mine    from the weights of a Llama or Qwen3

Batches and noise are pure functions of (seed, step), drawn for the whole global batch and then
sliced. So a resumed run, more processes or smaller micro-batches compute the same thing. (With
max_minutes the learning rate follows the clock, which no seed repeats.)
"""

import math
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

from util.configurator import (
    SettingsError,
    check_settings,
    first_line,
    guarded,
    override,
    public,
)

# isort: split
import torch
from torch import nn

from corrupt import SCHEDULES, WEIGHTINGS, Rates, corrupt_all_blocks, corrupt_target_block
from eval import Score, ar_input, evaluate, step_generator
from model import CascadeConfig, CascadeLM
from sample import DEFAULTS as SAMPLE
from sample import generate_stream
from util import hf
from util.checkpoint import (
    all_finite,
    check_out_dir,
    check_same,
    load_checkpoint,
    load_model,
    load_source,
    save_checkpoint,
    take_over,
)
from util.dataset import Prefetch, load_or_prepare
from util.display import printable
from util.judge import check_vocabulary
from util.log import Log, Silent
from util.machine import (
    Processes,
    Stop,
    autocast,
    choose_machine,
    keep_memory,
    peak_flops,
    train_flops,
)
from util.optim import lr_factor, make_optimizers
from util.shard import gathered, load_whole, shard_model, whole

_gpu = torch.cuda.is_available()  # the defaults are the nano for this machine
# ---- settings: each can be set in a config file or as --name=value -----------------------------
# where
out_dir = "out/nano"
dataset = "shakespeare"  # a folder of data/, prepared by its prepare.py
init_from = "scratch"  # or "resume": go on from out_dir/last.pt; or another run's folder or hf:DIR,
# whose weights a new run starts from, and whose shape it has where none is given
train = "all"  # or "draft": only what drafts, so that the GPT level stays what it was, bit for bit
overwrite = False  # allow a fresh run to replace the one in out_dir, with its first checkpoint
any_data = False  # allow a run to be resumed on other data than it began with
seed = 1337
# the model; its shape is explained in model.CascadeConfig
objective = "diffusion"  # or "ar"
block_size = 8  # S, tokens denoised together
seq_len = 256 if _gpu else 128
n_layer = 7 if _gpu else 2  # on a GPU 7 layers of 4 x 384 x 384 + 3 x 384 x 1024 = 1.77M
n_head = 6
n_kv_head = 0  # 0: as many as n_head
n_embd = 384 if _gpu else 192
n_hidden = 0  # 0: 8/3 n_embd
tie_embeddings = False
qk_norm = True
context = "causal"  # the clean stream is a GPT; or "block", as in BD3-LM
local_window = 4  # w, left tokens that the local head sees; 0: no local head
local_hidden = 0  # width of the local head; 0: twice n_embd
acceptance = False  # the local head learns to tell what the GPT level accepts: eval.py --drafts
draft_rank = 0  # of what noisy positions add to the projections, for --train=draft; 0: nothing
# the loss: bound + gpt_weight * next-token NLL + joint_weight * NLL of joint passes
loss_on = "all"  # or "completion": text behind the dataset's separator, in every term
gpt_weight = 3.0
joint_weight = 2.0
joint_target = "text"  # or "gpt": the distribution of the GPT level, not differentiated
gpt_target = "text"  # this one's and joint_target may be "teacher" as well:
teacher = ""  # a run of this vocabulary whose GPT level, or AR baseline, is to be imitated
# the noise
corruption = "all"  # all blocks of a sequence; or "target", one block of each
noise = "tilted"  # or "balanced", "uniform", "clipped": corrupt.py
copies = 2  # noisy copies of a sequence, 1 or 2, that share its clean stream
weighting = "elbo"  # or "cascade"
m_min = 1e-3
clip_low = 0.3
clip_high = 0.8
full_share = 0.5  # of the blocks, masked completely: what joint passes start from; 0 without them
# the budget: whichever of the two ends first; 0 = no such limit
max_steps = 5000 if _gpu else 0
max_minutes = 0.0 if _gpu else 4.5
batch_size = 64 if _gpu else 4  # sequences per step, over all processes and micro-batches
micro_batch = 0  # sequences per forward pass of one process; 0: its whole share at once
# the optimizer
optimizer = "muon"  # for the matrices of the layers; the rest always has AdamW. Or "adamw" for all
learning_rate = 1e-3 if _gpu else 1.2e-2  # AdamW's peak
muon_lr = 4e-3 if _gpu else 5e-3  # Muon's peak
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.98
grad_clip = 1.0
warmup_steps = 100 if _gpu else 40
final_lr = 0.0  # the learning rate falls linearly to this fraction of its peak
# reports
log_every = 50
eval_every = 250  # steps between validations; a checkpoint is written with each
eval_windows = 64  # validation windows for that
final_windows = 512  # windows for the figures at the end
sample_tokens = 400  # length of the sample at the end; 0 for none
wandb = False  # besides out_dir/log.csv, which is always written
# the machine
device = "auto"  # cuda if there is one, else cpu
dtype = "auto"  # bfloat16 where the hardware multiplies it, else float32
attention = "auto"  # flash or flex on CUDA, chunk elsewhere
shard = False  # slice weights and optimizer over the processes: for models beyond one GPU
compile = "auto"  # torch.compile of the layers: true with flex and in long runs on a CPU
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))

CHOICES = {
    "noise": tuple(SCHEDULES), "weighting": WEIGHTINGS, "corruption": ("all", "target"),
    "joint_target": ("text", "gpt", "teacher"), "gpt_target": ("text", "teacher"),
    "copies": (1, 2), "train": ("all", "draft"), "loss_on": ("all", "completion"),
    "optimizer": ("muon", "adamw"), "attention": ("auto", "chunk", "flex", "flash"),
}
AT_LEAST = {1: "batch_size log_every eval_every eval_windows final_windows",
            0: "micro_batch sample_tokens learning_rate muon_lr weight_decay grad_clip final_lr "
               "warmup_steps max_steps max_minutes gpt_weight joint_weight full_share"}
RANGES = {name: (low, math.inf) for low, names in AT_LEAST.items() for name in names.split()}
RANGES |= {"beta1": (0, 1 - 1e-9), "beta2": (0, 1 - 1e-9), "seed": (0, 2**63 - 1)}


def resolve(s, processes):
    """Settle what `s` leaves open, refuse what cannot work; returns lines that say what and why."""
    check_settings(s, CHOICES, RANGES)
    lines = choose_machine(s, processes.local_rank, processes.world)
    if not s.max_steps and not s.max_minutes:
        raise SettingsError("set --max_steps or --max_minutes: an endless run has no schedule")
    if s.shard and processes.world == 1:
        raise SettingsError("--shard=true is for several processes: start them with torchrun")
    unit = processes.world * max(1, s.micro_batch)
    if s.batch_size % unit:
        raised = -(-s.batch_size // unit) * unit
        lines.append(f"batch      {s.batch_size} sequences raised to {raised}: a multiple of "
                     f"{processes.world} processes, {max(1, s.micro_batch)} at a time")
        s.batch_size = raised
    if s.objective == "ar":
        s.block_size, s.context, s.local_window, s.corruption = 1, "causal", 0, "all"
        s.draft_rank = 0
    soft = [f"{name}={getattr(s, name)}" for name in ("joint_target", "gpt_target")
            if getattr(s, name) != "text"]
    if not s.local_window:
        s.full_share = 0.0
        s.joint_target = "text"
    for what, asked in (("train=draft", s.train == "draft"), ("draft_rank", s.draft_rank),
                        (" and --".join(soft), soft)):
        if asked and (s.context == "block" or s.objective == "ar"):
            raise SettingsError(f"--{what} needs a GPT level beside blocks: set --context=causal "
                                "and --objective=diffusion")
    if bool(s.teacher) != ("teacher" in "".join(soft)):
        raise SettingsError("--teacher=DIR goes with --joint_target=teacher or "
                            "--gpt_target=teacher: give both")
    if s.train == "draft" and (s.init_from == "scratch" or not (s.draft_rank or s.local_window)):
        raise SettingsError("--train=draft keeps a GPT level and trains what drafts: it needs "
                            "--init_from=DIR, and --draft_rank or --local_window")
    rates(s).check(s.noise)
    if s.corruption == "target" or s.block_size == 1:
        s.copies = 1  # of a block of one token the second copy would repeat the first
    if s.corruption == "target" and (s.context, s.local_window, s.loss_on) != ("block", 0, "all"):
        raise SettingsError("--corruption=target is one stream of blocks: set --context=block, "
                            "--local_window=0 and --loss_on=all")
    return lines


# ---- data and noise ----------------------------------------------------------------------------


def rates(s):
    return Rates(s.m_min, s.clip_low, s.clip_high, s.full_share)


def micro_batches(s, mask_id, split, step, rank, world):
    """This process's share of a step's global batch, cut into micro-batches, on the CPU.

    A list of (x0, xt, index, drafted, *own, weight, share): clean and noisy tokens, the positions
    with a loss, flat in xt (see `Score`), which of these train the acceptance, and their weights in
    the bound and in the joint NLL, (M,) each; both add up to means over the global batch. With
    loss_on="completion" they are of scored tokens alone, means in expectation, and own (B, N - 1)
    has the weights in the next-token NLL. All is drawn for the global batch, then sliced.
    """
    generator = step_generator(s.seed, step)
    starts = torch.randint(len(split) - s.seq_len + 1, (s.batch_size,), generator=generator)
    part = s.batch_size // world
    mine = slice(rank * part, (rank + 1) * part)
    x0 = torch.from_numpy(split.window(starts[mine].numpy(), s.seq_len))
    # corruption never looks at the tokens, so the other ranks' rows need not be read
    blank = torch.zeros(s.batch_size, s.seq_len, dtype=torch.long)
    how = blank, s.block_size, mask_id, generator, s.noise, rates(s), s.weighting
    blocks = s.copies * s.batch_size * s.seq_len // s.block_size
    if s.objective == "ar":
        mask = torch.ones_like(x0, dtype=torch.bool)
        xt, weight = ar_input(x0, mask_id), mask.float()
    elif s.corruption == "target":
        xt, mask, weight, *_ = (t[mine] for t in corrupt_target_block(*how))
        xt, blocks = torch.where(xt == mask_id, xt, x0), s.batch_size
    else:
        noisy = corrupt_all_blocks(*how, copies=s.copies)
        mask, weight = (t.view(s.copies, *blank.shape)[:, mine] for t in noisy[1:3])
        xt = x0.expand_as(mask).masked_fill(mask, mask_id)
    k = mask.unflatten(-1, (-1, s.block_size)).sum(dim=-1).clamp(min=1)
    share, own = (1 / k).repeat_interleave(s.block_size, dim=-1), []  # a mean over each block
    # drafts stand in blocks masked completely; a fifth of them, of every rank, costs little
    n = torch.arange(s.seq_len)
    some = (n > 0) & ((n // s.block_size + n % s.block_size) % 5 == 0)
    some = some & (k == s.block_size).repeat_interleave(s.block_size, dim=-1)
    if s.loss_on == "completion":  # a token's weight is 1 / S on average over the noise
        scored = torch.from_numpy(split.completions(starts.numpy(), s.seq_len))
        blocks = s.copies * scored.sum().clamp(min=1) / s.block_size
        mask, own = mask & scored[mine], [scored[mine] / scored[:, 1:].sum().clamp(min=1)]
    whole, out = (x0, xt, mask, some, *own, weight / blocks, share / blocks), []
    parts = (t.split(s.micro_batch or part, dim=-2) for t in whole)
    for x0, xt, mask, some, *own, weight, share in zip(*parts, strict=True):
        index = mask.flatten().nonzero()[:, 0]
        drafted = some.flatten()[index].nonzero()[:, 0]
        out.append((x0, xt, index, drafted, *(w[:, 1:] for w in own),
                    *(w.flatten()[index] for w in (weight, share))))
    return out


# ---- the run -----------------------------------------------------------------------------------


def in_training(compiled, eager, *args):
    return (compiled if torch.is_grad_enabled() else eager)(*args)


class Run:
    """One training run: what must survive a restart, and the steps that change it."""

    def __init__(self, s, processes, given=DEFAULTS):
        """`given`: the names of the settings that the user chose; others a source may set."""
        self.s, self.processes = s, processes
        source, weights, meta = load_source(s)
        if s.train == "draft" and s.init_from != "resume" and source.get("context") == "block":
            raise SettingsError(f"--train=draft: {s.init_from} has no GPT level to keep; give a "
                                "run with --context=causal")
        vars(s).update((k, v) for k, v in source.items() if k in DEFAULTS and k not in given)
        asked = dict(vars(s))  # before "auto" is resolved
        lines = resolve(s, processes)
        processes.open(s.device)
        self.data = load_or_prepare(s.dataset, s.seq_len, processes)
        self.check_data(source, meta)
        names = CascadeConfig.__dataclass_fields__
        shape = source | {k: v for k, v in vars(s).items() if k in names}
        self.config = CascadeConfig(**shape | {"vocab_size": self.data.vocab_size})
        torch.manual_seed(s.seed)
        torch.set_float32_matmul_precision("high")
        keep_memory()
        self.model = CascadeLM(self.config, s.attention)
        if weights:
            lines.append(take_over(self.model, source, weights, s.init_from))
        if s.train == "draft":
            self.model.freeze()
        teacher = self.load_teacher() if s.teacher else None
        processes.lock = processes.main_first(lambda: check_out_dir(s))
        self.score = Score(self.model, s.joint_target, s.gpt_target, teacher)
        if s.shard:
            shard_model(self.score, s.device, processes.world)
        self.score.to(s.device)
        self.optimizers = make_optimizers(self.model, s)
        self.step, self.saved, self.seconds = 0, 0, 0.0
        self.weights = {"gpt": 1.0} if s.objective == "ar" else {"bound": 1.0, "gpt": s.gpt_weight}
        if s.context == "block":
            del self.weights["gpt"]
        if s.local_window:
            self.weights["joint"] = s.joint_weight
        self.val, self.final = {}, {}  # term -> (mean, standard error)
        self.best, self.best_step = math.inf, 0
        self.norms = torch.zeros((), device=s.device)  # the gradients' norms, added up
        self.masked = 0  # rows of the head in this process's steps since the last report
        if s.init_from == "resume":
            self.restore(load_checkpoint(Path(s.out_dir) / "last.pt"))
        self.log = processes.main_first(lambda: Log(asked, self.step)) or Silent()
        if s.compile:
            self.compile()
        self.batches = Prefetch(self.make_batches)
        self.parallel = self.score
        if processes.world > 1 and not s.shard:
            # layers are compiled one by one: splitting them to overlap communication breaks flex
            torch._dynamo.config.optimize_ddp = False
            parallel = nn.parallel.DistributedDataParallel
            known = "forward_sync_buffers" in signature(parallel).parameters  # torch 2.13 on
            buffers = "forward_sync_buffers" if known else "broadcast_buffers"
            self.parallel = parallel(self.score, **{buffers: False})
        if processes.main:
            print("\n".join([*lines, *self.described()]), flush=True)

    def check_data(self, source, meta):
        """SettingsError for data that lack what the settings score, or that mean something else by
        their ids than the source of the weights: fields of its config, and the meta of a run."""
        s = self.s
        if s.loss_on == "completion" and "separator" not in self.data.meta:
            raise SettingsError(f"--loss_on=completion: {s.dataset} has no separator; prepare it "
                                "by data/text/prepare.py with --separator=STRING")
        if s.init_from.startswith("hf:"):
            hf.check_tokens(s.init_from[3:], source["vocab_size"], self.data.meta)
        elif meta:
            check_vocabulary(meta, self.data.meta, f"--dataset={s.dataset}")

    def load_teacher(self):
        """The frozen model of the setting `teacher`; a resumed run must give it again."""
        s = self.s
        model, state = load_model(s.teacher)
        check_vocabulary(state["meta"], self.data.meta, f"beside --teacher, --dataset={s.dataset}")
        if model.config.context != "causal" or model.config.seq_len < s.seq_len:
            raise SettingsError(f"--teacher={s.teacher} needs a GPT level and a context of "
                                f"{s.seq_len} tokens: use another, or lower --seq_len")
        s.teacher_digest = state["digest"]  # check_same compares it
        if s.seq_len % model.config.block_size:
            raise SettingsError(f"--teacher={s.teacher} has blocks of {model.config.block_size}, "
                                f"which do not divide --seq_len={s.seq_len}: use another length")
        return model.requires_grad_(False)  # by chunks, for it is not compiled

    def described(self):
        """Lines on what will be trained, on what."""
        s, data = self.s, self.data
        what = (f"{s.noise} noise in {s.corruption} blocks of {s.block_size}, noisy copies: "
                f"{s.copies}" if s.objective == "diffusion" else "autoregressive")
        learn = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        yield (f"model      {self.model.count_parameters():,} parameters"
               + f", of which {learn:,} learn" * self.model.frozen + f": {s.n_layer} layers, "
               f"{s.n_head} heads, width {s.n_embd}, context {s.seq_len}")
        yield (f"data       {data.name}: {len(data.split('train')):,} train and "
               f"{len(data.split('val')):,} validation tokens")
        yield (f"step       {s.batch_size} sequences = {s.batch_size * s.seq_len:,} tokens, {what}")
        yield "loss       " + " + ".join(f"{w:g} {term}" for term, w in self.weights.items())

    def compile(self):
        """Compile the layers, one code for all of a shape, by trial passes that change nothing, two
        since counts differ; their time is training time. What fails runs eager and says so."""
        began, flex = time.perf_counter(), self.s.attention != "chunk"
        for block in self.model.blocks:  # the forward alone: fully_shard's hooks stay outside
            compiled = torch.compile(block.forward, dynamic=self.dynamic_shapes())
            # evaluation is too short to compile for; but flex has no use uncompiled
            block.forward = compiled if flex else partial(in_training, compiled, block.forward)
        try:
            for step in (self.step, self.step + 1):
                self.terms(self.score, self.make_batches(step)[0]).sum().backward()
        except Exception as e:  # of the compiler, or of the compiler that it calls
            if self.s.attention == "flash":
                print(f"attention  flex, since flash failed: {first_line(e)}", flush=True)
                self.s.attention = self.model.attention = "flex"
            elif flex:
                raise
            else:
                self.s.compile = False
                print(f"compile    failed, the layers run eager: {type(e).__name__}", flush=True)
            for block in self.model.blocks:
                del block.forward
            if flex:
                return self.compile()
        self.model.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - began

    def dynamic_shapes(self):
        """False where every micro-batch masks equally many tokens, as exact counts in whole strata
        do; None: the compiler finds out."""
        s, size = self.s, self.s.micro_batch or self.s.batch_size // self.processes.world
        whole = s.copies == 2 or size * (s.seq_len // s.block_size) % s.block_size == 0
        exact = s.noise == "balanced" and s.corruption == "all" and not s.full_share
        static = (s.objective == "ar" or (exact and whole)) and s.loss_on == "all"
        return False if static else None

    def uncompiled(self):
        """A copy of the model to decode with, whose shapes change from pass to pass."""
        model = CascadeLM(self.config).to(self.s.device)
        model.load_state_dict(self.model.state_dict())
        return model.eval()

    def progress(self, seconds):
        """How much of the budget is used, in [0, 1]: of steps or of minutes, the larger."""
        s = self.s
        by_steps = self.step / s.max_steps if s.max_steps else 0.0
        by_clock = seconds / 60 / s.max_minutes if s.max_minutes else 0.0
        return min(1.0, max(by_steps, by_clock))

    def make_batches(self, step):
        """The micro-batches of a step, in pinned memory where a GPU will fetch them."""
        batches = micro_batches(self.s, self.config.mask_id, self.data.split("train"), step,
                                self.processes.rank, self.processes.world)
        pin = self.s.device.startswith("cuda")
        return [[t.pin_memory() for t in batch] for batch in batches] if pin else batches

    def terms(self, score, batch):
        """The terms of the loss that `weights` names, in nats per token, of a micro-batch."""
        x0, xt, index, drafted, *own, weight, share = (
            t.to(self.s.device, non_blocking=True) for t in batch)
        with autocast(self.s):
            gpt, single, joint, accept = score(x0, xt, index, drafted)
            found = {"bound": (single * weight).sum(), "joint": (joint * share).sum()}
            found["gpt"] = found["bound"] if gpt is None else (  # of objective "ar"
                (gpt * own[0].flatten()).sum() if own else
                gpt.sum() / (self.s.batch_size * (self.s.seq_len - 1)))
            terms = torch.stack([found[name] for name in self.weights])
            if accept is not None:  # x - x: a gradient, and nothing to what is reported
                accept = accept.sum() / (self.s.batch_size * self.s.seq_len)
                terms = terms + (accept - accept.detach())
            return terms

    def train_step(self, progress):
        """One optimizer step; returns this process's share of the `terms` of the loss."""
        s, world = self.s, self.processes.world
        factor = lr_factor(self.step, progress, s)
        for optimizer, peak in zip(self.optimizers, (s.learning_rate, s.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        batches = self.batches(self.step)
        weights, total = torch.tensor([*self.weights.values()]).to(s.device), 0.0
        for i, batch in enumerate(batches):
            self.masked += len(batch[-1])
            # sharded gradients are exchanged for each micro-batch: whole ones would have to fit
            hold = self.parallel is not self.score and i < len(batches) - 1
            with self.parallel.no_sync() if hold else nullcontext():
                terms = self.terms(self.parallel, batch)
                # gradients are averaged over processes; the terms are over the global batch already
                (terms @ weights * world).backward()
            total += terms.detach()
        # without the acceptance output, whose gradients are not to scale the others'
        clipped = [p for name, p in self.model.named_parameters() if ".accept." not in name]
        norm = nn.utils.clip_grad_norm_(clipped, s.grad_clip or math.inf)
        self.norms += whole(norm)
        if s.device == "cpu":  # a GPU would make the host wait in every step
            self.check_finite("gradient", self.norms)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def check_finite(self, what, number):
        """SettingsError unless the number is finite: the step, what is saved, what may help."""
        if not math.isfinite(number):
            last = f"{self.s.out_dir}/last.pt is good, of step {self.saved}"
            raise SettingsError(
                f"the {what} is not finite at step {self.step} "
                f"({last if self.saved else 'nothing was saved yet'}): lower --learning_rate and "
                "--muon_lr, raise --warmup_steps or set --dtype=float32, and start again with "
                "--overwrite=true or another --out_dir"
            )

    def evaluate(self, windows):
        self.check_finite("gradient", self.norms)
        found = evaluate(self.score, self.data.split("val"), windows, 0, self.s.micro_batch or 16,
                         lambda: autocast(self.s), self.processes, self.s.loss_on)
        for name, (mean, _) in found.items():
            self.check_finite(f"validation {name}", mean)
        return found

    def val_loss(self):
        """The validation terms, weighted as in training: what best.pt is the best by."""
        if not self.val:
            return math.inf
        return sum(weight * self.val[name][0] for name, weight in self.weights.items())

    def state(self):
        """What a checkpoint holds. Sharded: for all processes to call, and the main one to use."""
        main = self.processes.main
        return {
            "config": asdict(self.config), "settings": public(vars(self.s)), "meta": self.data.meta,
            "model": gathered(self.model.state_dict(), main),
            "optimizers": gathered([o.state_dict() for o in self.optimizers], main),
            "step": self.step, "seconds": self.seconds, "val": self.val, "final": self.final,
            "best": self.best, "best_step": self.best_step,
        }

    def restore(self, state):
        other = check_same(self.s, asdict(self.config), self.data.meta, state)
        if other and self.processes.main:
            print(f"note: resumed on other data, as asked: {', '.join(other)}", file=sys.stderr)
        load_whole(self.model, self.optimizers, state)
        self.step = self.saved = state["step"]
        self.seconds, self.val = state["seconds"], state["val"]
        self.best, self.best_step = state["best"], state["best_step"]

    def save(self):
        """last.pt always; best.pt too when the validation loss is the best so far, or none was."""
        is_best = not self.best_step or self.val_loss() < self.best
        if is_best:
            self.best, self.best_step = self.val_loss(), self.step
        state = self.state()

        def write():
            finite = all_finite([state["model"], state["optimizers"]])
            self.check_finite("model", 0.0 if finite else math.nan)
            self.log.sync()
            last, best = (Path(self.s.out_dir) / name for name in ("last.pt", "best.pt"))
            save_checkpoint(last, state, *[best] * is_best, before=self.log.publish)

        self.processes.main_first(write)
        self.saved = self.step

    def report(self, terms, steps, seconds, progress):
        """One line and a row of log.csv: the mean `terms` of `steps` steps, and their speed."""
        s, world = self.s, self.processes.world
        terms = dict(zip(self.weights, (self.processes.sum(terms) / steps).tolist(), strict=True))
        self.check_finite("gradient", self.norms)
        self.check_finite("loss", sum(terms.values()))
        peak, masked = peak_flops(s), self.masked * world / steps
        flops = train_flops(self.config, s.batch_size, masked, s.copies,
                            frozen=self.model.frozen)
        flops *= steps / seconds
        self.masked = 0
        self.log.report(
            self.step, s.max_steps, terms, self.val,
            lr=self.optimizers[0].param_groups[0]["lr"], seconds=self.seconds, progress=progress,
            rate=steps * s.batch_size * s.seq_len / seconds,
            mfu=flops / peak / world if peak else None,
        )


def train_loop(run):
    """Steps until the budget is used; evaluates, reports and saves on the way. Returns 0, or the
    number of the signal that asked to stop, SIGPIPE's when standard output takes no more."""
    s, began = run.s, time.perf_counter() - run.seconds
    mark, mark_step, terms = time.perf_counter(), run.step, 0.0
    progress = run.progress(run.seconds)
    done, asked = progress >= 1.0, 0
    with Stop() as stop:
        while not done:
            terms += run.train_step(progress)
            run.seconds = time.perf_counter() - began
            # the clock and the signals of the main process decide for all
            now = run.progress(run.seconds), stop.asked or Stop.PIPE * bool(run.log.deaf)
            progress, asked = run.processes.from_main(*now)
            done = progress >= 1.0 or asked > 0
            if run.step % s.log_every == 0 or done:
                seconds = time.perf_counter() - mark
                run.report(terms, run.step - mark_step, seconds, progress)
                mark, mark_step, terms = time.perf_counter(), run.step, 0.0
            if run.step % s.eval_every == 0 and not done:
                paused = time.perf_counter()
                run.val = run.evaluate(s.eval_windows)
                run.log.validated(run.step, run.val)
                run.save()
                run.seconds = time.perf_counter() - began
                mark += time.perf_counter() - paused  # evaluation is not training speed
    return int(asked)


LEVELS = {"bound": ("<=", "bound of the block level"), "gpt": ("=", "NLL of the GPT level"),
          "joint": ("=", "NLL of one pass a block")}


def finish(run, stopped):
    """The last figures, a sample, and what to try next; of a run that was `stopped`, how to go on.
    The weights are saved before anything else."""
    s, val = run.s, run.data.split("val")
    if run.step > run.saved:
        run.save()
    if not stopped:
        run.val, run.final = run.evaluate(s.eval_windows), run.evaluate(s.final_windows)
        run.log.validated(run.step, run.val)
        run.save()
    if not run.processes.main:
        return
    run.log.close()
    if stopped:
        again = [a for a in sys.argv[1:] if not a.startswith(("--init_from", "--overwrite"))]
        again = shlex.join(["python", "train.py", *again, "--init_from=resume"])
        if run.log.deaf:
            raise SettingsError(f"standard output takes no more ({run.log.deaf.strerror}): stopped "
                                f"at step {run.step}, saved; go on with {again}")
        print(f"stopped at step {run.step}, saved; go on with\n  {again}")
        return
    waited = run.batches.waited / max(run.seconds, 1e-9)
    print(
        f"\nafter {run.step} steps = {run.step * s.batch_size * s.seq_len:,} tokens in "
        f"{run.seconds / 60:.1f} minutes, {waited:.1%} of them waiting for data; on "
        f"{min(s.final_windows, len(val) // s.seq_len)} validation windows of {s.seq_len}:"
    )
    for name, (mean, error) in run.final.items():
        (sign, meaning), bits = LEVELS[name], mean / math.log(2) / val.bytes_per_token
        print(f"{meaning:42s} {sign:>2} {mean:.4f} +- {error:.4f} nats/token, "
              f"{sign} {bits:.4f} bits/byte")
    if s.sample_tokens and not s.shard:  # a sharded model may not fit one device
        heat = SAMPLE["temperature"]
        print(f"\n---- a sample, unedited: temperature {heat}, seed {s.seed} ".ljust(80, "-"))
        *_, last = generate_stream(run.uncompiled(), [[]], s.sample_tokens, temperature=heat,
                                   seed=s.seed)
        print(printable(run.data.tokenizer.decode(last.rows()[0])) + "\n" + "-" * 79)
        print(f"{s.sample_tokens} tokens in {last.nfe} passes: "
              f"{s.sample_tokens / last.nfe:.2f} tokens a pass")
    print(
        f"\ncheckpoint: {s.out_dir}/last.pt; the best was at step {run.best_step}: best.pt\n"
        f"next:       python sample.py --out_dir={s.out_dir}"
    )


@guarded
def main(argv):
    processes = Processes()
    try:
        run = Run(SimpleNamespace(**override(DEFAULTS, argv, given := set())), processes, given)
        stopped = train_loop(run)
        finish(run, stopped)
        return stopped and 128 + stopped
    except Exception as e:
        raise processes.only_once(e) from e
    finally:
        processes.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
