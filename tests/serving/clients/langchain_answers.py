"""Holds a conversation with an endpoint by LangChain, in the clients' environment, and prints JSON:
URL MODEL QUESTION…"""

import functools
import json
import operator
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

url, model, *questions = sys.argv[1:]
to = {"base_url": f"{url}/v1", "api_key": "none needed", "model": model, "max_retries": 0}
chat = ChatOpenAI(**to, temperature=0, max_tokens=8)
history = [SystemMessage("be brief")]
for number, question in enumerate(questions):
    history.append(HumanMessage(question))
    # The second one in parts, as applications show it.
    answer = (
        functools.reduce(operator.add, chat.stream(history))
        if number == 1
        else chat.invoke(history)
    )
    # An answer as it came, with all that the library adds to it, and one that an application has
    # kept as text.
    history.append(answer if number == 0 else AIMessage(answer.content))
embeddings = OpenAIEmbeddings(**to, check_embedding_ctx_length=False, chunk_size=256)
print(
    json.dumps(
        {
            "replies": [message.content for message in history if isinstance(message, AIMessage)],
            "text": OpenAI(**to, temperature=0, max_tokens=12).invoke("the quick"),
            "embeddings": embeddings.embed_documents(["fox", "lazy dog"] * 129)[-2:],
        }
    )
)
