"""
Datasets on disk and tokenizers: written by data/*/prepare.py, read by train.py, sample.py, eval.py.

A dataset is a folder, data/<name>/, of token ids and one description:

    train.bin, val.bin    little-endian token ids, no header; a split above SHARD_TOKENS is cut into
                          train_0000.bin, train_0001.bin, ...
    meta.json             {"name": "mine", "tokenizer": "char" | "byte" | "gpt2",
                           "vocab_size": 65, "dtype": "uint8" | "uint16" | "uint32",
                           "chars": "\\n !...",         char only: the characters in id order
                           "eot": 50256 or null,       the id that separates documents
                           "splits": {"train": {"tokens": n, "bytes": UTF-8 bytes of the text,
                               "shards": [{"file": "train.bin", "tokens": n, "max_id": m,
                                           "sha256": "..."}]}, "val": {...}},
                           "source": "one line"}

meta.json is written last, so a folder without it is not a dataset. A user's mistake raises
DataError: one line that ends with the remedy. $CASCADE_DATA moves the data folder elsewhere.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
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

from util.configurator import SettingsError, guarded

REPOSITORY = Path(__file__).resolve().parents[1]
SHARD_TOKENS = 100_000_000
EOT_TEXT = "<|endoftext|>"
# what `python data/<name>/prepare.py` leaves on disk, named when the data is missing
SIZES = {"shakespeare": "5 MB", "shakespeare_char": "1 MB", "enwik8": "100 MB, downloads 36 MB",
         "fineweb_edu": "400 MB for 200M tokens"}


class DataError(SettingsError):
    """A user's mistake; str() is one line with the remedy, printed after `error: `."""


def data_root():
    """The folder that holds all datasets: $CASCADE_DATA, or data/ of the repository."""
    return Path(os.environ.get("CASCADE_DATA") or REPOSITORY / "data")


def shown(path):
    """`path` as a message prints it: relative to the working directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


# -- tokenizers ------------------------------------------------------------------------------------

class Tokenizer:
    """Text to token ids in 0..vocab_size-1 and back. `eot` is the end-of-text id, or None."""
    kind, eot, special = None, None, False

    @staticmethod
    def from_meta(meta):
        """The tokenizer that a meta.json describes (as a dict)."""
        if meta["tokenizer"] == "char":
            return CharTokenizer(meta["chars"])
        kinds = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}
        if meta["tokenizer"] not in kinds:
            raise DataError(f"unknown tokenizer {meta['tokenizer']!r}: use char, byte or gpt2")
        return kinds[meta["tokenizer"]](eot=meta.get("eot") is not None)

    def meta(self):
        """The part of meta.json that from_meta needs."""
        return {"tokenizer": self.kind, "vocab_size": self.vocab_size, "eot": self.eot}

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

    def __init__(self, eot=True, special=False):
        """special: encode the text <|endoftext|> as the end-of-text token, as in GPT2Tokenizer."""
        self.eot, self.special = 255 if eot else None, special

    def encode_array(self, text):
        data = text.encode()
        if self.special:
            data = data.replace(EOT_TEXT.encode(), b"\xff")
        return np.frombuffer(data, np.uint8)

    def token_bytes(self, ids):
        text = bytes(bytearray(int(i) for i in ids))
        return text if self.eot is None else text.replace(b"\xff", EOT_TEXT.encode())


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken.

    Its two files are looked up in $TIKTOKEN_CACHE_DIR, else where install_bpe put them, in
    .tiktoken/ of the data folder, else tiktoken downloads them. DataError when none of it works.
    """
    kind, vocab_size = "gpt2", 50257
    # name, name in tiktoken's cache, sha256; tiktoken demands the same
    files = (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
         "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
         "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"))
    remedy = "give --bpe_dir=FOLDER with vocab.bpe and encoder.json to data/text/prepare.py"

    def __init__(self, eot=True, special=False):
        """special: encode the text <|endoftext|> as the end-of-text token."""
        import tiktoken
        if (installed := data_root() / ".tiktoken").exists():
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(installed))
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' errors are OSErrors
            raise DataError("GPT-2's vocabulary is not on this machine and could not be downloaded "
                            f"({type(e).__name__}): {self.remedy}") from e
        self.eot, self.special = self.bpe.eot_token if eot else None, special

    @classmethod
    def install_bpe(cls, folder):
        """Copy vocab.bpe and encoder.json of `folder` into the cache, hashes checked."""
        cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or data_root() / ".tiktoken")
        contents = {key: verified(read(Path(folder) / name, name), sha256, f"GPT-2's {name}")
                    for name, key, sha256 in cls.files}
        cache.mkdir(parents=True, exist_ok=True)
        for key, content in contents.items():
            write_atomically(cache / key, content)

    def encode_array(self, text):
        allowed = {EOT_TEXT} if self.special else set()
        return self.bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())

    def token_bytes(self, ids):
        return self.bpe.decode_bytes([int(i) for i in ids])


