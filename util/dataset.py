"""
Datasets on disk and tokenizers: written by data/*/prepare.py, read by train.py, sample.py, eval.py.

A dataset is a folder, data/<name>/, of token ids and one description:

    train.bin, val.bin    little-endian token ids, no header; a split above SHARD_TOKENS is cut into
                          train_0000.bin, ...; files that replace others are named by their hash
    meta.json             {"name": "mine", "tokenizer": "char" | "byte" | "gpt2" | "hf",
                           "vocab_size": 65, "dtype": "uint8" | "uint16" | "uint32",
                           "chars": "\\n !...",         char only: the characters in id order
                           "tokenizer_json": "{...", "tokenizer_sha256": "...",   hf only
                           "eot": 50256 or null,       the id that separates documents
                           "separator": [35, 35],      if asked for: the ids that stand in a
                                                       document between what is given and the rest
                           "splits": {"train": {"tokens": n, "bytes": UTF-8 bytes of the text,
                               "shards": [{"file": "train.bin", "tokens": n,
                                           "sha256": "..."}]}, "val": {...}},
                           "source": "one line"}

meta.json is written last, so a folder without it is not a dataset. It may come from a stranger:
check_meta is the one door. A user's mistake raises DataError: one line that ends with the remedy.
$CASCADE_DATA moves the data folder elsewhere.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from util.configurator import SettingsError, first_line, guarded, optional

REPOSITORY = Path(__file__).resolve().parents[1]
SHARD_TOKENS = 100_000_000
LARGEST_META = 64 << 20  # bytes; a tokenizer.json of 32 MB and 10,000 shards fit
EOT_TEXT = "<|endoftext|>"
PLAIN_NAME = re.compile(r"\w[\w.-]{0,99}")  # of a dataset or a file: no separator, no `..`
# the fields of meta.json that say what an id means
VOCABULARY = ("tokenizer", "vocab_size", "eot", "chars", "tokenizer_sha256")
SHIPPED = ("shakespeare",)  # the text lies in the repository: needs neither network nor arguments
# what `python data/<name>/prepare.py` leaves on disk
SIZES = {"shakespeare": "5 MB", "shakespeare_char": "1 MB", "enwik8": "100 MB, downloads 36 MB",
         "fineweb_edu": "400 MB for 200M tokens"}


def plain(text):
    """`text` as one line, without escape codes and other characters that harm a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


class DataError(SettingsError):
    """A user's mistake; str() is one line with the remedy, printed after `error: `."""


def data_root():
    """The folder that holds all datasets: $CASCADE_DATA, or data/ of the repository."""
    return Path(os.environ.get("CASCADE_DATA") or REPOSITORY / "data")


def shown(path):
    """`path` as a message prints it: relative to the working directory where it lies below it."""
    relative = os.path.relpath(path)
    text = plain(path if relative.startswith("..") else relative)
    return text if len(text) < 200 else f"...{text[-200:]}"


# -- tokenizers ------------------------------------------------------------------------------------

class Tokenizer:
    """Text to token ids in 0..vocab_size-1 and back. `eot` is the end-of-text id, or None."""
    kind, eot, special = None, None, False

    def __init__(self, eot=True, special=False):
        """eot: the last id is the end-of-text. special: text <|endoftext|> is encoded as it."""
        self.eot, self.special = self.vocab_size - 1 if eot else None, special

    @staticmethod
    def from_meta(meta):
        """The tokenizer that a meta.json describes (as a dict). DataError if it describes none."""
        try:
            check_vocabulary(meta)
        except ValueError as e:
            raise DataError(f"the vocabulary is damaged ({e}): prepare the data again") from e
        if meta["tokenizer"] == "char":
            found = CharTokenizer(meta["chars"])
        elif meta["tokenizer"] == "hf":
            found = HFTokenizer(meta["tokenizer_json"], meta["vocab_size"], meta.get("eot"))
        else:
            found = UTF8_TOKENIZERS[meta["tokenizer"]](eot=meta.get("eot") is not None)
        found.separator = meta.get("separator", [])
        return found

    def meta(self):
        """The part of meta.json that from_meta needs."""
        return {"tokenizer": self.kind, "vocab_size": self.vocab_size, "eot": self.eot}

    def encode_prompt(self, text):
        """`encode`, but a separator keeps the tokens that it has in the data."""
        if not self.separator:
            return self.encode(text)
        ids, *rest = (self.encode(part) for part in text.split(self.decode(self.separator)))
        for part in rest:
            ids += [*self.separator, *part]
        return ids

    def encode(self, text):
        """str -> list of int ids. Raises DataError on what the vocabulary cannot write."""
        try:
            return self.encode_array(text).tolist()
        except UnicodeEncodeError as e:  # what a terminal makes of bytes that are not UTF-8
            raise DataError(f"{text[e.start:e.end]!r} is no UTF-8 text: type it again") from e

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(ids).decode("utf-8", errors="replace")

    def token_text(self, token):
        """One id as text by itself, for a display; part of a character becomes U+FFFD."""
        return self.decode([token])


