"""Hugging Face's formats. So far the tokenizer."""

import numpy as np

from util.data import EOT
from util.settings import UserError, optional


class HFTokenizer:
    """The text of a tokenizer.json. vocab_size may exceed the tokenizer's own: models pad."""

    kind = "hf"

    def __init__(self, text, vocab_size=0, eot=None):
        try:
            self.text, self.bpe = text, optional("tokenizers").Tokenizer.from_str(text)
        except UserError:
            raise
        except Exception as e:  # what its parser raises has no other type
            raise UserError(f"the tokenizer.json is damaged ({e}): use another") from None
        self.bpe.encode_special_tokens = True  # their names in a text are text
        self.vocab_size = vocab_size or self.bpe.get_vocab_size()
        self.eot = self.bpe.token_to_id(EOT) if eot is None else eot

    def encode(self, text):
        return np.array(self.bpe.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def meta(self):
        return {"json": self.text}
