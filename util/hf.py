"""Llama and Qwen3 as folders of Hugging Face, in and out.

    python train.py --init_from=hf:DIR --dataset=NAME      from the weights of such a folder
    python data/text/prepare.py FILE --name=NAME --tokenizer=hf:DIR      NAME for it
    python util/hf.py --out_dir=RUN --to=FOLDER            the GPT level of a run as such a folder

    config.json          the shape             model.safetensors   the weights, or shards that
    tokenizer.json       the vocabulary        model.safetensors.index.json names

The GPT level is a Llama, with q/k norm a Qwen3, so weights keep their names, but for a prefix. A
folder that asks for something else, such as biases or scaled rotary embeddings, is refused.
"""

import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model import CascadeConfig, CascadeLM
from util import checkpoint
from util.data import HFTokenizer, read_json, writing
from util.settings import UserError, guarded, optional, require, settings

QK_NORM = {"LlamaForCausalLM": False, "Qwen3ForCausalLM": True}
SHAPE = {"vocab_size": "vocab_size", "n_embd": "hidden_size", "n_hidden": "intermediate_size",
         "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps"}
PLAIN = {  # what this network has of what a config.json, with its rope_scaling, may ask for
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "quantization_config": None, "rope_type": "default", "type": "default", "factor": 1,
    "partial_rotary_factor": 1}


# ---- in ------------------------------------------------------------------------------------------


def read_shape(folder):
    """(fields of CascadeConfig, the longest context that the model has seen) of config.json."""
    found = read_json(folder, "config.json")
    # this decides where it is given, whatever the width
    found.setdefault("use_sliding_window", found.get("sliding_window") is not None)
    name = " ".join(found.get("architectures") or ["missing"])
    require(name in QK_NORM, f"hf:{folder}: its architecture is {name}, not {' or '.join(QK_NORM)}")
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        found |= found.get(key) or {}
    layers = set(found.get("layer_types") or ["full_attention"])
    require(layers == {"full_attention"}, f"hf:{folder}: this network lacks its {sorted(layers)}")
    for key, ours in PLAIN.items():
        require(found.get(key, ours) == ours,
                f"hf:{folder}: its {key} is {found.get(key)!r}, which this network lacks")
    missing = [key for key in SHAPE.values() if not found.get(key)
               and key not in ("head_dim", "num_key_value_heads")]
    require(not missing, f"hf:{folder}: its config.json lacks {', '.join(missing)}")
    shape = {ours: found.get(theirs) or 0 for ours, theirs in SHAPE.items()}  # 0: from the others
    shape |= {"rope_base": float(found.get("rope_theta") or 10000), "qk_norm": QK_NORM[name],
              "tie_embeddings": bool(found.get("tie_word_embeddings"))}
    return shape, found.get("max_position_embeddings") or math.inf


def read_weights(folder, shape):
    """{our name: float32 tensor} of the GPT level of this shape. [MASK], which the folder lacks,
    begins as the mean of the embeddings."""
    load = optional("safetensors.torch").load_file
    files, weights = {"model.safetensors"}, {}
    if not Path(folder, *files).exists():
        index = read_json(folder, "model.safetensors.index.json")
        files = set(index.get("weight_map", {}).values())
    try:
        for file in files:
            weights |= load(Path(folder, file))
    except Exception as e:  # a damaged file raises whatever its reader makes of it
        raise UserError(f"hf:{folder}: its weights cannot be read ({e}): fetch them "
                        "again") from None
    weights = {name.removeprefix("model."): w.float() for name, w in weights.items()
               if not name.endswith("rotary_emb.inv_freq")}  # a table in older folders
    if shape["tie_embeddings"]:
        weights.pop("lm_head.weight", None)  # some store it twice
    with torch.device("meta"):
        config = CascadeConfig(**shape, seq_len=1, block_size=1, local_window=0)
        want = {name: w.shape for name, w in CascadeLM(config).state_dict().items()}
    rows = weights.get("embed_tokens.weight", torch.zeros(1, 1))  # if missing, it is named below
    weights["embed_tokens.weight"] = torch.cat([rows, rows.mean(dim=0, keepdim=True)])
    found = {name: w.shape for name, w in weights.items()}
    wrong = [name for name in found | want if found.get(name) != want.get(name)]
    require(not wrong, f"hf:{folder}: this network has no place, or another shape, for the weights "
                       f"{', '.join(wrong[:3])}")
    return weights


def read_folder(folder, seq_len):
    """A state as util/checkpoint.py's, of a GPT: what training starts from."""
    shape, longest = read_shape(folder)
    require(seq_len <= longest, f"hf:{folder} has read {longest} tokens at most: set --seq_len")
    tokenizer = HFTokenizer.from_folder(folder)
    return {"config": shape, "settings": {"draft_weight": 0.0},
            "model": read_weights(folder, shape),
            "meta": {"tokenizer": "hf", "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
                     **tokenizer.meta}}


# ---- out -----------------------------------------------------------------------------------------


def write_folder(folder, config, weights, meta):
    """The GPT level of `weights`, a model's state dict, as read_shape and read_weights read it;
    and its tokenizer.json, if it has one. [MASK] and the local head stay behind."""
    save = optional("safetensors.torch").save_file
    kind = "Qwen3" if config.qk_norm else "Llama"
    shape = {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()}
    shape |= {
        "architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "hidden_act": "silu",
        "max_position_embeddings": config.seq_len, "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tie_embeddings, "attention_bias": False,
        "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": meta.get("eot")}
    weights = weights | {"embed_tokens.weight": weights["embed_tokens.weight"][:-1].clone()}
    named = {name if name == "lm_head.weight" else f"model.{name}": w.contiguous()
             for name, w in weights.items() if not name.startswith("local.")}
    with writing(folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text(json.dumps(shape, indent=2) + "\n")
        if "json" in meta:
            Path(folder, "tokenizer.json").write_text(meta["json"], encoding="utf-8")
        save(named, Path(folder, "model.safetensors"), {"format": "pt"})


@guarded
def main(argv):
    s, _ = settings({"out_dir": "out/nano", "to": ""}, argv)
    state = checkpoint.load(checkpoint.find(s.out_dir))
    require(state["config"]["context"] == "causal", f"{s.out_dir} has no GPT level to write")
    require(s.to and not Path(s.to).exists(), "set --to=FOLDER, which does not exist yet")
    write_folder(s.to, CascadeConfig(**state["config"]), state["model"], state["meta"])
    print(f"{s.to}: the GPT level of step {state['step']} of {s.out_dir}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
