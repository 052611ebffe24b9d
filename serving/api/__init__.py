"""The HTTP routes: completions, chat, admission, keys."""
