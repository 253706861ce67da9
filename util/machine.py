"""The machine a script runs on: device, dtype, attention path, FLOPs, signals, and the processes
of torchrun."""

import ctypes
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from util.configurator import SettingsError, first_line

# dense bf16 matrix peaks in FLOP/s from the vendors' data sheets, for MFU; float32 products take
# TF32 units ("high" precision), at half of that
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
COMPILE_MINUTES = 20  # of training, from which compiling on a CPU gains more time than it takes


def cpu_multiplies_bf16():
    """Whether the processor has matrix or dot-product units for bf16 (else torch emulates it)."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def choose_device(name, local_rank=0):
    """A device's name from the setting `device`; SettingsError for one that is not here, and for
    mps, which has no float64, in which the draws and sums here are made."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    if name != "cpu" and name not in [f"cuda:{i}" for i in range(gpus)]:
        raise SettingsError(f"--device={name} is not on this machine ({gpus} GPUs): use auto, cpu")
    return name


def choose_dtype(s, device, small=False):
    """Resolve s.dtype; returns why. `small`: for passes of few tokens, as in decoding."""
    why, cpu = "as set", device == "cpu"
    if s.dtype == "auto" and cpu and small:
        s.dtype, why = "float32", "passes of few tokens gain nothing by bf16 on a CPU"
    elif s.dtype == "auto":
        has = cpu_multiplies_bf16() if cpu else torch.cuda.is_bf16_supported()
        s.dtype = "bfloat16" if has else "float32"
        why = f"this {'processor' if cpu else 'GPU'} has {'' if has else 'no '}bf16 units"
    if s.dtype not in ("bfloat16", "float32"):
        raise SettingsError(f"--dtype must be auto, bfloat16 or float32, not {s.dtype!r}")
    return why


def keep_memory():
    """Let glibc keep freed memory for the next step: given back to the system, its pages are
    cleared and mapped again, about 10 % of a small model's step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def autocast(s):
    """The context that computes in the settings' dtype."""
    on = s.dtype == "bfloat16"
    return torch.autocast(s.device.split(":")[0], dtype=torch.bfloat16) if on else nullcontext()


def choose_machine(s, local_rank=0, world=1):
    """Resolve device, dtype, attention and compile to what will run; returns lines that say why."""
    if world > 1 and ":" in s.device:
        raise SettingsError(f"--device={s.device} would put {world} processes on one GPU: use auto")
    s.device = choose_device(s.device, local_rank)
    on_cuda = s.device.startswith("cuda")
    why = choose_dtype(s, s.device)
    if s.compile not in ("auto", "true", "false"):
        raise SettingsError(f"--compile must be auto, true or false, not {s.compile!r}")
    # FlexAttention's kernels start at a head dimension of 16
    flex = on_cuda and s.compile != "false" and s.n_embd >= 16 * s.n_head
    if s.attention in ("flex", "flash") and not flex:
        raise SettingsError(f"--attention={s.attention} needs CUDA, --compile=true and heads of 16 "
                            "or more; use chunk")
    lacks = lacks_flash(s) if flex else ""
    if s.attention == "flash" and lacks:
        raise SettingsError(f"--attention=flash: {lacks}; use flex")
    if s.attention == "auto":
        s.attention = ("flex" if lacks else "flash") if flex else "chunk"
    note = {"chunk": "exact, in chunks of whole blocks; flex, faster, needs CUDA",
            "flex": f"FlexAttention with a cached block mask; not flash: {lacks or 'as set'}",
            "flash": "FlexAttention's flash backend with a cached block mask"}[s.attention]
    lines = [f"device     {torch.cuda.get_device_name(s.device) if on_cuda else s.device}",
             f"dtype      {s.dtype}: {why}", f"attention  {s.attention}: {note}"]
    if s.compile == "auto" and not on_cuda:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        found = shutil.which(compiler) is not None
        s.compile = "true" if found and s.max_minutes >= COMPILE_MINUTES else "false"
        lines.append(f"compile    {s.compile}: " + (
            f"on a CPU it pays from --max_minutes={COMPILE_MINUTES} on" if found
            else f"there is no C++ compiler {compiler} here"))
    s.compile = s.attention != "chunk" if s.compile == "auto" else s.compile == "true"
    return lines


def lacks_flash(s):
    """Why FlexAttention's flash backend cannot run on this GPU, or ""."""
    try:
        from torch._inductor.kernel.flex.flex_flash_attention import ensure_flash_available
    except ImportError:
        return "this torch has no such backend"
    # its kernels for Blackwell want other tiles than the block mask's 128
    if torch.cuda.get_device_capability(s.device)[0] != 9:
        return "it is for Hopper GPUs here"
    if s.dtype != "bfloat16":
        return "it is for bfloat16"
    return "" if ensure_flash_available() else "pip install --pre flash-attn-4"


def peak_flops(s):
    """The matrix peak of the settings' GPU in their dtype, or None where it is not in the table."""
    name = torch.cuda.get_device_name(s.device) if s.device.startswith("cuda") else ""
    peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
    return peak / 2 if peak and s.dtype == "float32" else peak


