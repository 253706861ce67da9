"""Datasets: folders of token ids, and the tokenizers that made them.

    train.bin, val.bin   token ids, no header
    meta.json            {"tokenizer": "char" | "byte" | "gpt2" | "hf", "vocab_size": 84,
                          "eot": the id that ends a document, or null, "dtype": "uint8" | ...,
                          "tokens": {"train": n, "val": n}, "bytes": {...}, of the text in UTF-8,
                          "source": "one line",
                          "chars": "..." of char, "json": tokenizer.json of hf}

`write` makes one; meta.json comes last, so that a folder without it is no dataset. --dataset=NAME
is the folder data/NAME, or $CASCADE_DATA/NAME; a name with a / in it is a path. The scripts
data/*/prepare.py need the second part of this file: `read_text`, `obtain`, `write`.
"""

import gzip
import hashlib
import http.client
import json
import lzma
import os
import runpy
import sys
import tempfile
import urllib.request
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from util.settings import ROOT, UserError, optional, require

EOT = "<|endoftext|>"
ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t"}  # as they are typed in a shell


def data_folder(name):
    root = Path(os.environ.get("CASCADE_DATA") or ROOT / "data").expanduser()
    return Path(name) if "/" in name else root / name


@contextmanager
def writing(path):
    """An OSError in here becomes a UserError that names the file, or `path`."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{e.filename or path}: {e.strerror or e}; make room there, or choose "
                        "another folder") from None


# ---- tokenizers ----------------------------------------------------------------------------------
# encode(str) -> (n,) ids, decode(ids) -> str, vocab_size, eot (the id that ends documents, or None)
# and meta: what make_tokenizer needs beside these.


class CharTokenizer:
    """One token for each of the distinct characters `chars`."""

    kind, eot = "char", None

    def __init__(self, chars):
        self.chars, self.vocab_size, self.meta = chars, len(chars), {"chars": chars}
        self.ids = {c: i for i, c in enumerate(chars)}

    def encode(self, text):
        try:
            return np.fromiter(map(self.ids.__getitem__, text), np.uint32, len(text))
        except KeyError as e:
            raise UserError(f"the vocabulary has no {e}: use the {self.vocab_size} characters of "
                            "the training text") from None

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


class ByteTokenizer:
    """The bytes of UTF-8. 255, which never occurs there, ends a document."""

    kind, eot, vocab_size, meta = "byte", 255, 256, {}

    def encode(self, text):
        return np.frombuffer(text.encode(errors="replace"), np.uint8)

    def decode(self, ids):
        return bytes(map(int, ids)).replace(b"\xff", EOT.encode()).decode(errors="replace")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken, which downloads its two files once."""

    kind, eot, vocab_size, meta = "gpt2", 50256, 50257, {}

    def __init__(self):
        try:
            self.bpe = optional("tiktoken").get_encoding("gpt2")
        except OSError as e:  # those of its downloads are OSErrors too
            raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}): "
                            "data/text/readme.md says how to do without a network") from None

    def encode(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])


class HFTokenizer:
    """The text of a tokenizer.json. Models often round its vocab_size up."""

    kind = "hf"

    def __init__(self, text, vocab_size=0, eot=None):
        tokenizers = optional("tokenizers")
        try:
            self.bpe, self.meta = tokenizers.Tokenizer.from_str(text), {
                "json": json.dumps(json.loads(text))}  # however it is spaced
        except Exception as e:  # what its parser raises has no other type
            raise UserError(f"the tokenizer.json is damaged ({e}): use another") from None
        self.bpe.encode_special_tokens = True  # their names in a text are text
        self.vocab_size = vocab_size or self.bpe.get_vocab_size()
        self.eot = self.bpe.token_to_id(EOT) if eot is None else eot

    @classmethod
    def from_folder(cls, folder):
        """That of a model's folder: vocab_size and the end-of-text token, the first if there are
        several, as its config.json says."""
        config = read_json(folder, "config.json")
        V, eot = config.get("vocab_size"), config.get("eos_token_id")
        if isinstance(eot, list) and eot:
            eot = eot[0]
        require(isinstance(V, int) and (eot is None or eot in range(V)),
                f"hf:{folder}: its config.json has vocab_size {V} and eos_token_id {eot}")
        return cls(json.dumps(read_json(folder, "tokenizer.json")), V, eot)

    def encode(self, text):
        return np.array(self.bpe.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)


