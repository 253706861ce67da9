"""The network of this folder against that of the old tree beside it, on the same weights; deleted
together with the old tree.

    python new/against_old.py
    python new/against_old.py out/nano/last.pt out/old.pt      an old checkpoint for new/eval.py

Logits, NLLs and gradients in float64 and float32; then the CPU seconds of forward and backward,
interleaved: medians and quartiles of the rounds' ratios.
"""

import importlib
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
NAMES = ("corrupt", "model", "eval")  # which both trees have
RENAMED = {  # the new tree's names: the old one's
    "embed_tokens": "embed", "layers": "blocks", "self_attn": "attn", "lm_head": "head",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
    **{f"{x}_proj": x for x in ("q", "k", "v", "o", "gate", "up", "down")},
}


def load(folder, *names):
    """Modules of a tree, under names that the other tree has too."""
    before = sys.path[:]
    sys.path[:] = [str(folder), *(path for path in before if Path(path) != HERE)]
    modules = [importlib.import_module(name) for name in names]
    sys.path[:] = before
    for name in [*sys.modules]:
        if name in NAMES or name.partition(".")[0] == "util":
            del sys.modules[name]
    return modules


old_corrupt, old_model, old_eval = load(HERE.parent, "corrupt", "model", "eval")
corrupt, model, checkpoint = load(HERE, "corrupt", "model", "util.checkpoint")


def old_name(name):
    parts = [RENAMED.get(part, part) for part in name.split(".")]
    if parts[0] == "local":
        parts = [part for part in parts if part != "mlp"]
    return ".".join(parts)


