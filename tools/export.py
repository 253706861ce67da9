"""The GPT level of a run as a Hugging Face folder, for every tool that reads those.

    python tools/export.py --out_dir=out/nano --to=DIR

DIR gets config.json, model.safetensors and, of a run on --tokenizer=hf: text, tokenizer.json: a
Llama, with q/k norm a Qwen3. What drafts stays behind: the local head and [MASK].
"""

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from any folder

from util import hf
from util.checkpoint import load_model
from util.configurator import SettingsError, guarded, override, writing

SETTINGS = {"out_dir": "out/nano", "to": "", "overwrite": False}  # replace `to`, if it is an export
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@guarded
def main(argv):
    s = SimpleNamespace(**override(SETTINGS, argv))
    to = Path(s.to)
    held = sorted(os.listdir(to)) if to.is_dir() else [to.name] * os.path.lexists(to)
    other = [name for name in held if name not in FILES]
    if not s.to or other or (held and not s.overwrite):
        remedy = "" if other else ", or replace this export by --overwrite=true"
        raise SettingsError(f"--to={s.to} holds {[*other, *held][:1]}: give a new folder{remedy}")
    model, state = load_model(s.out_dir)
    if model.config.context == "block":
        raise SettingsError(f"{s.out_dir} has no GPT level to export: train with --context=causal")
    if model.config.objective == "ar":
        raise SettingsError(f"{s.out_dir} is an AR baseline, which reads [MASK] as the beginning "
                            "of a text and is another model without: export a cascade's GPT level")
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{to.name}.", dir=to.parent) as folder:
            new = Path(folder, "new")
            new.mkdir()
            hf.write_folder(new, model.config, model.state_dict(), state["meta"])
            if to.exists():
                os.replace(to, Path(folder, "old"))
            os.replace(new, to)
    print(f"{to}: transformers.AutoModelForCausalLM.from_pretrained({str(to)!r}) reads it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