class CharTokenizer(Tokenizer):
    """One token per character of a fixed vocabulary `chars`, a str in id order."""
    kind = "char"

    def __init__(self, chars):
        self.chars, self.vocab_size = chars, len(chars)
        codes = [ord(c) for c in chars]
        self.ids = np.full(max(codes, default=0) + 2, -1, np.int32)  # the last entry stays -1
        self.ids[codes] = np.arange(len(codes))

    def meta(self):
        return super().meta() | {"chars": self.chars}

    def encode_array(self, text):
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if len(ids) and ids.min() < 0:
            missing = "".join(sorted({chr(c) for c in codes[ids < 0][:1000]}))[:20]
            raise DataError(f"the vocabulary has no {missing!r}: use only the {self.vocab_size} "
                            "characters of the training text")
        return ids

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes. 255 never occurs in them, so it is the end-of-text and ids fit a byte."""
    kind, vocab_size = "byte", 256

    def encode_array(self, text):
        data = text.encode()
        if self.special:
            data = data.replace(EOT_TEXT.encode(), b"\xff")
        return np.frombuffer(data, np.uint8)

    def token_bytes(self, ids):
        text = bytes(bytearray(int(i) for i in ids))
        return text if self.eot is None else text.replace(b"\xff", EOT_TEXT.encode())


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken. Its two files are looked up in $TIKTOKEN_CACHE_DIR,
    else where install_bpe put them, in .tiktoken/ of the data folder, else tiktoken downloads them.
    DataError when none of it works."""
    kind, vocab_size = "gpt2", 50257
    # name, name in tiktoken's cache, sha256
    files = (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
         "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
         "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"))

    def __init__(self, eot=True, special=False):
        super().__init__(eot, special)
        tiktoken = optional("tiktoken", "--tokenizer=gpt2")
        if (installed := data_root() / ".tiktoken").exists():
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(installed))
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' errors are OSErrors
            raise DataError("GPT-2's vocabulary is not on this machine and could not be downloaded "
                            f"({type(e).__name__}): give --bpe_dir=FOLDER with vocab.bpe and "
                            "encoder.json to data/text/prepare.py") from e

    @classmethod
    def install_bpe(cls, folder):
        """Copy vocab.bpe and encoder.json of `folder` into the cache, hashes checked."""
        cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or data_root() / ".tiktoken")
        contents = {key: verified(obtain(Path(folder, name), None, name), sha256, f"GPT-2's {name}")
                    for name, key, sha256 in cls.files}
        cache.mkdir(parents=True, exist_ok=True)
        for key, content in contents.items():
            (cache / key).write_bytes(content)

    def encode_array(self, text):
        allowed = {EOT_TEXT} if self.special else set()
        return self.bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())

    def token_bytes(self, ids):
        return self.bpe.decode_bytes([int(i) for i in ids])


