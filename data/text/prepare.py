"""
Your own text as a dataset: files or folders of UTF-8 text, plain, .gz or .xz.

    python data/text/prepare.py --input=FILE --name=mine                     # by byte
    python data/text/prepare.py --input FOLDER a.txt.gz --name=mine --tokenizer=gpt2
    python data/text/prepare.py --input=FILE --name=mine --tokenizer=hf:DIR    # of a model's folder
    python data/text/prepare.py --input=FILE --name=mine --special --separator=ANSWER:
    python data/text/prepare.py --bpe_dir=FOLDER             # GPT-2's two files, for no network
    python train.py --dataset=mine

Every file is a document. Two passes: the first checks the text and counts it, the second encodes
it, on all cores and in constant memory, in pieces of half a megabyte (GPT-2's tokens are those of
the whole; of another model's, one at a border may differ). Nothing exists until all is written.
"""
import gzip
import lzma
import sys
import zlib
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util import dataset
from util.dataset import EOT_TEXT, DataError, shown
from util.display import Progress

CHUNK = 1 << 19  # bytes that one thread works on at a time
TOKENIZERS = {"byte": dataset.ByteTokenizer, "gpt2": dataset.GPT2Tokenizer}


class Piece(NamedTuple):
    """Part of a document: document number, byte offset of `data` in it, the bytes."""
    document: int
    offset: int
    data: bytes


# -- reading ---------------------------------------------------------------------------------------

