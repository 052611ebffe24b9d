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