def make_tokenizer(meta):
    """The tokenizer that a dataset's meta describes."""
    kind = meta["tokenizer"]
    if kind == "char":
        return CharTokenizer(meta["chars"])
    if kind == "hf":
        return HFTokenizer(meta["json"], meta["vocab_size"], meta["eot"])
    require(kind in ("byte", "gpt2"), f"unknown tokenizer {kind!r}: prepare the data again")
    return ByteTokenizer() if kind == "byte" else GPT2Tokenizer()


def opening(tokenizer):
    """The prompt of a user who gives none: the end-of-text token, else a newline, else token 0."""
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode("\n").tolist() or [0]
    except UserError:
        return [0]


def token_id(tokenizer, text):
    r"""The id of `text`, one token. \n, \r and \t mean what they mean in Python; the
    name of a special token means that token, and <|endoftext|> means eot."""
    if text == EOT and tokenizer.eot is not None:
        return tokenizer.eot
    if tokenizer.kind == "hf" and text not in ESCAPES:
        special = tokenizer.bpe.token_to_id(text)  # encode reads the name as plain text
        if special is not None:
            return special
    ids = tokenizer.encode(ESCAPES.get(text, text)).tolist()
    require(len(ids) == 1, f"{text!r} is {len(ids)} tokens, not one")
    return ids[0]


# ---- reading and writing -------------------------------------------------------------------------


def read_text(where):
    """The text of a file, plain, .gz or .xz, or of standard input if -. UTF-8, with a byte order
    mark or without; line ends stay as they are."""
    require(where != "-" or sys.stdin, "standard input is closed: give a text or FILE:path")
    unpack = {".gz": gzip.open, ".xz": lzma.open}.get(Path(where).suffix, open)
    try:
        if where == "-":
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        else:
            with unpack(Path(where).expanduser(), "rb") as f:
                text = f.read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: byte {e.start} is not UTF-8; convert the file, or leave "
                        "it out") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"{where}: {why}; name a text file") from None
    require("\0" not in text, f"{where} is no text, it has zero bytes; leave it out")
    return text


def read_json(folder, name):
    """An object in a file; UserError if there is none."""
    try:
        found = json.loads(Path(folder, name).read_text(encoding="utf-8"))
        require(isinstance(found, dict), "it is no object")
    except (OSError, ValueError) as e:
        raise UserError(f"hf:{folder} has no readable {name} ({e}): give the folder of a Llama or "
                        "Qwen3, as save_pretrained writes it") from None
    return found


def obtain(where, url):
    """The bytes of a local file or, if that is empty, of a download."""
    try:
        if where:
            return Path(where).read_bytes()
        print(f"downloading {url}", flush=True)
        with urllib.request.urlopen(url, timeout=60) as reply:
            return reply.read()
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"{e}: name a local copy of {url} by --input=FILE") from None


def verified(content, sha256, what):
    """These bytes, if their hash is sha256."""
    found = hashlib.sha256(content).hexdigest()
    require(found == sha256, f"{what} is damaged or another file: its sha256 is {found}, and not "
                             f"{sha256}; fetch it again")
    return content


def prepare_shipped(name):
    """Prepare the text that ships here, unless it is. Other datasets are the user's to prepare."""
    if name == "shakespeare" and not (data_folder(name) / "meta.json").exists():
        print(f"data       {name} is not prepared yet: running its prepare.py", flush=True)
        script = runpy.run_path(str(ROOT / "data" / name / "prepare.py"))
        script["main"].__wrapped__([])  # without `guarded`: a mistake is the caller's to report