def find_files(inputs):
    """The files among `inputs` and in the folders among them, sorted, hidden ones left out."""
    files = []
    for path in map(Path, inputs):
        if not path.exists():
            raise DataError(f"{shown(path)} does not exist: give --input a text file or folder")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [p for p in inside if p.is_file() and
                  not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return files


def safe_cut(data):
    """
    Where to cut `data`, so that its two parts have the tokens of the whole.

    Before a whitespace that follows something else: no piece of GPT-2's pattern reaches across, and
    none looks back. "Something else" is printable ASCII or a byte from 0xB0, in which no whitespace
    of Unicode ends. Where there is no such place, before the last character or end-of-text marker.
    """
    for i in range(len(data) - 1, 0, -1):
        if data[i] in b" \n\t\r" and (0x20 < data[i - 1] < 0x7F or data[i - 1] >= 0xB0):
            return i
    last = next((i for i in range(len(data) - 1, max(len(data) - 5, 0), -1)
                 if data[i] & 0xC0 != 0x80), len(data))
    return last - marker_begun(data[:last])


def marker_begun(data):
    """How many bytes at the end of `data` may be the beginning of an end-of-text marker."""
    marker = EOT_TEXT.encode()
    return next((n for n in range(len(marker) - 1, 0, -1) if data.endswith(marker[:n])), 0)


def read_pieces(path, document, start, end, progress):
    """Yield the Pieces of bytes start..end (None: all) of the unpacked text; progress(bytes)."""
    with open(path, "rb") as raw:
        unpack = {".gz": lambda f: gzip.GzipFile(fileobj=f), ".xz": lzma.LZMAFile}
        file = unpack.get(path.suffix, lambda f: f)(raw)
        try:
            file.seek(start)
            rest = b""
            while True:
                want = CHUNK - len(rest)
                want = want if end is None else min(want, end - start - len(rest))
                data = rest + file.read(want)
                cut = safe_cut(data) if len(data) == CHUNK else len(data)
                if not data:
                    return
                yield Piece(document, start, data[:cut])
                start, rest = start + cut, data[cut:]
                progress(raw.tell())
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as e:
            raise DataError(f"{shown(path)} is damaged ({e}): pack it again") from e


def decode(path, piece):
    """The str of a Piece; DataError with the place of what is not UTF-8 text."""
    if piece.offset == 0 and piece.data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{shown(path)} is UTF-16: convert it with iconv -f UTF-16 -t UTF-8")
    if (at := piece.data.find(b"\0")) >= 0:
        raise DataError(f"{shown(path)} is binary (a zero at byte {piece.offset + at}): "
                        "give text files only")
    try:
        return piece.data.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{shown(path)} is not UTF-8 (0x{piece.data[e.start]:02x} at byte "
                        f"{piece.offset + e.start}): convert it, e.g. iconv -f LATIN1 -t UTF-8"
                        ) from e


# -- the two passes --------------------------------------------------------------------------------

class Corpus:
    """The files of a dataset; `sizes` are the bytes of text in each, filled by check()."""

    def __init__(self, files):
        self.files, self.sizes, self.separators = files, [0] * len(files), 0
        self.on_disk = [p.stat().st_size for p in files]

    def pieces(self, parts, label):
        """Yield the Pieces of parts, a list of (document, start, end)."""
        bar = Progress(label, sum(self.on_disk[d] for d, _, _ in parts))
        before = 0
        for document, start, end in parts:
            yield from read_pieces(self.files[document], document, start, end,
                                   lambda at, base=before: bar.update(base + at))
            before += self.on_disk[document]
        bar.close()

    def check(self, want_chars):
        """First pass: is it UTF-8, and how long? Returns the distinct characters if wanted."""
        def look(piece):
            text = decode(self.files[piece.document], piece)
            if not want_chars:
                return piece, ()
            seen = np.zeros(sys.maxunicode + 1, bool)
            seen[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
            return piece, np.flatnonzero(seen).tolist()

        parts = [(d, 0, None) for d in range(len(self.files))]
        codes = set()
        for piece, found in dataset.parallel_map(look, self.pieces(parts, "check ")):
            self.sizes[piece.document] += len(piece.data)
            codes.update(found)
        return "".join(map(chr, sorted(codes)))

    def split(self, val):
        """
        {"train": parts, "val": parts}, `val` of the bytes for validation.

        One document gives its tail. Of several, whole ones are drawn in a fixed random order as
        long as they fit; if none does, the smallest is taken.
        """
        documents = [d for d, size in enumerate(self.sizes) if size]
        if not documents:
            raise DataError("the input is empty: give a file with text")
        if len(documents) == 1:
            cut = self._cut(documents[0], int((1 - val) * sum(self.sizes)))
            return {"train": [(documents[0], 0, cut)], "val": [(documents[0], cut, None)]}
        room, chosen = val * sum(self.sizes), set()
        for d in Random(0).sample(documents, len(documents)):
            if self.sizes[d] <= room:
                chosen.add(d)
                room -= self.sizes[d]
        chosen = chosen or {min(documents, key=lambda d: self.sizes[d])}
        return {"train": [(d, 0, None) for d in documents if d not in chosen],
                "val": [(d, 0, None) for d in documents if d in chosen]}

    def _cut(self, document, at):
        """The first byte from `at` that starts a character, or the start of a marker around it."""
        before = min(at, len(EOT_TEXT))
        pieces = read_pieces(self.files[document], document, at - before, at + 4, lambda _: None)
        data = b"".join(piece.data for piece in pieces)
        starts = (i for i in range(before, len(data)) if data[i] & 0xC0 != 0x80)
        cut = next(starts, len(data))
        return at - before + cut - marker_begun(data[:cut])

    def encode(self, tokenizer, parts, label, separator=""):
        """Second pass: yield (ids, bytes of text), documents separated by the end-of-text token.
        The separator has tokens of its own, whatever stands beside it."""
        first, between = parts[0][0], tokenizer.encode_array(separator)

        def work(batch):
            arrays, n_bytes = [], 0
            for piece in batch:
                if tokenizer.eot is not None and piece.offset == 0 and piece.document != first:
                    arrays.append([tokenizer.eot])
                text = decode(self.files[piece.document], piece)
                for i, part in enumerate(text.split(separator) if separator else [text]):
                    self.separators += i
                    arrays += [between] * (i > 0) + [tokenizer.encode_array(part)]
                n_bytes += len(piece.data)
                if tokenizer.special:  # a separator is no text, however it is written
                    n_bytes -= len(EOT_TEXT) * piece.data.count(EOT_TEXT.encode())
            return np.concatenate(arrays), n_bytes

        return dataset.parallel_map(work, batches(self.pieces(parts, label)))


def batches(pieces):
    """Group small Pieces into lists of about CHUNK bytes."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= CHUNK // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# -- command line ----------------------------------------------------------------------------------

def parse_arguments():
    parser = dataset.Arguments(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", action="extend", metavar="PATH", help="text files or folders of them")
    add("--name", help="the dataset is written to data/NAME/")
    add("--tokenizer", default="byte", help="char, byte, gpt2, or hf:DIR with a tokenizer.json")
    add("--val", type=float, default=0.1, help="share of the text for validation")
    add("--special", action="store_true",
        help=f"read {EOT_TEXT} in the text as the end-of-text token, not as text")
    add("--separator", default="", metavar="STRING",
        help="of a document what stands before it is given, what follows is to be written: train "
        "with --loss_on=completion. A document ends with its file, or at a marker of --special")
    add("--bpe_dir", help="folder with GPT-2's vocab.bpe and encoder.json, for no network")
    add("--overwrite", action="store_true", help="replace a dataset of this name")
    return parser.parse_args()


def check_arguments(args):
    if not args.input or not args.name:
        raise DataError("give --input=PATH, text files or folders, and --name=NAME")
    if not dataset.PLAIN_NAME.fullmatch(args.name):
        raise DataError(f"--name={args.name} does not name a folder: use letters, digits and . - _")
    if (dataset.REPOSITORY / "data" / args.name / "prepare.py").exists():
        raise DataError(f"data/{args.name} has a prepare.py of its own: choose another --name")
    if not 0 < args.val < 1:
        raise DataError(f"--val={args.val} is not between 0 and 1: give a share, such as 0.1")
    if args.tokenizer not in ("char", *TOKENIZERS) and not args.tokenizer.startswith("hf:"):
        raise DataError(f"--tokenizer={args.tokenizer} is unknown: use char, byte, gpt2 or hf:DIR")
    if (args.special or args.separator) and args.tokenizer == "char":
        what = "special" if args.special else "separator"
        raise DataError(f"--{what} needs an end-of-text token: use --tokenizer=byte or gpt2")


def make_tokenizer(args):
    """The Tokenizer that is asked for; False for "char", which the text decides."""
    if args.tokenizer.startswith("hf:"):
        return dataset.HFTokenizer.from_folder(args.tokenizer[3:], args.special)
    return args.tokenizer != "char" and TOKENIZERS[args.tokenizer](special=args.special)


def main():
    args = parse_arguments()
    if args.bpe_dir:
        dataset.GPT2Tokenizer.install_bpe(args.bpe_dir)
        print("GPT-2's files are installed; --tokenizer=gpt2 now needs no network")
        if not args.input:
            return
    check_arguments(args)
    folder = dataset.data_root() / args.name
    dataset.refuse_existing(folder, args.overwrite)
    tokenizer = make_tokenizer(args)

    if args.separator and tokenizer.eot is None:
        raise DataError(f"--separator needs an end-of-text token, which {args.tokenizer} lacks: "
                        "use --tokenizer=byte or gpt2")

    corpus = Corpus(find_files(args.input))
    chars = corpus.check(want_chars=not tokenizer)
    tokenizer = tokenizer or dataset.CharTokenizer(chars)
    source = " ".join(args.input)
    with dataset.DatasetWriter(folder, tokenizer, source) as writer:
        for split, parts in corpus.split(args.val).items():
            for ids, n_bytes in corpus.encode(tokenizer, parts, f"encode {split}", args.separator):
                writer.add(split, ids, n_bytes)
        if args.separator:
            if not corpus.separators:
                raise DataError(f"the text has no {args.separator!r}: give its own --separator")
            writer.meta["separator"] = tokenizer.encode(args.separator)
        dataset.report(folder, writer.finish())
    print(f"next: python train.py --dataset={args.name}")


if __name__ == "__main__":
    dataset.run(main)
