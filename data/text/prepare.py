"""Your own text: files and folders of UTF-8, plain, .gz or .xz.

    python data/text/prepare.py FILE --name=mine                       by bytes: any text
    python data/text/prepare.py FOLDER a.txt.gz --name=mine --tokenizer=gpt2
    python data/text/prepare.py FILE --name=mine --tokenizer=hf:DIR    as a model of Hugging Face's

Every file is a document, read once however often it is named; in folders, hidden files are left
out, and links to folders are not followed. Validation takes whole files in a random order (always
the same) while they fit into its share, and then the end of the largest other file for what is
missing. It gets VAL_CHARACTERS at least, or half of a shorter text.
"""

import random
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util import data
from util.settings import ROOT, guarded, public, require, settings

# ---- settings ------------------------------------------------------------------------------------
name = ""  # the dataset: train.py --dataset=NAME
tokenizer = "byte"  # byte, char, gpt2 or hf:DIR
val = 0.1  # share of the characters that validate
# --------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
VAL_CHARACTERS = 5000  # by bytes about 20 windows of 256


def find_files(paths):
    """The files among `paths` and in the folders among them, by their real path, sorted."""
    files = set()
    for path in map(Path, paths):
        path = path.expanduser()
        require(path.exists(), f"{path} does not exist: name a text file or a folder of them")
        inside = path.rglob("*") if path.is_dir() else [path]
        files |= {p.resolve() for p in inside if p.is_file() and not any(
            part.startswith(".") for part in p.relative_to(path).parts)}
    return sorted(files)


def validation_tails(sizes, share):
    """{file: how many of its last characters validate} of texts of `sizes`, {file: characters}:
    whole files, and the end of one more."""
    total, tails = sum(sizes.values()), dict.fromkeys(sizes, 0)
    missing = max(total - int((1 - share) * total), min(VAL_CHARACTERS, total // 2))
    missing = min(missing, total - 1)
    for file in random.Random(0).sample(list(sizes), len(sizes)):
        if sizes[file] <= missing:
            tails[file] = sizes[file]
            missing -= sizes[file]
    rest = [file for file in sizes if tails[file] == 0]
    tails[max(rest, key=lambda file: (sizes[file], file))] = missing
    return tails


def choose_tokenizer(kind, characters):
    if kind.startswith("hf:"):
        return data.HFTokenizer.from_folder(kind.removeprefix("hf:"))
    kinds = {"byte": data.ByteTokenizer, "gpt2": data.GPT2Tokenizer,
             "char": lambda: data.CharTokenizer("".join(sorted(characters)))}
    require(kind in kinds, f"--tokenizer must be {', '.join(kinds)} or hf:DIR, not {kind!r}")
    return kinds[kind]()


@guarded
def main(argv):
    paths = [arg for arg in argv if not arg.startswith("--")]
    s, _ = settings(DEFAULTS, [arg for arg in argv if arg.startswith("--")])
    require(paths and s.name, "say what to read and what to call it: prepare.py FILE --name=mine")
    folder = data.data_folder(s.name)
    for place in (folder, ROOT / "data" / s.name):
        require(not (place / "prepare.py").exists(),
                f"{place} has a prepare.py of its own: choose another --name")
    require(0 < s.val < 1, f"--val must be between 0 and 1, not {s.val}")
    sizes, characters = {}, set()
    for file in find_files(paths):  # all are read before anything is written
        text = data.read_text(file)
        characters |= set(text)
        if text:
            sizes[file] = len(text)
    require(sum(sizes.values()) > 1, f"there is no text in {', '.join(paths)}")
    encoder, tails = choose_tokenizer(s.tokenizer, characters), validation_tails(sizes, s.val)
    whole = sum(tails[file] == sizes[file] for file in sizes)
    share = sum(tails.values()) / sum(sizes.values())
    print(f"{len(sizes)} files, of which {whole} and the end of another validate: {share:.0%}")
    train = (data.read_text(f)[: sizes[f] - tails[f]] for f in sizes if tails[f] < sizes[f])
    val = (data.read_text(f)[sizes[f] - tails[f] :] for f in sizes if tails[f] > 0)
    data.write(folder, encoder, " ".join(paths), train=train, val=val)
    start = f"--init_from={s.tokenizer}" if s.tokenizer.startswith("hf:") else "config/nano.py"
    print("next:", shlex.join(["python", "train.py", start, f"--dataset={s.name}",
                               f"--out_dir=out/{folder.name}"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
