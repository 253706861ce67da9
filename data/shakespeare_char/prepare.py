"""
Tiny Shakespeare by characters, with nanoGPT's split and vocabulary (65): 1.1 MB.

    python data/shakespeare_char/prepare.py                   # downloads it, hash checked
    python data/shakespeare_char/prepare.py --input=FILE      # from a local copy
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util import dataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main():
    parser = dataset.Arguments(description=__doc__)
    parser.add_argument("--input", help="local copy of the text, 1,115,394 bytes")
    path, what = parser.parse_args().input, "tiny Shakespeare"
    text = dataset.verified(dataset.obtain(path, URL, what), SHA256, what).decode()
    folder = dataset.data_root() / "shakespeare_char"
    dataset.report(folder, dataset.write_char_dataset(folder, text, URL))


if __name__ == "__main__":
    dataset.run(main)
