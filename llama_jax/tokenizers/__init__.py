"""The readers of tokenizers, one a kind of file, behind ``llama_jax.tokenizer.Tokenizer``.

files.py           which files a tokenizer has, which reader reads them, which tokens are BOS and EOS
reader.py          what a reader does, and tokens that files add to a vocabulary
sentencepiece.py   SentencePiece's tokenizer.model
table.py           tokenizer.json, checked before the tokenizers library sees it
table_reader.py    tokenizer.json, by the tokenizers library
patterns.py        regular expressions of a tokenizer.json that could take forever
tiktoken.py        LLaMA 3's tokenizer.model, turned into the same library's tokenizer
training.py        trains a SentencePiece model
borders.py         where a long text may be cut
"""
