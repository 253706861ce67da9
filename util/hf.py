"""A Hugging Face folder to and from our config and weights: Llama, Qwen3, Qwen2 without biases.

    config.json          `read_config`: the fields of CascadeConfig that it decides
    model.safetensors    or the shards that model.safetensors.index.json names: `read_weights`
    tokenizer.json       the vocabulary, which util/dataset.py reads: `check_tokens`

The GPT level is a Llama, with q/k norm a Qwen3, down to the half-split rotary layout, so both
directions are renaming. What a folder asks for and this network lacks is refused by name.
"""

import hashlib
import json
from contextlib import contextmanager
from math import inf
from pathlib import Path

import torch

from model import CascadeConfig, CascadeLM
from util.configurator import SettingsError, first_line, optional
from util.dataset import PLAIN_NAME, field

QK_NORM = {"LlamaForCausalLM": False, "Qwen2ForCausalLM": False, "Qwen3ForCausalLM": True}
SIZES = {"vocab_size": "vocab_size", "n_embd": "hidden_size", "n_hidden": "intermediate_size",
         "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "head_dim": "head_dim"}
SHAPE = (*SIZES, "rope_base", "norm_eps", "tie_embeddings", "qk_norm")  # what a folder decides
PLAIN = {  # of what a config.json may ask for, the values that this network has, the default first
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
    "use_sliding_window": (False,), "sliding_window": (None,), "rope_type": ("default",),
    "type": ("default",), "factor": (1,), "partial_rotary_factor": (1,),
    "layer_types": (["full_attention"],), "quantization_config": (None,)}
NAMES = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
         "head": "lm_head", "attn": "self_attn", "attn_norm": "input_layernorm",
         "mlp_norm": "post_attention_layernorm",
         **{name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}}


@contextmanager
def refusing(folder):
    """Whatever a stranger's folder makes its readers raise is a SettingsError in one line."""
    try:
        yield
    except Exception as e:
        kind = "" if isinstance(e, (ValueError, OSError)) else f"{type(e).__name__}: "
        raise SettingsError(f"hf:{folder} cannot be used ({kind}{first_line(e)}): give the folder "
                            "of a Llama or Qwen3 as save_pretrained writes it") from None


def read_config(folder, seq_len):
    """({field of CascadeConfig: value} for all of SHAPE, the architecture's name) of config.json.
    SettingsError for what this network lacks, and where it never saw `seq_len` tokens."""
    with refusing(folder):
        found = json.loads(Path(folder, "config.json").read_bytes())
        name = " ".join(field(found, "architectures", list))
        if name not in QK_NORM:
            raise ValueError(f"its architecture is {name}, not {', '.join(QK_NORM)}")
        for rope in ("rope_scaling", "rope_parameters"):  # of transformers 4, and 5
            found |= (rope := found.get(rope) or {})
            if any(isinstance(x, dict) for x in rope.values()):
                raise ValueError("its rope_parameters differ by layer, which this network lacks")
        found["layer_types"] = sorted(set(found.get("layer_types") or ["full_attention"]))
        if "use_sliding_window" in found:  # then it decides, whatever the width
            found["sliding_window"] = None
        for key, allowed in PLAIN.items():
            if found.get(key, allowed[0]) not in allowed:
                raise ValueError(f"its {key} is {found[key]!r}, which this network lacks")
        if seq_len > (longest := field(found, "max_position_embeddings", int, 1, 1 << 30)):
            raise ValueError(f"it has read {longest} tokens at most, and --seq_len is {seq_len}")
        shape = {ours: found.get(theirs) or 0 for ours, theirs in SIZES.items()}
        for ours in shape:  # 0: its default, which is ours too
            field(shape, ours, int, 0, 1000 if ours == "n_layer" else 1 << 24)
        shape |= {"rope_base": float(found.get("rope_theta", 10000)), "qk_norm": QK_NORM[name],
                  "norm_eps": float(found["rms_norm_eps"]),
                  "tie_embeddings": found.get("tie_word_embeddings") is True}
        if not (0 < shape["rope_base"] < inf and 0 < shape["norm_eps"] < inf):
            raise ValueError("its rope_theta or rms_norm_eps is no positive number")
        return shape, name


