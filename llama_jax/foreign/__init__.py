"""Models of other projects: what a folder holds, and what its configuration and its tokenizer's files say.

layouts.py          which of a folder's files are the model
folders.py          what a folder or a file is that is no checkpoint of ours, and the command that goes on
config_json.py      Hugging Face's configuration, key by key
params_json.py      Meta's
keys.py             how both are read
vocabulary.py       which tokenizer belongs to the weights
tokenizer_json.py   Hugging Face's tokenizer, written, read and compared with SentencePiece's
"""
