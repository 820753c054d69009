"""Small chat templates, each of the kind of a well-known model family, and tokenizers with their control tokens.

Written for the tests: they have the traits that matter (ends of turns, roles that are missing, tools, reasoning, what is
trimmed), not the words of the originals.
"""

from dataclasses import dataclass
from pathlib import Path

TEXTS = [
    "The weather in Lima is 18 degrees and the weather in Quito is 20 degrees.",
    "You are a helpful assistant. user system assistant tool model",
    "Name a fruit. An apple is a fruit, and an apple falls not far from the tree.",
]


@dataclass(frozen=True)
class Kind:
    """One kind of chat template, with its control tokens; tokens in `plain` are added, but not special."""

    template: str
    control: tuple[str, ...]
    eos: str
    plain: tuple[str, ...] = ()
    has_system: bool = True
    has_tools: bool = False
    has_reasoning: bool = False


CHATML_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        REASONING
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

NO_THINKING = (
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)

LAST_REASONING = """
        {%- if loop.last or message.reasoning_content and loop.index0 > messages | length - 4 %}
            {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {%- endif %}"""

LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA_3_TOOLS = """{{- bos_token }}
{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + tools | tojson + '<|eot_id|>' }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\\n\\n' }}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eom_id|>' }}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA_2 = """{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('no system role') }}{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI_3 = """{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant') %}
        {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""

R1 = """{{- bos_token }}
{%- for message in messages if message.role == 'system' %}{{- message.content }}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- if message.content is none %}
            {{- '<｜Assistant｜>' }}
            {%- for call in message.tool_calls %}{{- '<｜call｜>' + call.function.name + call.function.arguments }}{%- endfor %}
            {{- eos_token }}
        {%- else %}
            {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}
        {%- endif %}
    {%- endif %}
    {%- if message.role == 'tool' %}{{- '<｜output｜>' + message.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

ZEPHYR = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + (eos_token if message.role == 'assistant' else '') + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

COMMAND_R = """{{- bos_token }}
{%- set names = {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} %}
{%- for message in messages %}
    {{- '<|START_OF_TURN_TOKEN|>' + names[message.role] }}
    {{- ('<|START_RESPONSE|>' if message.role == 'assistant' else '') + message.content.strip() }}
    {{- ('<|END_RESPONSE|>' if message.role == 'assistant' else '') + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{%- endif %}"""

PARTS = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_CALLS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_COMMAND_R = (
    "START_OF_TURN_TOKEN",
    "END_OF_TURN_TOKEN",
    "SYSTEM_TOKEN",
    "USER_TOKEN",
    "CHATBOT_TOKEN",
    "START_RESPONSE",
    "END_RESPONSE",
)
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")

KINDS = {
    "qwen2.5": Kind(
        CHATML_TOOLS.replace("REASONING", "").replace(NO_THINKING, ""), _CHATML, "<|im_end|>", _CALLS, has_tools=True
    ),
    "qwen3": Kind(
        CHATML_TOOLS.replace("REASONING", LAST_REASONING),
        _CHATML,
        "<|im_end|>",
        _CALLS,
        has_tools=True,
        has_reasoning=True,
    ),
    "llama3": Kind(LLAMA_3, _HEADERS, "<|eot_id|>"),
    "llama3.1": Kind(LLAMA_3_TOOLS, _HEADERS, "<|eot_id|>", has_tools=True),
    "llama2": Kind(LLAMA_2, ("<s>", "</s>"), "</s>"),
    "gemma": Kind(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", has_system=False),
    "phi3": Kind(PHI_3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), "<|endoftext|>"),
    "r1": Kind(
        R1,
        ("<｜begin｜>", "<｜end｜>", "<｜User｜>", "<｜Assistant｜>", "<｜call｜>", "<｜output｜>"),
        "<｜end｜>",
        _CALLS,
    ),
    "zephyr": Kind(ZEPHYR, ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"), "</s>"),
    "command-r": Kind(
        COMMAND_R,
        ("<BOS_TOKEN>", *(f"<|{name}|>" for name in _COMMAND_R)),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "parts": Kind(PARTS, _CHATML, "<|im_end|>"),
}


def save_tokenizer(kind: Kind, folder: Path) -> Path:
    """Write a byte-level BPE tokenizer with the template and control tokens of a kind; BOS is its first control token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(kind.control),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in kind.plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=kind.control[0], eos_token=kind.eos)
    tokenizer.chat_template = kind.template
    tokenizer.save_pretrained(folder)
    return folder
