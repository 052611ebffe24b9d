"""Asks an endpoint by litellm, in the clients' environment, and prints the answers as JSON: URL
MODEL."""

import json
import sys

import litellm

url, model = sys.argv[1:]
to = {"api_base": f"{url}/v1", "api_key": "none needed", "num_retries": 0}
asked = {
    "model": f"openai/{model}",
    "messages": [{"role": "user", "content": "the quick fox"}],
    "max_tokens": 12,
    "temperature": 0,
}
parts = litellm.completion(**asked, **to, stream=True, stream_options={"include_usage": True})
text = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="the quick", max_tokens=12, temperature=0, **to
)
vectors = litellm.embedding(model=f"openai/{model}", input=["fox", "lazy dog"], **to)
print(
    json.dumps(
        {
            "chat": litellm.completion(**asked, **to, metadata={"team": "a"}, user="u")
            .choices[0]
            .message.content,
            "streamed": "".join(
                part.choices[0].delta.content or "" for part in parts if part.choices
            ),
            "text": text.choices[0].text,
            "embeddings": [found["embedding"] for found in vectors.data],
        }
    )
)