UTF8_TOKENIZERS = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, given as text, by the package tokenizers. special: the names
    of special tokens in a text are encoded as those, not as text."""
    kind = "hf"

    def __init__(self, text, vocab_size, eot=None, special=False):
        self.text, self.vocab_size, self.eot, self.special = text, vocab_size, eot, special
        package = optional("tokenizers", "a Hugging Face tokenizer.json")
        try:
            self.bpe = package.Tokenizer.from_str(text)
        except Exception as e:  # what its parser raises has no other type
            raise DataError(f"the tokenizer.json is damaged ({first_line(e)}): use another") from e
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.bpe.encode_special_tokens = not special

    @classmethod
    def from_folder(cls, folder, special=False):
        """That of a model's folder. The vocabulary is the model's, which may be padded beyond the
        tokenizer's, and the end-of-text its config.json's, else <|endoftext|>."""
        text, config = (obtain(Path(folder, name), None, f"a folder with a model's {name}")
                        for name in ("tokenizer.json", "config.json"))
        try:
            found, own = json.loads(config), cls(text.decode(), 0, special=special)
            eot = found.get("eos_token_id")
            eot = own.bpe.token_to_id(EOT_TEXT) if eot is None else eot
            own.eot = eot[0] if isinstance(eot, list) else eot
            own.vocab_size = max(*own.bpe.get_vocab().values(), found["vocab_size"] - 1) + 1
            check_vocabulary(own.meta())
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as e:
            raise DataError(f"{shown(folder)} is damaged ({first_line(e)}): use another") from e
        return own

    def meta(self):
        sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        return super().meta() | {"tokenizer_json": self.text, "tokenizer_sha256": sha256}

    def encode_array(self, text):
        text.encode()  # half a character raises UnicodeEncodeError, as in the other kinds
        return np.array(self.bpe.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids):
        """ids -> str; the ids that pad a model's vocabulary stand for no text."""
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)


# -- reading ---------------------------------------------------------------------------------------

def field(record, key, kind, low=0, high=0):
    """record[key], if it is of this type and, a number, in low..high; else ValueError."""
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not kind or (kind is int and not low <= value <= high):
        raise ValueError(f"{key} is no {kind.__name__}" + f" from {low} to {high}" * (kind is int))
    return value


def check_vocabulary(meta):
    """ValueError unless `meta` describes a tokenizer as Tokenizer.meta() does."""
    kind = field(meta, "tokenizer", str)
    chars = field(meta, "chars", str) if kind == "char" else ""
    chars.encode()  # half a character raises UnicodeEncodeError, a ValueError
    if kind not in ("char", "hf", *UTF8_TOKENIZERS) or len(set(chars)) < len(chars):
        raise ValueError("tokenizer is not byte, gpt2, hf, or char with distinct chars")
    if kind == "hf":
        text, low, size = field(meta, "tokenizer_json", str).encode(), 0, 1 << 24
        if hashlib.sha256(text).hexdigest() != meta.get("tokenizer_sha256"):
            raise ValueError("the tokenizer.json has another sha256")
        if len(text) > LARGEST_META // 2:
            raise ValueError(f"the tokenizer.json has {len(text) >> 20} MB")
    else:
        size = len(chars) if kind == "char" else UTF8_TOKENIZERS[kind].vocab_size
        low = max(size - 1, 0)  # the last id, which alone is an end-of-text
    size = field(meta, "vocab_size", int, low + 1, size)
    if meta.get("eot") is not None:
        field(meta, "eot", int, low, size - 1)


def check_meta(meta):
    """ValueError unless `meta` has the fields, types and ranges that DatasetWriter writes."""
    check_vocabulary(meta)
    names = [field(meta, "name", str)]
    if field(meta, "dtype", str) != smallest_dtype(meta["vocab_size"]).name:
        raise ValueError(f"dtype is not {smallest_dtype(meta['vocab_size']).name}")
    splits = field(meta, "splits", dict)
    field(splits, "train", dict), field(splits, "val", dict)
    for split, info in splits.items():
        shards = field(info, "shards", list)
        tokens = sum(field(shard, "tokens", int, 1, 1 << 48) for shard in shards)
        names += [split, *(field(shard, "file", str) for shard in shards)]
        if not all(len(field(shard, "sha256", str)) == 64 for shard in shards):
            raise ValueError("a sha256 has not 64 digits")
        field(info, "tokens", int, tokens or 1, tokens)
        field(info, "bytes", int, 1, 128 * tokens)  # no token of GPT-2 is longer
    marks = field(meta, "separator", list) if "separator" in meta else [0]
    if not marks or not all(type(t) is int and 0 <= t < meta["vocab_size"] for t in marks):
        raise ValueError("the separator is no list of token ids")
    if not all(map(PLAIN_NAME.fullmatch, names)):
        raise ValueError("a name or file has other characters than letters, digits and . - _")


