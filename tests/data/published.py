"""Short forms of published chat templates, which keep what those do with tool calls, reasoning and tools."""

# Arguments go through tojson, with or without the call's outer object; empty content leaves no line.
QWEN25 = """
{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Reasoning is kept behind the last question only; the last turn has a think block, be it empty. Arguments are written
# as they are if they are text. %s: what a prompt ends with (nothing; Qwen3-Thinking opens the block).
_QWEN3 = """
{%%- if tools %%}
    {{- '<|im_start|>system\\n<tools>' }}
    {%%- for tool in tools %%}{{- '\\n' + tool | tojson }}{%%- endfor %%}
    {{- '\\n</tools><|im_end|>\\n' }}
{%%- endif %%}
{%%- set ns = namespace(searching=true, question=messages | length - 1) %%}
{%%- for message in messages[::-1] %%}
    {%%- set from_tool = message.content is string and message.content.startswith('<tool_response>') %%}
    {%%- if ns.searching and message.role == 'user' and not from_tool %%}
        {%%- set ns.searching = false %%}
        {%%- set ns.question = messages | length - 1 - loop.index0 %%}
    {%%- endif %%}
{%%- endfor %%}
{%%- for message in messages %%}
    {%%- set content = message.content if message.content is string else '' %%}
    {%%- if message.role == 'assistant' %%}
        {%%- set thought = '' %%}
        {%%- if message.reasoning_content is string %%}
            {%%- set thought = message.reasoning_content %%}
        {%%- elif '</think>' in content %%}
            {%%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %%}
            {%%- set content = content.split('</think>')[-1].lstrip('\\n') %%}
        {%%- endif %%}
        {{- '<|im_start|>assistant\\n' }}
        {%%- if loop.index0 > ns.question and (loop.last or thought) %%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%%- endif %%}
        {{- content }}
        {%%- for call in message.tool_calls or [] %%}
            {%%- if not loop.first or content %%}{{- '\\n' }}{%%- endif %%}
            {%%- if call.function %%}{%%- set call = call.function %%}{%%- endif %%}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%%- endfor %%}
        {{- '<|im_end|>\\n' }}
    {%%- elif message.role == 'tool' %%}
        {%%- if loop.first or messages[loop.index0 - 1].role != 'tool' %%}{{- '<|im_start|>user' }}{%%- endif %%}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%%- if loop.last or messages[loop.index0 + 1].role != 'tool' %%}{{- '<|im_end|>\\n' }}{%%- endif %%}
    {%%- else %%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%%- endif %%}
{%%- endfor %%}
{%%- if add_generation_prompt %%}{{- '<|im_start|>assistant\\n%s' }}{%%- endif %%}
"""
QWEN3 = _QWEN3 % ""
QWEN3_THINKING = _QWEN3 % "<think>\\n"

# Text is put together, so arguments must be text. Calls are looked for by %s; tools themselves are not written; the
# list of calls begins once only, however many messages call. %s, %s: what of the content, and what ends a prompt.
_DEEPSEEK = """
{%%- set ns = namespace(begun=false, answered=false) %%}
{{- bos_token }}
{%%- for message in messages if message.role == 'system' %%}{{- message.content }}{%%- endfor %%}
{%%- for message in messages %%}
    {%%- if message.role == 'user' %%}
        {%%- set ns.answered = false %%}
        {{- '<|user|>' + message.content }}
    {%%- elif message.role == 'tool' %%}
        {%%- set ns.answered = true %%}
        {{- '<output>' + message.content + '</output>' }}
    {%%- elif message.role == 'assistant' and %s %%}
        {%%- set ns.answered = false %%}
        {%%- for call in message.tool_calls %%}
            {{- '\\n' if ns.begun else '<|assistant|>' + (message.content or '') + '<calls>' }}
            {%%- set ns.begun = true %%}
            {{- '<call>' + call.type + '<sep>' + call.function.name + '\\n' + call.function.arguments + '</call>' }}
        {%%- endfor %%}
        {{- '</calls></s>' }}
    {%%- elif message.role == 'assistant' %%}
        {{- '</outputs>' + message.content if ns.answered else '<|assistant|>' + %s }}
        {{- '</s>' }}
        {%%- set ns.answered = false %%}
    {%%- endif %%}
{%%- endfor %%}
{%%- if ns.answered %%}{{- '</outputs>' }}{%%- endif %%}
{%%- if add_generation_prompt and not ns.answered %%}{{- '<|assistant|>%s' }}{%%- endif %%}
"""
DEEPSEEK_V3 = _DEEPSEEK % ("'tool_calls' in message", "message.content", "")
R1_DISTILL = _DEEPSEEK % ("message.content is none", "message.content.split('</think>')[-1]", "<think>\\n")

# Every role alike: no word of tools.
SMOLLM2 = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA30 = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# One call a message, known by the key alone, whose content is dropped; answers go through tojson.
LLAMA31 = """
{{- bos_token }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + tool | tojson(indent=4) + '<|eot_id|>' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# Tools stand before the last question; the system message only in a question that nothing follows. Calls are known by
# the key, their content is dropped, and their ids have nine characters.
MISTRAL_V3 = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == questions[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""

# The call's name stands in its id alone, and the block of a final answer stays empty.
KIMI_K2 = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<think>' + (message.reasoning_content or '') + '</think>' }}
        {%- for call in message.tool_calls %}
            {{- '<call>' + call.id + '<args>' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
        {%- endfor %}
    {%- else %}
        {{- ('<think></think>' if message.role == 'assistant' else '') + message.content }}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
