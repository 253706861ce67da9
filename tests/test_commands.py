"""The commands: each job on a tiny checkpoint, what it prints, and one table of mistakes."""

import ast
import contextlib
import csv
import functools
import io
import json
import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F

import bench
import eval as evaluation
import sample
import train
from model import CascadeConfig, CascadeLM
from results import page, run
from tests.common import (
    CHARS,
    HERE,
    TINY,
    Skip,
    arguments,
    checkpoint_folder,
    command,
    generator,
    read_log,
    refuses,
    refuses_command,
    succeeds,
    tiny_model,
    train_tiny,
    within,
    write_dataset,
)
from tests.test_terminal import pictured
from tools import animate, plot
from util import checkpoint, configurator, dataset, judge, schedules
from util.dataset import CharTokenizer
from util.display import BRIGHT, DIM, OWN, PLAIN
from util.machine import Processes

LETTERS = "\nabcd\xe9\u6f22"  # of 1, 2 and 3 bytes
GPT, TEXT = {"objective": "ar", "block_size": 1}, "".join(
    LETTERS[i] for i in (torch.arange(4010) ** 2 // 3 % 7).tolist())


@functools.cache
def trained():
    """(a folder with data and the runs S4, block (of BD3-LM), ar, and a judge, its keeper)."""
    keeper = tempfile.TemporaryDirectory()
    write_dataset(keeper.name, TEXT, LETTERS)
    for name, settings in (("S4", {}), ("block", {"context": "block", "local_window": 0}),
                           ("ar", GPT), ("judge", GPT | {"seed": 2})):
        train_tiny(keeper.name, max_steps=4, **settings, out_dir=f"{keeper.name}/{name}")
    return Path(keeper.name), keeper


def run_json(script, *argv):
    """The one JSON object, without a NaN, that a command prints with --json=true."""
    said = succeeds(script, *argv, "--json=true")
    assert said.count("\n") == 1, said
    return json.loads(said, parse_constant=lambda word: 1 / 0)


def test_commands_of_the_readme():
    """The README's commands as processes, made tiny: train (which prepares the data), resume,
    sample; and the animation from another folder."""
    steps = configurator.override(train.DEFAULTS, ["config/smoke.py"])["max_steps"] + 5
    with tempfile.TemporaryDirectory() as folder:
        # a fresh clone: the raw text is there, the prepared files are not
        def run(script, *argv, cwd=HERE):
            code, said, err = command(HERE / script, *argv, f"--out_dir={folder}/out", cwd=cwd,
                                      env={"CASCADE_DATA": f"{folder}/data"})
            assert code == 0, said + err
            return said

        said = run("train.py", "config/smoke.py")
        for part in ("is not prepared yet", "bound of the block level <= ", " bits/byte",
                     "NLL of the GPT level = ", " tokens a pass", f"checkpoint: {folder}/out/",
                     f"python sample.py --out_dir={folder}/out"):
            assert part in re.sub(" +", " ", said), f"{part!r} is missing in: {said}"
        assert Path(folder, "data/shakespeare/meta.json").exists()
        said = run("train.py", "config/smoke.py", "--init_from=resume", f"--max_steps={steps}")
        assert f"{steps} steps" in said, said
        said = run("sample.py", "--prompt=KING.", "--max_new_tokens=30")
        assert said.startswith("KING.") and len(said) == 5 + 30 + 1, said
        run("tools/animate.py", "--svg=a.svg", cwd=folder)
        assert Path(folder, "a.svg").exists()
    return "train (which prepares the data), resume, sample, animate"


def printed(folder, net, tokenizer, given, prompt, samples, argv, **options):
    """sample.py on a pipe must print what the library writes; returns the first row."""
    options = {"temperature": sample.DEFAULTS["temperature"], **options}
    rows = sample.generate(net, [tokenizer.encode(prompt)] * samples, 20, **options)
    texts = [tokenizer.decode(row) + "\n" for row in rows]
    if samples > 1:
        texts = [f"--- sample {i + 1} of {samples}\n{text}" for i, text in enumerate(texts)]
    with mock.patch("sys.stdin", io.StringIO(prompt)):
        said = succeeds(sample, f"--out_dir={folder}", "--max_new_tokens=20", "--device=cpu",
                        *argv, f"--prompt={given.format(folder)}", f"--num_samples={samples}")
    assert said == "".join(texts), (argv, said)
    return rows[0]


def test_sample_command():
    """What the command accepts, in a pipe: the library's text, unadorned, in every mode."""
    block, five = {"mode": "block"}, {"rule": "threshold", "tau": 0.3, "temperature": 0.5,
                                      "top_k": 7, "top_p": 0.9, "seed": 4}
    cases = (  # shape of the model, how the prompt is given, the prompt, samples, options
        ({}, "", "", 1, {}), ({}, "ab", "ab", 1, {"mode": "gpt"}), ({}, "ab", "ab", 3, {}),
        ({}, "ab", "ab", 1, {"drafts": 2, "branches": 1}), ({}, "ab", "ab", 3, block | five),
        ({}, "FILE:{}/prompt.txt", "caf\xe9 a\n", 1, block | {"steps": 2}),
        ({}, "-", "hello\n", 1, block | {"rule": "entropy", "gamma": 1.0}),
        ({"objective": "ar"}, "abc", "abc", 1, {"mode": "gpt"}),
        ({"context": "block"}, "abc", "abc", 2, block),
    )
    for shape, *how, options in cases:
        with checkpoint_folder(**shape) as it:
            (it[0] / "prompt.txt").write_text("caf\xe9 a\n", encoding="utf-8")
            stop = printed(*it, *how, arguments(options), **options)[-9]
            argv = [*arguments(options), f"--stop={it[2].decode([stop])}"]
            printed(*it, *how, argv, stop_token=stop, **options)
    with checkpoint_folder() as it:
        it[1].config.block_size = 8
        printed(*it, "ab", "ab", 1, ["--block_size=8", "--any_block_size=true"])
    return f"{2 * len(cases) + 1} runs print the library's text"


def test_configs():
    """Every config file is one that train.py takes, with the parameters that its comments state."""
    stated = {"base": 139.1, "fineweb_nano": 15.1, "enwik8": 40.9, "shakespeare_char": 12.2}
    for path in sorted((HERE / "config").glob("*.py")):
        s = SimpleNamespace(**configurator.override(train.DEFAULTS, [str(path)]))
        train.resolve(s, Processes())
        vocab = {"fineweb_edu": 50257, "enwik8": 256, "shakespeare": 84, "shakespeare_char": 65}
        shape = {f.name: getattr(s, f.name) for f in fields(CascadeConfig) if hasattr(s, f.name)}
        with torch.device("meta"):
            net = CascadeLM(CascadeConfig(vocab_size=vocab[s.dataset], **shape))
        size = net.count_parameters() / 1e6
        assert abs(size - stated.get(path.stem, size)) < 0.06, (path.stem, size)
    return f"{len(list((HERE / 'config').glob('*.py')))} files, {len(stated)} sizes"


def figures(text):
    """The decimal fractions in a text, but for those in code and in names of papers."""
    text = re.sub(r"`[^`]*`|--\w+=\S+|arXiv \d+\.\d+|torch \S+", "", text)
    return set(re.findall(r"(?<![\d.])\d+\.\d+(?!\d|\.\d)", text))


def test_readme_figures():
    """results/README.md and frontier.csv are what tables.json gives, and the figures of README.md
    and of the nano's comment are on that page: of three decimals exactly, of fewer rounded."""
    about, nano, found = page.load(HERE / "results/tables.json")
    template, made = ((HERE / "results" / p).read_text() for p in ("page.md", "README.md"))
    assert page.render(template, about, nano, found) == made, "run python results/page.py"
    with open(HERE / "results/frontier.csv", newline="") as f:
        kept = list(csv.reader(line for line in f if line[0] != "#"))[1:]
    assert kept == [[str(x) for x in row] for row in page.frontier(about, found)], "frontier.csv"
    shown = (HERE / "README.md").read_text()
    measured = shown[: shown.index("## The idea")]  # behind it: settings, not measurements
    rows = set(made.splitlines())
    for line in measured[measured.index("## Results") :].splitlines():
        assert not line.startswith("|") or line in rows or not figures(line), line
    known = figures(made) | {f"{int(n.replace(',', '')) / 1e6:.2f}"
                             for n in re.findall(r"\d{1,3}(?:,\d{3}){2}", made)}  # 1,291,184: 1.29
    wanted = figures(measured) | figures(train_doc("nano"))
    missing = {f for f in wanted if f not in known and (len(f.split(".")[1]) > 2 or not any(
        f == f"{float(x):.{len(f.split('.')[1])}f}" for x in known))}
    assert len(wanted) > 10 and not missing, missing
    return f"{len(wanted)} figures are in results/README.md, as tables.json has them"


def train_doc(name):
    """The comment of a config file."""
    return ast.get_docstring(ast.parse((HERE / f"config/{name}.py").read_text()))


def test_results_are_of_this_code():
    """What results/ says was measured with the code as it stands; only prose may differ."""
    now, about = run.logic(run.measured_by()), page.load(HERE / "results/tables.json")[0]
    changed = subprocess.run(["git", "status", "--porcelain", "--", "*.py"], cwd=HERE,
                             capture_output=True, text=True, check=False).stdout
    if now != about.code and changed:
        raise Skip("the code is being changed: results/ are of the code before")
    assert now == about.code, (f"results/ are of commit {about.commit}, and the code has changed: "
                               "python results/run.py makes them again")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(run, "ROOT", Path(folder)):
        path, codes = Path(folder, "a.py"), []
        for text in ('"""Doc."""\ndef f(x):\n    "doc"\n    return x + 1  # why\n',
                     "def f(x):\n    return x + 1\n", "def f(x):\n    return x + 2\n",
                     "def f(y):\n    return x + 1\n", "def f(x):\n    return x[:1]\n",
                     "def f(x):\n    return x[1:]\n", "def f(*, x):\n    return x + 1\n"):
            path.write_text(text)
            codes.append(run.logic([path]))
    assert codes[0] == codes[1] and len(set(codes)) == 6, codes
    return f"commit {about.commit}, code {now}; prose does not change it, five edits do"


def test_draws_are_float64():
    """Every random number that a token is drawn or a draft accepted with, in all modes: in float32
    it would act as a lower temperature."""
    seen, exponential, rand = [], torch.Tensor.exponential_, torch.rand
    with (
        mock.patch.object(torch.Tensor, "exponential_",
                          lambda x, **how: seen.append(x.dtype) or exponential(x, **how)),
        mock.patch("torch.rand", lambda *n, **how: seen.append(how["dtype"]) or rand(*n, **how))
    ):
        for mode in ("gpt", "block", "verify"):
            sample.generate(tiny_model(), [[1], []], 9, mode=mode)
    assert len(seen) > 20 and set(seen) == {torch.float64}, set(seen)
    return f"{len(seen)} draws, all in float64"


def windows_of(folder, W, length=16):
    """(W, length): every window of the validation text, or W spread evenly from its start."""
    split = dataset.load_dataset(folder).split("val")
    count = len(split) // length
    starts = [i * count // (W or count) * length for i in range(W or count)]
    return torch.from_numpy(split.window(np.array(starts), length))


def test_eval_likelihood():
    """Printed, as JSON and as CSV the same figures; nats, bits a byte and perplexity agree with the
    definitions on text whose characters take 1 to 3 bytes; errors are those of windows."""
    folder, _ = trained()
    S4, table = f"--out_dir={folder}/S4", Path(tempfile.mkdtemp(dir=folder), "new", "table.csv")
    said = succeeds(evaluation, S4, f"--csv={table}", "--rule_windows=20")
    found = run_json(evaluation, S4, "--rule_windows=20", "--batch=3")
    rows, saved = ({r["method"]: r for r in x} for x in (found["rows"], read_log(table)))
    val = TEXT[int(len(TEXT) * 0.75):]
    size = len(val.encode()) / len(val)
    assert 1.3 < size < 2 and abs(found["run"]["bytes_per_token"] - size) < 1e-9, size
    for name, sign, passes in (("gpt", " =", 1), ("bound", "<=", None), ("5-gram", " =", None),
                               ("left_to_right 1", " =", 0.25)):
        r, mean, bits = rows[name], rows[name]["nll"], rows[name]["nll"] / math.log(2) / size
        line = (f"{name:20s} {sign} {mean:.4f} +- {r['nll_error']:.4f} nats/token  {sign} "
                f"{bits:.4f} bits/byte  {sign} {math.e**mean:.3f} perplexity")
        assert line in said, (line, said)
        assert abs(r["bits_per_byte"] - bits) < 1e-9 and r["passes_per_token"] == passes, r
        assert abs(float(saved[name]["nll"]) - mean) < 1e-5, (saved[name], r)
    assert "62 of 62 windows of 16 tokens" in said and "20 of 62 windows" in said, said
    assert "the tail of 11 is left out" in said, said

    score = evaluation.Score(checkpoint.load_model(folder / "S4")[0])
    loss, k = evaluation.score_noise(score, windows_of(folder, 0), evaluation.DEFAULTS["seed"])
    chart = [float(x.split()[1]) for x in said.splitlines() if re.match(r" +[1-4]  \d", x)]
    assert np.allclose(chart, [loss[k == i].mean() for i in range(1, 5)], atol=6e-4), chart
    each = {"confidence 2": evaluation.score_rule(score, windows_of(folder, 20),
                                                  "confidence", 2)[0]}
    rows |= {r["method"]: r for r in run_json(evaluation, f"--out_dir={folder}/ar")["rows"]}
    x0 = windows_of(folder, 0)
    with torch.no_grad():
        logits = checkpoint.load_model(folder / "ar")[0](F.pad(x0[:, :-1], (1, 0), value=7))
    each["gpt"] = F.cross_entropy(logits.mT, x0, reduction="none").mean(dim=1)
    off = [abs(rows[name]["nll"] - x.mean().item()) for name, x in each.items()]
    off += [abs(rows[name]["nll_error"] - x.std().item() / math.sqrt(len(x)))
            for name, x in each.items()]
    return within(max(off), 1e-5, "means and errors of two models, max|diff|")


def test_eval_jobs():
    """--exact on the windows that it says; --drafts with the control; --samples row by row."""
    folder, _ = trained()
    S4 = f"--out_dir={folder}/S4"
    rows = run_json(evaluation, S4, "--exact=true", "--exact_windows=7")["rows"]
    assert [r["method"] for r in rows[:3]] == ["exact bound", "random order", "left to right"]
    net, _ = checkpoint.load_model(folder / "S4")
    wanted = evaluation.score_exact(evaluation.Score(net), windows_of(folder, 7))
    off = max(abs(r["nll"] - x.mean().item()) for r, x in zip(rows, wanted, strict=False))
    assert "exact bound above" in succeeds(evaluation, S4, "--exact=true", "--exact_windows=7")

    block, control = run_json(evaluation, S4, "--drafts=true", "--num_samples=2")["rows"]
    assert (block["drafter"], control["drafter"]) == ("block level", "5-gram")
    steps = [step for step in sample.generate_stream(net, [[], []], 16, mode="verify", seed=0)
             if step.drafts is not None and not step.done.any()]
    wanted = (int(steps[-1].settled.sum()) - 2) / 2 / len(steps)  # the first two are not verified
    off = max(off, abs(block["tokens_per_pass"] - wanted))
    first = torch.cat([step.accepted for step in steps if step.block.shape[1] > 1]) > 0
    off = max(off, abs(block["accepted"][0] - first.double().mean().item()))

    argv = [S4, "--samples=true", f"--judge={folder}/judge", "--num_samples=3", "--temperature=0",
            "--sample_tokens=30", "--rows=left_to_right:4,confidence:1,threshold:0.3,entropy:1"]
    rows = run_json(evaluation, *argv)["rows"]
    assert f"{rows[2]['judge_nll']:.3f} +- " in succeeds(evaluation, *argv)
    names = ["held-out text", "left_to_right", "confidence", "threshold", "entropy"]
    assert [r["rule"] for r in rows] == names
    for r, o in zip(rows[1:], ({"steps": 4}, {"steps": 1}, {"tau": 0.3}, {"gamma": 1.0}),
                    strict=True):
        passes, o = 0, {"mode": "block", "rule": r["rule"], "temperature": 0, **o}
        for one in sample.generate_stream(net, [[]], 30, **o):
            passes += bool(one.new.any())
        assert r["nfe_per_token"] == passes / 30, (r, passes)  # greedy rows are alike
        assert abs(r["entropy"] - judge.token_entropy(torch.tensor(one.rows()))) < 1e-9
    net, _ = checkpoint.load_model(folder / "judge")
    text = windows_of(folder, 3, 30)
    nll = judge.autoregressive_judge(net, evaluation.ar_nll)(text)[0].sum().item()
    size = len(CharTokenizer(LETTERS).decode(text.flatten().tolist()).encode())
    off = max(off, abs(rows[0]["judge_nll"] - nll / 90),
              abs(rows[0]["judge_bits_per_byte"] - nll / math.log(2) / size))
    return within(off, 1e-6, "exact, accepted and judged figures, max|diff|")


def test_eval_schedules():
    """--schedules: what is scored was not fitted on, the oracle is ahead, and decoding goes by the
    file that it writes, which fits one checkpoint alone."""
    folder, _ = trained()
    run = Path(tempfile.mkdtemp(dir=folder))
    shutil.copy(checkpoint.find_checkpoint(folder / "S4"), run / "last.pt")
    argv = [f"--out_dir={run}", "--schedules=true", "--windows=21", "--rows=confidence:2"]
    decode = [f"--out_dir={run}", "--mode=block", "--max_new_tokens=9", "--steps=auto"]
    refuses_command(sample, decode, "schedules.json is missing", "--schedules=true")
    rows = run_json(evaluation, *argv)["rows"]
    said = succeeds(evaluation, *argv)
    assert "plan" in said and str(run / "schedules.json") in said, said
    found = {r["method"]: r for r in rows}
    score = evaluation.Score(checkpoint.load_model(run)[0])
    x0 = windows_of(folder, 21)
    losses = evaluation.score_passes(score, x0)[:, :, :4, :4]
    cuts = schedules.cheapest(losses[::2].flatten(0, 1).mean(0, keepdim=True))[1][:, 1]
    average = schedules.price(losses[1::2].flatten(0, 1), cuts).view(10, -1).sum(1) / 16
    assert found["average 2"]["cuts"] == " ".join(map(str, cuts[0].nonzero()[:, 0].tolist()))
    nll, _ = evaluation.score_rule(score, x0[1::2].contiguous(), "confidence", 2)
    each = {"average 2": average, "confidence 2": nll}
    off = max(abs(found[name]["nll"] - x.mean().item()) for name, x in each.items())
    apart = nll - average  # K = 2 of average cuts, or a mix of others that the fit prefers
    off = max(off, abs(found["confidence 2"]["nll"] - found["confidence 2"]["against_average"]
                       + found["average 2"]["against_average"] - average.mean().item()))
    assert 0 < found["confidence 2"]["against_error"] < 3 * evaluation.window_error(apart)
    for K in range(1, 5):
        best, mean = found[f"oracle {K}"], found[f"average {K}"]
        assert best["nll"] <= mean["nll"] + 1e-9 and mean["oracle_passes"] <= K + 1e-9, (K, best)
    assert found["oracle 2"]["against_average"] < 0
    for steps in (["--steps=auto", "--nats=9"], ["--steps=0"], ["--steps=0,2"]):
        *_, step = call_steps(decode[:-1] + steps)
        assert step.nfe == {"--nats=9": 3, "--steps=0": 12, "--steps=0,2": 6}[steps[-1]], steps
    block = [f"--out_dir={folder}/block", *argv[1:]]
    assert "plan" not in succeeds(evaluation, *block)
    assert not (folder / "block" / "schedules.json").exists()
    shutil.copy(checkpoint.find_checkpoint(folder / "block"), run / "last.pt")
    refuses_command(sample, decode, "not of this checkpoint", "--schedules=true")
    return within(off, 1e-6, "table of 21 windows, max|diff|")


def call_steps(argv):
    """The steps of sample.py's generation, started as its main does."""
    s = SimpleNamespace(**configurator.override(sample.DEFAULTS, argv))
    net, tokenizer = sample.load(s)
    return sample.generate_stream(net, [[]], s.max_new_tokens, **sample.options(s, tokenizer))


def test_eval_hugging_face_judge():
    """A local GPT-2 of random weights and its own vocabulary, against a loop over its tokens."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    except ImportError as e:
        raise Skip(f"needs transformers ({e}): pip install transformers") from None
    text, mine, worst = 1 + torch.randint(3, (2, 12), generator=generator(1)), "\nabc", 0.0
    # its progress bars on stderr are not this test's
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        words = Tokenizer(models.WordLevel({"<s>": 0, "c": 1, "a": 2, "b": 3}, unk_token="<s>"))
        words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        torch.manual_seed(0)
        net = GPT2LMHeadModel(GPT2Config(
            vocab_size=4, n_positions=8, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5,
            bos_token_id=0, eos_token_id=0,
        )).eval()
        net.save_pretrained(folder)
        for begin in ("<s>", None):
            PreTrainedTokenizerFast(tokenizer_object=words, bos_token=begin).save_pretrained(folder)
            nll, tokens = judge.hugging_face_judge(folder, CharTokenizer(mine), "cpu")(text)
            for row, said, count in zip(text.tolist(), nll, tokens, strict=True):
                ids = [0] * (begin is not None) + [".cab".index(mine[i]) for i in row]
                for i in range(1, len(ids)):  # windows of 8, each later one 4 on
                    first = 0 if i < 8 else (i - 8) // 4 * 4 + 4
                    with torch.no_grad():
                        logits = net(torch.tensor([ids[first:i]])).logits[0, -1]
                    said = said + logits.double().log_softmax(-1)[ids[i]]
                assert count == len(ids) - 1
                worst = max(worst, abs(said.item()))
        Path(folder, "config.json").write_text("{}")
        refuses(lambda: judge.hugging_face_judge(folder, CharTokenizer(mine), "cpu"), "no causal")
    return within(worst, 1e-5)


def test_bench_commands():
    """Each measurement in small, as JSON: rows as promised, figures finite, ratios ordered."""
    folder, _ = trained()
    tiny = arguments({**TINY, "dataset": folder, "rounds": 2, "steps": 1})
    ours, ar, product = run_json(bench, "train", *tiny)["rows"]
    assert (ours["step"], ar["step"], product["step"]) == ("ours", "ar", "product")
    for r in (ours, ar):
        assert abs(r["tokens_per_s"] * r["ms"] / 1e3 - 8 * 16) < 1e-6, r
        rate = r["gflop"] / r["ms"] * 1e3  # medians of a few rounds: not to the digit
        assert 0.2 < rate / product["gflop_per_s"] / r["mfu"] < 5, r
        assert 0 < r["of_ar"][1] <= r["of_ar"][0] <= r["of_ar"][2], r
    assert ar["of_ar"] == [1, 1, 1] and ours["gflop"] > ar["gflop"], (ours, ar)
    said = succeeds(bench, "train", *tiny)
    assert re.search(r"\nours +[\d,]+ ", said) and re.search(r"\nar .* 1\.00 \(1\.00-1\.00", said)

    tiny = arguments({**TINY, "dataset": folder, "batch_size": 1})
    short, long = run_json(bench, "memory", *tiny, "--lengths=16,32")["rows"]
    assert (short["N"], long["N"]) == (16, 32) and min(short["bytes"], long["bytes"]) >= 0

    argv = ["decode", f"--out_dir={folder}/S4", f"--ar_dir={folder}/ar", "--tokens=8",
            "--batches=1,3", "--modes=gpt,verify,block:1,block:2", "--rounds=1", "--windows=8"]
    rows = run_json(bench, *argv)["rows"]
    assert [(r["batch"], r["mode"]) for r in rows] == [
        (b, m) for b in (1, 3) for m in ("ar", "gpt", "verify", "block:1", "block:2")]
    found = {r["mode"]: r for r in rows[:5]}
    passes = {name: r["tokens_per_pass"] for name, r in found.items()}
    assert 1 <= passes.pop("verify") <= 4, passes
    assert passes == {"ar": 1, "gpt": 1, "block:1": 4, "block:2": 2}, passes
    assert found["gpt"]["nll"] == found["verify"]["nll"] != found["ar"]["nll"] and found["ar"][
        "of_ar"] == [1, 1, 1], found
    return f"train, memory and decode: {3 + 2 + len(rows)} rows"


def test_bench_gpu_list():
    """The GPU's list, here in small: verdicts, figures, and what a failing or late part says."""
    folder, _ = trained()
    s = SimpleNamespace(**{
        **bench.GPU, **TINY, "dataset": f"{folder}", "rounds": 1, "steps": 1, "lengths": "8,16",
        "attention": "chunk", "compile": "false", "shakespeare_steps": 3})
    worst = max(bench.parity("cpu", torch.bfloat16, 24, 4, 1, True, 0, "chunk"))
    chosen = train.DEFAULTS | TINY | {"dataset": f"{folder}", "max_steps": 30}

    def broken(s):
        """A part that needs too much."""
        raise torch.OutOfMemoryError("too much")

    out, parts = io.StringIO(), (broken, bench.gpu_parity, bench.gpu_train, bench.gpu_shakespeare)
    with mock.patch.multiple(bench, GPU_LIST=parts, override=lambda *_: chosen,
                             parity=lambda device, dtype, *_: (5e-3, 5e-3)):
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            raise AssertionError(f"a failed part leaves with exit code 0: {bench.bench_gpu(s)}")
    said = out.getvalue()
    verdicts = re.findall(r"in (\w+), from the oracle +\| (PASS|FAIL)", said)
    assert verdicts == [("float32", "FAIL"), ("bfloat16", "PASS"), ("float16", "PASS")], said
    for part in ("FAIL: out of memory; lower --batch_size=8", "step of ours", "30 steps at this"):
        assert part in said and "nan" not in said, (part, said)
    s.minutes, s.device = 0.0, "cuda"
    with mock.patch.object(bench, "peak_of_step", lambda s, N: 2**20 * N):
        *_, last = bench.gpu_memory(s)
    assert last == ("peak memory, N=16, batch 1", "16 MiB, 2.00 times the row before"), last
    late = [figure[:8] for _, figure in bench.bench_gpu(s)[:-1]]
    assert late == ["left out"] * len(bench.GPU_LIST), late
    return within(worst, 1e-2, "the oracle's attention in bfloat16, relative")


def test_plot():
    """Two figures from made-up tables and a real run's log, the same bytes twice."""
    try:
        plot.pyplot()
    except configurator.SettingsError as e:
        raise Skip(f"{e}") from None
    folder, _ = trained()
    with tempfile.TemporaryDirectory() as out:
        table = Path(out, "frontier.csv")
        table.write_text("# a remark\nmethod,passes_per_token,nll,nll_error\nplain,0.25,2.9,0.01\n"
                         "plain,1,2.1,0.01\nverify,0.3,1.65,0.01\n5-gram,,1.62,0.01\n")
        argv = [f"--frontier={table}", f"--out_dir={out}/new", f"--runs=mine:{folder}/S4,AR:"
                f"{folder}/ar/log.csv"]
        first, second = ([Path(line).read_text() for line in succeeds(plot, *argv).splitlines()]
                         for _ in range(2))
    assert first == second, "not repeatable"
    words = (("plain", "verify", "5-gram", "1/4"), ("mine: bound (\u2264)", "AR: GPT level"))
    for picture, expected in zip(first, words, strict=True):
        assert all(f"<!-- {word} -->" in picture for word in expected), expected
    return "two figures, the same twice"


def test_animate():
    """A frame for each pass, cell by cell in the terminal's colours, with a caption; at the end the
    settled text; of a size that a README can carry."""
    kinds = {"d": DIM, "a": BRIGHT, "o": OWN}

    def cells_of(line):
        """[(style, character)] of an SVG's <text>, blanks left out."""
        parts = [(PLAIN, line.text)]
        for part in line:
            parts += [(kinds[part.get("class")], part.text), (PLAIN, part.tail)]
        return [(kind, c) for kind, text in parts for c in text or "" if c.strip()]

    with checkpoint_folder(CHARS.replace("!", "<")) as (folder, net, tokenizer):
        path = folder / "new" / "a.svg"
        said = succeeds(animate, f"--out_dir={folder}", f"--svg={path}", "--prompt=a<b",
                        "--device=cpu")
        prompt, size = tokenizer.encode("a<b"), path.stat().st_size
        steps = list(sample.generate_stream(net, [prompt], 320, temperature=0.8))
        frames = [g for g in ElementTree.parse(path).getroot() if g.tag.endswith("}g")]
    assert len(frames) == len(steps) + 1 and size < 400_000, (len(frames), len(steps), size)
    text = [(PLAIN, char) for char in tokenizer.decode(steps[-1].rows()[0]) if char.strip()]
    pictures = [pictured(step, 0, tokenizer, net.config.mask_id) for step in steps]
    for i, (*lines, caption) in enumerate(frames):
        cells = [cell for line in lines for cell in cells_of(line)]
        if i != len(steps) - 1:
            assert cells == [*pictures, text][i], (i, cells[-9:])
        nfe = steps[min(i, len(steps) - 1)].nfe
        assert f"{nfe} passes, " in "".join(caption.itertext())
    return f"{len(frames)} frames, {said.split()[-2]} kB"


JUDGED = "--out_dir=S4 --samples=true --num_samples=2 --judge=judge"
FRESH = "--dataset=./ --out_dir=fresh --device=cpu --seq_len=16 --block_size=4 --max_steps=1"
DECODE = "decode --tokens=4 --windows=4 --device=cpu"
MISTAKES = (  # script, what all its lines begin with, (the rest of a line, words of the answer)
    (sample, "--out_dir=S4", (
        ("--steps=5", "steps", "1..4"), ("--tau=1.5", "tau"), ("--steps=x", "as in 0,1,4"),
        ("--steps=1,2", "from 0"), ("--steps=0,2,2", "from 0"), ("--steps=0,4", "below 4"),
        ("--num_samples=0", "num_samples"), ("--mode=gpt --steps=2", "mode block"),
        ("--prompt=Caps", "'Cps"), ("--stop=ab", "ab"), ("--stop=Z", "Z"), ("--prompt=-", "U"),
        ("--prompt=FILE:no", "No such file"), ("--prompt=FILE:S4", "directory"),
        ("--prompt=FILE:bytes.txt", "UTF-8"), ("--delay=-1", "delay"), ("--delay=nan", "delay"),
        ("--block_size=8", "blocks of 4", "--any_block_size=true"), ("--setps=3", "mean steps"),
        ("--block_size=5 --any_block_size=true", "multiple"), ("--out_dir=/no/such", "/no/such"),
        ("--out_dir=empty", "no checkpoint"), ("--out_dir=block --mode=gpt", "use mode block"))),
    (train, FRESH, (
        ("--local_window=17", "local_window", "0..seq_len"), ("--local_window=-1", "0..seq_"),
        ("--gpt_weight=-1", "--gpt_weight must be 0 or more"), ("--gpt_weight=nan", "0 or mor"),
        ("--joint_weight=-0.5", "--joint_weight must be 0 or more"),
        ("--local_hidden=-5", "local_hidden must"), ("--noise=uniform", "--full_share=0"),
        ("--joint_target=gpt --context=block", "--context=causal"), ("--train=draft", "=DIR"),
        ("--train=draft --init_from=S4 --context=block", "--train=draft needs a GPT level"),
        ("--train=draft --init_from=S4 --local_window=0", "--draft_rank or --local_window"),
        ("--draft_rank=-1", "draft_rank must"), ("--draft_rank=2 --context=block", "beside blocks"),
        ("--init_from=nowhere", "no checkpoint in nowhere"), ("--teacher=S4", "give both"),
        ("--init_from=S4 --n_layer=9", "--init_from=S4 has n_layer ", "leave --n_layer out"),
        ("--init_from=foreign", "another vocabulary"), ("--joint_target=teacher", "give both"),
        ("--teacher=foreign --gpt_target=teacher", "another vocabulary"),
        ("--teacher=block --joint_target=teacher", "--teacher=block needs a GPT level"),
        ("--copies=3", "--copies must be one of 1, 2"), ("--context=both", "causal or block"))),
    (evaluation, "--out_dir=S4", (
        ("--exakt=true", "did you mean exact"), ("--batch=0", "--batch"),
        ("--exact=true --samples=true", "one at a time"), ("--windows=-1", "--windows"),
        ("--split=test", "no split 'test'"), ("--dataset=nowhere", "no dataset"),
        ("--device=tpu", "not on this machine"), ("--samples=true", "needs --judge=DIR"),
        ("--samples=true --judge=S4", "not autoregressive"), ("--rows=random:2", "unknown r"),
        ("--rows=entropy:-1", "gamma be 0 or more"), ("--rows=threshold:5", "tau must lie in 0..1"),
        ("--samples=true --judge=foreign", "another vocabulary"),
        ("--samples=true --judge=hf:/no/such", "--judge=hf:"),
        ("--csv=held.csv --rows=confidence:1", "other columns"),
        ("--csv=S4 --rows=confidence:1", "cannot be written"))),
    (evaluation, JUDGED, (
        ("--rows=random", "rule:K"), ("--rows=best:2", "unknown rule 'best'"),
        ("--rows=random:5", "1..4"), ("--sample_tokens=2000", "1003 tokens"))),
    (evaluation, "", (
        ("--out_dir=block --drafts=true", "context block"), ("--out_dir=orphan", "--dataset"),
        ("--out_dir=ar --drafts=true", "mode gpt"), ("--out_dir=ar --schedules=true", "no blocks"),
        ("--out_dir=S4 --schedules=true --windows=3", "4 or more"),
        ("--out_dir=ar --exact=true", "exact out"),
        ("--out_dir=wide --exact=true", "1,023", "left_to_right"),
        ("--out_dir=long", "1003 tokens", "window of 4002"),
        ("--out_dir=foreign", "another vocabulary", "char, 7"),
        ("--out_dir=ar --samples=true --judge=ar", "the model itself"))),
    (bench, "", (
        ("", "decode", "train"), ("trian", "decode", "train"), ("train --device=tpu", "not on t"),
        ("train --tokens=3", "unknown setting 'tokens'"), (f"train {FRESH} --n_head=5", "visible"),
        ("memory --lengths=16,x --device=cpu", "--lengths must be numbers"),
        ("train --rounds=0 --device=cpu", "at least 1"),
        (f"{DECODE} --out_dir=S4 --ar_dir=ar --batches=0", "--batches must be numbers"),
        (f"{DECODE} --out_dir=S4 --ar_dir=ar --modes=fast", "verify"),
        (f"{DECODE} --out_dir=block --ar_dir=ar", "context block"),
        (f"{DECODE} --out_dir=S4 --ar_dir=S4", "not autoregressive"))),
    (bench, "gpu", () if torch.cuda.is_available() else (("", "no CUDA device here"),)),
    (animate, "--out_dir=S4", (("--columns=0", "--columns must be 1 or more"),
                               ("--svg=S4 --max_new_tokens=1", "directory"))),
    (plot, "", (("--frontier=no.csv", "No such file", "method,passes_per_token"),
                ("--frontier=held.csv", "method,passes_per_token"),
                ("--frontier= --runs=a:no", "label:folder"))),
)


def spoil(folder):
    """Add to `folder` checkpoints that do not fit its text, and files that are none of ours."""
    (folder / "bytes.txt").write_bytes(b"abc\xff\xfe")
    (folder / "held.csv").write_text("a,b\n1,2\n")
    (folder / "empty").mkdir()
    _, state = checkpoint.load_model(folder / "S4")
    state = {k: v for k, v in state.items() if k not in ("digest", "torch", "format")}
    foreign, wide = state["meta"] | {"chars": LETTERS[:-1] + "x"}, {"seq_len": 10, "block_size": 10}
    for name, shape, more in (
        ("wide", wide, {}), ("orphan", wide, {"settings": {}}), ("long", {"seq_len": 4002}, {}),
        ("foreign", {"objective": "ar"}, {"meta": foreign}),
    ):
        net = tiny_model(vocab_size=7, **shape)
        new = {"config": asdict(net.config), "model": net.state_dict(), "optimizers": [], **more}
        (folder / name).mkdir()
        checkpoint.save_checkpoint(folder / name / "last.pt", {**state, **new})


def test_mistakes():
    """Every mistake on a command line ends in one line that says what to do, and does no harm."""
    count = 0
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(shutil.copytree(trained()[0], copy, dirs_exist_ok=True))
        spoil(folder)
        with contextlib.chdir(folder):
            for script, always, cases in MISTAKES:
                for given, *words in cases:
                    with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"))):
                        refuses_command(script, f"{always} {given}".split(), *words)
                    count += 1
        assert not (folder / "fresh").exists(), "a refused run left a folder"
        assert (folder / "held.csv").read_text() == "a,b\n1,2\n"
    code, said, err = command("eval.py", "--out_dir=/no/such")
    assert code == 2 and not said and err.count("\n") == 1, err
    return f"{count + 1} mistakes, one line each"
