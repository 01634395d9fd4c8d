"""Formats of chat models that may be chosen by name, as templates."""

from typing import NamedTuple


class Named(NamedTuple):
    """A format: its template, and the texts in it that must be tokens of the vocabulary."""

    template: str
    tokens: tuple[str, ...] = ()


# Meta, llama/generation.py (chat_completion). In token ids, llama2.py writes it.
LLAMA2 = """\
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('expected user and assistant in turn, found ' + message.role) -}}
    {%- endif -%}
    {%- set content = (system if loop.first else '') + message.content -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + content | trim + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
# Meta, llama3/llama/tokenizer.py (ChatFormat).
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
# OpenAI's chatml.md, and the template of that name in TRL.
CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
# HuggingFaceH4/zephyr-7b-beta, and TinyLlama's chat models. The tags are text there.
ZEPHYR = """\
{%- for message in messages -%}
    {%- if message.role not in ('system', 'user', 'assistant') -%}
        {{- raise_exception('expected system, user or assistant, found ' + message.role) -}}
    {%- endif -%}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
# lm-sys, fastchat/conversation.py (vicuna_v1.1, of Vicuna 1.1 to 1.5).
VICUNA = """\
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = messages[0].content | trim -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = 'A chat between a curious user and an artificial intelligence assistant. '
        + 'The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- bos_token + system + ' ' -}}
{%- for message in turns -%}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('expected user and assistant in turn, found ' + message.role) -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- 'USER: ' + message.content | trim + ' ' -}}
    {%- else -%}
        {{- 'ASSISTANT: ' + message.content | trim + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
# Layouts for models without a template of their own. A text and what follows it:
PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- message.content -}}
    {%- if message.role == 'assistant' -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
# and instructions, under headings that are usual for them.
INSTRUCTION = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '### Instruction:\\n' + message.content | trim + '\\n\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '### Response:\\n' + message.content | trim + eos_token + '\\n\\n' -}}
    {%- elif message.role == 'system' -%}
        {{- message.content | trim + '\\n\\n' -}}
    {%- else -%}
        {{- raise_exception('expected system, user or assistant, found ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""
NAMED = {
    "llama2": Named(LLAMA2),
    "llama3": Named(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": Named(CHATML, ("<|im_start|>", "<|im_end|>")),
    "zephyr": Named(ZEPHYR),
    "vicuna": Named(VICUNA),
    "plain": Named(PLAIN),
    "instruction": Named(INSTRUCTION),
}
