"""Compares what the chat templates of two versions make of a few conversations."""

from model.text.chat_probe import ChatProbe


def chat_misfit(live: ChatProbe, candidate: ChatProbe) -> str:
    """Returns why clients' chats would suffer if the candidate replaced the live version; empty if
    they would not."""
    if live.is_chat_tuned != candidate.is_chat_tuned:
        has, had = ("a", "none") if candidate.is_chat_tuned else ("no", "one")
        return f"has {has} chat template, and the live version has {had}: chats would be written in another way"
    for name in live.hashes:
        if name in candidate.refusals:
            return f"cannot write {name}, which the live version can: {candidate.refusals[name]}"
    if candidate.end_of_turn != live.end_of_turn:
        return (
            f"ends an answer with another token (id {candidate.end_of_turn}) than the live version "
            f"(id {live.end_of_turn}), by its chat template"
        )
    return ""


def chat_notice(live: ChatProbe, candidate: ChatProbe) -> str:
    """Returns in what the candidate writes chats otherwise than the live version; empty if in
    nothing."""
    changed = [
        name for name, text_hash in live.hashes.items() if candidate.hashes.get(name) != text_hash
    ]
    return (
        f"its chat template writes {', '.join(changed)} otherwise than the live version's"
        if changed
        else ""
    )