class Dataset:
    """A prepared folder: `meta`, and `split(name)`, ids (tokens,) on disk."""

    def __init__(self, name, seq_len=1):
        folder = data_folder(name)
        self.name, self.folder, self.splits = folder.name, folder, {}
        remedy = "the scripts data/*/prepare.py make them"
        require((folder / "meta.json").is_file(), f"no dataset in {folder}: {remedy}")
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            for split, tokens in self.meta["tokens"].items():
                ids = np.memmap(folder / f"{split}.bin", self.meta["dtype"], "r")
                require(len(ids) == tokens, f"{split}.bin has {len(ids)} tokens, not {tokens}")
                self.splits[split] = ids
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"the data in {folder} is damaged ({e}): {remedy}") from None
        for split, ids in self.splits.items():
            require(len(ids) >= seq_len, f"{split} of {folder} has {len(ids)} tokens: give more "
                                         f"text, or set --seq_len to at most that, not {seq_len}")

    def require_vocabulary(self, meta, where):
        """UserError unless `meta`, of a checkpoint `where`, gives the ids the same meaning."""
        keys = ("tokenizer", "vocab_size", "eot", "chars", "json")
        require(all(self.meta.get(key) == meta.get(key) for key in keys),
                f"{self.folder} has another vocabulary than {where} was trained with")

    def split(self, name):
        require(name in self.splits, f"{self.folder} has no split {name!r}: it has "
                                     f"{', '.join(self.splits)}")
        return self.splits[name]

    def bytes_per_token(self, split):
        return self.meta["bytes"][split] / self.meta["tokens"][split]


def write(folder, tokenizer, source, at_most=None, **splits):
    """Write a dataset; one that is there is replaced when all is written. splits: train, val and
    others, iterables of documents (str). Each document is followed by the tokenizer's end-of-text,
    if it has one. at_most, {split: tokens}: no document is begun after so many."""
    folder, V = Path(folder), tokenizer.vocab_size
    dtype = "uint8" if V <= 2**8 else "uint16" if V <= 2**16 else "uint32"
    meta = {"tokenizer": tokenizer.kind, "vocab_size": V, "eot": tokenizer.eot, "dtype": dtype,
            "tokens": {}, "bytes": {}, "source": source, **tokenizer.meta}
    end = b"" if tokenizer.eot is None else np.array([tokenizer.eot], dtype).tobytes()
    ours = (folder / "meta.json").exists() or not (folder / "train.bin").exists()
    require(ours, f"{folder}/train.bin is of another project: choose another name")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(dir=folder) as new:
        for split, documents in splits.items():
            size = 0
            with open(Path(new, f"{split}.bin"), "wb") as f:
                for text in documents:
                    ids = tokenizer.encode(text)
                    require(ids.max(initial=0) < V, f"a token is {ids.max(initial=0)}, and the "
                            f"vocabulary has {V}: its config.json and tokenizer.json do not fit")
                    f.write(ids.astype(dtype).tobytes() + end)
                    size += len(text.encode(errors="replace"))
                    tokens = f.tell() // np.dtype(dtype).itemsize
                    if at_most and tokens >= at_most[split]:
                        break
            require(size, f"there is no text for {split}: give more")
            meta["tokens"][split], meta["bytes"][split] = tokens, size
            print(f"{folder / split}.bin: {tokens:,} tokens of {V:,} kinds, {size:,} bytes of text")
        Path(new, "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        (folder / "meta.json").unlink(missing_ok=True)
        for name in (*(f"{split}.bin" for split in splits), "meta.json"):
            Path(new, name).replace(folder / name)


def write_characters(name, text, source):
    """A dataset of one text by characters: its first 90 % train, the last 10 % validate."""
    cut = len(text) * 9 // 10
    write(data_folder(name), CharTokenizer("".join(sorted(set(text)))), source, train=[text[:cut]],
          val=[text[cut:]])
