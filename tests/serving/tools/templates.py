"""Short chat templates that offer tools, one for each format in which models write calls."""

HERMES_TEMPLATE = """\
{%- if tools %}<|system|>Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call one as <tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call>
{% endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor -%}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

MISTRAL_TEMPLATE = """\
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
{%- for message in messages -%}
{%- if message.tool_calls %}[TOOL_CALLS]{{ message.tool_calls | tojson }}
{%- else %}[{{ message.role }}]{{ message.content }}{% endif -%}
{%- endfor %}"""

QWEN_CODER_TEMPLATE = """\
{%- if tools %}<|system|>Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call one as <tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</tool_call>
{% endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items -%}
<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor -%}
</function>
</tool_call>{% endfor -%}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

MISTRAL_ARGS_TEMPLATE = """\
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
{%- for message in messages -%}
[{{ message.role }}]{{ message.content }}
{%- for call in message.tool_calls or [] -%}
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor -%}
{%- endfor %}"""

LLAMA_TEMPLATE = """\
{%- if tools %}Answer with {"name": NAME, "parameters": OBJECT} to call one of {{ tools | tojson }}
{% endif -%}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}<|assistant|>"""

WITHOUT_TOOLS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
UNKNOWN_FORMAT = (
    "{{ tools | tojson }}{% for message in messages %}{{ message.content }}{% endfor %}"
)
