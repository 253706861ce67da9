"""The machine a script runs on: device, dtype, attention path, and the processes of torchrun."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import SettingsError, fail

# dense bf16 matrix peaks in FLOP/s from the vendors' data sheets, for MFU
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def cpu_multiplies_bf16():
    """Whether the processor has matrix or dot-product units for bf16 (else torch emulates it)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def choose_device(name, local_rank=0):
    """A device's name from the setting `device`; SettingsError for one that is not here.

    Left out: mps, which has no float64, and the draws and sums here are made in it.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    if name != "cpu" and name not in [f"cuda:{i}" for i in range(gpus)]:
        raise SettingsError(f"--device={name} is not on this machine ({gpus} GPUs): use auto, cpu")
    return name


def choose_machine(s, local_rank=0, world=1):
    """Resolve device, dtype, attention and compile to what will run; returns lines that say why."""
    if world > 1 and ":" in s.device:
        raise SettingsError(f"--device={s.device} would put {world} processes on one GPU: use auto")
    s.device = choose_device(s.device, local_rank)
    on_cuda = s.device.startswith("cuda")
    if s.dtype == "auto":
        if on_cuda:
            has, why = torch.cuda.is_bf16_supported(), "this GPU"
        else:
            has, why = s.device == "cpu" and cpu_multiplies_bf16(), "this processor"
        s.dtype = "bfloat16" if has else "float32"
        why += " has bf16 units" if has else " has no bf16 units that torch uses"
    else:
        why = "as set"
    if s.dtype not in ("bfloat16", "float32"):
        raise SettingsError(f"--dtype must be auto, bfloat16 or float32, not {s.dtype!r}")
    if s.compile not in ("auto", "true", "false"):
        raise SettingsError(f"--compile must be auto, true or false, not {s.compile!r}")
    narrow = s.n_embd < 16 * s.n_head  # FlexAttention's kernels start at a head dimension of 16
    if s.attention == "auto":
        flex = on_cuda and s.compile != "false" and not narrow
        s.attention = "flex" if flex else "chunk"
    s.compile = s.attention == "flex" if s.compile == "auto" else s.compile == "true"
    if s.attention == "flex" and (narrow or not (on_cuda and s.compile)):
        raise SettingsError(
            "--attention=flex needs CUDA, --compile=true and heads of 16 or more; use chunk"
        )
    chunk = "exact, in chunks of whole blocks; flex, faster, needs CUDA"
    name = torch.cuda.get_device_name(s.device) if on_cuda else s.device
    lines = [f"device     {name}", f"dtype      {s.dtype}: {why}"]
    if s.objective == "diffusion":
        note = chunk if s.attention == "chunk" else "FlexAttention with a cached block mask"
        lines.append(f"attention  {s.attention}: {note}")
    return lines


def peak_flops(device_name):
    """The matrix peak of a GPU by its name, or None where it is not in the table."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in device_name), None)


class Processes:
    """torchrun's view of this process, or a world of one; `close` ends the group."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.lock = None  # the main process's claim on out_dir, an open file

    def open(self, device):
        """Join the group; `device` is this process's own, as choose_device names it."""
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if self.world > 1:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")

    def sum(self, tensor):
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, number, where):
        """The main process's float, on every process: decisions by the clock must agree."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=where)
        dist.broadcast(tensor, src=0)
        return tensor.item()

    def main_first(self, work, where):
        """work() on the main process, returned there; its SettingsError ends all the processes."""
        result = error = None
        if self.main:
            try:
                result = work()
            except SettingsError as e:
                error = e
        if self.from_main(float(error is not None), where):
            said = [str(error)]
            if self.world > 1:
                dist.broadcast_object_list(said, src=0, device=torch.device(where))
            raise error or SettingsError(said[0])
        return result

    def fail(self, error):
        """configurator.fail, but what the main process says too is left to it.

        It is heard through torchrun's store; without that, or without a word from it within a few
        seconds, every process speaks for itself.
        """
        if self.world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            key = "error" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
            try:
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=3))
                if self.main:
                    store.set(key, str(error))
                elif store.get(key).decode() == str(error):
                    sys.exit(2)
            except RuntimeError:  # the store has gone, or the main process goes on
                pass
        fail(error)

    def lost(self, error):
        """Whether a RuntimeError says that another process of the group has gone."""
        words = ("gloo", "NCCL", "Connection", "Broken pipe")
        return self.world > 1 and (isinstance(error, dist.DistError) or
                                   any(w in str(error) for w in words))

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.lock:
            self.lock.close()