# -- reading ---------------------------------------------------------------------------------------

def load_dataset(name, seq_len=1):
    """
    Open a prepared dataset: `name` of data/<name>/, or the path of such a folder.

    Checked: meta.json; each shard's presence and length; its largest id against the vocabulary, in
    the whole file up to 64 Mi tokens per split and in evenly spread windows of 1 Mi tokens (64 in
    all, the first and last of each shard among them) beyond that; at least `seq_len` tokens in each
    split. Hashes are not recomputed. Raises DataError.
    """
    is_path = os.sep in str(name) or (os.altsep or os.sep) in str(name)
    return Dataset(Path(name) if is_path else data_root() / name, seq_len)


def prepare_command(folder):
    """The command that makes the dataset in `folder`, with its size on disk where known."""
    name = folder.name
    again = " --overwrite" if any(folder.glob("*.bin")) else ""
    if name not in SIZES:
        return f"python data/text/prepare.py --input=FILE --name={name}{again}"
    # the other three have one content only, and replace what is there unasked
    again = again if name == "fineweb_edu" else ""
    return f"python data/{name}/prepare.py{again} ({SIZES[name]})"


def identity(meta):
    """
    What data a meta.json describes: {split: sha256 of its ids, ..., "vocabulary": sha256}.

    Two datasets of equal identity are the same tokens in the same order, whatever their folder.
    A split of several shards has the hash of their hashes.
    """
    def joined(hashes):
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    vocabulary = [meta[key] for key in ("tokenizer", "vocab_size", "eot")] + [meta.get("chars")]
    found = {name: joined([shard["sha256"] for shard in info["shards"]])
             for name, info in meta["splits"].items()}
    return found | {"vocabulary": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()}


def ships_with_repository(name):
    """Whether data/<name>/prepare.py needs neither network nor arguments: its raw text is there."""
    return any((REPOSITORY / "data" / str(name)).glob("*.txt.xz"))


def load_or_prepare(name, seq_len, processes):
    """load_dataset, for all processes; prepared here and now when its text ships with the code."""
    if not (data_root() / name / "meta.json").exists() and ships_with_repository(name):
        if processes.main:
            script = REPOSITORY / "data" / name / "prepare.py"
            print(f"data/{name} is not prepared yet: running {script.name}", flush=True)
            if subprocess.run([sys.executable, str(script)], check=False).returncode:
                raise DataError(f"{script} failed: see its message above")
    processes.wait()  # every process comes by here, whatever it found on disk
    return load_dataset(name, seq_len)


class Prefetch:
    """`prefetch(step)` is make(step), made by a thread while the step before was computing.

    `waited` counts the seconds that the training loop had to wait for data.
    """

    def __init__(self, make):
        self.make, self.pool, self.waited = make, ThreadPoolExecutor(1), 0.0
        self.next_step, self.future = None, None

    def __call__(self, step):
        began = time.perf_counter()
        batch = self.future.result() if step == self.next_step else self.make(step)
        self.next_step, self.future = step + 1, self.pool.submit(self.make, step + 1)
        self.waited += time.perf_counter() - began
        return batch


