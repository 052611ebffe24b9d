"""Fields of OpenAI's and vLLM's interfaces that this endpoint lacks, each with the values that change nothing.

The rule: what would change the answer is refused, everything else is accepted.
"""

import json
from collections.abc import Mapping
from typing import Any

HarmlessValues = Mapping[str, tuple[Any, ...]]
"""The harmless values of each field, besides null. A type stands for all of its values."""


def _each(*values: Any, names: str) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), values)


FIELDS: HarmlessValues = {
    **_each(
        names="allowed_token_ids audio cache_salt chat_template dimensions guided_choice guided_grammar guided_json "
        "guided_regex prediction prompt_embeds reasoning_effort structured_outputs truncate_prompt_tokens verbosity "
        "web_search_options"
    ),
    # These have no effect here: nothing is stored or billed, there are no tools, and GPT-2 adds no tokens.
    **_each(bool, names="add_special_tokens parallel_tool_calls store"),
    **_each(str, names="prompt_cache_key prompt_cache_retention safety_identifier service_tier"),
    **_each(dict, names="metadata"),
    # These are the defaults.
    **_each([], names="bad_words documents functions logits_processors tools"),
    **_each({}, names="chat_template_kwargs mm_processor_kwargs"),
    **_each(True, names="add_generation_prompt detokenize skip_special_tokens spaces_between_special_tokens"),
    **_each(False, names="continue_final_message include_stop_str_in_output use_beam_search"),
    **_each(False, names="echo return_tokens_as_token_ids"),  # the first of a chat
    **_each(0, names="priority"),
    **_each("none", "auto", names="function_call tool_choice"),
    "best_of": (1,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
# Servers and client libraries write these beside the text of a message; `type` is lm-eval's.
MESSAGE_FIELDS: HarmlessValues = {
    **_each(names="audio function_call"),
    **_each([], names="annotations tool_calls"),
    **_each("", names="reasoning reasoning_content refusal"),
    "provider_specific_fields": ({},),
    "type": ("text", "message"),
}


def is_harmless(name: str, value: Any, table: HarmlessValues) -> bool:
    return name in table and (
        value is None
        or any(
            isinstance(value, known) if isinstance(known, type) else type(value) is type(known) and value == known
            for known in table[name]
        )
    )


def advice(name: str, table: HarmlessValues) -> str:
    """Tells a client what to do about a field whose value is not harmless."""
    kinds = {bool: "true or false", str: "any text", dict: "any object"}
    values = [kinds[known] if isinstance(known, type) else json.dumps(known) for known in table[name]]
    return f"leave it out{', or give ' if values else ''}{' or '.join(values)}"
