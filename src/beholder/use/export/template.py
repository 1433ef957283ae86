"""A run's layout of a conversation as a Jinja template that other programs fill in."""

from __future__ import annotations

import json

from beholder.data.chat_template import TEMPLATE_DATE
from beholder.train.trained import TrainedRun

IMAGE_TOKEN = "<image>"

_FLATTEN = """\
{%- set seen = namespace(images=0, all=0, messages=[]) -%}
{%- for m in messages -%}
{%- if m.content is not string and m.content is not none -%}
{%- for p in m.content if p.type == 'image' -%}{%- set seen.all = seen.all + 1 -%}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.content is string -%}
{%- set seen.messages = seen.messages + [m] -%}
{%- else -%}
{%- set own = namespace(text='', front=true, images=0) -%}
{%- for p in m.content or [] -%}
{%- if p.type == 'image' -%}
{%- set seen.images = seen.images + 1 -%}
{%- set label = LABEL.replace('{k}', seen.images | string) if seen.all > 1 else '' -%}
{%- if label and not own.text.rstrip().endswith(label.rstrip()) -%}{%- set own.text = own.text + label -%}{%- endif -%}
{%- set own.text = own.text + IMAGE -%}
{%- if own.front -%}{%- set own.text = own.text + '\\n' -%}{%- endif -%}
{%- else -%}
{%- set said = p.text[1:] if own.front and own.text and p.text.startswith('\\n') else p.text -%}
{%- set own.text = own.text + said -%}
{%- if said -%}{%- set own.front = false -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set seen.messages = seen.messages + [{'role': m.role, 'content': own.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = seen.messages -%}
"""
"""Messages in parts become texts, with a marker where each image goes: on a line of its own before the first word, as
in training, else where it stands."""

_MARKED = """\
{%- set found = namespace(image='<__media__>', messages=[]) -%}
{%- for m in messages -%}
{%- if m.content is string -%}
{%- set texts = [m.content] -%}
{%- else -%}
{%- set texts = (m.content or []) | map(attribute='text') | list -%}
{%- endif -%}
{%- for text in texts if text and '<__media_' in text -%}
{%- set found.image = '<__media_' + text.split('<__media_')[1].split('>')[0] + '>' -%}
{%- endfor -%}
{%- endfor -%}
{%- set IMAGE = found.image -%}
{%- for m in messages -%}
{%- set own = namespace(parts=[]) -%}
{%- for p in ([{'type': 'text', 'text': m.content}] if m.content is string else m.content or []) -%}
{%- for text in (p.text or '').split(IMAGE) -%}
{%- if not loop.first -%}{%- set own.parts = own.parts + [{'type': 'image'}] -%}{%- endif -%}
{%- set own.parts = own.parts + [{'type': 'text', 'text': text}] -%}
{%- endfor -%}
{%- endfor -%}
{%- set found.messages = found.messages + [{'role': m.role, 'content': own.parts}] -%}
{%- endfor -%}
{%- set messages = found.messages -%}
"""
"""llama.cpp's marks of images, which a server draws anew each time it starts, become image parts."""

_PLAIN = """\
{{- BOS -}}
{%- for m in messages -%}
{%- if not loop.first and messages[loop.index0 - 1].role == 'assistant' -%}{{- '\\n' -}}{%- endif -%}
{%- if m.role == 'assistant' -%}
{{- m.content + EOS -}}
{%- else -%}
{%- set bare = m.content.replace(IMAGE, '').strip() -%}
{{- m.content -}}
{%- if not bare -%}{{- INSTRUCTIONS[0 if m.content.count(IMAGE) == 1 else 1] -}}{%- endif -%}
{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""
"""What the templates caption and conversation write; images without a word get the instruction."""


def chat_template(run: TrainedRun, token: str) -> str:
    """The run's layout of a conversation as a Jinja template, with ``token`` where an image goes."""
    head = f"{_set('LABEL', _say(run.encoder.image_label))}{_set('IMAGE', _say(token))}{_FLATTEN}"
    if token != IMAGE_TOKEN:
        head += (
            "{%- set seen.messages = [] -%}\n{%- for m in messages -%}\n"
            f"{{%- set text = m.content.replace({_say(IMAGE_TOKEN)}, IMAGE) -%}}"
            "{%- set seen.messages = seen.messages + [dict(m, content=text)] -%}\n"
            "{%- endfor -%}\n{%- set messages = seen.messages -%}\n"
        )
    return _from_texts(run, head)


def marked_template(run: TrainedRun) -> str:
    """The run's layout as a Jinja template for llama.cpp, which puts a mark where an image goes and, unlike a
    processor, nothing around it."""
    ids = (run.encoder.im_start_ids, run.encoder.im_end_ids)
    before, after = (_say(str(run.tokenizer.decode(i, clean_up_tokenization_spaces=False))) for i in ids)
    image = _set("IMAGE", f"{before} + IMAGE + {after}")
    return _from_texts(run, f"{_set('LABEL', _say(run.encoder.image_label))}{_MARKED}{image}{_FLATTEN}")


def _say(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _set(name: str, expression: str) -> str:
    return f"{{%- set {name} = {expression} -%}}\n"


def _from_texts(run: TrainedRun, head: str) -> str:
    """``head``, which makes texts of the messages, and what the run makes of these."""
    encoder = run.encoder
    if encoder.template != "chat":
        bos = "".join(run.tokenizer.convert_ids_to_tokens(i) for i in encoder.bos_ids)
        eos = run.tokenizer.convert_ids_to_tokens(encoder.eos_ids[0])
        instructions = f"[{_say(encoder.instruction)}, {_say(encoder.instruction_multi)}]"
        return f"{head}{_set('BOS', _say(bos))}{_set('EOS', _say(eos))}{_set('INSTRUCTIONS', instructions)}{_PLAIN}"
    return (head + _settled(run, parts=False)).rstrip("\n") + encoder.chat_text[0]


def native_template(run: TrainedRun) -> str:
    """The chat template of a run with a native model, which places images itself."""
    return _settled(run, parts=True).rstrip("\n") + run.encoder.chat_text[0]


def _settled(run: TrainedRun, *, parts: bool) -> str:
    """What the run gives its chat template besides the messages: where one asks for nothing else, as in training."""
    text, thinking = run.encoder.chat_text
    head, system = "", run.encoder.system
    if system is not None:
        content = json.dumps([{"type": "text", "text": system}] if parts else system, ensure_ascii=False)
        head += (
            "{%- if not messages or messages[0].role != 'system' -%}"
            f"{{%- set messages = [{{'role': 'system', 'content': {content}}}] + messages -%}}{{%- endif -%}}\n"
        )
    if "enable_thinking" in text:
        value = str(thinking).lower()
        head += f"{{%- if enable_thinking is not defined -%}}{{%- set enable_thinking = {value} -%}}{{%- endif -%}}\n"
    if "date_string" in text:
        date = json.dumps(TEMPLATE_DATE.strftime("%d %b %Y"))
        head += f"{{%- if date_string is not defined -%}}{{%- set date_string = {date} -%}}{{%- endif -%}}\n"
    return head
