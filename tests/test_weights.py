"""The trade's tests of weights from and for elsewhere: Hugging Face folders and tokenizers."""

import contextlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import model as cascade
import sample
import train
from tests.common import (
    CHARS,
    TINY,
    Skip,
    arguments,
    checkpoint_folder,
    data_folder,
    diff,
    generator,
    refuses,
    refuses_command,
    succeeds,
    tiny_model,
    tiny_settings,
    tokens_for,
    train_tiny,
    weights,
    within,
    write_dataset,
)
from tests.test_data import roots, script
from tools import export
from util import checkpoint, dataset, hf, judge


def needs(*packages):
    """The modules of optional packages; Skip where one is missing."""
    try:
        return [__import__(name) for name in packages]
    except ImportError as e:
        raise Skip(f"needs {e.name}: pip install {e.name}") from None


@contextlib.contextmanager
def hub_folder(meta=None, **shape):
    """(a folder as write_folder makes it, the tiny model in it)."""
    needs("safetensors")
    net = tiny_model(3, **shape)
    with tempfile.TemporaryDirectory() as folder:
        hf.write_folder(folder, net.config, net.state_dict(), meta or {})
        yield Path(folder), net


def imported(folder, **settings):
    """The model that a folder gives, as train.py makes it."""
    shape, _ = hf.read_config(folder, settings["seq_len"])
    net = cascade.CascadeLM(cascade.CascadeConfig(**shape, **settings))
    net.load_state_dict(net.state_dict() | hf.read_weights(folder, net.config))
    return net.eval()


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 32, "head_dim": 8,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 5e4, "tie_word_embeddings": True, "hidden_act": "silu", "sliding_window": 9,
    "use_sliding_window": False, "layer_types": ["full_attention"] * 2,
}
LACKING = (  # a change of the config.json above, and words of the refusal
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"architectures": None}, "architectures"), ({"architectures": [1]}, "str"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type", "llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type", "linear"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type", "yarn"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor", "0.5"),
    ({"rope_scaling": {"factor": 8.0}}, "factor", "8.0"),
    ({"rope_parameters": {"full_attention": {"rope_type": "llama3"}}}, "differ by layer"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"hidden_act": "gelu"}, "gelu"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"max_position_embeddings": 8}, "8", "--seq_len is 16"), ({"rms_norm_eps": 0}, "norm_eps"),
    ({"rope_theta": math.inf}, "rope_theta"), ({"rope_theta": "x"}, "x"),
    ({"hidden_size": "32"}, "n_embd"), ({"num_hidden_layers": 10**9}, "n_layer"),
    ({"vocab_size": True}, "vocab_size"), ({"rope_scaling": 3}, "TypeError"),
    ({"num_attention_heads": -1}, "n_head"),
)


def test_weights_config():
    """config.json as transformers 4 and 5 write it, with and without what has a default; what this
    network lacks is refused by name. No package is needed for it."""
    with tempfile.TemporaryDirectory() as folder:
        def read(change, *gone):
            text = json.dumps({k: v for k, v in (LLAMA | change).items() if k not in gone})
            Path(folder, "config.json").write_text(text)
            return hf.read_config(folder, 16)

        shape, name = read({})
        assert name == "LlamaForCausalLM" and set(shape) == set(hf.SHAPE)
        assert shape["tie_embeddings"] and not shape["qk_norm"] and shape["rope_base"] == 5e4
        five = {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}, "head_dim": None,
                "sliding_window": None, "num_key_value_heads": None, "dtype": "bfloat16"}
        for arch in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
            other, _ = read(five | {"architectures": [arch]}, "rope_theta", "tie_word_embeddings")
            want = {"rope_base": 7e4, "qk_norm": "3" in arch, "n_kv_head": 0, "head_dim": 0}
            assert other == shape | want | {"tie_embeddings": False}, other
        assert read({}, "rope_theta")[0] == shape | {"rope_base": 1e4}
        for change, *words in LACKING:
            refuses(lambda c=change: read(c), *words, folder, "save_pretrained")
        refuses(lambda: read({}, "use_sliding_window"), "sliding_window is 9")
        for text in ("{", "[]", "", "[" * 10**5, "\0", '{"architectures": "LlamaForCausalLM"}'):
            Path(folder, "config.json").write_text(text)
            refuses(lambda: hf.read_config(folder, 16), folder)
        Path(folder, "config.json").unlink()
        refuses(lambda: hf.read_config(folder, 16), "No such file")
        refuses(lambda: hf.read_config("/no/such", 16), "/no/such")
    return f"3 architectures; {len(LACKING) + 9} mistakes, one line each"


