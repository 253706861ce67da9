"""Train CASCADE, or its autoregressive twin, on one or many processes.

    python train.py                                      the nano on the text that ships here
    python train.py config/nano.py --max_minutes=20      a config file, then overrides
    python train.py --objective=ar --block_size=1 --out_dir=out/gpt     the same net as a GPT
    torchrun --nproc_per_node=8 train.py config/nano.py  the same batches and noise, shared out
    python train.py config/nano.py --init_from=resume    go on from out_dir/last.pt

Batches and noise are pure functions of (seed, step), drawn for the whole global batch and then
sliced, so a resumed run, more processes or smaller micro-batches compute the same thing. (With
max_minutes the learning rate follows the clock, which no seed repeats.)
"""

import math
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import all_finite, check_out_dir, check_same, load_checkpoint, save_checkpoint
from configurator import SettingsError, override, public
from corrupt import COUNTED, NOISE_LAWS, WEIGHTINGS, check_rates, corrupt_all_blocks, mean_rate
from dataset import DataError, data_root, load_dataset, ships_with_repository
from log import Log
from machine import Processes, choose_machine, peak_flops
from model import CascadeConfig, CascadeLM
from muon import Muon
from sample import DEFAULTS as SAMPLE
from sample import generate
from shard import gathered, load_whole, shard_model, whole

# ---- settings: each can be set in a config file or as --name=value -----------------------------
# where
out_dir = "out/nano"
dataset = "shakespeare"  # a folder of data/, prepared by its prepare.py
init_from = "scratch"  # or "resume": go on from out_dir/last.pt
overwrite = False  # allow a fresh run to replace the checkpoints in out_dir
seed = 1337
# the model; its shape is explained in model.CascadeConfig
objective = "diffusion"  # or "ar"
block_size = 8  # S, tokens denoised together
seq_len = 128
n_layer = 2
n_head = 6
n_kv_head = 0  # 0: as many as n_head
n_embd = 192
n_hidden = 0  # 0: 8/3 n_embd
tie_embeddings = False
qk_norm = True
neighbours = 3  # tokens on either side that join an embedding
# the noise
noise = "tilted"  # or "balanced", "uniform", "clipped": corrupt.py
copies = 2  # noisy copies of a sequence, 1 or 2, that share its clean stream
weighting = "elbo"  # or "cascade"
m_min = 1e-3
clip_low = 0.3
clip_high = 0.8
# the budget: whichever of the two ends first; 0 = no such limit
max_steps = 0
max_minutes = 4.5
batch_size = 4  # sequences per optimizer step, over all processes and micro-batches
micro_batch = 0  # sequences per forward pass of one process; 0: its whole share at once
# the optimizer
optimizer = "muon"  # for the matrices of the layers; the rest always has AdamW. Or "adamw" for all
learning_rate = 1.2e-2  # AdamW's peak
muon_lr = 5e-3  # Muon's peak
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.98
grad_clip = 1.0
warmup_steps = 40
final_lr = 0.0  # the schedule falls linearly to this fraction of the peak
# reports
log_every = 50
eval_every = 250  # steps between validation bounds; a checkpoint is written with each
eval_windows = 64  # validation windows for that bound
final_windows = 512  # windows for the bound at the end
sample_tokens = 400  # length of the sample at the end; 0 for none
wandb = False  # besides out_dir/log.csv, which is always written
# the machine
device = "auto"  # cuda if there is one, else cpu
dtype = "auto"  # bfloat16 where the hardware multiplies it, else float32
attention = "auto"  # flex on CUDA, chunk elsewhere
shard = False  # slice weights and optimizer over the processes: for models beyond one GPU
compile = "auto"  # torch.compile of the layers: true with flex, false elsewhere
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))

# ---- data and noise ----------------------------------------------------------------------------