class Dataset:
    """A prepared dataset: .name, .meta (dict), .vocab_size, .tokenizer, .split("train" | "val")."""

    def __init__(self, folder, seq_len=1):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        if not path.exists():
            raise DataError(f"no dataset at {shown(self.folder)}: run "
                            f"{prepare_command(self.folder)}")
        try:
            self.meta = json.loads(path.read_text(encoding="utf-8"))
            self.name, self.vocab_size = self.meta["name"], self.meta["vocab_size"]
            self._check_vocabulary()
            self.splits = {name: Split(self.folder, info, self.meta)
                           for name, info in self.meta["splits"].items()}
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{shown(path)} is damaged ({type(e).__name__}: {e}): run "
                            f"{prepare_command(self.folder)}") from e
        for name, split in self.splits.items():
            if len(split) < seq_len:
                raise DataError(f"{name} of {shown(self.folder)} has {len(split)} tokens, fewer "
                                f"than a sequence of {seq_len}: lower --seq_len, or give more text")

    def _check_vocabulary(self):
        kind, chars = self.meta["tokenizer"], self.meta.get("chars", "")
        size = {"char": len(set(chars)), "byte": ByteTokenizer.vocab_size,
                "gpt2": GPT2Tokenizer.vocab_size}[kind]
        if size != self.vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size}, but tokenizer {kind} has {size}")
        dtypes = ("uint8", "uint16", "uint32")
        if dtypes.index(self.meta["dtype"]) < dtypes.index(smallest_dtype(size).name):
            raise ValueError(f"{self.meta['dtype']} cannot hold a vocabulary of {size}")

    @cached_property
    def tokenizer(self):
        """The Tokenizer; made on first use, since training alone needs none."""
        return Tokenizer.from_meta(self.meta)

    def split(self, name):
        if name not in self.splits:
            raise DataError(f"{shown(self.folder)} has no split {name!r}: use one of "
                            f"{', '.join(self.splits)}")
        return self.splits[name]


class Split:
    """The tokens of one split, memory-mapped. len() is in tokens."""

    def __init__(self, folder, info, meta):
        self.tokens, self.bytes = info["tokens"], info["bytes"]
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.shards = [self._open(folder / s["file"], s["tokens"], dtype) for s in info["shards"]]
        # shard s holds the tokens offsets[s] .. offsets[s + 1] - 1
        self.offsets = np.cumsum([0] + [len(shard) for shard in self.shards])
        if not self.tokens or self.offsets[-1] != self.tokens:
            raise ValueError(f"{self.tokens} tokens, but {self.offsets[-1]} in the shards")
        for shard, s in zip(self.shards, info["shards"], strict=True):
            top = max(s["max_id"], sampled_max(shard, max(2, 64 // len(self.shards))))
            if top >= meta["vocab_size"]:
                raise DataError(f"{shown(folder / s['file'])} holds id {top}, the vocabulary "
                                f"{meta['vocab_size']}: run {prepare_command(folder)}")

    @staticmethod
    def _open(path, tokens, dtype):
        want, have = tokens * dtype.itemsize, path.stat().st_size if path.exists() else None
        if have is None or have != want or have == 0:
            state = "is missing" if have is None else f"has {have} bytes, not {want}"
            raise DataError(f"{shown(path)} {state}: run {prepare_command(path.parent)}")
        return np.memmap(path, dtype, mode="r")

    def __len__(self):
        return self.tokens

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text per token; bits per byte = nats per token / (ln 2 * this)."""
        return self.bytes / self.tokens

    def window(self, starts, length):
        """
        The windows [start, start + length) as int64 (B, length), across shard borders.

        starts: int64 (B,). Raises IndexError when a window leaves the split.
        """
        starts = np.asarray(starts, np.int64)
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(f"a window of {length} tokens leaves the split of {self.tokens}")
        out = np.empty((len(starts), length), np.int64)
        first = np.searchsorted(self.offsets, starts, side="right") - 1
        for row, start, shard in zip(out, starts.tolist(), first.tolist(), strict=True):
            done, s = 0, shard
            while done < length:
                at = start + done - self.offsets[s]
                piece = self.shards[s][at:at + length - done]
                row[done:done + len(piece)] = piece
                done, s = done + len(piece), s + 1
        return out


def sampled_max(ids, windows, size=1 << 20):
    """Largest of `ids`: of all where they fit `windows` windows of `size`, else of spread ones."""
    starts = range(0, len(ids), size)
    if len(starts) > windows:
        starts = np.linspace(0, len(ids) - size, windows).astype(int)
    return max(int(ids[s:s + size].max()) for s in starts)


def smallest_dtype(vocab_size):
    """The smallest of uint8, uint16, uint32 that holds the ids 0..vocab_size-1."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


# -- writing ---------------------------------------------------------------------------------------

def write_atomically(path, content):
    """Write bytes so that `path` is either absent, old, or complete, whenever the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read(path, what):
    """The bytes of the file `path`; `what` names it in the error."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {shown(path)} ({e.strerror}): give the path of {what}") from e


def download(url, what, instead="--input=FILE"):
    """The bytes behind `url`; `what` names them in the error, `instead` the way without network."""
    try:
        with urlopen(url, timeout=30) as answer:
            return answer.read()
    except (OSError, HTTPException) as e:
        raise DataError(f"cannot download {what} ({e}): fetch {url} elsewhere and give "
                        f"{instead}") from e


def verified(content, sha256, what):
    """`content`, if it has this sha256."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"this is not {what} ({len(content):,} bytes, another sha256): "
                        "fetch it again")
    return content


def refuse_existing(folder, overwrite):
    """DataError if `folder` holds data that is not to be replaced."""
    if not overwrite and any((*folder.glob("*.bin"), *folder.glob("meta.json"))):
        raise DataError(f"{shown(folder)} holds a dataset already: give --overwrite to replace it")


class ShardWriter:
    """One growing file of token ids, with its count, largest id and hash."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "wb")  # noqa: SIM115 - closed by close()
        self.sha256, self.tokens, self.max_id = hashlib.sha256(), 0, 0

    def write(self, ids):
        data = memoryview(np.ascontiguousarray(ids)).cast("B")
        self.file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)
        self.max_id = max(self.max_id, int(ids.max()))

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"file": self.path.name, "tokens": self.tokens, "max_id": self.max_id,
                "sha256": self.sha256.hexdigest()}


