"""
FineWeb-Edu, the 10B-token sample, in GPT-2 tokens: shards of 100M tokens, --tokens in all.

    pip install datasets
    python data/fineweb_edu/prepare.py --tokens=200M                # streams; 400 MB on disk
    python data/fineweb_edu/prepare.py --tokens=200M --input FILE.parquet FILE.jsonl.gz

The first documents, --val_tokens in all, are the validation split.
"""
import gzip
import json
import re
import sys
import zlib
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util import dataset
from util.dataset import DataError, shown
from util.display import Progress

REPOSITORY, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"
BATCH = 64  # documents that one thread works on at a time, about 0.3 MB


# -- documents -------------------------------------------------------------------------------------

def stream():
    """Yield the texts of the sample, over the network."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise DataError("streaming needs the package datasets: pip install datasets, "
                        "or give --input=FILES (parquet or jsonl)") from e
    try:
        rows = load_dataset(REPOSITORY, SAMPLE, split="train", streaming=True)
        for row in rows.select_columns("text"):
            yield row["text"]
    except Exception as e:  # its network stack raises errors of several packages
        raise DataError(f"the stream ended early ({type(e).__name__}: {str(e)[:100]}): try again, "
                        "or give --input=FILES") from e


def read_files(paths):
    """Yield the texts of local parquet, jsonl and jsonl.gz files."""
    for path in map(Path, paths):
        try:
            for text in (read_parquet if path.suffix == ".parquet" else read_jsonl)(path):
                if not isinstance(text, str):
                    raise TypeError("a row without text")
                yield text
        except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError,
                zlib.error) as e:
            raise DataError(f"{shown(path)}: {type(e).__name__} {e}: give parquet or jsonl files "
                            "with a text in each row") from e


def read_jsonl(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)["text"]


def read_parquet(path):
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise DataError("reading parquet needs the package pyarrow: pip install pyarrow") from e
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=BATCH, columns=["text"]):
        yield from batch.column(0).to_pylist()


# -- tokens ----------------------------------------------------------------------------------------

def tokenize(texts, writer, targets):
    """
    Encode an iterator of texts into splits, until each has its tokens of targets {"val": n, ...}.

    Every document starts with the end-of-text token.
    """
    tokenizer = writer.tokenizer

    def encode(batch):
        data = [text.encode("utf-8", "replace") for text in batch]  # JSON can hold half characters
        arrays = [a for d in data for a in ([tokenizer.eot], tokenizer.encode_array(d.decode()))]
        return np.concatenate(arrays), sum(map(len, data))

    have = dict.fromkeys(targets, 0)
    bar = Progress("tokenize", sum(targets.values()), unit="tok")
    encoded = dataset.parallel_map(encode, iter(lambda: list(islice(texts, BATCH)), []))
    for split, target in targets.items():
        while have[split] < target:
            ids, n_bytes = next(encoded, (None, 0))
            if ids is None:
                print(f"the input ends after {have[split]:,} tokens of {split}")
                return
            writer.add(split, ids, n_bytes)
            have[split] += len(ids)
            bar.update(sum(have.values()))
    bar.close()


def count(text):
    """'200M', '1e6' or '5000' as an int."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)([KMB]?)", text, re.IGNORECASE)
    if not match:
        raise ValueError
    number = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2].upper()]
    if not 1 <= number <= 1e15:
        raise ValueError
    return int(number)


def main():
    parser = dataset.Arguments(description=__doc__)
    add = parser.add_argument
    add("--tokens", type=count, default=count("200M"), help="tokens to train on, such as 200M, 10B")
    add("--val_tokens", type=count, default=count("1M"), help="tokens to validate on")
    add("--shard_tokens", type=count, default=dataset.SHARD_TOKENS, help="tokens of a shard")
    add("--input", nargs="+", action="extend", metavar="FILE", help="local parquet or jsonl files")
    add("--bpe_dir", help="folder with GPT-2's vocab.bpe and encoder.json, for no network")
    add("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args()

    folder = dataset.data_root() / "fineweb_edu"
    dataset.refuse_existing(folder, args.overwrite)
    if args.bpe_dir:
        dataset.GPT2Tokenizer.install_bpe(args.bpe_dir)
    source = " ".join(args.input or [REPOSITORY, SAMPLE])
    with dataset.DatasetWriter(folder, dataset.GPT2Tokenizer(), source,
                               args.shard_tokens) as writer:
        texts = read_files(args.input) if args.input else stream()
        tokenize(texts, writer, {"val": args.val_tokens, "train": args.tokens})
        dataset.report(folder, writer.finish())


if __name__ == "__main__":
    dataset.run(main)