def check_tokens(folder, vocab_size, meta):
    """SettingsError unless a dataset's meta.json means by every id what the folder's model does."""
    path, found = Path(folder, "tokenizer.json"), None
    with refusing(folder):
        if path.exists():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
    if (found, vocab_size) != (meta.get("tokenizer_sha256"), meta["vocab_size"]):
        raise SettingsError(
            f"hf:{folder} has another vocabulary ({vocab_size:,} tokens) than the dataset "
            f"({meta['tokenizer']}, {meta['vocab_size']:,}): prepare your text with "
            f"python data/text/prepare.py --tokenizer=hf:{folder} --input=FILE --name=NAME")


def weight_names(c):
    """{their name: (our name, shape)} of the GPT level of a model with the CascadeConfig c."""
    shape = {name: getattr(c, name) for name in SHAPE}
    with torch.device("meta"):
        own = CascadeLM(CascadeConfig(objective="ar", seq_len=1, **shape)).state_dict()
    own["embed.weight"] = own["embed.weight"][:-1]  # [MASK] is ours alone
    return {".".join(NAMES.get(part, part) for part in name.split(".")): (name, tuple(x.shape))
            for name, x in own.items()}


def read_folder(folder, seq_len):
    """(fields of CascadeConfig as read_config finds them, the weights of read_weights)."""
    shape, _ = read_config(folder, seq_len)
    return shape, read_weights(folder, CascadeConfig(objective="ar", seq_len=1, **shape))


def read_weights(folder, c):
    """{our name: float32 tensor} of the GPT level, all that is in c but the local head. [MASK],
    which the folder has not, gets the mean of the embeddings."""
    safe_open = optional("safetensors", "--init_from=hf:DIR").safe_open
    with refusing(folder):
        files, index = ["model.safetensors"], Path(folder, "model.safetensors.index.json")
        if not Path(folder, files[0]).exists() and index.exists():
            shards = field(json.loads(index.read_bytes()), "weight_map", dict)
            files = sorted(set(shards.values()))
        wanted, found = weight_names(c), {}
        if c.tie_embeddings:  # some folders store the tied weight a second time
            wanted["lm_head.weight"] = "head.weight", wanted["model.embed_tokens.weight"][1]
        for file in files:
            if not PLAIN_NAME.fullmatch(file) or not Path(folder, file).is_file():
                raise ValueError(f"its {file} is missing")
            with safe_open(Path(folder, file), "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    if name.endswith("rotary_emb.inv_freq"):  # a table that older folders keep
                        continue
                    if name not in wanted:
                        raise ValueError(f"this network has no place for its {name}")
                    ours, shape = wanted[name]
                    if (given := tuple(tensors.get_slice(name).get_shape())) != shape:
                        raise ValueError(f"its {name} is {given}, not {shape}")
                    x = tensors.get_tensor(name)
                    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                        raise ValueError(f"its {name} is {x.dtype}")
                    if not x.isfinite().all():
                        raise ValueError(f"not all numbers of its {name} are finite")
                    found[ours] = x.float()
        for name, (ours, _) in wanted.items():
            if ours not in found and not (c.tie_embeddings and ours == "head.weight"):
                raise ValueError(f"its {name} is missing")
        embed = found["embed.weight"]
        if c.tie_embeddings and not torch.equal(found.pop("head.weight", embed), embed):
            raise ValueError("its lm_head.weight is not the embeddings, though they are tied")
    return found | {"embed.weight": torch.cat([embed, embed.mean(dim=0, keepdim=True)])}


def write_folder(folder, c, weights, meta):
    """The GPT level of `weights`, a model's state dict, into an existing folder: what read_config
    and read_weights read, bit for bit, and the tokenizer.json of `meta` if it has one."""
    save_file = optional("safetensors.torch", "an export").save_file
    tensors = {name: weights[ours][:shape[0]].clone()  # of the embeddings all but [MASK]
               for name, (ours, shape) in weight_names(c).items()}
    kind = "Qwen3" if c.qk_norm else "Llama"
    config = {
        "architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "hidden_act": "silu",
        **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()},
        "max_position_embeddings": c.seq_len, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_base,
        "tie_word_embeddings": c.tie_embeddings, "attention_bias": False, "torch_dtype": "float32",
        "bos_token_id": None, "eos_token_id": meta.get("eot"), "pad_token_id": None}
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if "tokenizer_json" in meta:
        Path(folder, "tokenizer.json").write_bytes(meta["tokenizer_json"].encode())
    save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})