def step_generator(seed, step):
    """The generator of everything random in one step; step -1 is the evaluation's."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step + 1) % 2**32)


def noisy_copies(s):
    """1 or 2. A block of one token has one noisy copy: when counts are drawn it is [MASK]."""
    alike = s.block_size == 1 and s.noise in COUNTED
    return 1 if s.objective == "ar" or alike else s.copies


def micro_batches(s, mask_id, split, step, rank, world):
    """This process's share of step's global batch, cut into micro-batches, on the CPU.

    A list of (x0, xt, weight, index); index holds the flat positions that carry loss. For
    objective "ar": (x0,). Everything is drawn for the global batch, then sliced.
    """
    generator = step_generator(s.seed, step)
    starts = torch.randint(len(split) - s.seq_len + 1, (s.batch_size,), generator=generator)
    share = s.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    x0 = torch.from_numpy(split.window(starts[mine].numpy(), s.seq_len))
    size = s.micro_batch or share
    if s.objective == "ar":
        return [(x,) for x in x0.split(size)]
    # corruption never looks at the tokens, so the other ranks' rows need not be read
    blank = torch.zeros(s.batch_size, s.seq_len, dtype=torch.long)
    noisy = corrupt_all_blocks(
        blank, s.block_size, mask_id, generator, s.noise, s.m_min, (s.clip_low, s.clip_high),
        s.weighting, noisy_copies(s),
    )
    mask, weight = noisy.mask[..., mine, :], noisy.weight[..., mine, :]  # (copies, B, N) or (B, N)
    xt = x0.expand_as(mask).masked_fill(mask, mask_id)
    index = [m.flatten().nonzero()[:, 0] for m in mask.split(size, dim=-2)]
    return list(zip(
        x0.split(size), xt.split(size, dim=-2), weight.split(size, dim=-2), index, strict=True
    ))


class Prefetch:
    """`prefetch(step)` is make(step), made by a thread while the step before was computing.

    `waited` counts the seconds the training loop had to wait for data.
    """

    def __init__(self, make):
        self.make, self.pool, self.waited = make, ThreadPoolExecutor(1), 0.0
        self.next_step, self.future = None, None

    def __call__(self, step):
        began = time.perf_counter()
        batch = self.future.result() if step == self.next_step else self.make(step)
        self.next_step, self.future = step + 1, self.pool.submit(self.make, step + 1)
        self.waited += time.perf_counter() - began
        return batch


def load_data(s, processes):
    """The dataset of the settings; prepared here and now when its raw text ships with the code."""
    if not (data_root() / s.dataset / "meta.json").exists() and ships_with_repository(s.dataset):
        if processes.main:
            script = Path(__file__).parent / "data" / s.dataset / "prepare.py"
            print(f"data/{s.dataset} is not prepared yet: running {script.name}", flush=True)
            if subprocess.run([sys.executable, str(script)], check=False).returncode:
                raise DataError(f"{script} failed: see its message above")
    processes.wait()  # every process comes by here, whatever it found on disk
    return load_dataset(s.dataset, s.seq_len)


# ---- loss and evaluation -----------------------------------------------------------------------


class Loss(nn.Module):
    """CascadeLM.loss as a module's forward, so that DDP can wrap it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model.loss(*batch)


@torch.no_grad()
def token_nll(model, x0, mask, at=None):
    """(B, N) float64 on the model's device: -log p, in nats, of each token where `at`, else 0.

    Diffusion: x0 (B, N) with the places `mask` (B, N) hidden; `at` are those to score, by default
    all of them. objective "ar": every token given those before it; mask and at are ignored.
    """
    where = next(model.parameters()).device
    if model.config.objective == "ar":
        x0 = x0.to(where)
        return F.cross_entropy(model.ar_logits(x0).mT, x0, reduction="none").double()
    index = (mask if at is None else at).flatten().nonzero()[:, 0].to(where)
    xt = x0.masked_fill(mask, model.config.mask_id).to(where)
    x0 = x0.to(where)
    logits = model.masked_logits(x0, xt, index)
    nll = torch.zeros(x0.numel(), dtype=torch.float64, device=where)
    nll[index] = F.cross_entropy(logits, x0.flatten()[index], reduction="none").double()
    return nll.view_as(x0)


