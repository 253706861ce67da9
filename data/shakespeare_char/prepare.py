"""Tiny Shakespeare by characters, with nanoGPT's split and vocabulary (65 characters): 1.1 MB.

    python data/shakespeare_char/prepare.py                   downloads it
    python data/shakespeare_char/prepare.py --input=FILE      the same text from a local copy
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.data import obtain, verified, write_characters
from util.settings import guarded, settings

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@guarded
def main(argv):
    s, _ = settings({"input": ""}, argv)
    text = verified(obtain(s.input, URL), SHA256, s.input or URL).decode()
    write_characters("shakespeare_char", text, URL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
