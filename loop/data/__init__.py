"""Training data: chat JSONL in, packed micro-batches out.

reading.py recognises the formats; template.py and masking.py find what the assistant wrote; tokenise.py and cache.py do
it once; packing.py and dataset.py make batches; pydocs.py is the data that needs no file, tokenizer.py its tokenizer.
"""

from loop.data.dataset import Dataset, Document
from loop.data.load import load_dataset
from loop.data.tokenizer import load_tokenizer

__all__ = ["Dataset", "Document", "load_dataset", "load_tokenizer"]
