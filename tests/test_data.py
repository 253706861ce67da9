"""The trade's tests of data: datasets on disk, tokenizers, prepare scripts, files of strangers."""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np

from tests.common import HERE, Skip, refuses, refuses_command, succeeds, within
from util import dataset
from util.dataset import ByteTokenizer, CharTokenizer, load_dataset


@contextlib.contextmanager
def roots():
    """(a temporary folder that is the data folder meanwhile, another one for sources)."""
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as source:
        with mock.patch.dict(os.environ, CASCADE_DATA=root):
            yield Path(root), Path(source)


def script(name):
    """data/<name>/prepare.py as a module; .main(argv) ends as the command does."""
    spec = importlib.util.spec_from_file_location(name, HERE / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inner = module.main

    def main(argv):
        with mock.patch.object(sys, "argv", ["prepare.py", *argv]):
            dataset.run(inner)

    module.main = main
    return module


def small_dataset(folder, tokenizer=None, ids=None, shard_tokens=10_000):
    """A dataset of `ids` (default 25,000 random ones), written in 700-token pieces."""
    tokenizer = tokenizer or ByteTokenizer()
    if ids is None:
        ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 25_000)
    with dataset.DatasetWriter(folder, tokenizer, "test", shard_tokens) as writer:
        for i in range(0, len(ids), 700):
            writer.add("train", ids[i : i + 700], 500)
        writer.add("val", ids[:500], 400)
        writer.finish()
    return ids


def everything(data, *splits):
    """All ids of the splits, by default of all."""
    splits = [data.split(name) for name in splits or data.splits]
    return np.concatenate([split.window([0], len(split))[0] for split in splits])


