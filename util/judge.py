"""Judges of generated text: an autoregressive run of another seed, or a Hugging Face model.

A judge is a function: judge(text (B, n) int64) gives two (B,) tensors, each sample's total -log p
with nothing before it, and the tokens that were counted. A low score alone is easily had, by
repeating a phrase, so `token_entropy` and `repetition` belong beside it, and those of real text.
"""

import math
from pathlib import Path

import torch

from util.checkpoint import load_model
from util.configurator import SettingsError, first_line, optional
from util.dataset import VOCABULARY


def token_entropy(text):
    """Mean over samples (B, n) of the entropy, in nats, of the tokens' frequencies in a sample."""
    counts = torch.stack([torch.bincount(row, minlength=int(text.max()) + 1) for row in text])
    return torch.special.entr(counts.double() / text.shape[1]).sum(dim=1).mean().item()


def repetition(text, n=4):
    """Mean over samples (B, tokens) of the share of n-grams that stood earlier in the sample."""
    if text.shape[1] < n:
        return math.nan
    grams = text.unfold(1, n, 1).tolist()
    return sum(1 - len(set(map(tuple, row))) / len(row) for row in grams) / len(grams)


def judged(judge, text, tokenizer):
    """{judge_nll, judge_error, judge_bits_per_byte} of text (B, n); nats per token of the judge's.

    A ratio of sums over independent samples; its standard error by the usual linearisation.
    """
    nll, tokens = (x.double().cpu() for x in judge(text))
    size = sum(len(tokenizer.decode(row).encode()) for row in text.tolist())
    mean = (nll.sum() / tokens.sum()).item()
    error = (nll - mean * tokens).std().item() / math.sqrt(len(nll)) / tokens.mean().item()
    return {
        "judge_nll": mean, "judge_error": error,
        "judge_bits_per_byte": nll.sum().item() / math.log(2) / size,
    }


def sliding(n, context):
    """(start, end, first to score) of windows over n tokens: the first scores all it holds, each
    later one what is new, behind half a context of what came before."""
    start = done = 0
    while done < n:
        end = min(start + context, n)
        yield start, end, done
        start, done = end - context // 2, end


def check_vocabulary(mine, other, what):
    """SettingsError unless two meta.json mean the same by every token id."""
    if any(mine.get(key) != other.get(key) for key in VOCABULARY):
        says = [f"{m.get('tokenizer')}, {m.get('vocab_size')} tokens" for m in (other, mine)]
        raise SettingsError(
            f"{what} has another vocabulary ({says[0]}) than the checkpoint ({says[1]}): use one "
            "with the same; only a judge hf:DIR may differ, it reads text"
        )


def load_judge(name, state, tokenizer, device, score):
    """The judge of the setting `judge` for text of the checkpoint `state`, and its description.

    score(model, x0): (B, N) -log p of each token of x0 by an autoregressive model.
    """
    if not name:
        raise SettingsError(
            "--samples needs --judge=DIR, trained with another seed: python train.py "
            "--objective=ar --block_size=1 --seed=2 --out_dir=DIR makes one"
        )
    if name.startswith("hf:"):
        return hugging_face_judge(name[3:], tokenizer, device), name
    net, other = load_model(name, device)
    if net.config.objective != "ar":
        raise SettingsError(f"--judge={name} is not autoregressive, so its score is only a bound")
    if other["digest"] == state["digest"]:
        raise SettingsError(f"--judge={name} is the model itself: train one with another --seed")
    check_vocabulary(state["meta"], other["meta"], f"--judge={name}")
    said = f"{name}: autoregressive, seed {other['settings'].get('seed')}, step {other['step']}"
    return autoregressive_judge(net, score), said


def autoregressive_judge(net, score, batch=16):
    """A judge from a CascadeLM of objective "ar", for tokens of its own vocabulary."""

    @torch.no_grad()
    def judge(text):
        nll = torch.zeros(text.shape, dtype=torch.float64)
        for a, b, new in sliding(text.shape[1], net.config.seq_len):
            scores = [score(net, rows) for rows in text[:, a:b].split(batch)]
            nll[:, new:b] = torch.cat(scores)[:, new - a :].cpu()
        return nll.sum(dim=1), torch.full((len(text),), text.shape[1])

    return judge


def hugging_face_judge(folder, tokenizer, device):
    """A judge from a causal language model in a local folder; text is tokenised its way.

    The first token follows the judge's begin (or end) of text; without either it is not scored.
    """
    transformers = optional("transformers", "--judge=hf:DIR")
    if not Path(folder).is_dir():
        raise SettingsError(f"--judge=hf:{folder}: no such folder; give that of a saved model")
    try:
        words = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        net = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a foreign library on foreign files: whatever it raises
        raise SettingsError(f"--judge=hf:{folder} is no causal language model ({first_line(e)})"
                            ) from None
    net = net.float().to(device).eval()
    context = getattr(net.config, "max_position_embeddings", None) or 1024
    begin = words.eos_token_id if words.bos_token_id is None else words.bos_token_id

    def score(row):
        ids = words(tokenizer.decode(row), add_special_tokens=False).input_ids
        ids = torch.tensor([*([] if begin is None else [begin]), *ids], device=device)
        total = 0.0
        for a, b, new in sliding(len(ids), context):
            new = max(new, 1)  # position i is predicted by the logits before it
            logp = net(ids[None, a:b]).logits[0, new - 1 - a : b - 1 - a].float().log_softmax(-1)
            total -= logp.gather(1, ids[new:b, None]).double().sum().item()
        return total, len(ids) - 1

    @torch.no_grad()
    def judge(text):
        return torch.tensor([score(row) for row in text.tolist()], dtype=torch.float64).T

    return judge