def test_weights_head_dim():
    """Heads wider than n_embd / n_head are saved and loaded; odd ones, and those that a damaged
    checkpoint has no tensors for, are refused. (Parity and FLOPs: among the shapes of those.)"""
    for wrong in (3, -2, 1):
        refuses(lambda d=wrong: cascade.CascadeConfig(head_dim=d), "even head dimension")
    refuses(lambda: cascade.CascadeConfig(n_embd=10, n_head=3), "not divisible")
    assert cascade.CascadeConfig(n_embd=10, n_head=3, head_dim=4).head_dim == 4
    assert cascade.CascadeConfig(n_embd=12, n_head=3).head_dim == 4
    with checkpoint_folder(head_dim=12) as (folder, net, _):
        back, state = checkpoint.load_model(folder)
        assert back.config == net.config and back.blocks[0].attn.q.weight.shape == (48, 32)
        state = {k: v for k, v in state.items() if k != "digest"}
        for wrong, words in ((2 << 20, "larger than its tensors"), (10, "does not fit"),
                             ("12", "damaged")):
            changed = state | {"config": state["config"] | {"head_dim": wrong}}
            checkpoint.save_checkpoint(folder / "best.pt", changed)
            refuses(lambda: checkpoint.load_model(folder), words)
        old = {k: v for k, v in state["config"].items() if k != "head_dim"}
        assert cascade.CascadeConfig(**old).head_dim == 8, "a checkpoint without the field"
    return "12 of 32 / 4; 7 mistakes"


def test_weights_round_trip():
    """A checkpoint out by tools/export.py, in by read_weights, and out again: every bit the same,
    [MASK] the mean of the embeddings, nothing of what drafts; what is not to be replaced stays."""
    (safetensors,) = needs("safetensors.torch")
    count = 0
    for shape in ({}, {"tie_embeddings": True, "qk_norm": False}, {"head_dim": 12, "n_kv_head": 1},
                  {"rope_base": 5e3, "norm_eps": 1e-6, "qk_norm": False}):
        with checkpoint_folder(**shape) as (folder, net, _):
            to = folder / "new" / "a"
            said = succeeds(export, f"--out_dir={folder}", f"--to={to}")
            assert f"{to}" in said and os.listdir(to.parent) == ["a"]
            c = net.config
            back = imported(to, seq_len=c.seq_len, block_size=c.block_size, objective=c.objective)
            assert asdict(back.config) == asdict(c) | {
                k: getattr(back.config, k) for k in ("local_window", "local_hidden")}
            theirs, ours = back.state_dict(), net.state_dict()
            for name, (own, _) in hf.weight_names(c).items():
                rows = slice(None, -1 if own == "embed.weight" else None)
                assert (theirs[own][rows] == ours[own][rows]).all(), name
                count += ours[own].numel()
            mask = theirs["embed.weight"][-1] - ours["embed.weight"][:-1].mean(dim=0)
            assert mask.abs().max() < 1e-6
            assert back.local is None or not back.local.down.weight.any(), "the head speaks already"
            (folder / "b").mkdir()
            hf.write_folder(folder / "b", back.config, theirs, {})
            for name in ("config.json", "model.safetensors"):
                assert (folder / "b" / name).read_bytes() == (to / name).read_bytes(), name
            refuses_command(export, [f"--out_dir={folder}", f"--to={to}"], "--overwrite=true")
            succeeds(export, f"--out_dir={folder}", f"--to={to}", "--overwrite=true")
            (to / "mine.txt").touch()
            for argv, words in (((f"--to={to}", "--overwrite=true"), "mine.txt"), ((), "--to"),
                                ((f"--to={folder}/best.pt", "--overwrite=true"), "best.pt")):
                refuses_command(export, [f"--out_dir={folder}", *argv], words)
            with mock.patch.object(hf, "write_folder", side_effect=OSError(28, "No space")):
                refuses_command(export, [f"--out_dir={folder}", f"--to={folder}/c"], "No space")
            assert not (folder / "c").exists() and len(os.listdir(folder)) == 3
    for how, word in (({"context": "block"}, "no GPT level"), ({"objective": "ar"}, "baseline")):
        with checkpoint_folder(**how) as (folder, *_):
            refuses_command(export, [f"--out_dir={folder}", f"--to={folder}/a"], word)
    return f"{count:,} numbers of 4 models, 0 bits of difference; 8 mistakes"