def prose(n_bytes, seed=0):
    """n_bytes of lines of made-up words, ASCII."""
    r = random.Random(seed)
    words = ["".join(r.choices("etaoinshrdlu", k=r.randint(1, 9))) for _ in range(500)]
    page = "".join(r.choice(words) + r.choice("     \n") for _ in range(20_000))
    return (page * (n_bytes // len(page) + 1))[:n_bytes].encode()


def test_data_shakespeare():
    """The shipped text, prepared by a training that misses it: the counts and hashes of its
    readme.md, and it decodes back. No other prepare.py is run, whatever --dataset says."""
    with roots() as (root, source):
        for folder in (source, source / "shakespeare", root / "shakespeare", root / "theirs"):
            folder.mkdir(exist_ok=True)
            (folder / "prepare.py").write_text(f"open({str(source / 'ran')!r}, 'w')\n")
            (folder / "a.txt.xz").touch()
        up, alone = os.path.relpath(source, HERE / "data"), mock.Mock(main=True)
        for name in (f"{source}", f"{source}/shakespeare", f"{source}/shakespeare/", "theirs", up,
                     f"{up}/shakespeare", f"shakespeare/../{up}", f"./{up}", "..", "."):
            refuses(lambda n=name: dataset.load_or_prepare(n, 1, alone), "no dataset")
        quiet = functools.partial(subprocess.run, stdout=subprocess.DEVNULL)
        with contextlib.redirect_stdout(None), mock.patch.object(subprocess, "run", quiet):
            data = dataset.load_or_prepare("shakespeare", 1024, alone)
        assert not (source / "ran").exists(), "a stranger's prepare.py ran"
        readme = (HERE / "data/shakespeare/readme.md").read_text(encoding="utf-8")
        for name in ("train", "val"):
            sha256 = hashlib.sha256((root / f"shakespeare/{name}.bin").read_bytes()).hexdigest()
            assert sha256 in readme and sha256 in json.dumps(data.meta), f"{name}.bin has {sha256}"
        text = data.tokenizer.decode(everything(data)).encode()
        assert hashlib.sha256(text).hexdigest() == script("shakespeare").SHA256
        sizes = *map(len, data.splits.values()), data.vocab_size, data.split("val").bytes_per_token
        assert sizes == (4_551_552, 505_728, 84, 1.0), sizes
    return f"{sizes[0]:,} + {sizes[1]:,} tokens, hashes as in the readme"


def test_data_windows():
    """window() equals slices of the flat array, across shard borders, to the last token and no
    further."""
    with roots() as (root, _):
        ids, rng = small_dataset(root / "mine"), np.random.default_rng(1)
        split = load_dataset("mine").split("train")
        assert len(split.shards) == 3 and len(split) == len(ids), len(split)
        for length in (1, 8, 513, 12_000, 24_000, 25_000):
            last = len(ids) - length
            starts = np.array([0, last, *rng.integers(0, last + 1, 40)])
            got = split.window(starts, length)
            assert got.dtype == np.int64, got.dtype
            assert np.array_equal(got, ids[starts[:, None] + np.arange(length)]), length
            for start in (-1, last + 1):
                refuses(lambda s=start, n=length: split.window([s], n), "leaves", kind=IndexError)
    return "252 windows equal, 12 outside refused"


def test_data_tokenizers():
    """Ids fit the smallest type; text survives; special-looking text; half characters."""
    sizes = {2: "uint8", 256: "uint8", 257: "uint16", 65_536: "uint16", 65_537: "uint32"}
    assert all(dataset.smallest_dtype(v).name == name for v, name in sizes.items())
    text = "na\xefve \u6728 \U0001f600\r\n\t<|endoftext|>"
    char, byte = CharTokenizer("".join(sorted(set(text)))), ByteTokenizer()
    for tokenizer in (char, byte, *(dataset.Tokenizer.from_meta(t.meta()) for t in (char, byte))):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < tokenizer.vocab_size, tokenizer.kind
        assert len([tokenizer.token_text(i) for i in ids]) == len(ids)
    assert byte.eot not in byte.encode(text), "the text <|endoftext|> became a token"
    assert ByteTokenizer(special=True).encode(text)[-1] == byte.eot
    assert byte.decode([104, 0xE6, 0x9C]) == "h\ufffd", "half a character"
    refuses(lambda: char.encode("zebra Q"), "'Qbrz'")
    refuses(lambda: byte.encode("\udce9"), "UTF-8")
    refuses(lambda: dataset.Tokenizer.from_meta({"tokenizer": "bpe"}), "byte, gpt2")
    with mock.patch.dict(sys.modules, tiktoken=None):
        refuses(dataset.GPT2Tokenizer, "pip install tiktoken")
    with roots() as (root, _):  # more characters than 16 bits can number
        many = CharTokenizer("".join(map(chr, range(0x10000, 0x21000))))
        ids, data = small_dataset(root / "many", many), load_dataset("many")
        assert data.meta["dtype"] == "uint32"
        assert np.array_equal(everything(data, "train"), ids)
    return f"vocabularies of 256 to {many.vocab_size:,}: ids and text survive"


LONE = json.dumps("".join(map(chr, range(300, 599))) + "\ud800")  # ends in half a character
WRONG = {  # values in JSON that a field of meta.json must not have, in whichever record it stands
    "name": ("3", '""', '"\\u001b[2J"'), "tokenizer": ('"bpe"', "null", '"gpt2"'),
    "vocab_size": ("65", "300.0", "true", "-1"), "eot": ("300", "true", "-1"),
    "dtype": ('"uint8"', '"float64"', "2"), "bytes": ("0", "-1", '"x"', "NaN", "true", "9" * 400),
    "chars": ('"%s"' % ("a" * 300), LONE, "[]"), "tokens": ("24999", "0", "null", "1e4"),
    "file": ('"../train_0000.bin"', '"/etc/passwd"', '".."', '"%s"' % ("a" * 300), '"a\\n.bin"'),
    "sha256": ('"0"', "0"), "splits": ("[]", "{}", '{"train": {}, "val": {}}', "0"),
    "shards": ("[]", "[[]]", "{}", "null"),
}
UNICODE = CharTokenizer("".join(map(chr, range(300))))  # ids of 16 bits


def test_data_refuses_damage():
    """Every kind of damage to a dataset is refused in one plain line that names it."""
    with roots() as (root, source):
        small_dataset(root / "a", UNICODE)
        meta, one = ((root / "a" / name).read_bytes() for name in ("meta.json", "train_0001.bin"))
        (source / "elsewhere").write_bytes(one)
        harms = [("meta.json", value, "damaged") for value in (
            b"", b"{", b"[]", b"[" * 100_000, b"\xff", b" " * dataset.LARGEST_META + meta)]
        for field, value in ((f, v) for f in WRONG for v in WRONG[f]):
            top = json.loads(meta)
            records = top, top["splits"]["train"], top["splits"]["train"]["shards"][1]
            next(r for r in records if field in r)[field] = "HERE"
            content = json.dumps(top).replace('"HERE"', value).encode()
            harms.append(("meta.json", content, "damaged"))
        harms += [("train_0001.bin", one[:i] + b"\x2c\x01" + one[i + 2 :], "id 300")
                  for i in (0, 10_000, len(one) - 2)]
        harms += [("train_0001.bin", content, f"{len(content)} bytes")
                  for content in (b"", one[:-2], one[:-1], one + b"\0\0")]
        harms += [("meta.json", Path.mkdir, "no dataset"), ("val.bin", Path.mkdir, "no file"),
                  ("train_0001.bin", lambda p: p.symlink_to(source / "elsewhere"), "no file")]
        for name, content, word in harms:
            shutil.copytree(root / "a", root / "b")
            assert len(load_dataset("b", 500).split("val")) == 500
            path = root / "b" / name
            path.unlink()
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
            line = refuses(lambda: load_dataset("b"), word, "data/text/prepare.py")
            assert line.isprintable(), line
            shutil.rmtree(root / "b")
        refuses(lambda: load_dataset("a", 501), "val", "500 tokens", "501")
        refuses(lambda: load_dataset("a").split("\x1b"), "no split", "train")
        refuses(lambda: load_dataset("fineweb_edu"), "python data/fineweb_edu", "400 MB")
        for name in ("a" * 5000, "/a" * 3000, "\x1b]0;x\x07/a", "a\0b", "..", "", "/dev/null"):
            assert refuses(lambda n=name: load_dataset(n), "no dataset").isprintable()
        ids = np.zeros(3 << 20, np.uint8)  # far from all borders of a large shard
        small_dataset(root / "large", CharTokenizer("ab"), ids, shard_tokens=1 << 30)
        ids[2_345_678] = 2
        ids.tofile(root / "large/train.bin")
        refuses(lambda: load_dataset("large"), "train.bin", "id 2")
        refuses(lambda: small_dataset(root / "never", CharTokenizer("ab"), ids), "vocabulary of 2")
    return f"{len(harms) + 12} refused in one line"


def mutant(r, text):
    """A JSON text with one to three random changes, now and then cut or with another byte."""
    for _ in range(r.randint(1, 3)):  # mostly of a key or a value, seldom of a bracket or a blank
        words = r'"(?:[^"\\]|\\.)*"|[\w.]+' if r.random() < 0.97 else "."
        old, other = (r.choice([*re.finditer(words, text)]) for _ in range(2))
        odd = r.choice(sum(WRONG.values(), ("null", "255", "9" * 5000)))
        new = r.choice((odd, odd, other[0], old[0]))
        text = text[: old.start()] + new + text[old.end() :]
    data = bytearray(text.encode())
    for _ in range(r.choice((0, 0, 0, 0, 0, 0, 1, 5))):
        data[r.randrange(len(data))] = r.randrange(256)
    return bytes(data[: r.randrange(len(data)) if r.random() < 0.03 else None])


def test_data_fuzz(files=500, seed=0):
    """Mutated meta.json files: each loads and then serves, or is refused in one plain line, and
    needs little memory."""
    r, loaded = random.Random(seed), 0
    with roots() as (root, _):
        for name, tokenizer in (("byte", ByteTokenizer()), ("char", UNICODE)):
            small_dataset(root / name, tokenizer)
        texts = {f: (f / "meta.json").read_text() for f in root.iterdir()}
        tracemalloc.start()
        for count in range(files):
            folder = r.choice(sorted(texts))
            (folder / "meta.json").write_bytes(content := mutant(r, texts[folder]))
            try:
                data = load_dataset(folder)
                assert all(math.isfinite(math.log(s.bytes_per_token)) for s in data.splits.values())
                assert data.name.isprintable() and everything(data).max() < data.vocab_size
                if data.meta["tokenizer"] != "gpt2":
                    data.tokenizer.decode([0, data.vocab_size - 1])
                assert all(len(h) == 64 for h in dataset.identity(data.meta).values())
                loaded += 1
            except dataset.DataError as e:
                assert str(e).isprintable() and len(str(e)) < 1000, (content, str(e))
            except Exception as e:
                raise AssertionError(f"seed {seed}, file {count}: {e!r} of {content!r}") from e
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    assert files / 50 < loaded < files / 2, loaded
    return within(peak, 50, f"seed {seed}: {files} files, {loaded} load; peak MB")


def faults_meta_json():
    """Many mutated meta.json files, other ones each time."""
    return test_data_fuzz(20_000, random.SystemRandom().randrange(10**6))


def test_data_replacing():
    """Broken off before any step of the disk, a dataset that is being replaced loads as the old or
    as the new one, whole; the next run leaves nothing but its own files."""
    def step(left, real, *args, **kwargs):
        if next(left) == 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with roots() as (root, _):
        old, seen, left = small_dataset(root / "mine"), [], iter([-1])
        while next(left) < 0:  # until none of the steps is the one to break off at
            new, left = (old + len(seen) + 1) % 255, itertools.count(len(seen), -1)
            meta, link = root / "mine/meta.json", root / f"link{len(seen)}"
            os.link(meta, link)
            before = meta.read_bytes()
            writer = dataset.DatasetWriter(root / "mine", ByteTokenizer(), "test", 9000)
            writer.add("train", new, 9)
            writer.add("val", new[:99], 9)
            patches = {name: functools.partial(step, left, getattr(os, name))
                       for name in ("replace", "unlink", "fsync")}
            with mock.patch.multiple(os, **patches), contextlib.suppress(KeyboardInterrupt):
                writer.finish()  # without cleaning up: as a kill leaves it
            assert link.read_bytes() == before, "meta.json was written in place"
            found = everything(load_dataset("mine"), "train")
            assert np.array_equal(found, old) or np.array_equal(found, new), f"neither: {seen}"
            seen.append("old" if np.array_equal(found, old) else "new")
            old = found
        assert seen[0] == "old" and seen.count("old") > 3 and seen.count("new") > 2, seen
        small_dataset(root / "mine")
        splits = load_dataset("mine").meta["splits"].values()
        names = {s["file"] for info in splits for s in info["shards"]} | {"meta.json"}
        assert names == {p.name for p in (root / "mine").glob("[!.]*")}, names
    return f"broken off at {len(seen) - 1} steps: {seen.count('old')} old, the others new"


def test_data_killed():
    """A prepare that is stopped midway leaves nothing that loads, and the old dataset where there
    was one; only SIGKILL leaves a hidden folder; the exit code is the signal's."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,  # ignored in a background:
             "preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    with roots() as (root, source):
        (source / "text").write_bytes(prose(16_000_000))
        argv = [sys.executable, f"{HERE}/data/text/prepare.py", f"--input={source}/text",
                "--name=mine", "--overwrite"]
        for number, code, had in ((signal.SIGKILL, -9, False), (signal.SIGKILL, -9, True),
                                  (signal.SIGTERM, 143, True), (signal.SIGINT, 130, True)):
            shutil.rmtree(root / "mine", ignore_errors=True)
            old = small_dataset(root / "mine") if had else None
            process = subprocess.Popen(argv, **quiet)
            while process.poll() is None and not any(
                    p.stat().st_size for p in root.glob("mine/.writing-*/*.bin")):
                time.sleep(0.002)
            process.send_signal(number)
            assert process.wait() == code, (process.returncode, "too late to test?")
            assert bool([*root.glob("mine/.writing-*")]) == (number == signal.SIGKILL)
            if had:
                assert np.array_equal(everything(load_dataset("mine"), "train"), old)
            else:
                refuses(lambda: load_dataset("mine"), "no dataset")
        subprocess.run(argv, check=True, **quiet)
        assert len(everything(load_dataset("mine"))) == 16_000_000
    return "4 stopped, none lost or half"


def test_data_cuts():
    """Text cut by safe_cut has the pieces of GPT-2's pattern that the whole text has."""
    import regex  # tiktoken requires it
    from tiktoken_ext.openai_public import r50k_pat_str
    cut_at, split = script("text").safe_cut, regex.compile(r50k_pat_str).findall
    r, naive, trials = random.Random(0), 0, 4000
    for _ in range(trials):
        text = "".join(r.choices("ab'sll19.,\u6728\u3002\xe9  \n\n\t\r\u00a0\u3000\u2003", k=40))
        data = text.encode()
        at, whole = cut_at(data), split(text)
        if any(data[i] in b" \n\t\r" and data[i - 1] in b"ab'sll19.," for i in range(1, len(data))):
            assert split(data[:at].decode()) + split(data[at:].decode()) == whole, text
        naive += split(text[:20]) + split(text[20:]) != whole
    long = ("\u6728" * 50).encode()
    assert long[cut_at(long) :].decode() == "\u6728", "cut inside a character"
    marks = b"<|endoftext|>" * 9
    assert all(cut_at(marks[:n]) % 13 == 0 for n in range(20, 117)), "cut inside a marker"
    assert naive > trials // 4, naive
    return f"none of {trials} differ (cut in half: {naive})"


def test_data_text():
    """Folders, .gz and .xz; documents, separators and bytes counted; twice the same bytes."""
    text, eot = script("text"), bytes([ByteTokenizer().eot])
    texts = {"a.txt": prose(3000, 1), "b/c.txt": "\u6728 \xe9\n".encode() * 300, "empty.txt": b"",
             "d.txt.gz": prose(5000, 2), "e.txt.xz": prose(900, 3), ".hidden": b"\0",
             "f.md": prose(2000, 4), **{f"g{i}": prose(90 + i, i) for i in range(30)}}
    found = []
    with roots() as (_, source):
        for name, content in texts.items():
            pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(pack(content))
        expected = sorted(v for k, v in texts.items() if v and k != ".hidden")
        for text.CHUNK in (1000, 7777):  # many pieces from little text
            succeeds(text, f"--input={source}", "--name=byte", "--overwrite")
            data = load_dataset("byte")
            parts = [bytes(everything(data, s).astype(np.uint8)).split(eot) for s in data.splits]
            assert sorted(sum(parts, [])) == expected, "the documents differ from the files"
            found.append(dataset.identity(data.meta))
        assert found[0] == found[1], "the second run wrote other bytes"
        whole, bytes_of_val = sum(map(len, expected)), data.split("val").bytes
        assert data.split("train").bytes + bytes_of_val == whole
        refuses_command(text, [f"--input={source}", "--name=byte"], "already", "--overwrite")
        succeeds(text, f"--input={source}", "--name=char", "--tokenizer=char")
        assert set(load_dataset("char").meta["chars"]) == set(b"".join(expected).decode())
        # one document: its tail, cut between characters
        succeeds(text, f"--input={source}/b/c.txt", "--name=one", "--val=0.299")
        data = load_dataset("one")
        assert data.tokenizer.decode(everything(data)).encode() == texts["b/c.txt"]
        assert abs(data.split("val").bytes - 0.299 * 2100) < 4, data.split("val").bytes
        assert all("\ufffd" not in data.tokenizer.decode(everything(data, s)) for s in data.splits)
    assert 0.02 < bytes_of_val / whole, bytes_of_val
    return within(bytes_of_val / whole, 0.1, f"{len(expected)} documents, validation share")


def test_data_special():
    """--special reads markers as tokens of no bytes; neither the boundary of train and validation
    nor a piece of the reading cuts one in two."""
    text, eot = script("text"), ByteTokenizer().eot
    text.CHUNK = 50
    cases = [(b"one<|endoftext|>two " * 20, cut) for cut in range(180, 201)]
    with roots() as (_, source):
        for given, cut in [*cases, (b"one<|endoftext|>two" * 20, 90)]:
            (source / "a").write_bytes(given)
            for special, markers in (([], 0), (["--special"], 20)):
                succeeds(text, f"--input={source}/a", "--name=x", "--overwrite", *special,
                         f"--val={1 - (cut + 0.5) / len(given)}")
                data = load_dataset("x")
                assert (everything(data) == eot).sum() == markers, cut
                assert data.tokenizer.decode(everything(data)).encode() == given
                assert sum(s.bytes for s in data.splits.values()) == len(given) - markers * 13
    return f"{20 * (len(cases) + 1)} markers whole"


FILES = {
    "png": b"\x89PNG\r\n\x1a\n\0\0\0", "latin": b"caf\xe9 au lait", "empty": b"", "letter": b"x",
    "utf16": "hello".encode("utf-16"), "bad.gz": b"no gzip", "ok": b"text " * 99,
    "cut.xz": lzma.compress(prose(9000))[:-30], "late": b"a " * 400_000 + b"\xff",
    "marks": b"<|endoftext|>" * 20, "\x1b[2Jodd": b"\0",
}
MISTAKES = (  # (script, its arguments with {} for the folder of FILES, words of the line)
    ("text", "--input={}/png", "binary", "byte 8"), ("text", "--input={}/latin", "0xe9", "byte 3"),
    ("text", "--input={}/late", "0xff", "byte 800000"), ("text", "--input={}/empty", "empty"),
    ("text", "--input={}/utf16", "UTF-16", "iconv"), ("text", "--input={}/letter", "more text"),
    ("text", "--input={}/bad.gz", "bad.gz", "damaged"), ("text", "--input={}/cut.xz", "damaged"),
    ("text", "--input={}/nowhere", "not exist"), ("text", "--input={}/ok --val=2", "val"),
    ("text", "--input={}/ok --val=nan", "val"), ("text", "--input={}/ok --name=../x", "../x"),
    ("text", "--input={}/ok --name=enwik8", "enwik8"), ("text", "--val=0.1", "--input"),
    ("text", "--input={}/ok --name=" + "a" * 300, "--name"), ("text", "--inptu={}/ok", "--inptu"),
    ("text", "--input={}/ok --tokenizer=bpe", "bpe"), ("text", "--bpe_dir={}", "vocab.bpe"),
    ("text", "--input={}/ok --special --tokenizer=char", "--special needs"),
    ("text", "--input={}/marks --special", "nothing for train"),
    ("text", "--input={}/ok --separator=t --tokenizer=char", "--separator needs"),
    ("text", "--input={}/ok --separator=??", "no '??'"),
    ("text", "--input={}/\x1b[2Jodd", "binary"), ("text", "\x1b[2J", "arguments"),
    ("text", "--input=/" + "a/" * 3000, "too long"), ("text", "--input={}/ok/x", "not exist"),
    ("enwik8", "--input={}/nowhere", "nowhere"), ("enwik8", "--input={}", "directory"),
    ("shakespeare_char", "--input={}/ok", "another sha256"), ("shakespeare", "--x", "--x"),
    ("fineweb_edu", "--tokens=0", "--tokens"), ("fineweb_edu", "--tokens=1e999", "--tokens"),
    ("fineweb_edu", "--tokens=1.2.3", "--tokens"), ("fineweb_edu", "--shard_tokens=0", "--shard"),
)


def test_data_mistakes():
    """A user's mistake ends in one plain line with the remedy, and leaves nothing."""
    scripts = {name: script(name) for name, *_ in MISTAKES}
    with roots() as (root, source):
        for name, content in FILES.items():
            (source / name).write_bytes(content)
        for name, given, *words in MISTAKES:
            argv = ["--name=mine"] * (name == "text") + given.replace("{}", str(source)).split(" ")
            refuses_command(scripts[name], argv, *words)
        assert list(root.iterdir()) == [], f"left behind: {list(root.iterdir())}"
        with mock.patch.dict(os.environ, CASCADE_DATA=str(source / "ok")):
            refuses_command(scripts["text"], ["--name=mine", f"--input={source}/ok"], "directory")
    return f"{len(MISTAKES) + 1} refused in one line"


def test_data_memory():
    """The peak of memory does not grow with the input."""
    text, peaks = script("text"), []
    with roots() as (_, source):
        for size in (10_000_000, 40_000_000):
            (source / "text").write_bytes(prose(size))
            tracemalloc.start()
            succeeds(text, f"--input={source}/text", "--name=mine", "--overwrite")
            peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
            tracemalloc.stop()
    return within(peaks[1] - peaks[0], 5, f"{peaks[0]:.0f} MB for 10 MB of text; growth to 40 MB")


def test_data_fineweb():
    """FineWeb-Edu from local files: documents, shards and targets."""
    fineweb, text = script("fineweb_edu"), prose(900_000).decode()
    texts = [text[i * 400 :][: 100 + 7 * (i % 90)] for i in range(2000)]
    rows = [json.dumps({"text": t}) + "\n" for t in texts]
    with roots() as (_, source), mock.patch.object(dataset, "GPT2Tokenizer", ByteTokenizer):
        (source / "a.jsonl.gz").write_bytes(gzip.compress("".join(rows[:500]).encode()))
        (source / "b.jsonl").write_text("".join(rows[500:]))
        succeeds(fineweb, "--tokens=500K", "--val_tokens=2e4", "--shard_tokens=100K",
                 "--input", source / "a.jsonl.gz", source / "b.jsonl")
        data = load_dataset("fineweb_edu")
        shards, sizes = data.split("train").shards, [len(s) for s in data.splits.values()]
        assert 20_000 <= sizes[0] < 60_000 and 500_000 <= sizes[1] < 540_000, sizes
        assert len(shards) == 5 and min(map(len, shards[:4])) >= 100_000
        documents = data.tokenizer.decode(everything(data)).split(dataset.EOT_TEXT)
        assert documents == ["", *texts[: len(documents) - 1]], "the documents differ"
        for bad in ("{}", "[" * 100_000):
            (source / "b.jsonl").write_text(bad)
            argv = ["--overwrite", "--input", f"{source}/b.jsonl"]
            refuses_command(fineweb, argv, "b.jsonl", "parquet or jsonl")
    return f"{len(documents) - 1} documents in {len(shards)} shards, as given"


def test_data_enwik8():
    """enwik8 plain, .gz and .zip are the same bytes; anything else is refused. (Small stand-in.)"""
    enwik8, content = script("enwik8"), prose(100_000)
    enwik8.SHA256 = hashlib.sha256(content).hexdigest()
    enwik8.SPLITS = {"train": 90_000, "val": 5_000, "test": 5_000}
    with roots() as (_, source):
        with zipfile.ZipFile(source / "zip", "w") as archive:
            archive.writestr("enwik8", content)
        given, packed = gzip.compress(content), (source / "zip").read_bytes()
        for good in (content, given, packed):
            (source / "input").write_bytes(good)
            succeeds(enwik8, f"--input={source}/input")
            data = load_dataset("enwik8")
            sizes = {name: len(split) for name, split in data.splits.items()}
            assert sizes == enwik8.SPLITS and data.tokenizer.eot is None, sizes
            assert bytes(everything(data).astype(np.uint8)) == content
        for bad in (content[:-1], given[:-9], packed[:-9], b""):
            (source / "input").write_bytes(bad)
            refuses_command(enwik8, [f"--input={source}/input"], "fetch it again")
    return f"{sizes}, 4 damaged inputs refused"


def test_data_gpt2_known_answer():
    """GPT-2 tokens: tiny Shakespeare 338,025, split 301,966 / 36,059; our val split 164,984."""
    try:  # the tests use no network
        with mock.patch("tiktoken.load.read_file", side_effect=OSError):
            tokenizer = dataset.GPT2Tokenizer()
    except dataset.DataError as e:
        raise Skip(f"{e}") from None
    text = script("shakespeare").read_text()
    tail = text[int(0.9 * len(text)) :]
    counts, known = [len(tokenizer.encode(tail))], [164_984]
    ids = tokenizer.encode(tail[:2000] + " <|endoftext|> \u6728\U0001f600")
    assert tokenizer.eot == tokenizer.vocab_size - 1 and tokenizer.eot not in ids
    assert tokenizer.decode(ids).endswith(" <|endoftext|> \u6728\U0001f600")
    assert "\ufffd" in {tokenizer.token_text(i) for i in ids}, "half a character displays"
    assert max(len(tokenizer.token_bytes([i])) for i in range(tokenizer.vocab_size)) == 128
    with contextlib.suppress(dataset.DataError):
        data = load_dataset("shakespeare_char")
        parts = [data.tokenizer.decode(everything(data, name)) for name in data.splits]
        counts += [len(tokenizer.encode(t)) for t in (*parts, "".join(parts))]
        known += [301_966, 36_059, 338_025]
    assert counts == known, f"{counts}, known {known}"
    return f"{counts} tokens, as known"