def identity(meta):
    """What data a meta.json describes: {split: sha256 of its shards' hashes, ..., "vocabulary":
    sha256}. Equal identities are the same tokens in the same shards, whatever their folder. Raises
    ValueError when meta describes none: a checkpoint's may be anything."""
    check_meta(meta)
    found = {name: [s["sha256"] for s in info["shards"]] for name, info in meta["splits"].items()}
    if "separator" in meta:
        found["separator"] = meta["separator"]
    found["vocabulary"] = [meta.get(key) for key in VOCABULARY]
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest()
            for name, value in found.items()}


def holds_data(folder):
    """Whether `folder` holds a dataset, or parts of one."""
    return os.path.isdir(folder) and any((*folder.glob("*.bin"), *folder.glob("meta.json")))


def prepare_command(folder):
    """The command that makes the dataset in `folder`, with its size on disk where known."""
    name = folder.name if PLAIN_NAME.fullmatch(folder.name) else "NAME"
    again = " --overwrite" if holds_data(folder) else ""
    if name not in SIZES:
        return f"python data/text/prepare.py --input=FILE --name={name}{again}"
    again = again if name == "fineweb_edu" else ""  # the others replace their one content unasked
    return f"python data/{name}/prepare.py{again} ({SIZES[name]})"


def load_or_prepare(name, seq_len, processes):
    """load_dataset, for all processes; what ships with the repository is prepared here and now. No
    other prepare.py is ever run: a stranger's folder may hold one."""
    if name in SHIPPED and not (data_root() / name / "meta.json").exists():
        if processes.main:
            script = REPOSITORY / "data" / name / "prepare.py"
            print(f"data/{name} is not prepared yet: running {script.name}", flush=True)
            if subprocess.run([sys.executable, str(script)], check=False).returncode:
                raise DataError(f"{shown(script)} failed: see its message above")
    processes.wait()  # every process comes by here, whatever it found on disk
    return load_dataset(name, seq_len)


class Prefetch:
    """`prefetch(step)` is make(step), made by a thread while the step before was computing;
    `waited` counts the seconds that the training loop had to wait for data."""

    def __init__(self, make):
        self.make, self.pool, self.waited, self.ahead = make, ThreadPoolExecutor(1), 0.0, {}

    def __call__(self, step):
        began = time.perf_counter()
        batch = self.ahead[step].result() if step in self.ahead else self.make(step)
        self.ahead = {step + 1: self.pool.submit(self.make, step + 1)}
        self.waited += time.perf_counter() - began
        return batch


class Dataset:
    """A prepared dataset: .name, .meta (dict), .vocab_size, .tokenizer, .split("train" | "val").

    `name` is that of data/<name>/, or the path of such a folder. Checked are the whole of
    meta.json, each shard's length, every id (at 12 GB a second from memory) and that each split
    has `seq_len` tokens; hashes are not recomputed. Raises DataError."""

    def __init__(self, name, seq_len=1):
        self.folder = data_root() / name if PLAIN_NAME.fullmatch(str(name)) else Path(name)
        remedy = f"run {prepare_command(self.folder)}"
        if not os.path.isfile(self.folder / "meta.json"):
            raise DataError(f"no dataset at {shown(self.folder)}: {remedy}")
        try:
            with open(self.folder / "meta.json", "rb") as f:
                size = os.fstat(f.fileno()).st_size  # read(n) allocates n at once
                self.meta = json.loads(f.read(min(size, LARGEST_META)))
            check_meta(self.meta)
            self.splits = {name: Split(self.folder, info, self.meta)
                           for name, info in self.meta["splits"].items()}
        except (OSError, ValueError, RecursionError) as e:
            raise DataError(f"{shown(self.folder)} is damaged ({str(e)[:200]}): {remedy}") from e
        self.name, self.vocab_size = self.meta["name"], self.meta["vocab_size"]
        for name, split in self.splits.items():
            if len(split) < seq_len:
                raise DataError(f"{name} of {shown(self.folder)} has {len(split)} tokens, fewer "
                                f"than a sequence of {seq_len}: lower --seq_len, or give more text")

    @cached_property
    def tokenizer(self):
        """The Tokenizer; made on first use, since training alone needs none."""
        return Tokenizer.from_meta(self.meta)

    def split(self, name):
        if name not in self.splits:
            raise DataError(f"{shown(self.folder)} has no split {name!r}: use one of "
                            f"{', '.join(self.splits)}")
        return self.splits[name]


