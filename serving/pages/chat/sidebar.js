// Draws the list of earlier conversations: each a link, with a button that deletes it.

import { element } from "/page/elements.js";
import { titleOf } from "/chat/conversations.js";

export function drawList(list, conversations, { current, onRemove }) {
  list.replaceChildren(
    ...conversations.map((conversation) => {
      const title = titleOf(conversation);
      const link = element("a", { href: `#${conversation.id}`, title }, title);
      if (conversation.id === current) link.setAttribute("aria-current", "page");
      const button = element("button", { type: "button", className: "small" }, "Delete");
      button.setAttribute("aria-label", `Delete ${title}`);
      button.addEventListener("click", () => {
        if (confirm(`Delete “${title}”? It cannot be brought back.`)) onRemove(conversation.id);
      });
      return element("li", {}, link, button);
    }),
  );
}
