"""Models of other projects: which files of a folder are the model, and what its configuration and tokenizer mean.

layouts.py          finds the model among a folder's files
folders.py          explains a folder or file that is not a checkpoint of ours, and names the next command
config_json.py      reads Hugging Face's configuration, key by key
params_json.py      reads and writes Meta's configuration
keys.py             reads keys by type and refuses those that are not supported
vocabulary.py       finds the tokenizer that belongs to the weights
tokenizer_json.py   writes Hugging Face's tokenizer, and compares it with SentencePiece's
"""