@torch.no_grad()
def evaluate(model, split, windows, seed=0, batch=16, autocast=nullcontext, processes=None):
    """(mean, standard error) in nats per token over fixed windows, the same on every call.

    Diffusion: the bound, `balanced` noise from a fixed generator. objective "ar": the exact NLL.
    Windows are spread evenly over the split without overlap, and the noise is drawn for all of
    them at once, so the figure is the same at any batch size and number of processes. The error
    is that of independent windows: a little too large, since the strata span several.
    """
    c = model.config
    where = next(model.parameters()).device
    windows = min(windows, len(split) // c.seq_len)
    stride = (len(split) - c.seq_len) / max(windows - 1, 1)
    starts = (torch.arange(windows, dtype=torch.float64) * stride).long()
    blank = torch.zeros(windows, c.seq_len, dtype=torch.long)
    noise = corrupt_all_blocks(blank, c.block_size, c.mask_id, step_generator(seed, -1))
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    total = torch.zeros(windows, dtype=torch.float64, device=where)
    batches = torch.arange(windows).split(batch)
    # sharded weights are gathered by all processes together: none may sit the last round out
    for i in range(rank, len(batches) + -len(batches) % world, world):
        rows, own = batches[i % len(batches)], i < len(batches)
        x0 = torch.from_numpy(split.window(starts[rows].numpy(), c.seq_len))
        with autocast():
            nll = token_nll(model, x0, noise.mask[rows])
        # objective "ar" has S = 1: all weights are 1, and blocks are tokens
        weighted = nll * noise.weight[rows].to(where)
        total[rows] += own * weighted.sum(dim=1) / (c.seq_len // c.block_size)
    total = processes.sum(total) if processes else total
    error = total.std().item() / math.sqrt(windows) if windows > 1 else math.nan
    return total.mean().item(), error


# ---- optimizer and schedule --------------------------------------------------------------------


def make_optimizers(model, s):
    """[AdamW] or [AdamW, Muon]. Muon takes the matrices of the layers and of the neighbours' mix,
    those of attention head by head; decay goes to matrices alone."""
    if s.optimizer not in ("muon", "adamw"):
        raise SettingsError(f"--optimizer must be muon or adamw, not {s.optimizer!r}")
    inside = ("blocks.", "near.mix")
    named = {n: p for n, p in model.named_parameters() if n.startswith(inside) and p.ndim == 2}
    matrices = list(named.values())
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    tables, vectors = [p for p in rest if p.ndim == 2], [p for p in rest if p.ndim < 2]
    groups = [
        {"params": tables, "weight_decay": s.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if s.optimizer == "adamw":
        groups.insert(0, {"params": matrices, "weight_decay": s.weight_decay})
    adamw = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)
    if s.optimizer == "adamw":
        return [adamw]
    D = {"q": model.config.head_dim, "k": model.config.head_dim, "v": model.config.head_dim,
         "o": -model.config.head_dim}  # o reads the heads by its columns
    by_head = {}
    for name, p in named.items():
        by_head.setdefault(D.get(name.split(".")[-2], 0), []).append(p)
    groups = [{"params": params, "head_dim": d} for d, params in by_head.items()]
    return [adamw, Muon(groups, s.muon_lr, s.weight_decay, dtype=getattr(torch, s.dtype))]


def lr_factor(step, progress, s):
    """Fraction of the peak: linear warm-up by steps, then linear fall by `progress` in [0, 1]."""
    rise = min(1.0, (step + 1) / max(1, s.warmup_steps))
    return rise * (s.final_lr + (1 - s.final_lr) * (1 - progress))


# ---- checking the settings ---------------------------------------------------------------------


def check_settings(s, world):
    """Everything that can be refused before the first step is refused here, in one line."""
    if s.noise not in NOISE_LAWS:
        raise SettingsError(f"--noise must be one of {', '.join(NOISE_LAWS)}, not {s.noise!r}")
    if s.weighting not in WEIGHTINGS:
        raise SettingsError(f"--weighting must be one of {', '.join(WEIGHTINGS)}")
    if s.copies not in (1, 2):
        raise SettingsError(f"--copies must be 1 or 2, not {s.copies}")
    check_rates(s.m_min, 1.0)
    check_rates(s.clip_low, s.clip_high)
    if s.init_from not in ("scratch", "resume"):
        raise SettingsError(f"--init_from must be scratch or resume, not {s.init_from!r}")
    if s.max_steps <= 0 and s.max_minutes <= 0:
        raise SettingsError("set --max_steps or --max_minutes: an endless run has no schedule")
    for name in ("batch_size", "log_every", "eval_every", "eval_windows", "final_windows"):
        if getattr(s, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(s, name)}")
    for name in ("micro_batch", "sample_tokens", "learning_rate", "muon_lr", "weight_decay",
                 "grad_clip", "warmup_steps", "final_lr", "max_steps", "max_minutes"):
        if not getattr(s, name) >= 0:
            raise SettingsError(f"--{name} must be 0 or more, not {getattr(s, name)}")
    if not (0 <= s.beta1 < 1 and 0 <= s.beta2 < 1):
        raise SettingsError(f"--beta1 and --beta2 must lie in [0, 1), not {s.beta1} and {s.beta2}")
    if not 0 <= s.seed < 2**63:
        raise SettingsError(f"--seed must lie between 0 and 2^63 - 1, not {s.seed}")
    if s.shard and world == 1:
        raise SettingsError("--shard=true is for several processes: start them with torchrun")
    share, rest = divmod(s.batch_size, world)
    if rest or (s.micro_batch and share % s.micro_batch):
        raise SettingsError(
            f"--batch_size={s.batch_size} must be a multiple of {world} processes times "
            f"--micro_batch={s.micro_batch or 'any'}"
        )


# ---- the run -----------------------------------------------------------------------------------


class Run:
    """One training run: what must survive a restart, and the steps that change it."""

    def __init__(self, s, processes):
        self.s, self.processes = s, processes
        asked = dict(vars(s))  # before "auto" is resolved
        lines = choose_machine(s, processes.local_rank, processes.world)
        self.on_cuda = s.device.startswith("cuda")
        processes.open(s.device)
        check_settings(s, processes.world)
        self.data = load_data(s, processes)
        shape = {f.name: getattr(s, f.name) for f in fields(CascadeConfig) if hasattr(s, f.name)}
        self.copies = noisy_copies(s)
        self.config = CascadeConfig(vocab_size=self.data.vocab_size, **shape)
        processes.lock = processes.main_first(lambda: check_out_dir(s), s.device)
        torch.manual_seed(s.seed)
        torch.set_float32_matmul_precision("high")
        self.model = CascadeLM(self.config, s.attention)
        if s.shard:
            shard_model(self.model, s.device, processes.world)
        self.model.to(s.device)
        self.optimizers = make_optimizers(self.model, s)
        self.step, self.saved, self.seconds = 0, 0, 0.0
        self.bound = self.final = (math.nan, math.nan)  # mean and standard error
        self.best, self.best_step = math.inf, 0
        if s.init_from == "resume":
            where = "cpu" if s.shard else s.device
            self.restore(load_checkpoint(Path(s.out_dir) / "last.pt", where))
        self.log = processes.main_first(lambda: Log(asked, self.step), s.device)
        if s.compile:
            for block in self.model.blocks:  # the forward alone: fully_shard's hooks stay outside
                dynamic = False if self.static_shapes() else None
                block.forward = torch.compile(block.forward, dynamic=dynamic)
        self.batches = Prefetch(self.make_batches)
        self.loss = Loss(self.model)
        if processes.world > 1 and not s.shard:
            # layers are compiled one by one: splitting them to overlap communication breaks flex
            torch._dynamo.config.optimize_ddp = False
            self.loss = nn.parallel.DistributedDataParallel(self.loss)
        lines.append(
            f"model      {self.model.count_parameters():,} parameters: {s.n_layer} layers, "
            f"{s.n_head} heads, width {s.n_embd}, context {s.seq_len}, "
            + (f"blocks of {s.block_size}" if s.objective == "diffusion" else "autoregressive")
        )
        train, val = (len(self.data.split(n)) for n in ("train", "val"))
        lines.append(f"data       {self.data.name}: {train:,} train and {val:,} validation tokens")
        lines.append(
            f"step       {s.batch_size} sequences = {s.batch_size * s.seq_len:,} tokens"
            + (f" in {self.copies} noisy copies, {s.noise}" if s.objective == "diffusion" else "")
            + (f" on {processes.world} processes" if processes.world > 1 else "")
        )
        if processes.main:
            print("\n".join(lines), flush=True)

    def autocast(self):
        if self.s.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.s.device.split(":")[0], dtype=torch.bfloat16)

    def static_shapes(self):
        """Whether every micro-batch masks equally many tokens: exact counts in whole strata."""
        s, S = self.s, self.config.block_size
        size = s.micro_batch or s.batch_size // self.processes.world
        whole = self.copies == 2 or size * (s.seq_len // S) % S == 0
        return s.noise == "balanced" and whole

    def progress(self, seconds):
        """How much of the budget is used, in [0, 1]: of steps or of minutes, the larger."""
        s = self.s
        by_steps = self.step / s.max_steps if s.max_steps > 0 else 0.0
        by_clock = seconds / 60 / s.max_minutes if s.max_minutes > 0 else 0.0
        if s.max_minutes > 0:
            by_clock = self.processes.from_main(by_clock, s.device)
        return min(1.0, max(by_steps, by_clock))

    def make_batches(self, step):
        """The micro-batches of a step, in pinned memory where a GPU will fetch them."""
        batches = micro_batches(
            self.s, self.config.mask_id, self.data.split("train"), step, self.processes.rank,
            self.processes.world,
        )
        return [[t.pin_memory() for t in b] for b in batches] if self.on_cuda else batches

    def train_step(self, progress):
        """One optimizer step; returns this process's share of the loss (a tensor)."""
        s, world = self.s, self.processes.world
        factor = lr_factor(self.step, progress, s)
        for optimizer, peak in zip(self.optimizers, (s.learning_rate, s.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        batches = self.batches(self.step)
        count = self.copies * s.batch_size * s.seq_len // s.block_size
        total = 0.0
        for i, batch in enumerate(batches):
            batch = [t.to(s.device, non_blocking=True) for t in batch]
            last = i == len(batches) - 1
            # sharded gradients are exchanged for each micro-batch: whole ones would have to fit
            hold = isinstance(self.loss, nn.parallel.DistributedDataParallel) and not last
            with self.loss.no_sync() if hold else nullcontext():
                with self.autocast():
                    loss = self.loss(count, *batch)
                # gradients are averaged over processes; the loss is already over the global count
                (loss * world).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        self.check_finite("gradient", whole(norm).item())
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
        self.model.eval()
        bound = evaluate(
            self.model, self.data.split("val"), windows, autocast=self.autocast,
            processes=self.processes,
        )
        self.model.train()
        self.check_finite("validation bound", bound[0])
        return bound

    def state(self):
        """What a checkpoint holds. Sharded: for all processes to call, and the main one to use."""
        plain = {k: v for k, v in vars(self.s).items() if isinstance(v, (bool, int, float, str))}
        return {
            "config": asdict(self.config), "settings": plain, "meta": self.data.meta,
            "model": gathered(self.model.state_dict(), self.processes.main),
            "optimizers": gathered([o.state_dict() for o in self.optimizers], self.processes.main),
            "step": self.step, "seconds": self.seconds, "bound": list(self.bound),
            "final": list(self.final), "best": self.best, "best_step": self.best_step,
        }

    def restore(self, state):
        check_same(self.s, state["settings"], asdict(self.config), state["config"])
        load_whole(self.model, self.optimizers, state)
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved = self.step
        self.bound, self.best = tuple(state["bound"]), state["best"]
        self.best_step = state["best_step"]

    def save(self):
        """last.pt always; best.pt too when the bound is the best so far. Returns the state."""
        is_best = self.bound[0] < self.best
        if is_best:
            self.best, self.best_step = self.bound[0], self.step
        state = self.state()

        def write():
            tensors = [state["model"], state["optimizers"]]
            self.check_finite("model", 0.0 if all_finite(tensors) else math.nan)
            self.log.sync()
            for name in ("last.pt", "best.pt") if is_best else ("last.pt",):
                save_checkpoint(Path(self.s.out_dir) / name, state)

        self.processes.main_first(write, self.s.device)
        self.saved = self.step
        return state


class Stop:
    """SIGINT and SIGTERM ask the loop to finish its step and save; a later one ends at once.

    Later means by a second: torchrun repeats to its workers what the terminal has sent them.
    """

    def __init__(self):
        self.asked, self.at = False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, _frame):
        if self.asked and time.monotonic() > self.at + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.asked:
            self.asked, self.at = True, time.monotonic()


def report(run, loss, lr, rate, mfu, left):
    """One aligned line. The bound carries <=; an autoregressive NLL is exact and does not."""
    s = run.s
    sign = "<=" if s.objective == "diffusion" else " ="
    steps = f"{run.step:6d}" + (f"/{s.max_steps}" if s.max_steps else "")
    val = f"{run.bound[0]:.3f}" if math.isfinite(run.bound[0]) else "  -  "
    speed = f"{rate:5.0f} tok/s" if rate < 1e4 else f"{rate / 1e3:4.0f}k tok/s"
    print(
        f"step {steps} | loss {loss:.3f} | val {sign} {val} | lr {lr:.1e} | {speed} | "
        + (f"mfu {mfu:3.0%} | " if mfu else "")
        + f"eta {left:.1f}m",
        flush=True,
    )


def train_loop(run):
    """Steps until the budget is used; evaluates, reports and saves on the way."""
    s, processes = run.s, run.processes
    stop = Stop()
    peak = peak_flops(torch.cuda.get_device_name(s.device)) if run.on_cuda else None
    share = mean_rate(s.noise, s.block_size, s.m_min, (s.clip_low, s.clip_high))
    masked = run.copies * s.batch_size * s.seq_len * share
    step_flops = run.model.train_flops(s.batch_size, masked, run.copies)
    began = time.perf_counter() - run.seconds
    mark, mark_step, losses = time.perf_counter(), run.step, 0.0
    progress = run.progress(run.seconds)
    while progress < 1.0:
        losses += run.train_step(progress)
        run.seconds = time.perf_counter() - began
        progress = run.progress(run.seconds)
        stopping = processes.from_main(float(stop.asked), s.device) > 0
        done = progress >= 1.0 or stopping
        if run.step % s.log_every == 0 or done:
            count = run.step - mark_step
            loss = processes.sum(torch.as_tensor(losses)).item() / count
            seconds = time.perf_counter() - mark
            rate = count * s.batch_size * s.seq_len / seconds
            mfu = count * step_flops / seconds / (peak * processes.world) if peak else None
            left = run.seconds / 60 / max(progress, 1e-9) * (1 - progress)
            lr = run.optimizers[0].param_groups[0]["lr"]
            run.check_finite("loss", loss)
            if processes.main:
                report(run, loss, lr, rate, mfu, left)
                run.log.write(run.step, seconds=run.seconds, loss=loss, lr=lr,
                              tokens_per_second=rate)
            mark, mark_step, losses = time.perf_counter(), run.step, 0.0
        if run.step % s.eval_every == 0 and not done:
            paused = time.perf_counter()
            run.bound = run.evaluate(s.eval_windows)
            if processes.main:
                run.log.write(run.step, val=run.bound[0], val_error=run.bound[1])
            run.save()
            run.seconds = time.perf_counter() - began
            mark += time.perf_counter() - paused  # evaluation is not training speed
        if stopping:
            break
    return progress >= 1.0


def finish(run, complete):
    """The bound with its standard error, a sample, where things lie and what to try next."""
    s, val = run.s, run.data.split("val")
    if complete:
        run.bound, run.final = run.evaluate(s.eval_windows), run.evaluate(s.final_windows)
        if run.processes.main:
            run.log.write(run.step, val=run.bound[0], val_error=run.bound[1])
    state = run.save()
    if not run.processes.main:
        return
    run.log.close()
    if not complete:
        again = [a for a in sys.argv[1:] if not a.startswith(("--init_from", "--overwrite"))]
        print(
            f"stopped at step {run.step}, saved; go on with\n"
            f"  {shlex.join(['python', 'train.py', *again, '--init_from=resume'])}"
        )
        return
    mean, error = run.final
    kind, sign = ("bound", "<=") if s.objective == "diffusion" else ("NLL", "=")
    windows = min(s.final_windows, len(val) // s.seq_len)
    waited = run.batches.waited / max(run.seconds, 1e-9)
    print(
        f"\nvalidation {kind} {sign} {mean:.4f} +- {error:.4f} nats/token, "
        f"{sign} {mean / math.log(2) / val.bytes_per_token:.4f} bits/byte, on {windows} windows of "
        f"{s.seq_len}\nafter {run.step} steps = {run.step * s.batch_size * s.seq_len:,} tokens in "
        f"{run.seconds / 60:.1f} minutes, {waited:.1%} of them waiting for data"
    )
    if s.sample_tokens:
        heat = SAMPLE["temperature"]
        print(f"\n---- a sample, unedited: temperature {heat}, seed {s.seed} ".ljust(80, "-"))
        model = CascadeLM(run.config).to(s.device)  # not compiled: decoding's shapes change
        model.load_state_dict(state["model"])
        with run.autocast():
            rows = generate(model.eval(), [[]], s.sample_tokens, temperature=heat, seed=s.seed)
        print(run.data.tokenizer.decode(rows[0]) + "\n" + "-" * 79)
    print(
        f"\ncheckpoint: {s.out_dir}/last.pt; the best bound was at step {run.best_step}: best.pt\n"
        f"next:       python sample.py --out_dir={s.out_dir}"
    )


def main(argv):
    processes = Processes()
    try:
        run = Run(SimpleNamespace(**override(DEFAULTS, argv)), processes)
        finish(run, train_loop(run))
    except (SettingsError, DataError, ValueError) as e:
        processes.fail(e)
    except RuntimeError as e:
        if not processes.lost(e):
            raise
        processes.fail(
            f"another process of this run is gone ({str(e).splitlines()[0][:80]}): start it "
            "again, with --init_from=resume if it has saved"
        )
    finally:
        processes.close()


if __name__ == "__main__":
    main(sys.argv[1:])