load_dataset = Dataset


class Split:
    """The tokens of one split, memory-mapped. len() is in tokens."""

    def __init__(self, folder, info, meta):
        self.tokens, self.bytes = info["tokens"], info["bytes"]
        self.shards, dtype = [], np.dtype(meta["dtype"]).newbyteorder("<")
        for shard in info["shards"]:
            name, size = shard["file"], shard["tokens"] * dtype.itemsize
            path = folder / name
            if path.is_symlink() or not path.is_file():
                raise ValueError(f"{name} is missing, or no file")
            if path.stat().st_size != size:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, not {size}")
            self.shards.append(np.memmap(path, dtype, mode="r"))
            if (top := int(self.shards[-1].max())) >= meta["vocab_size"]:
                raise ValueError(f"{name} holds id {top}, the vocabulary {meta['vocab_size']}")
        self.separator, self.eot = meta.get("separator"), meta.get("eot")
        # shard s holds the tokens offsets[s] .. offsets[s + 1] - 1
        self.offsets = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self):
        return self.tokens

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text per token; bits per byte = nats per token / (ln 2 * this)."""
        return self.bytes / self.tokens

    @cached_property
    def marks(self):
        """Where separators end, and the end-of-text tokens: two sorted arrays of positions."""
        text, sep = np.concatenate(self.shards), self.separator
        found = np.flatnonzero(text[: len(text) - len(sep) + 1] == sep[0])
        for i, token in enumerate(sep):
            found = found[text[found + i] == token]
        return found + len(sep) - 1, np.flatnonzero(text == self.eot)

    def completions(self, starts, length):
        """bool (B, length): which tokens of the windows at `starts` are to be written: those behind
        a separator, as far as the end-of-text and with it."""
        at = np.asarray(starts, np.int64)[:, None] + np.arange(length)
        last = [np.append(-1, m)[np.searchsorted(m, at)] for m in self.marks]  # before each token
        return last[0] > last[1]

    def window(self, starts, length):
        """The windows [start, start + length) as int64 (B, length), across shard borders. starts:
        int64 (B,). Raises IndexError when a window leaves the split."""
        starts = np.asarray(starts, np.int64)
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(f"a window of {length} tokens leaves the split of {self.tokens}")
        out = np.empty((len(starts), length), np.int64)
        first = np.searchsorted(self.offsets, starts, side="right") - 1
        for rest, at, s in zip(out, starts - self.offsets[first], first, strict=True):
            while len(rest):
                piece = self.shards[s][at:at + len(rest)]
                rest[:len(piece)] = piece
                rest, at, s = rest[len(piece):], 0, s + 1
        return out


def smallest_dtype(vocab_size):
    """The smallest of uint8, uint16, uint32 that holds the ids 0..vocab_size-1."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


# -- writing ---------------------------------------------------------------------------------------

def close_safely(file):
    """Bring a file that was written to the disk, so that a rename never comes before its bytes."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def obtain(path, url, what, instead="--input=FILE"):
    """The bytes of the file `path`, or those behind `url` where it is None; `what` names them in
    the error, `instead` the way without a network."""
    try:
        with urlopen(url, timeout=30) if path is None else open(path, "rb") as file:
            return file.read()
    except (OSError, HTTPException) as e:
        if path is None:
            raise DataError(f"cannot download {what} ({e}): fetch {url} and give {instead}") from e
        raise DataError(f"cannot read {shown(path)} ({e.strerror}): give {what}") from e


def verified(content, sha256, what):
    """`content`, if it has this sha256."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"this is not {what} ({len(content):,} bytes, another sha256): "
                        "fetch it again")
    return content


def refuse_existing(folder, overwrite):
    """DataError if `folder` holds data that is not to be replaced."""
    if not overwrite and holds_data(folder):
        raise DataError(f"{shown(folder)} holds a dataset already: give --overwrite to replace it")


