"""FineWeb-Edu, the sample of 10 billion tokens, in GPT-2 tokens.

    pip install datasets
    python data/fineweb_edu/prepare.py                           streams 200M tokens: 400 MB on disk
    python data/fineweb_edu/prepare.py --tokens=1e10             all of it: 20 GB
    python data/fineweb_edu/prepare.py *.parquet --tokens=1e9    from local files, parquet or jsonl

The first documents, val_tokens in all, validate; those that follow train.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.data import GPT2Tokenizer, data_folder, write
from util.settings import UserError, guarded, optional, public, require, settings

# ---- settings ------------------------------------------------------------------------------------
tokens = 200_000_000  # to train on
val_tokens = 1_000_000
# --------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
REPOSITORY, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"


def texts(files):
    """The documents of local files, or of the sample, one by one."""
    source = {"path": REPOSITORY, "name": SAMPLE}
    if files:
        kind = "parquet" if files[0].endswith(".parquet") else "json"
        source = {"path": kind, "data_files": files}
    load = optional("datasets").load_dataset
    try:
        for row in load(**source, split="train", streaming=True):
            if not isinstance(row["text"], str):
                raise TypeError("a row without text")
            yield row["text"]
    except Exception as e:  # its readers and its network raise errors of several packages
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"the texts end with an error ({why}): try again, or name parquet or jsonl "
                        "files with a text in each row") from None


@guarded
def main(argv):
    files = [arg for arg in argv if not arg.startswith("--")]
    s, _ = settings(DEFAULTS, [arg for arg in argv if arg.startswith("--")])
    require(s.tokens > 0 and s.val_tokens > 0, "--tokens and --val_tokens must be at least 1")
    documents = texts(files)  # one stream, of which the second split takes what the first leaves
    write(data_folder("fineweb_edu"), GPT2Tokenizer(), " ".join(files) or f"{REPOSITORY} {SAMPLE}",
          at_most={"val": s.val_tokens, "train": s.tokens}, val=documents, train=documents)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