def test_weights_damage():
    """Shards that are missing, tensors that are missing, more, misshapen, or not finite, biases and
    damaged files: each is refused by its name in one line, and leaves no run."""
    (safetensors,) = needs("safetensors")
    from safetensors.torch import load_file, save_file

    count, name = 0, "model.layers.1.mlp.up_proj.weight"
    with hub_folder(seq_len=16, block_size=4) as (folder, net), data_folder() as data:
        path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        whole = load_file(path)
        first = {k: v for i, (k, v) in enumerate(whole.items()) if i % 2}
        rest = {k: v for k, v in whole.items() if k not in first}
        bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}

        def read():
            return hf.read_weights(folder, net.config)

        for change, *words in (
            ({name: None}, name, "missing"), (bias, *bias), ({"more": torch.ones(1)}, "more"),
            ({name: whole[name].T.contiguous()}, name, "(32, 40)", "(40, 32)"),
            ({name: whole[name] / 0}, name, "finite"), ({name: whole[name].double()}, "float64"),
            ({name: whole[name].to(torch.int8)}, name, "int8"),
        ):
            save_file({k: v for k, v in (whole | change).items() if v is not None}, path)
            refuses(read, *words, "save_pretrained")
            count += 1
        save_file({k: v.bfloat16() for k, v in whole.items()} | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
        assert (read()["norm.weight"] == whole["model.norm.weight"].bfloat16().float()).all()
        for content in (b"", path.read_bytes()[:-9], b"\xff" * 99):
            path.write_bytes(content)
            refuses(read, f"{folder}")
            count += 1
        path.unlink()
        refuses(read, "model.safetensors is missing")
        shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        save_file(first, folder / shards[0])
        save_file(rest, folder / shards[1])
        for files, *words in (
            (shards, ()), ([shards[0], "../x"], "../x"), (shards[:1], "is missing"), ([3], "Type"),
        ):
            found = {k: files[i % len(files)] for i, k in enumerate(whole)}
            index.write_text(json.dumps({"weight_map": found}))
            if words[0]:
                refuses(read, *words)
            else:
                assert all((v == read()[hf.weight_names(net.config)[k][0]][:len(v)]).all()
                           for k, v in whole.items()), "shards"
        (folder / shards[1]).unlink()
        index.write_text(json.dumps({"weight_map": {**dict.fromkeys(first, shards[0]),
                                                    **dict.fromkeys(rest, shards[1])}}))
        settings = tiny_settings(data, init_from=f"hf:{folder}", max_steps=1)
        write_dataset(data, "abcdefghij" * 400, "abcdefghijk")
        refuses_command(train, arguments(settings), shards[1], "missing")
        assert not Path(settings["out_dir"]).exists(), "a refused run left a folder"
        with mock.patch.dict(sys.modules, {"safetensors": None, "safetensors.torch": None}):
            refuses_command(train, arguments(settings), "pip install safetensors")
    return f"{count + 6} damages, one line each"


def test_weights_tied():
    """A tied folder may store the head as well, if it is the embeddings; another is refused."""
    needs("safetensors")
    from safetensors.torch import load_file, save_file

    with hub_folder(tie_embeddings=True) as (folder, net):
        path, head = folder / "model.safetensors", "lm_head.weight"
        whole = load_file(path)
        embed = whole["model.embed_tokens.weight"]
        save_file(whole | {head: embed.clone()}, path)
        assert (hf.read_weights(folder, net.config)["embed.weight"][:-1] == embed).all()
        save_file(whole | {head: embed + 1}, path)
        refuses(lambda: hf.read_weights(folder, net.config), head, "tied")
    return f"{len(whole)} tensors and the head; another head refused"


def gpt_nll(net, x0):
    return F.cross_entropy(net(x0)[:, :-1].flatten(0, 1), x0[:, 1:].flatten()).item()


def test_weights_training():
    """--init_from=hf:DIR takes the folder's shape and says so, starts at its NLL, and resumes
    bit for bit without the folder; another vocabulary and too long sequences are refused."""
    letters = "abcdefghijk"
    shape = {"seq_len": 64, "block_size": 4, "tie_embeddings": True, "head_dim": 12,
             "n_kv_head": 2, "rope_base": 5e3, "norm_eps": 1e-4, "objective": "ar"}
    with hub_folder(**shape) as (folder, net), data_folder() as data:
        text = "".join(letters[i] for i in (torch.arange(4000) ** 2 // 3 % 11).tolist())
        write_dataset(data, text, letters)
        s = {"max_steps": 6, "init_from": f"hf:{folder}", "eval_every": 2, "final_windows": 20}
        still, said = train_tiny(data, **s | {"max_steps": 1, "learning_rate": 0, "muon_lr": 0})
        assert f"weights of hf:{folder}; new local head" in said, said
        assert still.config.n_embd == net.config.n_embd != TINY["n_embd"]
        assert still.config.seq_len == 16 and still.config.local_window == 2
        x0 = torch.from_numpy(still.data.split("val").window(range(0, 320, 16), 16))
        with torch.no_grad():
            off = abs(gpt_nll(still.model, x0) - gpt_nll(net, x0))
        line = within(off, 1e-6, "first NLL of the GPT level, |diff|")

        class Halted(train.Run):
            def train_step(self, progress):
                if self.step == 3:
                    os.kill(os.getpid(), 2)
                return super().train_step(progress)

        whole, _ = train_tiny(data, **s, out_dir=f"{data}/a")
        for short, *words in (({"seq_len": 128}, "64 tokens", "128"),
                              ({"init_from": "hf:/no/such"}, "/no/such"),
                              ({"init_from": "gpt2"}, "gpt2")):
            refuses(lambda new=short: train_tiny(data, **s | new, out_dir=f"{data}/c"), *words)
        write_dataset(data, text.replace("k", "a"), letters[:-1])
        refuses(lambda: train_tiny(data, **s, out_dir=f"{data}/c"), "11", "char, 10", "--tokenizer")
        write_dataset(data, text, letters)
        assert not (data / "c").exists(), "a refused run left a folder"
        train_tiny(data, Halted, **s, out_dir=f"{data}/b")
        shutil.rmtree(folder)
        folder.mkdir()
        for _ in range(2):  # the second time of a checkpoint that was itself of a resumed run
            rest, _ = train_tiny(data, **s | {"init_from": "resume"}, out_dir=f"{data}/b")
            assert (weights(whole) == weights(rest)).all() and whole.final == rest.final
    return f"{line}; resumed with 0 bits of difference"


def test_weights_transformers():
    """Tiny random Llamas and Qwen3s of transformers, grouped, tied and not: our logits are theirs;
    and an export of ours loads there, has our logits, and writes the text of --mode=gpt."""
    transformers, _ = needs("transformers", "safetensors")
    worst = back = 0.0
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        for i, (kind, tie) in enumerate([(k, t) for k in ("Llama", "Qwen3") for t in (0, 1)]):
            torch.manual_seed(i)
            config = getattr(transformers, f"{kind}Config")(
                vocab_size=29, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                rope_parameters={"rope_theta": 500.0, "rope_type": "default"}, rms_norm_eps=1e-4,
                head_dim=12 if kind == "Qwen3" else 8, tie_word_embeddings=bool(tie),
                initializer_range=0.25, bos_token_id=None, eos_token_id=None, pad_token_id=None)
            theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
            for p in theirs.parameters():
                if p.ndim == 1:  # norms that start at 1 would hide a mistake
                    p.data.uniform_(0.5, 2, generator=generator(i))
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                theirs.save_pretrained(folder, max_shard_size="8KB" if tie else "5GB")
                ours = imported(folder, seq_len=32, block_size=4)
                x = tokens_for(ours)
                worst = max(worst, diff(theirs(x).logits, ours(x)))
            with checkpoint_folder(CHARS[:29], n_head=4, qk_norm=kind == "Qwen3", seq_len=64,
                                   tie_embeddings=bool(tie), head_dim=12) as (folder, net, _):
                succeeds(export, f"--out_dir={folder}", f"--to={folder}/hub")
                theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hub").eval()
                assert type(theirs).__name__ == f"{kind}ForCausalLM"
                x = tokens_for(net)
                with torch.no_grad():
                    back = max(back, diff(theirs(x).logits, net(x)))
                prompt = [3, 1, 4, 1, 5]
                row = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
                mine = sample.generate(net, [prompt], 40, mode="gpt", temperature=0.0)
                assert row.tolist() == mine, (row.tolist(), mine)
    return f"{within(worst, 1e-4, 'in')}; {within(back, 1e-4, 'out')}; 4 texts of 40 tokens agree"


# ---- tokenizers ----------------------------------------------------------------------------------

PROSE = "To be, or not to be: that is the question.\n\n  'Tis nobler \u00e9\u6728 19<|end|>\n"


def write_tokenizer(folder, vocab_size=320, **config):
    """A byte-level BPE tokenizer.json of a few merges, beside a config.json."""
    tokenizers, *_ = needs("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([PROSE * 9], trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|endoftext|>"],
        show_progress=False))
    bpe.post_processor = processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", 0)])
    bpe.enable_truncation(5)
    folder.mkdir(exist_ok=True)
    bpe.save(f"{folder}/tokenizer.json")
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, **config}))
    return len(bpe.get_vocab())


