"""Text in, token ids out, and back again token by token.  Needs neither torch nor transformers."""

from __future__ import annotations

from penstock.text.detokenizer import Detokenizer
from penstock.text.stop import StopStrings
from penstock.text.stream import TextStream
from penstock.text.tokenizer import TextTokenizer, load_tokenizer

__all__ = ["Detokenizer", "StopStrings", "TextStream", "TextTokenizer", "load_tokenizer"]