def pair(dtype, **shape):
    """(new, old) model with the same random weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": 85, "n_layer": 2, "n_head": 6, "n_embd": 192, "seq_len": 128,
             "block_size": 8, "local_window": 4, "local_hidden": 384, **shape}
    if shape.get("context") == "block":
        shape |= {"local_window": 0}
    new = model.CascadeLM(model.CascadeConfig(**shape))
    old = old_model.CascadeLM(old_model.CascadeConfig(**shape))
    for p in new.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {old_name(name): p for name, p in new.state_dict().items()}
    old.load_state_dict(state)
    return new.to(dtype), old.to(dtype)


def largest(a, b):
    return (a.double() - b.double()).abs().max().item()


def exactly(dtype):
    """The old tree computes parts in float32 whatever its weights; for float64 that is undone."""
    stack = ExitStack()
    if dtype == torch.float64:
        parts = partial(old_model.stream_parts, dtype=dtype)
        stack.enter_context(mock.patch.object(old_model, "stream_parts", parts))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", lambda x: x))
    return stack


def parity(dtype, allowed):
    for shape in ({}, {"n_kv_head": 2, "block_size": 16}, {"qk_norm": False}, {"context": "block"},
                  {"context": "block", "tie_embeddings": True, "n_kv_head": 3}):
        new, old = pair(dtype, **shape)
        c, worst = new.config, {}
        x0 = torch.randint(85, (4, 128), generator=torch.Generator().manual_seed(1))
        schedule = "full" if c.local_window else "balanced"
        noisy = corrupt.corrupt_all_blocks(x0, c.block_size, c.mask_id, torch.Generator(), schedule)
        index = noisy.mask.flatten().nonzero()[:, 0]
        nlls = new(x0, noisy.xt, index, own_p=c.local_window > 0)
        with exactly(dtype):
            worst["logits"] = largest(new.logits_of(x0), old(x0))
            text = old_eval.Score(old)(x0, noisy.xt[None], index)[2]
            gpt, _, soft, _ = old_eval.Score(old, "gpt")(x0, noisy.xt[None], index)
            theirs, ours = [text.mean()], [nlls.masked.mean()]
            worst["masked"] = largest(nlls.masked, text)
            if c.context == "causal":
                known = index % 128 > 0  # a window's first token has no p
                worst["gpt"] = largest(nlls.gpt.flatten(), gpt)
                worst["soft"] = largest(nlls.masked_soft[known], soft[known])
                theirs += [gpt.mean(), soft[known].mean()]
                ours += [nlls.gpt.mean(), nlls.masked_soft[known].mean()]
            sum(theirs).backward()
        sum(ours).backward()
        grads = {name: p.grad for name, p in old.named_parameters()}
        worst["grad"] = max(
            largest(p.grad, grads[old_name(name)]) for name, p in new.named_parameters())
        assert max(worst.values()) <= allowed, (shape, worst)
        said = ", ".join(f"{name} {x:.1e}" for name, x in worst.items())
        print(f"{str(dtype):14s} {shape or 'cascade'}: max|diff| {said}; allowed {allowed:.0e}")


def new_step(net, schedule, soft):
    c, g = net.config, torch.Generator().manual_seed(1)
    x0 = torch.randint(85, (4, 128), generator=g)

    def step():
        noisy = corrupt.corrupt_all_blocks(x0, c.block_size, c.mask_id, g, schedule)
        index = noisy.mask.flatten().nonzero()[:, 0]
        nlls = net(x0, noisy.xt, index, own_p=soft > 0)
        masked = nlls.masked if soft == 0 else (1 - soft) * nlls.masked + soft * nlls.masked_soft
        weight = noisy.weight.flatten()[index]
        loss = corrupt.masked_diffusion_loss(masked, weight, noisy.block.numel())
        (loss if nlls.gpt is None else loss + nlls.gpt.mean()).backward()
        net.zero_grad()

    return step


def old_step(net, schedule, copies, full_share):
    c, g = net.config, torch.Generator().manual_seed(1)
    score, x0 = old_eval.Score(net), torch.randint(85, (4, 128), generator=g)
    rates = old_corrupt.Rates(full_share=full_share)

    def step():
        noisy = old_corrupt.corrupt_all_blocks(
            x0, c.block_size, c.mask_id, g, schedule, rates, copies=copies)
        mask = noisy.mask.view(copies, 4, 128)
        index = mask.flatten().nonzero()[:, 0]
        gpt, single, joint, _ = score(x0, noisy.xt.view(copies, 4, 128), index)
        weight = noisy.weight.flatten()[index] / (copies * 4 * 128 / c.block_size)
        loss = (single * weight).sum()
        if gpt is not None:
            k = mask.unflatten(-1, (-1, c.block_size)).sum(dim=-1).clamp(min=1)
            share = (1 / k).repeat_interleave(c.block_size, dim=-1).flatten()[index]
            share = share / (copies * 4 * 128 / c.block_size)
            loss = loss + 3 * gpt.mean() + 2 * (joint * share).sum()
        loss.backward()
        net.zero_grad()

    return step


def times(name, new, old, bf16, rounds=30, steps=4):
    ratios = []
    for i in range(rounds + 1):
        taken = []
        for step in (new, old):
            began = time.process_time()
            for _ in range(steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    step()
            taken.append((time.process_time() - began) / steps)
        if i:
            ratios.append((taken[0] / taken[1], *taken))
    middle = statistics.median(r[0] for r in ratios)
    q = statistics.quantiles([r[0] for r in ratios])
    new_ms, old_ms = (1e3 * statistics.median(r[i] for r in ratios) for i in (1, 2))
    print(f"{name}: {middle:.2f} ({q[0]:.2f}-{q[2]:.2f}) of the old step's CPU time, "
          f"{new_ms:.1f} ms for {old_ms:.1f}")


def convert(old_path, new_path):
    state = torch.load(old_path, map_location="cpu", weights_only=True)
    config = {f.name: state["config"][f.name] for f in fields(model.CascadeConfig)}
    net, ar = model.CascadeLM(model.CascadeConfig(**config)), state["config"]["objective"] == "ar"
    net.load_state_dict({name: state["model"][old_name(name)] for name in net.state_dict()})
    known = {"config": config, "model": net.state_dict(), "step": state["step"],
             "settings": {"draft_weight": 0 if ar else 1, "dataset": state["settings"]["dataset"]},
             "meta": state["meta"] | {"eot": state["meta"].get("eot")}}
    checkpoint.save(new_path, known)


def main():
    if len(sys.argv) == 3:
        convert(*sys.argv[1:])
        return
    parity(torch.float64, 1e-10)
    parity(torch.float32, 1e-5)
    torch.set_num_threads(1)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    print(f"steps of 4 x 128 tokens, one thread, {'bfloat16' if bf16 else 'float32'}")
    new, old = pair(torch.float32)
    theirs = old_step(old, "tilted", 2, 0.5)
    times("cascade, the old default's local head (2C, w = 4)", new_step(new, "full", 0.5), theirs,
          bf16)
    wide, _ = pair(torch.float32, local_window=6, local_hidden=768)
    times("cascade, the new default's local head (4C, w = 6)", new_step(wide, "full", 0.5), theirs,
          bf16)
    new, old = pair(torch.float32, context="block")
    times("block diffusion, one noisy copy", new_step(new, "balanced", 0),
          old_step(old, "balanced", 1, 0), bf16)


if __name__ == "__main__":
    main()