def test_tokenizer_hugging_face():
    """--tokenizer=hf:DIR: text comes back whole, special tokens are text unless --special, ids of a
    padded vocabulary write nothing; meta.json carries all, and no other; sample.py decodes with
    the checkpoint alone, and export.py gives tokenizer.json back."""
    needs("tokenizers")
    prepare = script("text")
    with roots() as (root, source):
        size = write_tokenizer(source / "m", eos_token_id=[0, 7])
        (source / "a.txt").write_bytes(PROSE.encode() * 200)
        argv = [f"--input={source}/a.txt", "--name=mine", f"--tokenizer=hf:{source}/m"]
        for more, count in (([], 0), (["--special", "--overwrite"], 200)):
            said = succeeds(prepare, *argv, *more)
            data = dataset.load_dataset("mine")
            words, ids = data.tokenizer, [
                t for name in data.splits for t in
                data.split(name).window([0], len(data.split(name)))[0].tolist()]
            assert words.decode(ids) == PROSE * 200 and ids.count(0) == count, said
            assert words.vocab_size == 320 > size and words.eot == 0 and "hf (320)" in said
        for eos, eot in ({}, 1), ({"eos_token_id": None}, 1), ({"eos_token_id": 9}, 9):
            write_tokenizer(source / "e", **eos)
            assert dataset.HFTokenizer.from_folder(source / "e").eot == eot
        assert words.decode([5, size, 319]) == words.decode([5]) and words.token_text(319) == ""
        assert words.encode("<|end|>") != [0], "a prompt's text became a special token"
        meta = data.meta
        for change in ({"tokenizer_sha256": "0" * 64}, {"tokenizer_json": "{}"}, {"eot": 320},
                       {"tokenizer_json": None}, {"vocab_size": 0}, {"vocab_size": 1 << 40}):
            refuses(lambda c=change: dataset.Tokenizer.from_meta(meta | c), "damaged")
        text = meta["tokenizer_json"] + "\n"
        other = meta | dataset.HFTokenizer(text, 320, 0).meta()
        assert dataset.identity(other)["vocabulary"] != dataset.identity(meta)["vocabulary"]
        refuses(lambda: judge.check_vocabulary(meta, other, "it"), "another vocabulary")
        for content, name in (("{}", "x"), ("", "tokenizer.json"), ("[1]", "config.json")):
            shutil.copytree(source / "m", source / name)
            (source / name / "tokenizer.json" if name == "x" else source / name / name
             ).write_text(content)
            refuses_command(prepare, [*argv[:2], f"--tokenizer=hf:{source}/{name}", "--overwrite"],
                            "use another")
        for value, word in (("hf:/no/such", "No such file"), ("bpe", "hf:DIR")):
            refuses_command(prepare, [*argv[:2], f"--tokenizer={value}", "--overwrite"], word)
        with mock.patch.dict(sys.modules, {"tokenizers": None}):
            refuses_command(prepare, [*argv, "--overwrite"], "pip install tokenizers")
        needs("safetensors")
        net = tiny_model(vocab_size=320, seq_len=16, block_size=4)
        hf.write_folder(source / "m", net.config, net.state_dict(), meta)
        s = {"init_from": f"hf:{source}/m", "max_steps": 1, "out_dir": f"{source}/out"}
        run, _ = train_tiny(root / "mine", **s)
        assert run.config.vocab_size == 320
        (source / "m" / "tokenizer.json").write_text(text)
        refuses(lambda: train_tiny(root / "mine", **s), "another vocabulary", "--tokenizer=hf:")
        shutil.rmtree(root / "mine")
        said = succeeds(sample, f"--out_dir={source}/out", "--prompt=To be", "--max_new_tokens=20",
                        "--device=cpu")
        assert said.startswith("To be"), said
        succeeds(export, f"--out_dir={source}/out", f"--to={source}/hub")
        assert (source / "hub/tokenizer.json").read_text() == meta["tokenizer_json"]
        assert json.loads((source / "hub/config.json").read_text())["eos_token_id"] == 0
        state = checkpoint.load_checkpoint(source / "out/last.pt")
        kept = len(state["meta"]["tokenizer_json"])
    return f"{size} tokens in a vocabulary of 320, {kept:,} bytes in the checkpoint; 12 mistakes"
