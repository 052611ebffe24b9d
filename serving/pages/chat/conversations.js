// Keeps conversations in the browser's own storage, an entry for each.
//
// A conversation has turns, a turn a text and its answers: one of each column, see answer.js.

const PREFIX = "raymill.chat.";
const storage = openStorage();

// Returns null where the reader forbids pages to store anything.
function openStorage() {
  try {
    return localStorage;
  } catch {
    return null;
  }
}

export function newConversation(settings) {
  const id = [...crypto.getRandomValues(new Uint32Array(2))].map((part) => part.toString(36)).join("");
  return { id, kind: null, changed: Date.now(), settings, models: [null, null], turns: [] };
}

export function titleOf(conversation) {
  const line = conversation.turns[0]?.text.trim().split("\n")[0];
  if (!line) return "New conversation";
  return line.length > 60 ? `${line.slice(0, 60)}…` : line;
}

// Returns all that are stored, the one that was changed last first.
export function storedConversations() {
  const ids = Object.keys(storage ?? {}).filter((key) => key.startsWith(PREFIX));
  const stored = ids.map((key) => load(key.slice(PREFIX.length))).filter(Boolean);
  return stored.sort((one, other) => other.changed - one.changed);
}

// Returns a conversation, or null. What was not answered to its end was interrupted.
export function load(id) {
  try {
    const conversation = JSON.parse(storage?.getItem(PREFIX + id) ?? null);
    for (const turn of conversation?.turns ?? []) {
      for (const answer of turn.answers) if (answer) answer.ending ??= "interrupted";
    }
    return conversation;
  } catch {
    return null; // written by something else
  }
}

// Raises an error whose message is for the reader if the browser has no room.
export function save(conversation) {
  conversation.changed = Date.now();
  try {
    storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch {
    throw new Error("This browser has no room for the conversation, so it will be gone when the page is closed. Delete earlier ones.");
  }
}

export function remove(id) {
  storage.removeItem(PREFIX + id);
}

export function isStored(id) {
  return (storage?.getItem(PREFIX + id) ?? null) !== null;
}

export function isOfConversation(key) {
  return key === null || key.startsWith(PREFIX);
}
