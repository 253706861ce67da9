"""The measuring stick: likelihoods with their errors, and samples under an independent judge.

    python eval.py --out_dir=out/nano                     bound and chain likelihood
    python eval.py --out_dir=out/gpt                      an autoregressive run: its exact NLL
    python eval.py --out_dir=out/nano --exact=true        the bound against the truth, S <= 8
    python eval.py --out_dir=out/nano --samples=true --judge=out/judge     quality against speed
    python eval.py --out_dir=out/nano --json=true         one JSON object alone on stdout

Text is scored in windows of seq_len tokens, one behind the other from its start; a tail shorter
than a window is left out. So every model with one seq_len is scored on the same tokens:

    bound  <=  mean cross-entropy of masked tokens, averaged over k, how many of a block are masked
    chain   =  -log p of the sampler that reveals each block left to right, comparable with a GPT's
    NLL     =  -log p of an autoregressive model

Noise and choices come from `seed` and are drawn for all windows at once, so the batch size changes
nothing beyond rounding. Models run in float32 whatever they were trained in; sums are float64.
"""

import math
import sys
import time
from csv import DictWriter
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import torch

from checkpoint import find_checkpoint, load_model
from configurator import SettingsError, fail, override, public
from corrupt import corrupt_all_blocks
from dataset import DataError, Progress, Tokenizer, load_dataset
from judge import check_vocabulary, judged, load_judge, repetition, token_entropy
from machine import choose_device
from sample import RULES, generate_stream
from train import step_generator, token_nll

# ---- settings ----------------------------------------------------------------------------------
out_dir = "out/nano"  # or a checkpoint file
dataset = ""  # empty: as trained
split = "val"
windows = 0  # how many to score, evenly spread; 0 = all
draws = 1  # noise draws per window; from 2 on the error of the noise alone is known too
chain_windows = 512  # the chain takes S passes: so many windows, at random, for it; 0 = all
batch = 32  # windows per forward pass
seed = 0  # of noise, choices and samples
exact = False  # instead: enumerate all mask sets
exact_windows = 16
samples = False  # instead: generate text and have it judged
judge = ""  # an autoregressive checkpoint of this vocabulary, or hf:DIR, a Hugging Face model
rows = ""  # rule:K, threshold:tau and entropy:gamma, comma-separated; empty = a grid of them
num_samples = 64  # of each row, generated as one batch
sample_tokens = 0  # of each sample; 0 = the context
temperature = 1.0  # 1 = the trained distribution
csv = ""  # append the figures to this file
json = False
device = "auto"
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))


# ---- likelihoods: functions of a model and its windows x0 (W, N) int64 ---------------------------


@torch.no_grad()
def score(model, x0, mask=None, at=None, batch=32, tick=lambda tokens: None):
    """(W, N) float64: -log p of each token where `at`, by default where `mask`, else 0.

    mask, at: (W, N) or (N,) bool. An autoregressive model needs neither and scores every token.
    """
    mask, at = (None if m is None else m.expand_as(x0).split(batch) for m in (mask, at))
    out = []
    for i, x in enumerate(x0.split(batch)):
        out.append(token_nll(model, x, mask and mask[i], at and at[i]).cpu())
        tick(x.numel())
    return torch.cat(out)


def score_noise(model, x0, draws, seed, **how):
    """(loss, k), each (draws, W, nb): every block's mean cross-entropy, and its masked tokens.

    `balanced` noise, stratified over groups of S / gcd(S, nb) windows. Their mean is the bound.
    """
    c, found = model.config, []
    for r in range(draws):
        noise = corrupt_all_blocks(x0, c.block_size, c.mask_id, step_generator(seed + r, -1))
        blocks = (*noise.block.shape, c.block_size)
        loss = score(model, x0, noise.mask, **how) * noise.weight
        found.append((loss.view(blocks).sum(dim=-1), noise.mask.view(blocks).sum(dim=-1)))
    return tuple(torch.stack(x) for x in zip(*found, strict=True))


