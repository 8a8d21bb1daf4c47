"""Chat templates of several kinds, and what samples are made with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data import rendering
from nemo_hybrid.data.samples import Made, SampleMaker
from nemo_hybrid.data.sources import Record
from nemo_hybrid.data.template import Renderer
from nemo_hybrid.data.tokenizer import load_tokenizer

CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

LLAMA = """{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Reasoning is kept after the last question only, as Qwen3 does it; the prompt opens it, as Nemotron
# 3 does it, unless enable_thinking is false.
REASONING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
  {%- set inner = m.reasoning_content | default('') %}
  {%- if loop.index0 > ns.last and inner %}
    {{- '<think>\\n' + inner + '\\n</think>\\n' }}
  {%- else %}
    {{- '<think></think>' }}
  {%- endif %}
{%- endif %}
{{- m.content | default('') }}
{%- for call in m.tool_calls | default([]) %}
{{- '<tool_call>\\n' + call.function.name + ' ' }}
{%- for k, v in call.function.arguments.items() %}{{- k + '=' + v | tojson }}{%- endfor %}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>' }}
{{- '</think>' if enable_thinking is defined and not enable_thinking else '\\n' }}
{%- endif %}"""

TOOLS = """{%- if tools %}{{- '<|im_start|>system\\nTools:' }}
{%- for t in tools %}{{- ' ' + t | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
  {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
  {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
  {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
  {{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
  {%- for call in m.tool_calls or [] %}
    {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
    {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MARKED = """{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{% generation %}{{- ' ' + m.content + eos_token }}{% endgeneration %}
{%- else %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- endif %}
{%- endfor %}"""

TEMPLATES = {
    "chatml": CHATML, "llama": LLAMA, "reasoning": REASONING, "tools": TOOLS, "marked": MARKED
}  # fmt: skip

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ARGUMENTS = {"a": 2, "b": "é"}
CALL = {"type": "function", "function": {"name": "add", "arguments": json.dumps(ARGUMENTS)}}

OPTIONS: list[dict[str, Any]] = [
    *({"reasoning": how} for how in ("keep", "mask", "strip")),
    {"strip_reasoning": 0.999},
    {"truncate_reasoning": 0.999},
]


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def make(model: Path, record: dict[str, Any], **options: Any) -> Made:
    maker = SampleMaker(SampleOptions(**options), model, seed=0)
    return maker.make(Record("k#1", "k line 1", record, 1.0))


def learnt_texts(model: Path, record: dict[str, Any], **options: Any) -> list[list[str]]:
    """Decoded runs of learnt tokens, of each sample."""
    tokenizer = load_tokenizer(model)
    made = make(model, record, **options)
    assert not made.unusable, made.unusable
    found = []
    for sample in made.samples:
        edges = np.flatnonzero(np.diff(np.r_[0, sample.targets, 0]))
        runs = zip(edges[::2], edges[1::2], strict=True)
        found.append([tokenizer.decode(sample.ids[a:b].tolist()) for a, b in runs])
    return found


def render_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without another process, so that rendering can be broken."""

    def ask(self: Renderer, line: str) -> dict[str, Any]:
        request = json.loads(line)
        del request["seconds"]
        return dict(json.loads(json.dumps(rendering.answer_request(request))))

    monkeypatch.setattr(Renderer, "ask", ask)


def fault(model: Path, record: dict[str, Any], **options: Any) -> str:
    made = make(model, record, **options)
    assert not made.samples
    (unusable,) = made.unusable
    return unusable.why