def train_flops(c, batch, masked, copies=1, attention=True, frozen=False):
    """Matrix FLOPs of one training step (forward and backward) on `batch` sequences.

    A product with P weights costs 2 P per token forward and 4 P backward: 6 P. Attention over
    E visible entries costs 2 * 2 E D per head forward, three times that in all: 12 E H D.
    Of the last layer, only the tokens with a loss pass through o, the MLP and the head: the
    `masked` ones, of all copies together, and with a causal context the clean ones but the last.
    Through the local head each masked token passes twice, but for what h alone contributes.
    `frozen`, only what drafts learns: 2 P where no gradient comes by, 4 P where it goes through.
    """
    N, C, ar, causal = c.seq_len, c.n_embd, c.objective == "ar", c.context == "causal"
    kv, head, tokens = 2 * C * c.n_kv_head * c.head_dim, C * c.vocab_size, batch * N
    width, r = c.n_head * c.head_dim, c.draft_rank
    q, tail = C * width, C * width + 3 * C * c.n_hidden
    copies, masked = (0, 0) if ar else (copies, masked)
    clean = tokens if ar else batch * (N - 1) if causal else 0  # tokens with a loss
    text, noisy, top = (2, 4 if r else 2, 4) if frozen else (6, 6, 6)  # for a weight and a token
    layers = tokens * (c.n_layer - 1) * (q + kv + tail)
    flops = text * (layers + tokens * (causal * q + kv) + clean * (tail + head))
    flops += noisy * (copies * (layers + tokens * (q + kv)) + masked * tail)
    flops += top * masked * (2 if c.local_window else 1) * head
    if c.local_window:
        left = 2 * c.local_window * max(1, C // 4)
        flops += 6 * masked * 2 * c.local_hidden * (C + left + C)
    before, after = r * (3 * C + width + kv // C), r * (C + width + 3 * (C + c.n_hidden))
    flops += 6 * (copies * tokens * (c.n_layer * (before + after) - after) + masked * after)
    beside = copies * batch * N * (N + c.block_size) // 2  # visible entries in a layer
    own = batch * N * (N + (1 if causal else c.block_size)) // 2
    entries = text * (c.n_layer - (not causal)) * own + (6 if noisy > 2 else 2) * c.n_layer * beside
    return flops + attention * 2 * width * entries


class Stop:
    """Within it SIGINT, SIGTERM and SIGHUP ask the loop to finish its step and save; a later one
    ends at once. Later means by a second: torchrun repeats to its workers what the terminal sent.
    `asked` is the signal's number, 0 without one."""

    PIPE = 13  # SIGPIPE, a name that not every system has

    def __init__(self):
        self.asked, self.at = 0, 0.0

    def __enter__(self):
        numbers = [getattr(signal, name, signal.SIGINT) for name in ("SIGTERM", "SIGHUP", "SIGINT")]
        self.before = {n: signal.signal(n, self.ask) for n in set(numbers)
                       if signal.getsignal(n) != signal.SIG_IGN}  # as nohup has it
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _frame):
        if self.asked and time.monotonic() > self.at + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.asked:
            self.asked, self.at = int(number), time.monotonic()


class Processes:
    """torchrun's view of this process, or a world of one."""

    def __init__(self):
        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        found = [os.environ.get(name, default) for name, default in names.items()]
        self.rank, self.local_rank, self.world = (int(x) if x.isdecimal() else -1 for x in found)
        if not 0 <= self.local_rank <= self.rank < self.world:
            raise SettingsError(f"{', '.join(names)} are {', '.join(found)}: torchrun sets them; "
                                "unset them to train in one process")
        self.main = self.rank == 0
        self.lock = None  # the main process's claim on out_dir, an open file

    def open(self, device):
        """Join the group; `device` is this process's own, as choose_device names it."""
        if device != "cpu":
            torch.cuda.set_device(device)
        if self.world > 1:  # gloo for what the hosts decide, so that no GPU has to be waited for
            dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")

    def sum(self, tensor):
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, *numbers):
        """The main process's floats, on every process: decisions by the clock must agree."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(tensor, src=0)
        return tensor.tolist()

    def main_first(self, work):
        """work() on the main process, returned there; its SettingsError ends all the processes."""
        result = error = None
        if self.main:
            try:
                result = work()
            except SettingsError as e:
                error = e
        if self.from_main(float(error is not None))[0]:
            said = [str(error)]
            if self.world > 1:
                dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
            raise error or SettingsError(said[0])
        return result

    def only_once(self, error):
        """`error`, to be raised by this process; but SystemExit if the main process says the same,
        through torchrun's store. Without a word from it every process speaks for itself."""
        words = ("gloo", "NCCL", "Connection", "Broken pipe")
        if self.world > 1 and isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or any(w in str(error) for w in words)
        ):
            error = SettingsError(f"another process of this run is gone ({first_line(error)}): "
                                  "start it again, with --init_from=resume if it has saved")
        if self.world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            key = "error" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
            try:
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=3))
                if self.main:
                    store.set(key, str(error))
                elif store.get(key).decode() == str(error):
                    return SystemExit(2)
            except RuntimeError:  # the store has gone, or the main process goes on
                pass
        return error

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.lock:
            self.lock.close()
