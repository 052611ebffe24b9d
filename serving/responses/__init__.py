"""OpenAI's Responses API: requests as chats, and answers of chats as responses. Nothing is stored."""