class DatasetWriter:
    """Write a dataset piece by piece into a temporary folder; finish() moves it to its place.

        with DatasetWriter(folder, tokenizer, source="one line") as writer:
            writer.add("train", ids, n_bytes)      # in order, any number of times, per split
            writer.finish()

    A shard is closed by the piece that fills it to `shard_tokens`."""

    def __init__(self, folder, tokenizer, source, shard_tokens=SHARD_TOKENS):
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.shard_tokens, self.dtype = shard_tokens, smallest_dtype(tokenizer.vocab_size)
        self.splits, self.open = {}, {}
        self.meta = {"name": self.folder.name, **tokenizer.meta(), "dtype": self.dtype.name,
                     "splits": self.splits, "source": plain(source)}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))

    def add(self, split, ids, n_bytes):
        """Append ids (an integer array, any length) that stand for n_bytes of UTF-8 text."""
        info = self.splits.setdefault(split, {"tokens": 0, "bytes": 0, "shards": []})
        info["bytes"] += n_bytes
        info["tokens"] += len(ids)
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size:
            raise ValueError(f"an id outside the vocabulary of {self.tokenizer.vocab_size}")
        if split not in self.open:
            info["shards"].append({"file": f"{split}_{len(info['shards']):04d}.bin", "tokens": 0})
            path = self.temporary / info["shards"][-1]["file"]
            self.open[split] = open(path, "wb"), hashlib.sha256()  # noqa: SIM115 - by _close()
        file, sha256 = self.open[split]
        data = memoryview(np.ascontiguousarray(ids, self.dtype.newbyteorder("<"))).cast("B")
        file.write(data)
        sha256.update(data)
        info["shards"][-1]["tokens"] += len(ids)
        if info["shards"][-1]["tokens"] >= self.shard_tokens:
            self._close(split)

    def _close(self, split):
        file, sha256 = self.open.pop(split)
        close_safely(file)
        self.splits[split]["shards"][-1]["sha256"] = sha256.hexdigest()

    def finish(self):
        """Move the files to their place; returns the meta as a dict. No new shard takes the name of
        an old one, and meta.json turns from the old to the new in one step: broken off at any
        moment, the folder holds one of the two datasets, whole."""
        for split in ("train", "val"):
            if not self.splits.get(split, {}).get("bytes"):
                raise DataError(f"the text leaves nothing for {split}: give more text")
        for split in [*self.open]:
            self._close(split)
        used = set()
        for split, info in self.splits.items():
            for shard in info["shards"]:
                name = shard["file"] if len(info["shards"]) > 1 else f"{split}.bin"
                if os.path.lexists(self.folder / name):
                    name = f"{name.removesuffix('.bin')}-{shard['sha256'][:16]}.bin"
                os.replace(self.temporary / shard["file"], self.folder / name)
                shard["file"] = name
                used.add(name)
        check_meta(self.meta)
        file = open(self.temporary / "meta.json", "xb")  # noqa: SIM115 - by close_safely()
        file.write(json.dumps(self.meta, indent=1, ensure_ascii=False).encode() + b"\n")
        close_safely(file)
        os.replace(file.name, self.folder / "meta.json")
        for old in self.folder.glob("*.bin"):
            if old.name not in used and re.match("(train|val|test)[_.-]", old.name):
                old.unlink()
        return self.meta

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file, _ in self.open.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()


def write_char_dataset(folder, text, source):
    """Write `text` by characters, the last tenth for validation; replaces what is there."""
    tokenizer, cut = CharTokenizer("".join(sorted(set(text)))), int(0.9 * len(text))
    with DatasetWriter(folder, tokenizer, source) as writer:
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            writer.add(split, tokenizer.encode_array(part), len(part.encode()))
        return writer.finish()


# -- prepare scripts -------------------------------------------------------------------------------

class Arguments(argparse.ArgumentParser):
    """argparse with one-line errors; --help prints the description as it is written."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise DataError(f"{message} (--help lists the options)")


def run(main):
    """Call a script's main(). A user's mistake ends it in one line and exit code 2, a signal in
    its own exit code; either way no half-written files stay."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if code := guarded(lambda argv: main())(sys.argv):
        sys.exit(code)


def report(folder, meta):
    """Print one line per split."""
    for name, info in meta["splits"].items():
        print(f"{shown(folder)}: {name:5} {info['tokens']:>13,} tokens {info['bytes']:>14,} bytes"
              f"  {meta['tokenizer']} ({meta['vocab_size']:,}), {meta['dtype']}")


def parallel_map(function, items):
    """Like map, in order, with a thread per core (tiktoken, numpy and hashlib release the
    interpreter lock); `items` may be endless, few are held at a time."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
