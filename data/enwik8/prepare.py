"""enwik8, the first 100 MB of an English Wikipedia dump, by bytes: 90M train, 5M val, 5M test.

    python data/enwik8/prepare.py                   downloads enwik8.zip, 36 MB
    python data/enwik8/prepare.py --input=FILE      enwik8, enwik8.gz or enwik8.zip
"""

import gzip
import io
import sys
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.data import ByteTokenizer, data_folder, obtain, verified, write
from util.settings import UserError, guarded, settings

URL = "http://mattmahoney.net/dc/enwik8.zip"
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"  # of enwik8 itself


def unpack(content):
    """enwik8 from the bytes of a .gz or .zip file, or from its own."""
    try:
        if content[:2] == b"\x1f\x8b":
            return gzip.decompress(content)
        if content[:2] == b"PK":
            return zipfile.ZipFile(io.BytesIO(content)).read("enwik8")
    except (OSError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as e:
        raise UserError(f"the archive of enwik8 is damaged ({e}): fetch it again") from None
    return content


@guarded
def main(argv):
    s, _ = settings({"input": ""}, argv)
    content = verified(unpack(obtain(s.input, URL)), SHA256, s.input or URL)
    ends = {"train": (0, 90_000_000), "val": (90_000_000, 95_000_000), "test": (95_000_000, None)}
    parts = {split: [content[begin:end].decode()] for split, (begin, end) in ends.items()}
    write(data_folder("enwik8"), ByteTokenizer(), URL, **parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
