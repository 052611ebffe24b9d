"""Fields of OpenAI's and vLLM's interfaces that this endpoint does not have, each with the values that change nothing.

The rule: what would change the answer is refused, and what would not is accepted.
"""

import json
from collections.abc import Mapping
from typing import Any

HarmlessValues = Mapping[str, tuple[Any, ...]]
"""By field, beside null. A type stands for all of its values."""

FIELDS: HarmlessValues = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (bool,),  # GPT-2 vocabularies add none
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),  # of a chat
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "metadata": (dict,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (bool,),  # there are no tools
    "prediction": (),
    "priority": (0,),
    "prompt_cache_key": (str,),
    "prompt_cache_retention": (str,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "safety_identifier": (str,),
    "service_tier": (str,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (bool,),  # nothing is stored
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
# What servers and client libraries write beside the text of a message.
MESSAGE_FIELDS: HarmlessValues = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "provider_specific_fields": ({},),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_calls": ([],),
    "type": ("text", "message"),  # lm-eval
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
    """What a client can do whose value of the field is not harmless."""
    kinds = {bool: "true or false", str: "any text", dict: "any object"}
    values = [kinds[known] if isinstance(known, type) else json.dumps(known) for known in table[name]]
    return f"leave it out{', or give ' if values else ''}{' or '.join(values)}"