class DatasetWriter:
    """
    Write a dataset piece by piece into a temporary folder; finish() moves it to its place.

        with DatasetWriter(folder, tokenizer, source="one line") as writer:
            writer.add("train", ids, n_bytes)      # in order, any number of times, per split
            writer.finish()

    A shard is closed by the piece that fills it to `shard_tokens`. An existing dataset is refused
    unless `overwrite`, and then stays as it is until finish().
    """

    def __init__(self, folder, tokenizer, source, *, overwrite=False, shard_tokens=SHARD_TOKENS):
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.shard_tokens, self.dtype = shard_tokens, smallest_dtype(tokenizer.vocab_size)
        self.head = {"name": self.folder.name, **tokenizer.meta(), "dtype": self.dtype.name}
        self.tail = {"source": source}
        self.splits, self.open = {}, {}
        refuse_existing(self.folder, overwrite)
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
            name = f"{split}_{len(info['shards']):04d}.bin"
            self.open[split] = ShardWriter(self.temporary / name)
        self.open[split].write(ids.astype(self.dtype.newbyteorder("<"), copy=False))
        if self.open[split].tokens >= self.shard_tokens:
            info["shards"].append(self.open.pop(split).close())

    def finish(self):
        """Move the files to their place, meta.json last; returns the meta as a dict."""
        for split in ("train", "val"):
            if not self.splits.get(split, {}).get("tokens"):
                raise DataError(f"the text leaves nothing for {split}: give more text")
        for split in list(self.open):
            self.splits[split]["shards"].append(self.open.pop(split).close())
        (self.folder / "meta.json").unlink(missing_ok=True)
        for old in self.folder.glob("*.bin"):
            if re.fullmatch(r"(train|val|test)(_\d+)?\.bin", old.name):
                old.unlink()
        for split, info in self.splits.items():
            for shard in info["shards"]:
                written = self.temporary / shard["file"]
                if len(info["shards"]) == 1:
                    shard["file"] = f"{split}.bin"
                os.replace(written, self.folder / shard["file"])
        meta = self.head | {"splits": self.splits} | self.tail
        text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / "meta.json", text.encode())
        return meta

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for shard in self.open.values():
            shard.file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()


def write_char_dataset(folder, text, source, val=0.1):
    """Write `text` by characters, the last `val` of them for validation; replaces what is there."""
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    cut = int((1 - val) * len(text))
    with DatasetWriter(folder, tokenizer, source, overwrite=True) as writer:
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
        sys.exit(f"error: {message} (--help lists the options)")


def run(main):
    """Call a script's main(); a user's mistake ends it in one line, Ctrl-C in exit code 130."""
    if code := guarded(lambda argv: main())(sys.argv):
        sys.exit(code)


def report(folder, meta):
    """Print one line per split."""
    for name, info in meta["splits"].items():
        print(f"{shown(folder)}: {name:5} {info['tokens']:>13,} tokens {info['bytes']:>14,} bytes"
              f"  {meta['tokenizer']} ({meta['vocab_size']:,}), {meta['dtype']}")


def parallel_map(function, items):
    """
    Like map, in order, with a thread per core; `items` may be endless, few are held at a time.

    Threads suffice: tiktoken, numpy and hashlib release the interpreter lock, and no text has to be
    copied to another process.
    """
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
