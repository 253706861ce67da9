"""The machine: device, dtype, the processes of torchrun, and signals."""

import itertools
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from util.settings import UserError, require

# dense bf16 FLOP/s by the vendors' data sheets, for the MFU; TF32 has half of that
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def choose_device(name, local_rank=0, world=1):
    """The device that a setting stands for, of this process; "auto": cuda where there is one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(world == 1 or ":" not in name, f"every process would use --device={name}: set auto")
    name = ("cuda" if gpus else "cpu") if name == "auto" else name
    name = f"cuda:{local_rank}" if name == "cuda" else name
    require(name in ("cpu", *(f"cuda:{i}" for i in range(gpus))), f"{name} is not on this machine "
            f"with {gpus} GPUs: start no more processes than that, or set --device=cpu")
    if name != "cpu":
        torch.cuda.set_device(name)
    return name


def choose_dtype(name, device):
    """(dtype, why) that a setting stands for; "auto": bfloat16 where the hardware multiplies it."""
    if name != "auto":
        return name, "as set"
    if device != "cpu":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        info = Path("/proc/cpuinfo")
        flags = info.read_text() if info.exists() else ""
        has = "avx512_bf16" in flags or "amx_bf16" in flags
    said = f"this {'processor' if device == 'cpu' else 'GPU'} has {'' if has else 'no '}bf16 units"
    return "bfloat16" if has else "float32", said


def autocast(device, dtype):
    """The context that computes in dtype; weights stay float32."""
    on = dtype == "bfloat16"
    return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=on)


def decode_in(name, model):
    """The dtype that a setting stands for; the weights are converted to it. Norms of q and k stay
    in float32, as in training. On a CPU a small model is faster in float32."""
    device, size = model.cos.device.type, sum(p.numel() for p in model.parameters())
    small = name == "auto" and device == "cpu" and size < 5e6
    dtype = "float32" if small else choose_dtype(name, device)[0]
    for path, p in model.named_parameters():
        if path.split(".")[-2] not in ("q_norm", "k_norm"):
            p.data = p.data.to(getattr(torch, dtype))
    return dtype


def take_turns(calls, seconds=0.5):
    """{name: median seconds of a call} of `calls`, {name: function}. They take turns for so long,
    two turns at least, of four calls: the first of each finds the others' data in the caches."""
    taken, turns, began = {name: [] for name in calls}, 0, time.perf_counter()
    while turns < 2 or time.perf_counter() < began + seconds:
        turns += 1
        for (name, call), i in itertools.product(calls.items(), range(4)):
            start = time.perf_counter()
            call()
            if i:
                taken[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in taken.items()}


def peak_flops(device, dtype):
    """FLOP/s of the GPU's matrix units, or None where they are not in the table."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else ""
    peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
    return peak / 2 if peak and dtype == "float32" else peak


def step_flops(model, s):
    """FLOPs of a step, as nanoGPT counts them: 6 for each weight that a token passes through, and
    12 H D N a layer for attention. Clean tokens pass through the layers and the head; noisy ones,
    as if all were masked, through the local head as well."""
    c = model.config
    weights = sum(p.numel() for p in model.layers.parameters()) + model.head_weight().numel()
    local = sum(p.numel() for p in model.local.mlp.parameters()) if model.local else 0
    flops = 6 * weights + 12 * c.n_layer * c.n_head * c.head_dim * c.seq_len  # of a clean token
    if s.draft_weight:
        flops = 2 * flops + 6 * local
    return s.batch_size * c.seq_len * flops


class Processes:
    """This process among those of torchrun, or alone. Rank 0 speaks, writes and decides."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if self.world > 1:  # gloo for tensors on the CPU, so that hosts agree without their GPUs
            gpus = torch.cuda.is_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")

    def say(self, line):
        if self.main:
            print(line, flush=True)

    def sum(self, tensor):
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, *numbers):
        """Rank 0's numbers on every process, so that all decide alike."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(tensor, src=0)
        return tensor.tolist()

    @contextmanager
    def together(self):
        """A user's mistake that one process finds in here ends all of them, alike."""
        found = None
        try:
            yield
        except UserError as e:
            found = e
        errors = [found] * self.world
        if self.world > 1:
            dist.all_gather_object(errors, found)
        for error in filter(None, errors):
            raise error


def resume_command(out_dir):
    """The shell command that goes on with a run, by torchrun if it was."""
    world = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", f"--nproc_per_node={world}"] if world else ["python"]
    return shlex.join([*start, sys.argv[0], f"--out_dir={out_dir}", "--init_from=resume"])


def close():
    """Leave the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Stop:
    """Within it Ctrl-C, SIGTERM and SIGHUP set `asked`, so that a step can be finished. A second
    one ends at once, if it comes more than a second later: torchrun sends each twice."""

    def __enter__(self):
        self.asked, self.when = 0, 0.0
        signals = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
        self.before = {n: signal.signal(n, self.ask) for n in signals
                       if signal.getsignal(n) != signal.SIG_IGN}  # as nohup has it
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _frame):
        if not self.asked:
            self.asked, self.when = int(number), time.monotonic()
        elif time.monotonic() > self.when + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