def score_chain(model, x0, **how):
    """(W,) nats per token: a block's token j given its tokens 0..j-1; S passes score them all."""
    c = model.config
    if c.objective == "ar":
        return score(model, x0, **how).mean(dim=1)
    place = torch.arange(x0.shape[1]) % c.block_size
    passes = (score(model, x0, place >= j, place == j, **how) for j in range(c.block_size))
    return sum(nll.sum(dim=1) for nll in passes) / x0.shape[1]


def score_exact(model, x0, **how):
    """(bound, random order, chain), (W,) each in nats per token, from all 2^S - 1 mask sets A.

    The bound of a block, per token:  sum_A sum_{i in A} -log p(x_i | rest) / (C(S, |A|) |A| S).
    The likelihood of revealing it in a uniformly random order is f(all places), where

        f(empty) = 1,   f(A) = 1/|A| * sum_{i in A} p(x_i | rest outside A) f(A without i):

    the mean over S! orders in 2^S - 1 steps, here in logarithms. By Jensen its NLL is <= the bound.
    """
    S = model.config.block_size
    blocks = (len(x0), -1, S)
    log_f, bound, chain = {0: torch.zeros(1, dtype=torch.float64)}, 0.0, 0.0
    for A in range(1, 2**S):  # bit i is place i, so A without i has come before A
        inside = [i for i in range(S) if A >> i & 1]
        mask = torch.zeros(S, dtype=torch.bool)
        mask[inside] = True
        nll = score(model, x0, mask.repeat(x0.shape[1] // S), **how).view(blocks)
        k = len(inside)
        bound += nll.sum(dim=-1) / (math.comb(S, k) * k * S)
        paths = torch.stack([log_f[A ^ (1 << i)] - nll[..., i] for i in inside])
        log_f[A] = paths.logsumexp(dim=0) - math.log(k)
        if k == S - inside[0]:  # every place from the first of A on: the chain's conditions
            chain += nll[..., inside[0]] / S
    return tuple(x.mean(dim=1) for x in (bound, -log_f[2**S - 1] / S, chain))


# ---- errors --------------------------------------------------------------------------------------


def window_error(x):
    """Standard error of the mean of x (W,), windows taken as independent: how far another text of
    this kind may lie. Noise is in it, and is overstated where its strata span several windows."""
    return x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


def noise_error(loss, group):
    """Standard error of the mean of loss (draws, W) on this very text, over the noise alone.

    Draws are independent, and so are groups of `group` windows, which share their strata: the
    variance is the sum over groups of the variance, between draws, of what they add to the mean,
    divided by the draws. NaN for a single draw.
    """
    draws, W = loss.shape
    unit = torch.arange(W) // group
    share = torch.zeros(draws, int(unit[-1]) + 1, dtype=torch.float64).index_add_(1, unit, loss / W)
    return math.sqrt(share.var(dim=0).sum().item() / draws) if draws > 1 else math.nan


def by_regression(y, x, x_all):
    """(mean, standard error) over W windows of y, known on n random ones, by help of x.

        mean = mean(y) + b (mean(x_all) - mean(x)),   b = cov(x, y) / var(x)
        error^2 = (1 - n / W) * residual variance / n      (Cochran, Sampling Techniques, ch. 7)

    y and x (n,), n >= 3; x_all (W,). When all windows are known it is their mean, without error.
    """
    n, W = len(y), len(x_all)
    if n == W:
        return y.mean().item(), 0.0
    dx, dy = x - x.mean(), y - y.mean()
    b = dx @ dy / (dx @ dx).clamp(min=1e-30)
    residual = (dy - b * dx).square().sum().item() / (n - 2)
    mean = y.mean() + b * (x_all.mean() - x.mean())
    return mean.item(), math.sqrt((1 - n / W) * residual / n)


def some_of(count, most, seed):
    """(min(most, count),) ascending indices below `count`, chosen at random; all if most is 0."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: most or count].sort().values


# ---- the three jobs ------------------------------------------------------------------------------


class Evaluation:
    """A checkpoint and its text. Each job prints as it goes, and returns rows of plain figures."""

    def __init__(self, s):
        self.s, self.device = s, choose_device(s.device)
        self.say = (lambda line: None) if s.json else lambda line: print(line, flush=True)
        self.model, self.state = load_model(s.out_dir, self.device)
        self.c, trained = self.model.config, self.state["settings"]
        self.tokenizer = Tokenizer.from_meta(self.state["meta"])
        name = s.dataset or trained.get("dataset")
        if not name:
            raise SettingsError(f"{s.out_dir} does not say what it was trained on: give --dataset")
        data = load_dataset(name)
        check_vocabulary(self.state["meta"], data.meta, f"--dataset={name}")
        self.text = data.split(s.split)
        tokens = self.state["step"] * trained.get("batch_size", 0) * self.c.seq_len
        self.run = {
            "run": s.out_dir, "objective": self.c.objective, "block_size": self.c.block_size,
            "seq_len": self.c.seq_len, "parameters": self.model.count_parameters(),
            "train_seed": trained.get("seed"), "step": self.state["step"], "train_tokens": tokens,
            "train_tokens_per_s": tokens / max(self.state["seconds"], 1e-9), "dataset": data.name,
            "split": s.split, "bytes_per_token": self.text.bytes_per_token,
        }
        kind = "autoregressive" if self.c.objective == "ar" else f"blocks of {self.c.block_size}"
        self.say(
            f"model      {find_checkpoint(s.out_dir)}: step {self.state['step']}, "
            f"{self.run['parameters']:,} parameters, context {self.c.seq_len}, {kind}"
        )

    def cut(self, length, most):
        """(W, length): the split's windows from its start, or `most` of them, evenly spread."""
        count = len(self.text) // length
        if not count:
            raise DataError(
                f"{self.s.split} of {self.run['dataset']} has {len(self.text)} tokens, fewer than "
                f"a window of {length}: give another --dataset or --split"
            )
        W = min(most or count, count)
        starts = torch.arange(W) * count // W * length
        self.say(
            f"text       {self.run['dataset']}, {self.s.split}: {W:,} of {count:,} windows of "
            f"{length} tokens; the tail of {len(self.text) % length} is left out"
        )
        return torch.from_numpy(self.text.window(starts.numpy(), length))

    def how(self, passes):
        """Arguments of the score functions: the batch size, and a bar over `passes` windows."""
        bar, done = Progress("scoring", passes * self.c.seq_len, "tok"), 0
        bar.update(0)

        def tick(tokens):
            nonlocal done
            done += tokens
            bar.close() if done == bar.total else bar.update(done)

        return {"batch": self.s.batch, "tick": tick}

    def line(self, name, sign, mean, error, note=""):
        """Say a likelihood in nats per token, bits per byte and perplexity."""
        bits = mean / math.log(2) / self.text.bytes_per_token
        self.say(
            f"{name:12s} {sign:>2} {mean:.4f} +- {error:.4f} nats/token  {sign:>2} {bits:.4f} "
            f"bits/byte  {sign:>2} {math.exp(mean):.3f} perplexity{note}"
        )

    def likelihood(self):
        """Bound, chain and the bound's shape over k; of an autoregressive model the NLL."""
        s, S, x0 = self.s, self.c.block_size, self.cut(self.c.seq_len, self.s.windows)
        W, ar = len(x0), self.c.objective == "ar"
        some = some_of(W, 0 if ar else s.chain_windows, s.seed)
        draws, found = 0 if ar else s.draws, {"windows": W, "chain_windows": len(some)}
        each = torch.full((W,), math.nan)
        noise = math.nan
        if not ar:
            loss, k = score_noise(self.model, x0, draws, s.seed, **self.how(W * draws))
            each = loss.mean(dim=(0, 2))
            noise = noise_error(loss.mean(dim=2), S // math.gcd(S, self.c.seq_len // S))
            note = f"  (noise alone {noise:.4f})" if draws > 1 else ""
            self.line("bound", "<=", each.mean().item(), window_error(each), note)
        chain = score_chain(self.model, x0[some], **self.how(len(some) * S))
        mean, miss = by_regression(chain, each[some], each)
        error = math.hypot(window_error(chain) * math.sqrt(len(some) / W), miss)
        note = f"  ({W - len(some):,} windows left out alone {miss:.4f})" if miss else ""
        self.line("NLL" if ar else "chain", "=", mean, error, note)
        found |= {
            "draws": draws, "bound": each.mean().item(), "bound_error": window_error(each),
            "bound_noise": noise, "chain": mean, "chain_error": error, "chain_noise": miss,
        }
        if S > 1:
            count = torch.bincount(k.flatten(), minlength=S + 1)[1:]
            total = torch.bincount(k.flatten(), loss.flatten(), minlength=S + 1)[1:]
            found["by_k"] = (total / count).tolist()
            self.say(chart(total, count))
        return [found]

    def exact(self):
        """The bound by enumeration, how loose it is, and whether the estimate finds it."""
        s, S = self.s, self.c.block_size
        if self.c.objective == "ar":
            raise SettingsError("an autoregressive model's NLL is exact: leave --exact out")
        if S > 8:
            raise SettingsError(
                f"--exact needs 2^S - 1 passes, {2**S - 1:,} at S = {S}, and stops at S = 8: the "
                "chain likelihood, printed without --exact, is exact at any S"
            )
        x0 = self.cut(self.c.seq_len, s.windows)
        x0 = x0[some_of(len(x0), s.exact_windows, s.seed)]
        self.say(f"           {len(x0)} of these at random, {2**S - 1} mask sets of each block")
        draws = max(s.draws, 8)
        how = self.how(len(x0) * (2**S - 1 + draws))
        bound, order, chain = score_exact(self.model, x0, **how)
        loss, _ = score_noise(self.model, x0, draws, s.seed, **how)
        found = {"windows": len(x0)}
        for name, sign, each in (("bound", "<=", bound), ("random order", "=", order),
                                 ("chain", "=", chain), ("looseness", None, bound - order)):
            mean, error = each.mean().item(), window_error(each)
            key = name.replace(" ", "_")
            found |= {key: mean, f"{key}_error": error}
            if sign:
                self.line(name, sign, mean, error)
        self.say(f"the bound lies {mean:.4f} +- {error:.4f} nats/token above the random order")
        noise = noise_error(loss.mean(dim=2), S // math.gcd(S, self.c.seq_len // S))
        found |= {"draws": draws, "estimate": loss.mean().item(), "estimate_noise": noise}
        self.say(
            f"its estimate by {draws} noise draws on the same windows: <= {found['estimate']:.4f} "
            f"+- {noise:.4f}, off by {found['estimate'] - found['bound']:+.4f}"
        )
        return [found]

    def samples(self):
        """Each rule's text under the judge; the first row is held-out text of the same length."""
        s, n = self.s, self.s.sample_tokens or self.c.seq_len
        grid = sample_grid(s.rows, self.c)
        judge, name = load_judge(s.judge, self.state, self.tokenizer, self.device)
        held_out, table = self.cut(n, s.num_samples), []
        self.say(
            f"judge      {name}\nsamples    {s.num_samples} of {n} tokens a row from nothing, one "
            f"batch, temperature {s.temperature:g}, none redrawn\n\nrule             setting  "
            "NFE/token  tokens/s   judge: nats/token  bits/byte  entropy  repeated"
        )
        for rule, value in [("held-out text", math.nan), *grid]:
            text, nfe, speed = held_out, math.nan, math.nan
            if rule in RULES:
                text, nfe, speed = generate_timed(self.model, rule, value, n, s)
            row = {
                "judge": s.judge, "samples": len(text), "tokens": n, "temperature": s.temperature,
                "rule": rule, "setting": value, "nfe_per_token": nfe, "tokens_per_s": speed,
                **judged(judge, text, self.tokenizer), "entropy": token_entropy(text),
                "repetition": repetition(text),
            }
            table.append(row)
            self.say(
                f"{rule:16s} {value:7g} {nfe:10.3f} {speed:9.0f}   {row['judge_nll']:8.3f} "
                f"+- {row['judge_error']:.3f} {row['judge_bits_per_byte']:10.3f} "
                f"{row['entropy']:8.3f} {row['repetition']:9.3f}".replace("nan", "  -")
            )
        return table


def chart(total, count, most=16):
    """Bars of the mean loss given k masked, from sums and counts (S,) of blocks by k = 1..S."""
    S = len(count)
    edges = [S * i // min(S, most) for i in range(min(S, most) + 1)]
    ranges = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if count[a:b].sum()]
    means = [(total[a:b].sum() / count[a:b].sum()).item() for a, b in ranges]
    lines = [f"nats per masked token when k of {S} are masked; their mean is the bound"]
    for (a, b), mean in zip(ranges, means, strict=True):
        label = f"{b}" if b == a + 1 else f"{a + 1}-{b}"
        lines.append(f"{label:>9s}  {mean:.3f}  " + "#" * round(50 * mean / max(means)))
    return "\n".join(lines)


def sample_grid(rows, c):
    """[(rule, value)] of the setting `rows`; if empty K = S, S/2, S/4 and the adaptive rules."""
    if not rows and c.objective == "ar":
        return [("left_to_right", 1)]
    if not rows:
        steps = sorted({max(1, c.block_size // d) for d in (1, 2, 4)}, reverse=True)
        grid = [(rule, K) for rule in ("random", "left_to_right", "confidence") for K in steps]
        return [*grid, ("threshold", 0.9), ("threshold", 0.5), ("entropy", 0.1), ("entropy", 1.0)]
    try:
        pairs = [row.strip().split(":") for row in rows.split(",")]
        grid = [(r, float(v) if r in ("threshold", "entropy") else int(v)) for r, v in pairs]
    except ValueError:
        raise SettingsError("write --rows=random:8,threshold:0.9,entropy:0.5 (rule:K)") from None
    for rule, _ in grid:
        if rule not in RULES:
            raise SettingsError(f"unknown rule {rule!r} in --rows: one of {', '.join(RULES)}")
    return grid


def generate_timed(model, rule, value, tokens, s):
    """(text (B, tokens), forward passes per token, tokens/s) of one batch from empty prompts.

    Passes are those that revealed some of a sample, on average: what it takes by itself. In a batch
    an adaptive rule waits for the slowest sample, and tokens/s, those of the batch, show it.
    """
    name = {"threshold": "tau", "entropy": "gamma"}.get(rule, "steps")
    began, passes = time.perf_counter(), 0
    for step in generate_stream(model, [[]] * s.num_samples, tokens, rule=rule, seed=s.seed,
                                temperature=s.temperature, **{name: value}):
        passes = passes + step.revealed.any(dim=1).double()
    text = torch.tensor(step.rows())
    return text, passes.mean().item() / tokens, text.numel() / (time.perf_counter() - began)


# ---- the command ---------------------------------------------------------------------------------


def check_settings(s):
    if s.exact and s.samples:
        raise SettingsError("one at a time: --exact=true or --samples=true")
    for name, least in (("windows", 0), ("chain_windows", 0), ("sample_tokens", 0), ("draws", 1),
                        ("batch", 1), ("exact_windows", 1), ("num_samples", 2)):
        if getattr(s, name) < least:
            raise SettingsError(f"--{name} must be at least {least}, not {getattr(s, name)}")
    if s.chain_windows in (1, 2):
        raise SettingsError("--chain_windows must be 3 or more to have an error; 0 for all")


def append_csv(path, table):
    """Append rows (dicts of the same keys) to a CSV file, which is made with a header if new."""
    columns = [key for key, value in table[0].items() if not isinstance(value, list)]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", newline="", encoding="utf-8") as f:
            f.seek(0)
            head = f.readline().rstrip("\r\n")
            if head not in ("", ",".join(columns)):
                raise SettingsError(f"--csv={path} has other columns: give another file")
            writer = DictWriter(f, columns, extrasaction="ignore", lineterminator="\n")
            if not head:
                writer.writeheader()
            for row in table:
                writer.writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(f"--csv={path} cannot be written ({e}): give another file") from None


def plain(value):
    """`value` for JSON, which knows no NaN: null instead."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv):
    try:
        s = SimpleNamespace(**override(DEFAULTS, argv))
        check_settings(s)
        job = "exact" if s.exact else "samples" if s.samples else "likelihood"
        evaluation = Evaluation(s)
        table = getattr(evaluation, job)()
        if s.json:
            found = {"job": job, "settings": vars(s), "run": evaluation.run, "rows": table}
            print(dumps(plain(found)))
        if s.csv:
            append_csv(s.csv, [evaluation.run | row for row in table])
    except (SettingsError, DataError, ValueError) as e:
        fail(e)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
